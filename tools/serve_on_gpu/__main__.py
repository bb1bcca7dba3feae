"""``python3 -m tools.serve_on_gpu``."""

from __future__ import annotations

import functools
import json
import re
import shlex
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import click
from tools.serve_on_gpu.arms import ServerArm, Workplace
from tools.serve_on_gpu.models import MODELS
from tools.serve_on_gpu.parts import Folder, TimeBudget
from tools.serve_on_gpu.records import FORMAT, merge
from tools.serve_on_gpu.room import check_alone, check_room
from tools.serve_on_gpu.servers import bench_for, parse_loads, parse_servers
from tools.serve_on_gpu.tables import agreement, rows_of, table

from epfuse.bench import machine
from epfuse.cli.exits import PlainCommand
from epfuse.errors import ConfigError
from epfuse.report.write import write_atomic
from epfuse.serving.node import Gpus, answer

Function = TypeVar("Function", bound=Callable[..., Any])
ORDER = "none:cold,epfuse:cold,epfuse,none,none,epfuse,epfuse,none"
SIDE_BY_SIDE = ("--gpu-memory-utilization", "0.1", "--kv-cache-memory-bytes")
"""vLLM then measures no memory, which another server's would disturb; how much its cache has follows."""
FROM_DISK = ("--attention-backend", "TRITON_ATTN", "--block-size", "128", "--max-model-len", "4096",
             "--no-enable-prefix-caching", *SIDE_BY_SIDE, "4G")  # fmt: skip
CACHE = click.option("--cache", default="12G", show_default=True, help="Of keys and values, in each server and GPU.")
NEW_POINTS, WARM_POINTS = "128/256@64,256", "128/256@1,16,64,256"


def of_a_part(function: Function) -> Function:
    """Options that all parts have."""
    for option in (
        click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="For the records."),
        click.option("--seconds", type=click.FloatRange(min=1), default=560.0, show_default=True, help="Of this part."),
        click.option("--label", default="a", show_default=True, help="Of this run's records; another one runs anew."),
        click.option("--work", type=click.Path(file_okay=False, path_type=Path), help="For models, caches and logs."),
        click.option("--tensor-parallel", type=click.IntRange(min=1), default=1, show_default=True,
                     help="GPUs."),
        click.option("--expert-parallel/--no-expert-parallel", default=True, show_default=True,
                     help="Whether a GPU of several has whole experts, or a part of each."),
        click.option("--serve-arguments", default="", help="More arguments of vllm serve, in one word."),
        click.option("--more-plugins", default="", help="More plugins of vLLM, with commas."),
        click.option("--set", "variables", multiple=True, metavar="NAME=VALUE", help="In the servers' environment."),
    ):  # fmt: skip
        function = option(function)
    return function


def of_a_model(function: Function) -> Function:
    """The option ``--model``."""
    words = f"One of {', '.join(MODELS)}, or the folder of a checkpoint."
    return click.option("--model", default="minimax-m3", show_default=True, help=words)(function)


class Place:
    """What the common options say."""

    def __init__(self, model: str, options: dict[str, Any]) -> None:
        if model not in MODELS and not (Path(model) / "config.json").is_file():
            raise ConfigError(
                f"--model is {model!r}; it must be one of {', '.join(MODELS)} or have a config.json in it"
            )
        arguments = tuple(shlex.split(options["serve_arguments"]))
        if (ranks := options["tensor_parallel"]) > 1:
            arguments += ("--tensor-parallel-size", str(ranks))
            arguments += ("--enable-expert-parallel",) if options["expert_parallel"] else ()
        path = options["work"] or Path(tempfile.gettempdir()) / "serve-on-gpu"
        plugins = tuple(filter(None, options["more_plugins"].split(",")))
        for variable in options["variables"]:
            if not re.fullmatch(r"\w+=.*", variable):
                raise ConfigError(f"--set is {variable!r}; it must be NAME=VALUE")
        self.work = Workplace(path.absolute(), model, arguments, plugins, options["variables"])
        self.folder = Folder(options["out"], options["label"])
        self.budget = TimeBudget(options["seconds"])
        self.logs = self.work.path / "logs"
        self.logs.mkdir(parents=True, exist_ok=True)
        self.work.prepare()

    def beside(self, cache: str) -> Workplace:
        """Where servers run side by side, each with that much memory for keys and values on each GPU.

        Raises:
            ConfigError: two of them don't fit on a GPU.
        """
        work = replace(self.work, arguments=(*SIDE_BY_SIDE, cache, *self.work.arguments))
        check_room(work)
        return work


def machine_facts() -> dict[str, Any]:
    """GPU, driver, versions and commit, without a context on the GPU."""
    query = ("nvidia-smi", "--query-gpu=name,driver_version,clocks.sm,clocks.mem,power.limit", "--format=csv,noheader")
    return {
        "gpus": answer(query, {"PATH": "/usr/local/bin:/usr/bin:/bin"}).splitlines()
        if not Gpus("nvidia").absent
        else [],
        "versions": machine.versions(),
        "commit": machine.commit(),
        "command": shlex.join(["python3", "-m", "tools.serve_on_gpu", *sys.argv[1:]]),
    }


