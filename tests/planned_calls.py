"""Calls on a Hopper GPU that launches nothing, with plans and without (`test_launch_plan.py`). Not for interpreters."""

from __future__ import annotations

import enum
import gc
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from tools.host_time.stub import StubGPU, StubLaunch, stub_gpu
from tools.host_time.worker import python_calls as entered_by

from epfuse import launch_plan
from epfuse.api import fused_experts
from epfuse.config import Bias, Combine, LayerShape, SwiGLUOAI
from epfuse.expert_map import ExpertMap
from epfuse.families.family import CallKind
from epfuse.families.registry import READABLE, readable_formats, scratch_size
from epfuse.scratch import Scratch
from epfuse.target import Target
from epfuse.weights.experts import ExpertWeights

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 256, 128, 8, 3
ANY_SHAPE = LayerShape(HIDDEN, INTERMEDIATE, EXPERTS, EXPERTS, TOP_K)

LAYERS = {
    f"{path.value} {form.value} {bias.value} {combine.value}": (path, form, bias, combine)
    for path, forms in READABLE[Target.SM90].items()
    for form in forms
    for bias in Bias
    for combine in Combine
    if form in readable_formats(CallKind(path, Target.SM90, ANY_SHAPE, combine=combine, bias=bias))
}
"""Every layer that Hopper has kernels for: what is kept in which format, with biases or not, summed how."""


class Memory(enum.Enum):
    """What of a call's memory the caller brings."""

    NONE = "none"
    OUT = "out"
    SCRATCH = "scratch"
    OUT_IN_Y = "out in y"
    OUT_FURTHER_IN_Y = "out further in y"
    OUT_AT_THE_END_OF_Y = "out at the end of y"


@dataclass(frozen=True)
class Drawn:
    """One call.

    Attributes:
        layer: name in `LAYERS`.
        tokens: T.
        ids: dtype of the ids.
        memory: what the caller brings.
        local: L.
        numbers: the activation's limit.
        fresh: whether the weights are made anew, perhaps at the address of others that are freed.
        odd: what begins at no multiple of 16 bytes: hidden, the weights' last tensor, or nothing.
    """

    layer: str
    tokens: int
    ids: str = "int32"
    memory: Memory = Memory.NONE
    local: int = 4
    numbers: float = 7.0
    fresh: bool = False
    odd: str = ""


