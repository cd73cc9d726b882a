"""Make Triton's interpreter trustworthy: `mend()` before any kernel runs (triton 3.6 to 3.9, numpy 1.26 to 2.5).

What is wrong with the stock interpreter, and silently so:
  bfloat16   values are kept as uint16 bit patterns, and arithmetic, `where`, `dot` and reductions act on the bits;
             a cast from float32 truncates instead of rounding to nearest even.
  numpy 2.4  `int()` of a 1-element array raises, so `range`, `tl.cdiv` and `if` on run-time scalars fail.
The mend: a bfloat16 tensor is held as float32 whose values are bfloat16 numbers. Every new tensor is rounded (which is
what a GPU does after each bfloat16 operation), and only loads, stores and bitcasts see the 16-bit pattern.
Not covered, because no kernel here uses it: bfloat16 atomics, libdevice, inline assembly.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np


def bf16_to_fp32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def fp32_to_bf16(x: np.ndarray) -> np.ndarray:
    """Round to nearest, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16
    return np.where(np.isnan(x), (bits >> 16) | 0x40, rounded).astype(np.uint16)


def mend() -> None:
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("TRITON_INTERPRET=1 must be set before triton is imported")
    import triton.language as tl
    from triton.runtime import interpreter

    if getattr(interpreter, "_roro_mended", False):
        return
    interpreter._roro_mended = True
    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    _mend_scalars(interpreter)

    def is_bf16(dtype: Any) -> bool:
        return not isinstance(dtype, tl.pointer_type) and dtype.scalar == tl.bfloat16

    np_dtype, fits, made = interpreter._get_np_dtype, interpreter._validate_np_data_size, handle.__post_init__

    def round_values(self: Any) -> None:
        made(self)
        if is_bf16(self.dtype) and self.data.dtype != np.bool_:  # comparisons keep their operand's type
            bits = self.data if self.data.dtype == np.uint16 else fp32_to_bf16(self.data)
            self.data = bf16_to_fp32(bits)

    interpreter._get_np_dtype = lambda t: np.dtype(np.float32) if is_bf16(t) else np_dtype(t)
    interpreter._validate_np_data_size = lambda data, t: data.itemsize <= 4 if is_bf16(t) else fits(data, t)
    handle.__post_init__ = round_values

    def bits_of(h: Any) -> Any:
        """The same tensor as its 16-bit pattern, typed uint16."""
        return handle(fp32_to_bf16(h.data), tl.uint16) if h is not None and is_bf16(h.dtype) else h

    load, store, cast = builder.create_masked_load, builder.create_masked_store, builder.cast_impl
    to_fp, bitcast = builder.create_fp_to_fp, builder.create_bitcast

    def masked_load(self: Any, ptrs: Any, mask: Any, other: Any, *rest: Any, **kw: Any) -> Any:
        if ptrs.get_element_ty() != tl.bfloat16:
            return load(self, ptrs, mask, other, *rest, **kw)
        raw = handle(ptrs.data, tl.pointer_type(tl.uint16))
        return handle(load(self, raw, mask, bits_of(other), *rest, **kw).data, tl.bfloat16)

    def masked_store(self: Any, ptrs: Any, value: Any, *rest: Any) -> Any:
        return store(self, ptrs, bits_of(value), *rest)

    def cast_impl(self: Any, src: Any, dst: Any) -> Any:
        if is_bf16(dst):
            return handle(src.data.astype(np.float32), tl.bfloat16)
        return cast(self, handle(src.data, tl.float32) if is_bf16(src.dtype) else src, dst)

    def fp_to_fp(self: Any, src: Any, dst: Any, mode: Any) -> Any:
        if tl.float32 in (src.dtype.scalar, dst.scalar) or not (is_bf16(src.dtype) or is_bf16(dst)):
            return cast_impl(self, src, dst) if is_bf16(src.dtype) or is_bf16(dst) else to_fp(self, src, dst, mode)
        return fp_to_fp(self, fp_to_fp(self, src, tl.float32, mode), dst, mode)

    def create_bitcast(self: Any, src: Any, dst: Any) -> Any:
        if is_bf16(dst):
            return handle(src.data.view(np.uint16), tl.bfloat16)
        return bitcast(self, bits_of(src), dst)

    builder.create_masked_load, builder.create_masked_store = masked_load, masked_store
    builder.cast_impl, builder.create_fp_to_fp, builder.create_bitcast = cast_impl, fp_to_fp, create_bitcast
    builder.create_fabs = lambda self, x: handle(np.abs(x.data), x.dtype.scalar)
    builder.get_bf16 = lambda self, value: handle(np.array([value], np.float32), tl.bfloat16)


def _mend_scalars(interpreter: Any) -> None:
    patch = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(np.asarray(self.handle.data).reshape(-1)[0]))

    interpreter._patch_lang_tensor = patch_lang_tensor