class Group(PlainCommand, click.Group):
    """A group that ends as its commands do."""


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]}, help=__doc__)
def main() -> None:
    """Run a part, or put records together."""


@main.command(
    "serve", cls=PlainCommand, epilog="Example: python3 -m tools.serve_on_gpu serve --out records --servers none,epfuse"
)
@of_a_model
@click.option("--servers", default=ORDER, show_default=True, help="One after the other; :cold empties caches before.")
@click.option("--new", "new_points", default=NEW_POINTS, show_default=True, help="Points of a new server: IN/OUT@C,C.")
@click.option("--warm", "warm_points", default=WARM_POINTS, show_default=True, help="Points of a warm one.")
@click.option("--waves", type=click.IntRange(min=1), default=3, show_default=True, help="Requests over concurrency.")
@of_a_part
def serve(model: str, servers: str, new_points: str, warm_points: str, waves: int, **options: Any) -> None:
    """New servers in turn: ready, first requests, p99 TTFT of new ones, TPOT of warm ones, kernels compiled late.

    Exit code 1: a server failed; 75: there was no time for all of them, and another call does the rest.
    """
    from tools.serve_on_gpu import servers as part

    wanted = parse_servers(servers)
    loads = [*parse_loads(new_points, True, waves), *parse_loads(warm_points, False, waves)]
    place = Place(model, options)
    part.check_lengths(loads, place.work.engine_arguments)
    check_alone(place.work)
    with bench_for(place.work, place.logs) as bench:
        outcome = part.run(place.work, place.folder, wanted, loads, bench, place.budget, machine_facts())
    outcome.finish()


@main.command(
    "alternate", cls=PlainCommand, epilog="Example: python3 -m tools.serve_on_gpu alternate --out records --rounds 3"
)
@of_a_model
@click.option("--points", default=WARM_POINTS, show_default=True, help="IN/OUT@C,C.")
@click.option("--rounds", type=click.IntRange(min=1), default=2, show_default=True, help="Of each point, in turn.")
@click.option("--waves", type=click.IntRange(min=1), default=3, show_default=True, help="Requests over concurrency.")
@CACHE
@of_a_part
def alternate(model: str, points: str, rounds: int, waves: int, cache: str, **options: Any) -> None:
    """A server without epfuse and one with it, side by side on the same GPUs; each point is measured in turn.

    Exit code 1: a server failed; 75: there was no time for all of it.
    """
    from tools.serve_on_gpu import alternate as part
    from tools.serve_on_gpu import servers

    loads, place = parse_loads(points, False, waves), Place(model, options)
    work = place.beside(cache)
    servers.check_lengths(loads, work.engine_arguments)
    with bench_for(work, place.logs) as bench:
        part.run(work, loads, rounds, bench, place.folder, place.budget, machine_facts()).finish()


@main.command(
    "offline", cls=PlainCommand, epilog="Example: python3 -m tools.serve_on_gpu offline --out records --seconds 500"
)
@of_a_model
@click.option("--runs", default="epfuse:cold,none:cold,none,epfuse,epfuse,none", show_default=True, help="In turn.")
@click.option(
    "--sizes",
    type=(int, int, int),
    default=(512, 1024, 128),
    show_default=True,
    help="Prompts, input and output tokens.",
)
@of_a_part
def offline(model: str, runs: str, sizes: tuple[int, int, int], **options: Any) -> None:
    """Runs of ``vllm bench throughput`` in turn: tokens/s of first and later ones.

    Exit code 1: a run failed; 75: there was no time for all of them, and another call does the rest.
    """
    from tools.serve_on_gpu import offline as part

    wanted = parse_servers(runs)
    place = Place(model, options)
    check_alone(place.work)
    part.run(place.work, place.folder, wanted, sizes, place.budget, machine_facts()).finish()


def checkpoint_places(place: Place, kind: str, forms: tuple[str, ...]) -> tuple[dict[str, Workplace], Any]:
    """Where the servers of a checkpoint in each of these formats run, and its model in transformers."""
    from tools.serve_on_gpu import checkpoint

    wanted = {"reading": checkpoint.READING, "reciting": checkpoint.RECITING}[kind]
    at = place.work.path / kind
    model = checkpoint.write(at, wanted, forms)
    change = {
        "arguments": (*FROM_DISK, *place.work.arguments),
        "more_plugins": place.work.more_plugins or MODELS["minimax-m3"].plugins,
    }
    return {form: replace(place.work, model=str(at / form), **change) for form in forms}, model


