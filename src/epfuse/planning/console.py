"""A model's plan as tables."""

from __future__ import annotations

from dataclasses import replace
from itertools import groupby

from rich.console import Console

from epfuse.errors import ConfigError
from epfuse.planning.layer_times import NOT_FITTED, Rival, Time, layer_times
from epfuse.planning.model_plan import ModelPlan, plan_model, storages
from epfuse.planning.predict import CONCURRENCIES, chosen_ms, stored_ms
from epfuse.policy.auto import expert_budget
from epfuse.report.terminal import figures, in_parts, print_rows

SHOWN_TOKENS = (1, 16, 64, 256, 1024, 8192)
"""Token counts of the table of one layer's times."""


def show(plan: ModelPlan, rival: Rival | None, console: Console) -> None:
    """Print what is stored, what runs and what does not, bytes, times, and what half the ranks would do.

    Args:
        plan: the plan.
        rival: what vLLM would choose; None if that is not known.
        console: where.
    """
    shape, serving, model = plan.shape, plan.serving, plan.model
    console.print(
        f"{model.name}: H={shape.hidden} I={shape.intermediate} E={shape.experts} K={shape.top_k}"
        f" L={shape.local_experts}, {len(model.moe_layers)} layers with experts, {model.checkpoint.value} checkpoint\n"
        f"P={serving.ep_size} x {serving.product.device_name} ({serving.product.target.value}),"
        f" {_gigabytes(serving.hbm_bytes)} GB each, max_model_len {serving.max_model_len}, policy {plan.policy.value}",
        highlight=False,
    )
    if model.beside:
        widths = ", ".join(f"I={width}" for width in model.beside)
        console.print(
            f"Each of these layers has experts for other tokens too (images), {widths}: their bytes count here, their"
            " calls and times don't.",
            highlight=False,
        )
    ranks = serving.ranks(model)
    if len(ranks) > 1:
        held = ", ".join(f"{count} hold {experts}" for count, experts in ranks)
        console.print(f"E is no multiple of P: {held} experts. L and bytes are those of a rank that holds more.")
    print_rows(console, "Layers", ("layers", "storage", figures("GB a rank"), "why"), _layers(plan))
    if next(plan.ranges(), None) is not None:
        columns = ("layers that keep", figures("T"), "path", "block_m / gate_up / down", figures("why"))
        print_rows(console, "Calls", columns, _calls(plan))
        for number, reason in enumerate(_reasons(plan), 1):
            console.print(f"{number}: {reason}", markup=False, highlight=False)
        console.print()
        print_rows(console, "Tiles", (figures("T"), "from"), _tiles(plan))
    print_rows(console, "Not taken", ("path", "why"), [(path.value, reason) for path, reason in plan.refused()])
    beside = "vLLM" if rival is None else rival.name
    title = "One layer beside vLLM's choice, microseconds: m measured, p predicted"
    print_rows(console, title, (figures("T"), "path", *map(figures, ("epfuse", beside, "floor"))), _times(plan, rival))
    if rival is not None:
        console.print(f"{rival.plugin}\n", markup=False, highlight=False)
    if any(kind.why_portable for kind in plan.kinds()) and serving.product.machine is not None:
        console.print(f"Predicted times are the time model's as it is: {NOT_FITTED}.\n", highlight=False)
    machine = serving.product.machine
    title = "Experts of one rank, and PREDICTED ms of both expert GEMMs in all layers of a decode step"
    print_rows(console, title, ("stored as", figures("GB a rank"), "fits", *map(figures, CONCURRENCIES)), _stored(plan))
    if machine is None:
        console.print(f"No times: nothing is calibrated for {serving.product.device_name}.", highlight=False)
    else:
        console.print(f"Time model of {machine.name}: {machine.source}.", highlight=False)
    console.print(f"\n{fewer_ranks(plan)}", highlight=False)


def _layers(plan: ModelPlan) -> list[tuple[str, ...]]:
    """Groups; more than a few are shortened to one row a kind."""
    rows: dict[tuple[str, str], list[str]] = {}
    sizes: dict[tuple[str, str], int | None] = {}
    for group in plan.groups:
        kind = (group.plan.storage.value, group.plan.reason)
        first, last = group.layers[0], group.layers[-1]
        rows.setdefault(kind, []).append(str(first) if first == last else f"{first}-{last}")
        sizes[kind] = None if group.nbytes is None else (sizes.get(kind) or 0) + group.nbytes
    return [(" ".join(names), kind[0], _gigabytes(sizes[kind]), kind[1]) for kind, names in rows.items()]


