"""Triton's interpreter: kernels run on a CPU, tensor by tensor, in NumPy. For tests and for a dry acceptance run only.

Traps of the interpreter (Triton 3.7.1), and what is done about them, in tests only:

- `tl.dot` of bfloat16 multiplies the raw bits, of float16 is slow. `dot` widens the operands to float32, which holds
  them exactly, and rounds the result once.
- float32 to bfloat16 truncates where hardware rounds; to float8 it loses the carry of its rounding. `convert` lets
  torch do both.
- bfloat16 knows no arithmetic, and an integer cast to it keeps its bits: kernels go through float32 either way.
- float32 to float8 does not saturate, to int8 it wraps around: kernels clamp first, and tests overflow on purpose.
- A masked load without `other` gives 0, on hardware anything: kernels always give `other`.
"""

from __future__ import annotations

from typing import Any


def mend() -> None:
    """Put right what the interpreter of this process does wrong. TRITON_INTERPRET has to be 1 before Triton is imported."""
    import numpy as np
    import torch
    import triton.language as tl
    from triton.runtime import interpreter

    def widened(handle: Any) -> Any:
        kind = handle.dtype.scalar
        if kind == tl.bfloat16:
            return (handle.data.astype(np.uint32) << 16).view(np.float32)
        if kind.is_floating() and kind.primitive_bitwidth == 8:
            half = interpreter._convert_float(handle.data, kind, tl.float16, None).view(np.float16)
            return half.astype(np.float32)
        return handle.data.astype(
            np.float32 if kind.is_floating() else np.float64
        )  # 64: exact for sums of int8

    def dot(self: Any, a: Any, b: Any, d: Any, *_: Any) -> Any:
        left, right = widened(a), widened(b)
        data = left @ right + d.data.astype(left.dtype)
        return interpreter.TensorHandle(data.astype(d.data.dtype), d.dtype.scalar)

    narrow = {tl.bfloat16: (torch.bfloat16, torch.uint16), tl.float8e4nv: (torch.float8_e4m3fn, torch.uint8)}
    convert_float = interpreter._convert_float

    def convert(data: Any, source: Any, target: Any, rounding: Any) -> Any:
        if source != tl.float32 or target not in narrow:
            return convert_float(data, source, target, rounding)
        kind, bits = narrow[target]
        return torch.from_numpy(np.ascontiguousarray(data)).to(kind).view(bits).numpy()

    interpreter.InterpreterBuilder.create_dot = dot
    interpreter._convert_float = convert