@main.command("logprobs", cls=PlainCommand, epilog="Example: python3 -m tools.serve_on_gpu logprobs --out records")
@click.option(
    "--format", "formats", multiple=True, type=click.Choice(["mxfp8", "bf16"]), help="Of the weights; both without it."
)
@of_a_part
def logprobs(formats: tuple[str, ...], **options: Any) -> None:
    """Log probabilities of a seeded checkpoint, MXFP8 and BF16, with epfuse and without, against float32.

    Exit code 1: epfuse's error is larger than vLLM's own, or a server failed; 75: there was no time for both.
    """
    from tools.serve_on_gpu import answers, checkpoint

    place = Place("minimax-m3", options)
    places, model = checkpoint_places(place, "reading", formats or checkpoint.FORMS)
    reference = functools.partial(checkpoint.read, model, answers.TEXTS)
    answers.logprobs(places, reference, place.folder, place.budget, machine_facts()).finish()


@main.command("recite", cls=PlainCommand, epilog="Example: python3 -m tools.serve_on_gpu recite --out records")
@of_a_part
def recite(**options: Any) -> None:
    """Sentences that a checkpoint knows by heart, through epfuse's experts.

    Exit code 1: another text came, or the server failed; 75: there was no time.
    """
    from tests.integrations.vllm_e2e.checkpoint import PROMPT, SENTENCES
    from tools.serve_on_gpu import answers

    place = Place("minimax-m3", options)
    places, _ = checkpoint_places(place, "reciting", ("mxfp8",))
    sentences = {sentence[:PROMPT]: sentence[PROMPT:] for sentence in SENTENCES}
    answers.recite(places["mxfp8"], sentences, place.folder, place.budget, machine_facts()).finish()


@main.command("endure", cls=PlainCommand, epilog="Example: python3 -m tools.serve_on_gpu endure --out records")
@of_a_model
@click.option("--requests", type=click.IntRange(min=10), default=10_000, show_default=True, help="At the most.")
@click.option(
    "--arm", type=click.Choice(list(ServerArm)), default=ServerArm.EPFUSE, show_default=True, help="To compare: none."
)
@of_a_part
def endure(model: str, requests: int, arm: str, **options: Any) -> None:
    """Requests of mixed lengths, some broken off, some preempted; same answers and memory afterwards.

    Exit code 1: one of these is not so; 75: there was no time.
    """
    from tools.serve_on_gpu import endure as part

    place = Place(model, options)
    check_alone(place.work)
    part.run(place.work, requests, place.folder, place.budget, machine_facts(), ServerArm(arm)).finish()


@main.command("sleep", cls=PlainCommand, epilog="Example: python3 -m tools.serve_on_gpu sleep --out records")
@of_a_part
def sleep(**options: Any) -> None:
    """Sleep mode, and weights loaded in place: right answers or an error afterwards.

    Exit code 1: other answers came, or sleep level 1 failed; 75: there was no time for all of it.
    """
    from tools.serve_on_gpu import sleep as part

    place = Place("minimax-m3", options)
    places, _ = checkpoint_places(place, "reading", ("mxfp8",))
    part.run(places["mxfp8"], place.folder, place.budget, machine_facts()).finish()


@main.command(
    "trace", cls=PlainCommand, epilog="Example: python3 -m tools.serve_on_gpu trace --out records --concurrency 64"
)
@of_a_model
@click.option("--concurrency", type=click.IntRange(1, 512), default=16, show_default=True, help="Requests in flight.")
@CACHE
@of_a_part
def trace(model: str, concurrency: int, cache: str, **options: Any) -> None:
    """A few decode steps of a server without epfuse and of one beside it with epfuse, recorded by vLLM's profiler.

    Exit code 1: a server failed, or left no trace; 75: there was no time.
    """
    from tools.serve_on_gpu import trace as part

    place = Place(model, options)
    part.run(place.beside(cache), part.Wanted(concurrency), place.folder, place.budget, machine_facts()).finish()


@main.command(
    "merge", cls=PlainCommand, epilog="Example: python3 -m tools.serve_on_gpu merge records --json record.json"
)
@click.argument("paths", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="All of it in one record.")
def merge_records(paths: tuple[Path, ...], json_file: Path | None) -> None:
    """Records of PATHS, files or folders, as one and as tables.

    Exit code 1: an aim that could be judged is not reached, or a check failed.
    """
    records = merge(paths)
    rows = rows_of(records)
    content = {"format": FORMAT, "records": records, "rows": [row.to_json() for row in rows]}
    if json_file is not None:
        write_atomic(json_file, json.dumps(content, indent=1, allow_nan=False) + "\n")
    click.echo(table(rows))
    for line in agreement(records):
        click.echo(line)
    failed = [record for record in records if record.get("passed") is False or "error" in record]
    for record in records:
        if "passed" in record or "error" in record:
            words = record.get("error") or record.get("reason", "")
            how = "error" if "error" in record else ("passed" if record["passed"] else "FAILED")
            click.echo(f"{record['part']} {record['number']} {record['arm']}: {how}: {words}")
    sys.exit(1 if failed or any(row.reached is False for row in rows) else 0)


if __name__ == "__main__":
    main()