class Layers:
    """Weights by name and L, kept until they are wanted anew."""

    def __init__(self) -> None:
        self.made: dict[tuple[str, int, bool], ExpertWeights] = {}

    def weights(self, call: Drawn) -> ExpertWeights:
        where = call.layer, call.local, call.odd == "weights"
        if call.fresh:
            self.made.pop(where, None)
        if where not in self.made:
            _, form, bias, _ = LAYERS[call.layer]
            shape = LayerShape(HIDDEN, INTERMEDIATE, EXPERTS, call.local, TOP_K)
            without = ExpertWeights.without_data(form, shape, bias=bias)
            biases = {name: torch.empty(tensor.shape) for name, tensor in without.biases}
            formats = []
            for experts in without.formats:
                tensors = [torch.empty(tensor.shape, dtype=tensor.dtype) for _, tensor in experts.tensors()]
                if call.odd == "weights":
                    last = tensors[-1]
                    tensors[-1] = torch.empty(last.numel() + 1, dtype=last.dtype)[1:].view(last.shape)
                formats.append(type(experts).rebuilt(tensors, HIDDEN, INTERMEDIATE))
            self.made[where] = ExpertWeights(tuple(formats), **biases)
        return self.made[where]

    def operands(self, call: Drawn) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What `fused_experts` is given."""
        path, _, _, combine = LAYERS[call.layer]
        weights, tokens = self.weights(call), call.tokens
        hidden = torch.empty(tokens * HIDDEN + 8, dtype=torch.bfloat16)[int(call.odd == "hidden") :][: tokens * HIDDEN]
        hidden = hidden.view(tokens, HIDDEN)
        ids = torch.zeros(tokens, TOP_K, dtype=getattr(torch, call.ids))
        slots = torch.arange(EXPERTS)
        expert_map = ExpertMap(torch.where(slots < call.local, slots, -1))
        more: dict[str, Any] = {"path": path, "combine": combine, "activation": SwiGLUOAI(limit=call.numbers)}
        if call.memory is Memory.OUT:
            more["out"] = torch.empty(tokens, HIDDEN, dtype=torch.bfloat16)
        elif call.memory is not Memory.NONE:
            size = scratch_size(path, tokens, TOP_K, HIDDEN, INTERMEDIATE)
            rows = tokens * HIDDEN
            y = torch.empty(size.y + 2 * rows, dtype=torch.bfloat16)
            more["scratch"] = Scratch(y, torch.empty(size.routed, dtype=torch.bfloat16))
            if call.memory is Memory.OUT_IN_Y:
                more["out"] = y[:rows].view(tokens, HIDDEN)
            elif call.memory is Memory.OUT_FURTHER_IN_Y:
                more["out"] = y[64 : 64 + rows].view(tokens, HIDDEN)
            elif call.memory is Memory.OUT_AT_THE_END_OF_Y:
                more["out"] = y[-rows:].view(tokens, HIDDEN)
        return (hidden, weights, torch.empty(tokens, TOP_K), ids, expert_map), more


def _fresh_plans() -> launch_plan.Plans:
    from epfuse import api

    api.PLANS = launch_plan.Plans()
    return api.PLANS


def _launches(gpu: StubGPU, run: Callable[[], object]) -> list[StubLaunch]:
    gpu.launches = []
    run()
    found, gpu.launches = gpu.launches, None
    return found


def _without_plans(run: Callable[[], object]) -> Callable[[], object]:
    def unplanned() -> None:
        can_plan, launch_plan.can_plan = launch_plan.can_plan, lambda call: False
        try:
            run()
        finally:
            launch_plan.can_plan = can_plan

    return unplanned


def differences(calls: list[Drawn]) -> list[str]:
    """In what calls with plans differ from the same calls without."""
    found = []
    layers = Layers()
    with stub_gpu() as gpu:
        _fresh_plans()
        for call in [call for call in calls for _ in range(3)]:
            given, more = layers.operands(call)

            def run(given: Any = given, more: Any = more) -> object:
                return fused_experts(*given, **more)

            wanted = _launches(gpu, _without_plans(run))
            ours = _launches(gpu, run)
            found += [f"{call}: {what}" for what in _compare(wanted, ours, _own(given, more))]
    return found


def pairs() -> list[str]:
    """`differences` of calls that differ in one thing, one after the other."""
    found = []
    for layer in LAYERS:
        for tokens in (3, 300):
            call = Drawn(layer, tokens)
            others = [replace(call, tokens=tokens + 1), replace(call, ids="int64"), replace(call, local=3)]
            others += [replace(call, numbers=1.5), replace(call, fresh=True)]
            others += [replace(call, odd=what) for what in ("hidden", "weights")]
            others += [replace(call, memory=memory) for memory in Memory]
            found += differences([part for other in others for part in (call, other)])
            brought = replace(call, memory=Memory.SCRATCH)
            found += differences([part for memory in Memory for part in (brought, replace(call, memory=memory))])
            found += differences([replace(call, memory=memory) for memory in Memory])
    return found


def one_bias_for_both() -> list[str]:
    """What goes wrong in layers with two biases after calls of layers whose biases are one tensor."""
    found = []
    for name, (_, _, bias, _) in LAYERS.items():
        if bias is Bias.NONE:
            continue
        with stub_gpu() as gpu:
            _fresh_plans()
            for shared in (True, False):
                (hidden, weights, *rest), more = Layers().operands(Drawn(name, 3))
                biases = dict(weights.biases)
                one = biases["gate_up_bias"]
                assert one.shape == biases["down_bias"].shape
                weights = ExpertWeights(weights.formats, one, one if shared else biases["down_bias"])
                given = (hidden, weights, *rest)

                def run(given: Any = given, more: Any = more) -> object:
                    return fused_experts(*given, **more)

                for _ in range(3):
                    wanted = _launches(gpu, _without_plans(run))
                    ours = _launches(gpu, run)
                    found += [f"{name}: {what}" for what in _compare(wanted, ours, _own(given, more))]
    return found


def _own(given: Any, more: Any) -> list[torch.Tensor]:
    """The caller's tensors."""
    hidden, weights, factors, ids, expert_map = given
    tensors = [hidden, factors, ids, expert_map.on(hidden.device), *(tensor for _, tensor in weights.biases)]
    tensors += [tensor for experts in weights.formats for _, tensor in experts.tensors()]
    if "out" in more:
        tensors.append(more["out"])
    if "scratch" in more:
        tensors += [more["scratch"].y, more["scratch"].routed]
    return tensors


