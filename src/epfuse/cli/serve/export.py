"""``epfuse serve export``."""

from __future__ import annotations

import json
from pathlib import Path

import click

from epfuse.cli.delivery import STDOUT, Delivery
from epfuse.cli.serve.reading import read_run
from epfuse.errors import ConfigError
from epfuse.report.write import write_atomic

EPILOG = """\b
Examples:
  epfuse serve export runs/first --inferencex out      # out/agg_NAME.json, a file for each point and arm
  epfuse serve export runs/first --csv first.csv
  epfuse serve export runs/first --json | jq '.[].tput_per_gpu'

\b
Exit status: 0 good, 1 no point has a speed, or a result can't be read; 2 no run, or a file that could not be written;
130 interrupted.
"""


@click.command(epilog=EPILOG)
@click.argument("folder", metavar="RUN", type=click.Path(path_type=Path))
@click.option(
    "--inferencex",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Write InferenceX' aggregates, one file for each point and arm; the folder is made.",
)
@click.option(
    "--csv", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", help="Write a row for each leg."
)
@click.option("--json", "as_json", is_flag=True, help="Print the aggregates as one JSON object, by file name.")
def export(folder: Path, inferencex: Path | None, csv: Path | None, as_json: bool) -> None:
    """Write a run's results for other tools. Points that failed, or whose answers were wrong, have no aggregate."""
    from epfuse.serving.export import aggregates, table

    if inferencex is None and csv is None and not as_json:
        raise click.UsageError("nothing to write: give --inferencex, --csv or --json")
    delivery = Delivery({"--csv": csv}, {"--inferencex": inferencex})
    record = read_run(folder)
    found = aggregates(record)
    if inferencex is not None:
        with delivery.of("--inferencex"):
            try:
                inferencex.mkdir(parents=True, exist_ok=True)
            except FileExistsError as error:
                raise ConfigError(f"--inferencex is {str(inferencex)!r}, which is no folder") from error
            for name, content in found.items():
                write_atomic(inferencex / name, json.dumps(content, indent=2, allow_nan=False) + "\n")
            click.echo(f"written: {len(found)} files in {inferencex}", err=True)
    if csv is not None:
        with delivery.of("--csv"):
            write_atomic(csv, table(record))
            click.echo(f"written: {csv}", err=True)
    with delivery.of(STDOUT):
        if as_json:
            click.echo(json.dumps(found, indent=2, allow_nan=False))
    faults = [f"{p.name}, leg {leg.leg.number}: {leg.fault}" for p in record.points for leg in p.legs if leg.fault]
    for fault in [*record.faults, *faults]:
        click.echo(f"epfuse: {fault}", err=True)
    delivery.exit(passed=bool(found) and not faults)
