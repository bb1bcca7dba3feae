"""Which peers take part, and why the others don't."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec

from epfuse.bench.contender import Absent, Contender
from epfuse.bench.weights import LayerWeights
from epfuse.config import Bias
from epfuse.errors import EpfuseError

PEERS = {
    "vllm": ("vllm", "epfuse.bench.peers.vllm_experts"),
    "transformers": ("transformers", "epfuse.bench.peers.transformers_experts"),
    "torch": ("torch", "epfuse.bench.peers.torch_grouped_mm"),
    "deepgemm": ("deep_gemm", "epfuse.bench.peers.deep_gemm_experts"),
    "flashinfer": ("flashinfer", "epfuse.bench.peers.flashinfer_experts"),
}
"""Name -> the package that it needs, and the module whose ``CONTENDERS`` names its makers.

A maker takes the weights and returns a contender; it may raise whatever the package raises.
"""


def find_peers(
    names: Sequence[str], weights: LayerWeights, advance: Callable[[str], None] = lambda name: None
) -> tuple[list[Contender], list[Absent]]:
    """The peers that can be imported and set up, and the others with the reason.

    Args:
        names: keys of `PEERS`.
        weights: what they compute with; a peer's own copies are made here.
        advance: called with a name before its package is imported, which can take a while.
    """
    found: list[Contender] = []
    absent: list[Absent] = []
    for name in names:
        package, module = PEERS[name]
        advance(name)
        if weights.layer.bias is not Bias.NONE:
            absent.append(Absent(name, "it is driven without biases, and the layer has some"))
            continue
        if find_spec(package) is None:
            absent.append(Absent(name, f"the package {package} is not installed"))
            continue
        makers: dict[str, Callable[[LayerWeights], Contender]] = import_module(module).CONTENDERS
        for label, make in makers.items():
            try:
                found.append(make(weights))
            except Exception as error:  # a foreign package may raise anything; it costs its own column, not the run
                absent.append(Absent(label, describe(error)))
    return found, absent


def describe(error: BaseException) -> str:
    """The first line of an error, after its type unless it is one of ours, whose messages need none."""
    lines = str(error).strip().splitlines()
    first = lines[0][:300] if lines else ""
    return first if isinstance(error, EpfuseError) else f"{type(error).__name__}: {first}".rstrip(": ")