def _compare(wanted: list[StubLaunch], ours: list[StubLaunch], own: list[torch.Tensor]) -> list[str]:
    """Kernels, grids and numbers must be alike; the caller's addresses the same; others lie alike in buffers."""
    if not wanted:
        return ["nothing was launched"]
    if [launch[:4] for launch in wanted] != [launch[:4] for launch in ours]:
        return [f"{[launch[:4] for launch in wanted]} became {[launch[:4] for launch in ours]}"]
    found: list[str] = []
    moved: dict[int, tuple[int, int]] = {}  # a buffer of theirs: where it is in ours, and its bytes
    for theirs, mine in zip(wanted, ours, strict=True):
        for index, (one, other) in enumerate(zip(theirs.arguments, mine.arguments, strict=True)):
            place = f"{theirs.kernel} argument {index}"
            tensor = one
            if _is_descriptor(one):
                tensor = one.base
                ours_has = {name: value for name, value in vars(other).items() if name != "base"}
                if ours_has != {name: value for name, value in vars(one).items() if name != "base"}:
                    found.append(f"{place}: {ours_has}")
            if not isinstance(tensor, torch.Tensor):
                if repr(one) != repr(other):
                    found.append(f"{place}: {one} became {other}")
                continue
            address = _address(other)
            begin = tensor.data_ptr()
            if any(mine.data_ptr() <= begin < mine.data_ptr() + mine.nbytes for mine in own):
                if address != begin:
                    found.append(f"{place}: {begin} became {address}")
                continue
            storage = tensor.untyped_storage()
            at = address - (begin - storage.data_ptr())
            if moved.setdefault(storage._cdata, (at, storage.nbytes()))[0] != at:
                found.append(f"{place}: parts of a buffer are apart")
            if at % 16 != storage.data_ptr() % 16:
                found.append(f"{place}: not aligned")
    spans = sorted((at, at + size) for at, size in moved.values())
    spans += [(tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes) for tensor in own]
    for number, (begin, end) in enumerate(spans[: len(moved)]):
        if any(begin < last and first < end for first, last in spans[number + 1 :]):
            found.append(f"buffer {number} shares memory")
    return found


def _is_descriptor(value: object) -> bool:
    return hasattr(value, "base") and not isinstance(value, torch.Tensor)


def _address(value: Any) -> int:
    """Of a pointer or a descriptor."""
    base = value.base if _is_descriptor(value) else value
    return base if isinstance(base, int) else base.data_ptr()


def _planned_kinds(plans: launch_plan.Plans) -> list[launch_plan.LaunchPlan | None]:
    return list(plans._plans.values())


def planned() -> dict[str, bool]:
    """Of each layer whether few tokens and many have plans after two calls."""
    found = {}
    with stub_gpu():
        for name in LAYERS:
            plans, layers = _fresh_plans(), Layers()
            for tokens in (3, 300):
                given, more = layers.operands(Drawn(name, tokens))
                for _ in range(2):
                    fused_experts(*given, **more)
            assert len(_planned_kinds(plans)) == 2
            found[name] = None not in _planned_kinds(plans)
    return found