def _reasons(plan: ModelPlan) -> list[str]:
    """Why calls run as they do, each once: many rows have the same."""
    return list(dict.fromkeys(entry.decision.reason for _, entry in plan.ranges()))


def _calls(plan: ModelPlan) -> list[tuple[str, ...]]:
    reasons = _reasons(plan)
    return [
        (
            layer.storage.value,
            _tokens(entry.min_tokens, entry.max_tokens),
            entry.decision.path.value,
            in_parts(entry.decision.tile_key or ""),
            str(reasons.index(entry.decision.reason) + 1),
        )
        for layer, entry in plan.ranges()
    ]


def _tiles(plan: ModelPlan) -> list[tuple[str, ...]]:
    """Adjacent ranges with one source are joined."""
    rows: list[tuple[str, ...]] = []
    for source, alike in groupby(plan.ranges(), key=lambda pair: pair[1].decision.tile_source):
        entries = [entry for _, entry in alike]
        rows.append((_tokens(entries[0].min_tokens, entries[-1].max_tokens), source))
    return rows


def _stored(plan: ModelPlan) -> list[tuple[str, ...]]:
    budget = expert_budget(plan.serving.hbm_bytes)
    rows: list[tuple[str, ...]] = []
    for storage in storages(plan.model.checkpoint):
        nbytes = plan.stored_bytes(storage)
        times = [stored_ms(plan, storage, tokens) for tokens in CONCURRENCIES.values()]
        rows.append((storage.value, _gigabytes(nbytes), _fits(nbytes, budget), *map(_milliseconds, times)))
    chosen = plan.chosen_bytes
    if chosen is not None:
        times = [chosen_ms(plan, tokens) for tokens in CONCURRENCIES.values()]
        rows.append(("this plan", _gigabytes(chosen), _fits(chosen, budget), *map(_milliseconds, times)))
    return rows


def _times(plan: ModelPlan, rival: Rival | None) -> list[tuple[str, ...]]:
    return [
        (str(time.tokens), time.path or "", _marked(time.ours), _marked(time.theirs), _microseconds(time.floor))
        for time in layer_times(plan, rival)
        if time.tokens in SHOWN_TOKENS
    ]


def _marked(time: Time | None) -> str:
    return "" if time is None else f"{time.microseconds:.1f} {time.kind[0]}"


def _microseconds(time: float | None) -> str:
    return "" if time is None else f"{time:.1f}"


def fewer_ranks(plan: ModelPlan) -> str:
    """What would change with half the ranks."""
    ranks = plan.serving.ep_size
    if ranks % 2:
        return "Half the ranks: there is no half of them."
    half = replace(plan.serving, ep_size=ranks // 2)
    budget = expert_budget(plan.serving.hbm_bytes)
    sizes = [(storage, half.bytes_of(plan.model, storage)) for storage in storages(plan.model.checkpoint)]
    stored = ", ".join(f"{s.value} {_gigabytes(b)} GB ({_fits(b, budget)})" for s, b in sizes)
    try:
        other = plan_model(plan.model, half, plan.policy)
    except ConfigError as error:
        return f"{half.ep_size} ranks instead of {ranks}: {stored}. The plan would be refused: {error}"
    kept = ", ".join(dict.fromkeys(kind.storage.value for kind in other.kinds()))
    reason = other.kinds()[0].reason
    return f"{half.ep_size} ranks instead of {ranks}: {stored}. The plan would be: {kept}. {reason}"


def _fits(nbytes: int, budget: int) -> str:
    return "fits" if nbytes <= budget else "does not fit"


def _tokens(first: int, last: int | None) -> str:
    return f"{first}.." if last is None else f"{first}..{last}"


def _gigabytes(nbytes: int | None) -> str:
    return "" if nbytes is None else f"{nbytes / 1e9:.1f}"


def _milliseconds(time: float | None) -> str:
    return "" if time is None else f"{time:.2f}"
