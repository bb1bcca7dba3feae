"""From rows of the matrix to jobs: names, commands, environment, and the order of the arms."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from epfuse import __version__
from epfuse.errors import ConfigError, first_fault
from epfuse.serving.entries import Entry
from epfuse.serving.matrix import MatrixRow
from epfuse.serving.point import AccuracyGate, Arm, Client, Command, Compare, Point, PointJob, PutIn, Run
from epfuse.serving.prompts import PROMPTS
from epfuse.serving.recipe import ArmSettings, LoadedRecipe, Recipe, environment_of, joined

LONGEST_NAME = 80


def point_names(rows: Sequence[MatrixRow]) -> list[str]:
    """A name for each row that no other row has: model, lengths, concurrency and ranks; key and node where needed."""
    short = [_point_name(row.name, row) for row in rows]
    long = [_point_name(f"{row.key.lower()}_{row.node.lower()}_{row.isl}_{row.osl}", row) for row in rows]
    count = Counter(short)
    names = [brief if count[brief] == 1 else full for brief, full in zip(short, long, strict=True)]
    twice = [name for name, times in Counter(names).items() if times > 1]
    if twice:
        raise ConfigError(f"two rows of the matrix are the same point, {twice[0]}; remove one")
    longest = max(names, key=len, default="")
    if len(longest) > LONGEST_NAME:
        raise ConfigError(f"point {longest} has a name of more than {LONGEST_NAME} characters; shorten its key")
    return names


def _point_name(what: str, row: MatrixRow) -> str:
    what = re.sub(r"[^a-z0-9._-]+", "-", what).lstrip("._-")  # a node's name may have anything in it
    ranks = f"tp{row.tp}" + (f"-ep{row.ep}" if row.ep != 1 else "") + ("-dp" if row.dp_attn else "")
    draft = "" if row.spec_decoding == "none" else f"-{row.spec_decoding}"
    return f"{what}-c{row.conc}-{ranks}{draft}"


@contextmanager
def _of(row: MatrixRow) -> Iterator[None]:
    """What is too large or no name only when it is put together is the row's fault."""
    try:
        yield
    except ValidationError as error:
        where, fault = first_fault(error, "its point")
        raise ConfigError(f"key {row.key!r}, {row.isl}/{row.osl} c{row.conc}: {where}: {fault}") from None


def points(recipe: Recipe, rows: Sequence[MatrixRow]) -> list[Point]:
    """The points of rows.

    Raises:
        ConfigError: a row needs several nodes, speculation or an ep that vLLM has not, or two rows are the same.
    """
    found = []
    for row in rows:
        if not isinstance(row.entry, Entry) or not isinstance(row.conc, int) or row.tp is None or row.ep is None:
            raise ConfigError(f"key {row.key!r} needs several nodes; a run takes one node a point (--single-node)")
        if row.spec_decoding != "none":
            raise ConfigError(f"key {row.key!r} has spec-decoding {row.spec_decoding!r}; a run takes 'none'")
        if row.ep not in (1, row.tp) and recipe.server.command is None:
            raise ConfigError(f"key {row.key!r} has ep {row.ep} and tp {row.tp}; vllm serve's ep is 1 or tp")
    for row, name in zip(rows, point_names(rows), strict=True):
        assert isinstance(row.conc, int)
        assert row.tp is not None
        assert row.ep is not None
        with _of(row):
            found.append(
                Point(
                    name=name,
                    model=recipe.model or row.entry.model,
                    prefix=row.entry.model_prefix,
                    target=row.entry.runner,
                    precision=row.entry.precision,
                    framework=row.entry.framework,
                    isl=row.isl,
                    osl=row.osl,
                    concurrency=row.conc,
                    tp=row.tp,
                    ep=row.ep,
                    dp_attention=bool(row.dp_attn),
                    is_eval=row.is_eval,
                    eval_only=row.eval_only,
                )
            )
    return found


def vllm_serve(point: Point, arguments: Sequence[str]) -> tuple[str, ...]:
    """The command of InferenceX' recipe.

    Args:
        point: with attention that is not sliced over the ranks, ``tp`` copies of it share the experts.
        arguments: that the recipe adds.
    """
    ranks = (
        ("--tensor-parallel-size", "1", "--data-parallel-size", str(point.tp), "--enable-expert-parallel")
        if point.dp_attention
        else ("--tensor-parallel-size", str(point.tp), *(("--enable-expert-parallel",) if point.ep > 1 else ()))
    )
    length = ("--max-model-len", str(point.max_model_len))
    return ("vllm", "serve", point.model, "--port", "{port}", *ranks, *length, *arguments)


def point_environment(point: Point, client: Client) -> dict[str, str]:
    """A point in the variables that InferenceX' scripts read; servers of another command get them."""
    return {
        "MODEL": point.model,
        "TP": str(point.tp),
        "EP_SIZE": str(point.ep),
        "DP_ATTENTION": str(point.dp_attention).lower(),
        "CONC": str(point.concurrency),
        "ISL": str(point.isl),
        "OSL": str(point.osl),
        "MAX_MODEL_LEN": str(point.max_model_len),
        "RANDOM_RANGE_RATIO": f"{client.shortest_share:g}",
        "RESULT_FILENAME": point.name,
    }


def _client(recipe: Recipe, point: Point) -> Client:
    settings = recipe.client
    return Client(
        tool=settings.tool,
        command=settings.command,
        prompts=max(settings.least_prompts, settings.prompts_per_concurrency * point.concurrency),
        concurrency=point.concurrency,
        warmups=settings.warmups_per_concurrency * point.concurrency,
        isl=point.isl,
        osl=point.osl,
        shortest_share=settings.shortest_share,
        seed=settings.seed,
        most_failed=settings.most_failed,
    )


