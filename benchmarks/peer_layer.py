"""The whole layer as one function of plain tensors, for harnesses that time several implementations side by side.

``layer(hidden, w13, w13_scale, w2, w2_scale, topk_weights, topk_ids, expert_map, alpha, beta, limit) -> out`` takes
MXFP8 weights as checkpoints have them; what has to be rearranged is rearranged once per weight tensor and kept.
"""

from __future__ import annotations

import functools

import torch

from epfuse import ExpertMap, ExpertWeights, Path, SwiGLUOAI, fused_experts

_weights: dict[tuple[int, str], ExpertWeights] = {}
_maps: dict[int, ExpertMap] = {}


def _prepared(path: Path, w13, w13_scale, w2, w2_scale) -> ExpertWeights:
    key = (w13.data_ptr(), path.value)
    if key not in _weights:
        # the harness keeps its own tensors for its reference: rearrange a copy
        copies = [t.clone() for t in (w13, w13_scale, w2, w2_scale)]
        if path is Path.BF16:
            dense = ExpertWeights.hybrid(*copies).dense_experts
            assert dense is not None
            _weights[key] = ExpertWeights.bf16(dense.w13, dense.w2)
        elif path is Path.BLOCK_FP8:
            _weights[key] = ExpertWeights.block_fp8(*copies)
        else:
            _weights[key] = ExpertWeights.mxfp8(*copies).prepare(path=path)
    return _weights[key]


def layer(
    hidden, w13, w13_scale, w2, w2_scale, topk_weights, topk_ids, expert_map, alpha, beta, limit, path="w8a16"
) -> torch.Tensor:
    """One call of this rank's experts on ``path``."""
    if expert_map.data_ptr() not in _maps:
        _maps[expert_map.data_ptr()] = ExpertMap(expert_map)
    weights = _prepared(Path(path), w13, w13_scale, w2, w2_scale)
    activation = SwiGLUOAI(alpha, beta, limit)
    slots = _maps[expert_map.data_ptr()]
    return fused_experts(hidden, weights, topk_weights, topk_ids, slots, activation=activation, path=Path(path))


layer.variants = {"bf16": {"path": "bf16"}, "w8a16": {"path": "w8a16"}}
bf16 = functools.partial(layer, path="bf16")
w8a16 = functools.partial(layer, path="w8a16")
w8a8 = functools.partial(layer, path="w8a8")
block_fp8 = functools.partial(layer, path="block_fp8")
