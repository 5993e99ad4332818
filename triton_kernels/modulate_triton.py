"""The kernels of `modulate`: each reads its tensors once and writes once.

Rows are the first axis of a grid: the others end at 65,535 programs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowvram.triton_kernels.norm_rope import EPS

BLOCK = 1024
WARPS = 4


@triton.jit
def modulated_row(x, shift, scale, width, EPS: tl.constexpr, BLOCK: tl.constexpr):
    """One token, float32 [BLOCK], zero beyond the width; BLOCK is the least power of two that holds it."""
    d = tl.arange(0, BLOCK)
    inside = d < width
    y = tl.load(x + d, mask=inside, other=0).to(tl.float32)
    mean = tl.sum(y, 0) / width
    y = tl.where(inside, y - mean, 0.0)
    y = y / tl.sqrt_rn(tl.sum(y * y, 0) / width + EPS)
    by = 1.0 + tl.load(scale + d, mask=inside, other=0)
    return y * by + tl.load(shift + d, mask=inside, other=0)


@triton.jit
def gelu_of(y):
    """The tanh form, of float32."""
    inner = 0.7978845608028654 * (y + 0.044715 * y * y * y)  # sqrt(2 / pi)
    return y * tl.sigmoid(2.0 * inner)  # 0.5 * (1 + tanh(u)) is sigmoid(2 u)


@triton.jit
def modulate_kernel(
    x, shift, scale, out, width, x_row, shift_row, scale_row, EPS: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    y = modulated_row(x + row * x_row, shift + row * shift_row, scale + row * scale_row, width, EPS, BLOCK)
    tl.store(out + row * width + d, y.to(out.dtype.element_ty), mask=d < width)


@triton.jit
def gated_kernel(x, y, gate, width, x_row, y_row, gate_row, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = d < width
    old = tl.load(x + row * x_row + d, mask=inside, other=0).to(tl.float32)
    add = tl.load(y + row * y_row + d, mask=inside, other=0).to(tl.float32)
    new = old + add * tl.load(gate + row * gate_row + d, mask=inside, other=0)
    tl.store(x + row * x_row + d, new.to(x.dtype.element_ty), mask=inside)


@triton.jit
def gelu_kernel(x, width, x_row, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = d < width
    y = tl.load(x + row * x_row + d, mask=inside, other=0).to(tl.float32)
    tl.store(x + row * x_row + d, gelu_of(y).to(x.dtype.element_ty), mask=inside)


def modulate(x: Tensor, shift: Tensor, scale: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Launch with tensors as `modulate.modulate_op` describes them."""
    n, width = x.shape
    out = torch.empty(n, width, dtype=dtype or x.dtype, device=x.device)
    modulate_kernel[(n,)](
        x, shift, scale, out, width, x.stride(0), row_step(shift), row_step(scale),
        EPS=EPS, BLOCK=triton.next_power_of_2(width), num_warps=8,
    )  # fmt: skip
    return out


def gated(x: Tensor, y: Tensor, gate: Tensor) -> None:
    """Launch with tensors as `modulate.gated_` describes them."""
    n, width = x.shape
    gated_kernel[(n, triton.cdiv(width, BLOCK))](
        x, y, gate, width, x.stride(0), y.stride(0), row_step(gate), BLOCK=BLOCK, num_warps=WARPS
    )


def gelu(x: Tensor) -> None:
    """Launch with tensors as `modulate.gelu_` describes them."""
    n, width = x.shape
    gelu_kernel[(n, triton.cdiv(width, BLOCK))](x, width, x.stride(0), BLOCK=BLOCK, num_warps=WARPS)


def row_step(x: Tensor) -> int:
    """Distance between the rows of x [n, width]; 0 if there is one, which then serves all tokens."""
    return 0 if x.shape[0] == 1 else x.stride(0)