def _server(recipe: Recipe, arm: ArmSettings, point: Point, client: Client) -> Command:
    command = arm.command or recipe.server.command
    if command is None:
        plugins = [*recipe.server.plugins, *(["epfuse"] if arm.epfuse is PutIn.PLUGIN else [])]
        own = {"VLLM_PLUGINS": ",".join(plugins)}  # empty: none, whatever the environment has installed
        argv = vllm_serve(point, (*recipe.server.arguments, *arm.arguments))
    else:
        own = point_environment(point, client)
        values = {name: str(getattr(point, name)) for name in ("model", "tp", "ep", "concurrency", "max_model_len")}
        argv = (*command, *recipe.server.arguments, *arm.arguments)
        for name, value in values.items():
            argv = tuple(word.replace("{" + name + "}", value) for word in argv)
    return Command(argv=argv, env=joined(own, recipe.server.env, arm.env))


def _arm(recipe: Recipe, arm: ArmSettings, point: Point, client: Client, image: str) -> Arm:
    return Arm(
        name=arm.name,
        server=_server(recipe, arm, point, client),
        environment=environment_of(recipe, arm, image),
        epfuse=arm.epfuse,
        epfuse_source=arm.epfuse_source,
    )


def abba(baseline: str, candidate: str, pairs: int) -> tuple[str, ...]:
    """Pairs of two arms, every second one turned round: what drifts over time does not favour one of them."""
    turned = (candidate, baseline)
    return tuple(name for pair in range(pairs) for name in (turned if pair % 2 else turned[::-1]))


def jobs(
    recipe: Recipe,
    rows: Sequence[MatrixRow],
    run: str,
    *,
    arms: Sequence[str] = (),
    pairs: int = 0,
    profile: bool = False,
) -> list[PointJob]:
    """The jobs of rows.

    Args:
        recipe: what they run.
        rows: of its matrix.
        run: the run's name.
        arms: each runs once, the recipe's first one first, for the gate compares the others with it; none: that one
            alone. Without meaning where ``pairs`` is given.
        pairs: baseline and candidate are compared, each so often; 0: no comparison.
        profile: a trace of each server.

    Raises:
        ConfigError: there is no row, an arm is unknown, or `points` refuses a row.
    """
    if not rows:
        raise ConfigError("the selection leaves no point of the matrix")
    known = {arm.name: arm for arm in recipe.arms}
    if pairs and len(known) < 2:
        raise ConfigError(f"recipe {recipe.name} has one arm; a comparison needs two")
    order = abba(recipe.compare.baseline, recipe.compare.candidate, pairs) if pairs else tuple(arms)
    order = order or (recipe.arms[0].name,)
    unknown = [name for name in order if name not in known]
    if unknown:
        raise ConfigError(f"arm is {unknown[0]!r}; the recipe has {', '.join(known)}")
    used = sorted(set(order), key=list(known).index)
    if order[0] != used[0] or (not pairs and used[0] != recipe.arms[0].name):
        raise ConfigError(
            f"arm {order[0]!r} has nothing that its answers can be compared with; the baseline comes first:"
            f" --arm {','.join(dict.fromkeys((recipe.arms[0].name, *order)))}"
        )
    found = []
    for row, point in zip(rows, points(recipe, rows), strict=True):
        with _of(row):
            client = _client(recipe, point)
            found.append(
                PointJob(
                    run=run,
                    label=recipe.label,
                    point=point,
                    node=row.node if row.node != row.entry.runner else None,
                    arms=tuple(_arm(recipe, known[name], point, client, row.entry.image) for name in used),
                    order=order,
                    client=client,
                    gate=recipe.gate if recipe.gate.prompts else _with_prompts(recipe.gate),
                    deadlines=recipe.deadlines,
                    polls=recipe.polls,
                    host=recipe.host,
                    port=recipe.port,
                    gpus=0 if recipe.gpu_vendor == "none" else point.tp,
                    gpu_vendor=recipe.gpu_vendor,
                    fatal=recipe.fatal,
                    needs=(*recipe.needs, *((recipe.model,) if recipe.model else ())),
                    profile=profile,
                )
            )
    return found


def _with_prompts(gate: AccuracyGate) -> AccuracyGate:
    return gate.model_copy(update={"prompts": PROMPTS})


def resolve(
    loaded: LoadedRecipe,
    found: Sequence[PointJob],
    *,
    launcher: Literal["local", "slurm", "ssh"] = "local",
    hosts: Iterable[str] = (),
    canary: bool = True,
) -> Run:
    """The run of these jobs, as ``run.json`` has it.

    Args:
        loaded: the recipe that they come from.
        found: its jobs; all are of one run.
        launcher: what starts them.
        hosts: of the ssh launcher.
        canary: the cheapest point must end well before the others start.
    """
    cheapest = min(found, key=lambda job: (job.client.prompts * (job.point.isl + job.point.osl), job.point.name))
    compared = len(found[0].order) > 1 and len(found[0].arms) > 1
    compare: Compare | None = loaded.recipe.compare if compared else None
    return Run(
        name=found[0].run,
        label=loaded.recipe.label,
        recipe=Path(loaded.source).name,  # a page is read elsewhere
        recipe_sha256=loaded.sha256,
        epfuse=__version__,
        created=time.time(),
        points=tuple(job.point.name for job in found),
        canary=cheapest.point.name if canary and len(found) > 1 else None,
        compare=compare,
        launcher=launcher,
        slurm=loaded.recipe.slurm,
        hosts=tuple(hosts),
    )
