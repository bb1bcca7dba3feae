"""One tile of Hopper's kernels of few rows in numpy: the kernels' own code, without a GPU."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from epfuse.stages import sm90_gemm, sm90_layouts
from epfuse.stages.down import kernel_sm90 as down_kernel
from epfuse.stages.gate_up import kernel_sm90 as gate_up_kernel
from tests.stages.plain_gluon import numbers, plain
from tests.stages.plain_memory import BFLOAT16, COPIES, FLOAT32, INT32, PlainMachine, Pointers, multiply

TOKENS, TOP_K = 6, 2
ROUTES = torch.tensor([11, 2, 7, 4, *[TOKENS * TOP_K] * 4], dtype=torch.int32)
"""Of a block of 8 rows, of which the last four are padding."""


@dataclass(frozen=True)
class PlainTile:
    """Which tile: the second of an expert's, of 128 weight rows.

    Attributes:
        stage: gate_up or down.
        expert: its index.
        split: this program's part of K.
        shares: programs that share K.
        tail: whether they share it because the tile comes after the last full wave.
    """

    stage: str
    expert: int
    split: int
    shares: int
    tail: bool

    @property
    def reads(self) -> torch.Tensor:
        """Rows of x that the block's four routes read."""
        return (ROUTES if self.stage == "down" else ROUTES // TOP_K)[:4].long()

    def inside(self, steps: int) -> slice:
        """The part of K that this program multiplies, of so many steps of 128."""
        own = -(-steps // self.shares) * 128
        return slice(self.split * own, (self.split + 1) * own)

    def run(self, x: torch.Tensor, codes: Pointers, scales: torch.Tensor, sizes: tuple[int, int, int, int],
            conversion: str) -> np.ndarray:  # fmt: skip
        """The sums [128, 8] before they are stored.

        Args:
            x: BF16 [T*K, columns].
            codes: of the weights.
            scales: FP32.
            sizes: weight rows of an expert, columns, columns with padding, panels of 64 rows.
            conversion: the device function that makes BF16 of codes; its twin here is exact.
        """
        rows, columns, padded, panels = sizes
        operands = [Pointers.to_tensor(x, BFLOAT16), codes, Pointers.to_tensor(scales, FLOAT32), None]
        routes_at = Pointers.to_tensor(ROUTES, INT32)
        tile = {"BLOCK_M": 8, "BLOCK_N": 128, "BLOCK_K": 128, "STAGES": 3, "EVEN_K": columns == padded}
        tile |= {"SPLIT_K": 1 if self.tail else self.shares, "TAIL_SPLIT": 2 if self.tail else 1}
        place = (None, numbers(0), self.split, self.shares, numbers(self.expert), numbers(1), TOKENS * TOP_K)
        got: list[np.ndarray] = []
        others = {
            "async_copy": COPIES,
            "warpgroup_mma": multiply,
            "warpgroup_mma_wait": lambda pending, deps: deps[0],
            "fence_async_shared": lambda: None,
            "wait_for_previous_kernel": lambda: None,
            conversion: lambda codes: torch.from_numpy(codes).view(torch.float8_e4m3fn).double().numpy() / 256,
            "sum_of_shares": lambda acc, *_: (acc, True),
            "store_activated": lambda acc, *_: got.append(np.asarray(acc)),
            "store_weighted": lambda acc, *_: got.append(np.asarray(acc)),
        }
        with plain(gate_up_kernel, down_kernel, sm90_gemm, sm90_layouts, machine=PlainMachine, **others):
            if self.stage == "down":
                down_kernel.down_tile(
                    *operands, None, None, routes_at, None, *place, rows, columns, padded, panels, **tile
                )  # fmt: skip
            else:
                gate_up_kernel.gate_up_tile(
                    *operands, None, routes_at, None, *place, columns, rows // 2, padded, panels, None, TOP_K,
                    **tile, ACTIVATION=None,
                )  # fmt: skip
        return got[0]