W8A16, W8A8 = "w8a16 fragment none deterministic", "w8a8 row_fp8 none deterministic"
PACKED = Drawn(W8A16, 300)
"""A call on packed rows."""


def hooks_and_streams() -> tuple[list[str], list[str], set[int]]:
    """What launch hooks are told of a planned call, and the streams that it launches on."""
    from triton import knobs

    entered: list[str] = []
    left: list[str] = []
    with stub_gpu() as gpu:
        _fresh_plans()
        given, more = Layers().operands(PACKED)
        for _ in range(2):
            fused_experts(*given, **more)
        before = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
        knobs.runtime.launch_enter_hook = lambda metadata: entered.append(metadata.get()["name"])
        knobs.runtime.launch_exit_hook = lambda metadata: left.append(metadata.get()["name"])
        gpu.stream = 5
        try:
            launches = _launches(gpu, lambda: fused_experts(*given, **more))
        finally:
            knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook = before
    return entered, left, {launch.stream for launch in launches}


def ranges() -> list[list[str]]:
    """The profiler's ranges of four calls: the first, the watched one, two planned ones."""
    found = []
    with stub_gpu():
        _fresh_plans()
        given, more = Layers().operands(PACKED)
        for _ in range(4):
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
                fused_experts(*given, **more)
            ours = [event for event in profile.events() if event.name.startswith("epfuse::")]
            found.append([event.name.removeprefix("epfuse::") for event in ours])
    return found


def kept() -> tuple[int, list[str]]:
    """How many plans a small cache holds after many kinds, and which of the calls' tensors are still there."""
    from epfuse import api

    with stub_gpu():
        plans = api.PLANS = launch_plan.Plans(most=3)
        watched = []
        for tokens in (1, 2, 3, 4, 5, 300):
            layers = Layers()
            for memory in (Memory.NONE, Memory.OUT_IN_Y):
                given, more = layers.operands(Drawn(W8A16, tokens, memory=memory))
                for _ in range(3):
                    more["out"] = fused_experts(*given, **more)
                    more.pop("out") if memory is Memory.NONE else None
                watched += [(f"T={tokens} {tensor.shape}", weakref.ref(tensor)) for tensor in _own(given, more)]
        del layers, given, more
        gc.collect()
        assert max(len(plans._plans), len(plans._seen)) == 3
        return len(plans._plans), [name for name, reference in watched if reference() is not None]


def in_threads() -> list[str]:
    """What goes wrong where threads run calls of one kind at once, each on memory of its own."""
    wrong: list[str] = []
    with stub_gpu() as gpu:
        _fresh_plans()
        layers = Layers()
        weights = layers.operands(PACKED)[0][1]
        noted = threading.local()  # a thread's number is another's after its end

        class ByThread(list[StubLaunch]):
            def append(self, launch: StubLaunch) -> None:
                noted.launches.append(launch)

        def work() -> None:
            noted.launches = []
            (hidden, _, *rest), more = layers.operands(PACKED)
            for _ in range(40):
                fused_experts(hidden, weights, *rest, **more)
            gathered = [launch for launch in noted.launches if launch.kernel == "gather_kernel"]
            if {_address(launch.arguments[0]) for launch in gathered} != {hidden.data_ptr()}:
                wrong.append("a thread read another's rows")

        work_twice = [threading.Thread(target=work) for _ in range(3)]
        gpu.launches = ByThread()
        for thread in work_twice:
            thread.start()
        for thread in work_twice:
            thread.join()
    return wrong


def python_calls() -> dict[str, int]:
    """Functions in Python that a planned call of each Hopper family enters."""
    found = {}
    with stub_gpu():
        _fresh_plans()
        for family, call in (("sm90", Drawn(W8A16, 16)), ("sm90_packed", PACKED), ("sm90_fp8", Drawn(W8A8, 64))):
            given, more = Layers().operands(call)
            for _ in range(3):
                fused_experts(*given, **more)
            found[family] = entered_by(lambda given=given, more=more: fused_experts(*given, **more))
    return found
