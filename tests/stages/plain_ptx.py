"""The inline PTX of Hopper's device functions, run in Python."""

from __future__ import annotations

import re

import pytest
import torch

from epfuse.stages import sm90_codes


def run_ptx(text: str, codes: list[int]) -> torch.Tensor:
    """The four BF16 that a block of PTX makes of four codes; of its instructions those that are used here."""
    value = {"$2": sum(code << 8 * place for place, code in enumerate(codes)), "0": 0}
    mask = (1 << 32) - 1

    def of(name: str) -> int:
        return value[name] if name in value else int(name, 0)

    for guard, operation, names in re.findall(r"(?m)^\s*(?:@(\w+) )?([a-z]\w+\.[\w.]+)\s+([^;]+);", text):
        if guard and not value[guard]:
            continue
        out, *inputs = (name.strip() for name in names.split(","))
        match operation:
            case "prmt.b32":
                both = [of(name) >> 8 * i & 255 for name in inputs[:2] for i in range(4)]
                picked = [of(inputs[2]) >> 4 * i & 15 for i in range(4)]
                each = [both[pick & 7] if pick < 8 else 255 * (both[pick & 7] >> 7) for pick in picked]
                value[out] = sum(byte << 8 * i for i, byte in enumerate(each))
            case "shl.b32":
                value[out] = of(inputs[0]) << of(inputs[1]) & mask
            case "and.b32":
                value[out] = of(inputs[0]) & of(inputs[1])
            case "add.u32":
                value[out] = of(inputs[0]) + of(inputs[1]) & mask
            case "setp.ne.u32":
                value[out] = of(inputs[0]) != of(inputs[1])
            case "mov.b32":
                value[out] = of(inputs[0])
            case "mul.rn.bf16x2":
                a, b = (torch.tensor([of(name) & 65535, of(name) >> 16]).to(torch.uint16) for name in inputs)
                product = (a.view(torch.bfloat16) * b.view(torch.bfloat16)).view(torch.uint16).tolist()
                value[out] = product[0] | product[1] << 16
            case _:
                raise AssertionError(operation)
    halves = [value[name] >> shift & 65535 for name in ("$0", "$1") for shift in (0, 16)]
    return torch.tensor(halves).to(torch.uint16).view(torch.bfloat16)


def assembly_of(function: object) -> str:
    """The PTX of one of `sm90_codes`' device functions."""
    found: list[str] = []

    class Language:
        bfloat16 = None

        @staticmethod
        def inline_asm_elementwise(text: str, *_: object, **__: object) -> None:
            found.append(text)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sm90_codes, "gl", Language)
        function.fn(None)  # type: ignore[attr-defined]
    return found[0]
