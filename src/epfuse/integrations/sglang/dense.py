"""MXFP8 linear layers in BF16, for a GPU on which SGLang has no kernel for them."""

from __future__ import annotations

import logging
from typing import Any, NoReturn

import torch
from sglang.srt.layers.quantization.base_config import LinearMethodBase
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod

from epfuse.errors import ConfigError
from epfuse.numerics.e8m0 import decode_scales
from epfuse.numerics.mxfp8 import BLOCK, decode

log: logging.Logger = logging.getLogger("sglang.srt.epfuse")  # below SGLang's own logger, whose handlers print it

ROWS_AT_ONCE = 1024
"""Rows that are converted in one go, so that loading needs little memory beside the result."""


class DenseMxfp8Method(LinearMethodBase):
    """Loads a linear layer as SGLang does and multiplies in BF16: twice the bytes, and exact.

    E4M3 times a power of two is a BF16 number unless it lies at the ends of BF16's range; how many do is logged. The
    scales are kept (1/64 of the bytes), so that the checkpoint's numbers can be made again for a partial update.

    Args:
        own: SGLang's Fp8LinearMethod, whose parameters and loaders are used.
        name: the layer's name.
    """

    def __init__(self, own: Any, name: str) -> None:
        self._own, self._name = own, name
        self._plain = UnquantizedLinearMethod()
        self._arguments: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self._dense: torch.Tensor | None = None
        self._scales: torch.Tensor | None = None

    def create_weights(self, layer: torch.nn.Module, *arguments: Any, **named: Any) -> None:
        """The FP8 weight and its scales, for the checkpoint to be loaded into."""
        self._arguments = (arguments, named)
        self._own.create_weights(layer, *arguments, **named)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Replace them by ``weight`` ``[N, K]`` BF16, the second time in the memory of the first.

        Raises:
            ConfigError: a value is over BF16's range.
        """
        codes = layer.weight.data
        if codes.dtype == torch.bfloat16:
            return
        scales = layer.weight_scale_inv.data
        made = (
            torch.empty(codes.shape, dtype=torch.bfloat16, device=codes.device) if self._dense is None else self._dense
        )
        rounded = 0
        for rows in _slices(codes.shape[0]):
            exact, bf16 = (decode(codes[rows], scales[rows], dtype) for dtype in (torch.float64, torch.bfloat16))
            if bool((bf16.isinf() & ~exact.isinf()).any()):
                raise ConfigError(f"{self._name} has weights over BF16's range; epfuse can't run it in BF16")
            rounded += int(((exact != bf16.double()) & ~exact.isnan()).sum())
            made[rows] = bf16
        parameter = torch.nn.Parameter(made, requires_grad=False)
        parameter.weight_loader = self._refuse_to_load  # type: ignore[attr-defined]
        layer.register_parameter("weight", parameter)
        del layer.weight_scale_inv
        self._dense, self._scales = made, scales
        if rounded:
            log.warning("epfuse: %s has %d weights under BF16's range, which are rounded", self._name, rounded)

    def restore_weights_before_loading(self, layer: Any) -> None:
        """Make the checkpoint's numbers again; the BF16 memory, which graphs read, waits for what is loaded."""
        if self._dense is None or layer.weight.dtype != torch.bfloat16:
            return
        assert self._arguments is not None
        assert self._scales is not None
        with torch.device(self._dense.device):
            self._own.create_weights(layer, *self._arguments[0], **self._arguments[1])
        for rows in _slices(self._dense.shape[0]):
            scales = decode_scales(self._scales[rows], torch.float64).repeat_interleave(BLOCK, dim=-1)
            layer.weight.data[rows] = (self._dense[rows].double() / scales).to(torch.float32).to(torch.float8_e4m3fn)
        layer.weight_scale_inv.data.copy_(self._scales)

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """As SGLang's own unquantised linear: ``[..., K]`` to ``[..., N]``."""
        result: torch.Tensor = self._plain.apply(layer, x, bias)
        return result

    def require_loadable(self, layer: Any) -> None:
        """Refuse to load into weights that are BF16 by now.

        Raises:
            ConfigError: they are.
        """
        if layer.weight.dtype == torch.bfloat16:
            self._refuse_to_load()

    def _refuse_to_load(self, *_: Any, **__: Any) -> NoReturn:
        raise ConfigError(
            f"weights of {self._name} would be loaded over weights that epfuse made BF16; call begin_weight_update"
            " before and end_weight_update after, or update_weights_from_disk"
        )


def _slices(rows: int) -> list[slice]:
    return [slice(start, start + ROWS_AT_ONCE) for start in range(0, rows, ROWS_AT_ONCE)]
