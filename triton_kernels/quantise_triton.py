"""The kernels of `quantise`: one token a program, read once, written once in 8 bits.

The Hadamard matrix of 256 is that of 16, twice: x as a square of 16 x 16, multiplied from both sides. Two products of
depth 16 on the tensor cores are an eighth of one of depth 256, and need no matrix in memory.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lowvram.triton_kernels.hadamard_triton import hadamard
from lowvram.triton_kernels.modulate_triton import gelu_of, modulated_row, row_step
from lowvram.triton_kernels.norm_rope import EPS, LEAST
from lowvram.triton_kernels.quantise import PEAK, room


def warps_of(block: int) -> int:
    """Warps of a program on rows padded to `block`: at most 64 numbers a thread."""
    return min(16, max(4, block // 1024))


@triton.jit
def rotated(y, BLOCK: tl.constexpr):
    """y [BLOCK] in a 16-bit format -> float32, its groups of 256 rotated.

    The first product is exact but for its sums. The second takes its operand in TF32: 2^-11 of a number, where an
    int8 step is at least 2^-7 of the largest.
    """
    matrix = hadamard(16)
    y = tl.dot(tl.reshape(y, [BLOCK // 16, 16]), matrix.to(y.dtype), out_dtype=tl.float32)
    y = tl.permute(tl.reshape(y, [BLOCK // 256, 16, 16]), [0, 2, 1])
    y = tl.dot(tl.reshape(y, [BLOCK // 16, 16]), matrix, input_precision="tf32", out_dtype=tl.float32)
    y = tl.permute(tl.reshape(y, [BLOCK // 256, 16, 16]), [0, 2, 1])
    return tl.reshape(y, [BLOCK]) * 0.0625


@triton.jit
def store_8bit(
    y, out, scale, row, width,
    LEAST: tl.constexpr, PEAK: tl.constexpr, WHOLE: tl.constexpr, ROTATED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Row `row` of out [n, width] and of scale [n] from y [BLOCK], zero beyond the width."""
    d = tl.arange(0, BLOCK)
    y = rotated(y, BLOCK) if ROTATED else y.to(tl.float32)
    most = tl.maximum(tl.max(tl.abs(y), 0), LEAST)
    bad = tl.sum(y * 0.0, 0)  # 0, or NaN: a maximum does not see NaN, and integers cannot hold it
    y = y * (PEAK / most)
    if WHOLE:
        y = tl.floor(y + 0.5)
    y = tl.minimum(tl.maximum(y, -PEAK), PEAK).to(out.dtype.element_ty)
    tl.store(out + row * width + d, y, mask=d < width)
    tl.store(scale + row, most / PEAK + bad)


@triton.jit
def quantise_kernel(
    x, out, scale, width, x_row,
    LEAST: tl.constexpr, PEAK: tl.constexpr, WHOLE: tl.constexpr, GELU: tl.constexpr, ROTATED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    y = tl.load(x + row * x_row + d, mask=d < width, other=0)
    if GELU:
        y = gelu_of(y.to(tl.float32)).to(x.dtype.element_ty)
    store_8bit(y, out, scale, row, width, LEAST, PEAK, WHOLE, ROTATED, BLOCK)


@triton.jit
def modulate_quantise_kernel(
    x, shift, by, out, scale, width, x_row, shift_row, by_row,
    EPS: tl.constexpr, LEAST: tl.constexpr, PEAK: tl.constexpr, WHOLE: tl.constexpr, ROTATED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    y = modulated_row(x + row * x_row, shift + row * shift_row, by + row * by_row, width, EPS, BLOCK)
    store_8bit(y.to(x.dtype.element_ty), out, scale, row, width, LEAST, PEAK, WHOLE, ROTATED, BLOCK)


def quantise(x: Tensor, group: int, form: str) -> tuple[Tensor, Tensor]:
    """Launch with tensors as `quantise.quantise_op` describes them."""
    return _quantise(x, group, form, gelu=False)


def gelu(x: Tensor, group: int, form: str) -> tuple[Tensor, Tensor]:
    """Launch with tensors as `quantise.gelu_quantise_op` describes them."""
    return _quantise(x, group, form, gelu=True)


def modulate(x: Tensor, shift: Tensor, by: Tensor, group: int, form: str) -> tuple[Tensor, Tensor]:
    """Launch with tensors as `quantise.modulate_quantise_op` describes them."""
    n, width = x.shape
    out, scale = room(x, form)
    block = triton.next_power_of_2(max(width, 256))
    if n:
        modulate_quantise_kernel[(n,)](
            x, shift, by, out, scale, width, x.stride(0), row_step(shift), row_step(by),
            EPS=EPS, LEAST=LEAST, PEAK=PEAK[form], WHOLE=form == "int8", ROTATED=group > 0, BLOCK=block,
            num_warps=warps_of(block),
        )  # fmt: skip
    return out, scale


def _quantise(x: Tensor, group: int, form: str, *, gelu: bool) -> tuple[Tensor, Tensor]:
    n, width = x.shape
    out, scale = room(x, form)
    block = triton.next_power_of_2(max(width, 256))
    if n:
        quantise_kernel[(n,)](
            x, out, scale, width, x.stride(0),
            LEAST=LEAST, PEAK=PEAK[form], WHOLE=form == "int8", GELU=gelu, ROTATED=group > 0, BLOCK=block,
            num_warps=warps_of(block),
        )  # fmt: skip
    return out, scale
