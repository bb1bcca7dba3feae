"""``epfuse checkpoint inspect``."""

from __future__ import annotations

import json
import resource
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.table import Table
from rich.text import Text

from epfuse.cli.delivery import STDOUT, Delivery
from epfuse.cli.names import SIZE
from epfuse.errors import ConfigError
from epfuse.report.late_bar import LateBar
from epfuse.report.terminal import Console, make_table, stdout

if TYPE_CHECKING:
    from epfuse.planning.folder import FolderRecord
    from epfuse.weights.checkpoint import ExpertCheckpoint

EPILOG = """\b
Examples:
  epfuse checkpoint inspect MiniMax-M3-MXFP8
  epfuse checkpoint inspect Qwen3-30B-A3B --ep-size 4 --load 3
  epfuse checkpoint inspect gpt-oss-20b --json | jq '.ranks[0].bytes'

\b
Exit status: 0 the folder is one that epfuse loads; 2 it is not, and one line says why; 130 interrupted.
"""


@click.command(epilog=EPILOG)
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path), metavar="FOLDER")
@click.option("--ep-size", type=SIZE, default=8, show_default=True, help="Ranks that share experts.")
@click.option("--max-model-len", type=SIZE, default=8192, show_default=True, help="The longest sequence, tokens.")
@click.option(
    "--load", "rank", type=click.IntRange(min=0), help="Also read this rank's share, and say how long it took."
)
@click.option(
    "--group",
    type=click.IntRange(min=0),
    help="Which experts, where a layer has a group for each kind of tokens: 0 text, 1 images.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the record as JSON.")
def inspect(folder: Path, ep_size: int, max_model_len: int, rank: int | None, group: int | None, as_json: bool) -> None:
    """Say what the experts in the Hugging Face folder FOLDER are, what each rank would read, and what would run it.

    config.json, the index and the headers of all files are checked against each other. Of the weights themselves only
    --load reads any.
    """
    from epfuse.planning.folder import describe
    from epfuse.weights.checkpoint import ExpertCheckpoint

    delivery = Delivery()
    if rank is not None and rank >= ep_size:
        raise ConfigError(f"--load is {rank}; it must be in 0..{ep_size - 1}, below --ep-size")
    checkpoint = ExpertCheckpoint(folder, group)
    record = describe(checkpoint, ep_size, max_model_len)
    loaded = None if rank is None else _load(checkpoint, ep_size, rank)
    with delivery.of(STDOUT):
        if as_json:
            click.echo(json.dumps({**record.model_dump(mode="json"), "loaded": loaded}, indent=2))
        else:
            _show(record, loaded, stdout(200))
    delivery.exit(passed=True)


def _load(checkpoint: ExpertCheckpoint, ep_size: int, rank: int) -> dict[str, Any]:
    """Read a rank's share into the CPU's memory, a layer at a time; each layer is dropped when the next is read."""
    from epfuse.expert_map import ExpertMap

    expert_map = ExpertMap.contiguous(checkpoint.model.experts, ep_size, rank)
    total = checkpoint.bytes_of(expert_map)
    begin = time.perf_counter()
    with LateBar(f"rank {rank}", total, in_bytes=True) as bar:
        for _ in checkpoint.load(expert_map, on_bytes=bar.advance):
            pass
    return {
        "rank": rank,
        "bytes": total,
        "seconds": time.perf_counter() - begin,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def _show(record: FolderRecord, loaded: dict[str, Any] | None, console: Console) -> None:
    facts = {
        "model": f"{record.model}, {len(record.layers)} layers with E={record.experts}, K={record.top_k}, "
        f"H={record.hidden}, I={record.intermediate}",
        "activation": record.activation + (", biases" if record.has_bias else ""),
        "format": f"{record.format}: " + ", ".join(f"{part} {kind}" for part, kind in record.dtypes.items()),
        "layout": f"{record.naming} of {record.module}, {record.order}",
        "experts": f"{_size(record.bytes)} in the files",
    }
    grid = Table.grid(padding=(0, 2, 0, 0))
    for name, value in facts.items():
        grid.add_row(name, Text(value))
    console.print(grid)
    ranks = make_table("rank", "experts a layer", "read")
    for entry in record.ranks:
        name = str(entry.first) if entry.first == entry.last else f"{entry.first}-{entry.last}"
        ranks.add_row(name, str(entry.experts), _size(entry.bytes))
    console.print(ranks)
    targets = make_table("GPU", "keeps", "paths", "why")
    for target in record.targets:
        targets.add_row(target.target, target.storage, ", ".join(target.paths), Text(target.reason))
    console.print(targets)
    if loaded is not None:
        console.print(
            f"rank {loaded['rank']}: {_size(loaded['bytes'])} read in {loaded['seconds']:.2f} s;"
            f" the process took {_size(loaded['peak_bytes'])} at its peak"
        )


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 10**9 else f"{nbytes / 1e6:.2f} MB"
