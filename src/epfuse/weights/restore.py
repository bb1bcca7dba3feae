"""New weights in a layer that runs: the checkpoint's order again, and then the new ones, all in the same memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from epfuse.errors import ConfigError
from epfuse.numerics.consumable import note_restored
from epfuse.numerics.e8m0 import NAN_BYTE
from epfuse.numerics.mxfp8 import MXFP8
from epfuse.weights.experts import ExpertWeights
from epfuse.weights.fragment import FragmentExperts, FragmentMXFP8, unpack


@torch.no_grad()
def restore_checkpoint_order(
    weights: ExpertWeights, codes: Sequence[torch.Tensor], scales: Sequence[torch.Tensor]
) -> None:
    """Undo `ExpertWeights.prepare` of MXFP8 weights, one matrix at a time.

    ``weights`` hold no layer afterwards where they lie in the memory of ``codes`` and ``scales``, which is the rule.

    Args:
        weights: as `prepare` returned them.
        codes: w13 ``[L, 2I, H]`` and w2 ``[L, H, I]`` float8_e4m3fn, written.
        scales: their E8M0 bytes, ``[L, 2I, H / 32]`` and ``[L, H, I / 32]``, written.

    Raises:
        ConfigError: the weights are in a form that has lost bits.
    """
    kept = weights.held(FragmentExperts) or weights.mxfp8_experts
    if kept is None:
        raise ConfigError(f"weights are in {', '.join(form.value for form in weights.kept)}, which can't be undone")
    for stack, out_codes, out_scales in zip((kept.w13, kept.w2), codes, scales, strict=True):
        for expert in range(weights.local_experts):
            plain = _plain(stack, expert)
            out_codes[expert].view(torch.uint8).copy_(plain.values.view(torch.uint8))
            out_scales[expert].view(torch.uint8).copy_(plain.scales)
        note_restored(out_codes)
        note_restored(out_scales)


def _plain(stack: MXFP8 | FragmentMXFP8, expert: int) -> MXFP8:
    """One matrix as the checkpoint had it; of FNUZ's zeros the sign is gone, and its NaN has one code."""
    if isinstance(stack, FragmentMXFP8):
        return unpack(stack, expert)
    values, scales = stack.values[expert], stack.scales[expert]
    if values.dtype == torch.float8_e4m3fn:
        return MXFP8(values.clone(), scales.clone())
    codes = values.view(torch.uint8)
    codes = codes.masked_fill(codes == 0x80, 0x7F)
    halved = scales - (scales != NAN_BYTE).to(torch.uint8)
    return MXFP8(codes.view(torch.float8_e4m3fn), halved)


@torch.no_grad()
def take_over_memory(old: ExpertWeights, new: ExpertWeights) -> None:
    """Write new weights of the same layer into the memory of the old, which captured graphs read.

    Args:
        old: in use; holds the new numbers afterwards.
        new: in the same formats; may lie in the same memory already.

    Raises:
        ConfigError: the formats differ.
    """
    if tuple(old.kept) != tuple(new.kept):
        raise ConfigError(
            f"the new weights can only be kept as {', '.join(form.value for form in new.kept)}, and the layer runs with"
            f" {', '.join(form.value for form in old.kept)}: start the server again with them"
        )
    for was, becomes in zip(old.kept.values(), new.kept.values(), strict=True):
        for (_, source), (_, target) in zip(becomes.tensors(), was.tensors(), strict=True):
            if source.data_ptr() != target.data_ptr():
                target.view(torch.uint8).copy_(source.view(torch.uint8))
