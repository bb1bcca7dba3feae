"""Triton's interpreter with numpy's missing number formats put right, for tests on a machine without a GPU.

Triton 3.6 to 3.9 interpret bf16 as raw uint16: products, those of `tl.dot` too, multiply the bit patterns, and fp32 ->
bf16 truncates. Both are done by PyTorch instead, which rounds to nearest even as the GPUs do. And its list of types
that a pointer can have lacks E4M3FNUZ. In 3.9 a comparison of two scalars is spread over a block as integers, which its
masked loads and stores then refuse.

Three things that it does again and again are done once, or not at all, in half of the time: before each call of a
device function it replaces all of `triton.language` by what interprets it, although the launch has done that; it makes
its table of number formats anew whenever it looks into it; and it repeats each sum and product of integers in 64 bits
to see whether it overflows, but asserts that only with an option `debug` that nothing sets.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

TORCH_FLOATS = {
    tl.float32: torch.float32,
    tl.float16: torch.float16,
    tl.bfloat16: torch.bfloat16,
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e4b8: torch.float8_e4m3fnuz,
}
CARRIERS = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32}


def as_torch(data: np.ndarray, dtype: tl.dtype) -> torch.Tensor:
    """A handle's numpy data, reinterpreted as the floats it stands for."""
    flat = torch.from_numpy(np.ascontiguousarray(data).reshape(-1).copy())
    return flat.view(TORCH_FLOATS[dtype]).reshape(data.shape)


def convert(data: np.ndarray, source: tl.dtype, target: tl.dtype) -> np.ndarray:
    """Round to nearest even from one float format to another, in the interpreter's numpy carrier types."""
    out = as_torch(data, source).to(TORCH_FLOATS[target])
    carrier = interpreter._get_np_dtype(target)
    return out.reshape(-1).view(CARRIERS[carrier.itemsize]).numpy().view(carrier).reshape(data.shape)


def install() -> None:
    """Patch the interpreter's builder; call once, before any kernel runs."""
    cast, fp_to_fp = InterpreterBuilder.cast_impl, InterpreterBuilder.create_fp_to_fp

    def both_float(src: TensorHandle, dst_type: tl.dtype) -> bool:
        return src.dtype.scalar in TORCH_FLOATS and dst_type.scalar in TORCH_FLOATS

    def cast_impl(self, src, dst_type):
        if both_float(src, dst_type):
            return TensorHandle(convert(src.data, src.dtype.scalar, dst_type.scalar), dst_type.scalar)
        return cast(self, src, dst_type)

    def create_fp_to_fp(self, src, dst_type, rounding_mode):
        if both_float(src, dst_type):
            return TensorHandle(convert(src.data, src.dtype.scalar, dst_type.scalar), dst_type.scalar)
        return fp_to_fp(self, src, dst_type, rounding_mode)

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        left, right = (as_torch(x.data, x.dtype.scalar).float().numpy() for x in (a, b))
        return TensorHandle(np.matmul(left, right, dtype=np.float32) + d.data, d.dtype.scalar)

    multiply = InterpreterBuilder.create_fmul

    def create_fmul(self, lhs, rhs):
        if lhs.dtype.scalar != tl.bfloat16:
            return multiply(self, lhs, rhs)
        product = as_torch(lhs.data, tl.bfloat16) * as_torch(rhs.data, tl.bfloat16)
        return TensorHandle(product.view(torch.uint16).numpy(), tl.bfloat16)

    patch_lang_core = interpreter._patch_lang_core

    def patch_with_fnuz(lang, scope):
        patch_lang_core(lang, scope)
        to_ir = lang.dtype.to_ir

        def to_ir_with_fnuz(self, builder):
            return builder.get_fp8e4b8_ty() if self.name == "fp8e4b8" else to_ir(self, builder)

        scope.set_attr(lang.dtype, "to_ir", to_ir_with_fnuz)

    interpreter._patch_lang_core = patch_with_fnuz

    def with_boolean_mask(access, place):
        @functools.wraps(access)
        def call(self, *operands, **named):
            mask = operands[place]
            boolean = TensorHandle(mask.data.astype(bool), tl.int1)
            return access(self, *operands[:place], boolean, *operands[place + 1 :], **named)

        return call

    patch_lang, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    replaced: set[str] = set()  # the language's modules, in this launch

    get_np_dtype = interpreter._get_np_dtype
    np_dtypes: dict[str, np.dtype] = {}

    def np_dtype(kind):
        name = kind.scalar.name  # a type of blocks has no hash
        if name not in np_dtypes:
            np_dtypes[name] = get_np_dtype(kind)
        return np_dtypes[name]

    def patch_lang_once(fn):
        seen = {value.__name__ for value in fn.__globals__.values() if value is tl or value is tl.core}
        if seen <= replaced:
            return None  # of a device function, where nothing asks for it
        replaced.update(seen)
        return patch_lang(fn)

    def launch_from_clean(self, *operands, **named):
        replaced.clear()
        try:
            launch(self, *operands, **named)
        finally:
            replaced.clear()  # the launch has put the language back

    for access, place in (("create_masked_load", 1), ("create_masked_store", 2), ("create_atomic_rmw", 3)):
        setattr(InterpreterBuilder, access, with_boolean_mask(getattr(InterpreterBuilder, access), place))
    interpreter._patch_lang = patch_lang_once
    interpreter.GridExecutor.__call__ = launch_from_clean
    interpreter._get_np_dtype = np_dtype
    assert not interpreter.interpreter_builder.options.debug
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)
    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder.create_fp_to_fp = create_fp_to_fp
    InterpreterBuilder.create_dot = create_dot
    InterpreterBuilder.create_fmul = create_fmul
