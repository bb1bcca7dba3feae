"""The source of the peers' harness with a layer's top-k, activation and routing, and our paths as its kernels."""

from __future__ import annotations

from ast import literal_eval

from epfuse.bench.layers import Layer
from epfuse.bench.routing import Routing, RoutingKind
from epfuse.config import SwiGLUOAI
from epfuse.errors import ConfigError

TOP_K_LINE = "TOPK = 4\n"
ACTIVATION_LINE = "ALPHA, BETA, LIMIT = 1.702, 1.0, 7.0\n"
NO_LIMIT = 3e38  # as a number that C++ reads, for humming
ROUTING_LINE = "        w, ids = torch.topk(torch.sigmoid(torch.randn(T, E, generator=g, device=DEV)), TOPK, dim=-1)\n"
# experts without replacement: the largest of log popularity plus Gumbel noise, ranks shuffled in each draw
ZIPF_LINES = """\
        ranks = torch.randperm(E, generator=g, device=DEV) + 1
        noise = -torch.rand(T, E, generator=g, device=DEV).log().neg().log()
        w, ids = torch.topk(torch.sigmoid(noise - {parameter} * ranks.log()), TOPK, dim=-1)
"""
# the first experts, which are local, and remote ones
ALL_TO_LINES = """\
        scores = 0.5 * torch.sigmoid(torch.randn(T, E, generator=g, device=DEV))
        scores[:, :{parameter}] += 0.5
        scores[:, {parameter}:EL] -= 1
        w, ids = torch.topk(scores, TOPK, dim=-1)
"""
MULTIPLES = "(1, 0.25, 0.5, 2, 4)"  # of the rows that humming is told to expect: its configurations
MARLIN_LINES = """\
        out = [('default', self.make)]
        for bm in bms:
            for at in ([False, True] if T <= 1024 else [False]):
"""  # its configurations; with atomics it is faster at few tokens alone, and vLLM's default nowhere
FEW_MARLIN_LINES = """\
        out = []
        for bm in bms:
            for at in ([False, True] if T <= 16 else [False]):
"""
MAIN_LINE = "if __name__ == '__main__':\n"
PATHS_LINES = """\
for path in {paths}:

    @peer("impl_" + path, limit=150, compile_limit=200)
    class Ours(External):
        what, path = "external implementation", path

        def __init__(self):
            os.environ["PEER_IMPL"] = os.environ["PEER_IMPL"].rsplit(":", 1)[0] + ":" + self.path
            super().__init__()


for name in {peers} + [name for name in PEERS if not name.startswith("impl") and name not in {peers}]:
    if name in PEERS:
        PEERS[name] = PEERS.pop(name)


"""


def harness_for(
    source: str, layer: Layer, routing: Routing, paths: tuple[str, ...], peers: str, humming: int | None = None
) -> str:
    """The harness' source with the layer's top-k, activation and routing in place of its own, our paths first.

    ``humming``: the most configurations of each of humming's kernels, its own choice first, and fewer of Marlin's; None
    for all.

    Raises:
        ConfigError: it has not the lines that say which those are.
    """
    lines = {RoutingKind.ZIPF: ZIPF_LINES, RoutingKind.ALL_TO: ALL_TO_LINES}
    other = tuple(path for path in paths if path != "w8a16")
    changes = {MAIN_LINE: PATHS_LINES.format(paths=other, peers=peers.split(",")) + MAIN_LINE}
    if humming is not None:
        if MULTIPLES not in source:
            raise ConfigError(f"the harness has no {MULTIPLES}, humming's configurations")
        source = source.replace(MULTIPLES, repr(literal_eval(MULTIPLES)[:humming]))  # to compile, and to time
        source = source.replace(MARLIN_LINES, FEW_MARLIN_LINES)
    if layer.shape.top_k != 4:
        changes[TOP_K_LINE] = f"TOPK = {layer.shape.top_k}\n"
    if layer.activation != SwiGLUOAI():
        alpha, beta, limit = layer.activation.parameters
        changes[ACTIVATION_LINE] = f"ALPHA, BETA, LIMIT = {alpha}, {beta}, {min(limit, NO_LIMIT)}\n"
    if routing.kind in lines:
        number = int(routing.parameter) if routing.kind is RoutingKind.ALL_TO else routing.parameter
        changes[ROUTING_LINE] = lines[routing.kind].format(parameter=number)
    for line, replacement in changes.items():
        if source.count(line) != 1:
            raise ConfigError(f"the harness has {source.count(line)} times the line {line.strip()!r}; needed is one")
        source = source.replace(line, replacement)
    return source
