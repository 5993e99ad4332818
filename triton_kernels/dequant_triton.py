"""The kernels of `dequant`: stored bytes -> dense numbers, each byte read once, each number written once.

All arithmetic is in float32 in the order of the encodings in torch, and rounded once where it is stored. A fused
multiply-add would skip a rounding that torch does, so every launch forbids it. fp8 is taken apart as bytes: as a type it
does not compile for sm_86.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
"""Weights a program, of formats whose scales lie beside the weights."""
WARPS = 4


@triton.jit
def e4m3(byte):
    """float32 of fp8 bytes, given as int32: an fp16 with the same fields is 2^8 smaller. Exact, subnormals too."""
    bits = ((byte & 128) << 8) | ((byte & 127) << 7)
    value = bits.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    return tl.where((byte & 127) == 127, float("nan"), value)


@triton.jit
def e5m2(byte):
    """As `e4m3`; these bytes are the upper ones of fp16."""
    return (byte << 8).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def scaled_kernel(
    weight, scale, out, columns, chunks, scale_row,
    FORMAT: tl.constexpr, SCALES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    FACTOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A stretch of a row of whole-byte weights a program, times one scale a row or a scale a tile [ROWS, COLUMNS]."""
    row = tl.program_id(0) // chunks
    c = tl.program_id(0) % chunks * BLOCK + tl.arange(0, BLOCK)
    inside = c < columns
    at = row.to(tl.int64) * columns
    stored = tl.load(weight + at + c, mask=inside, other=0).to(tl.int32)
    if FORMAT == "e4m3":
        value = e4m3(stored)
    elif FORMAT == "e5m2":
        value = e5m2(stored)
    else:
        value = stored.to(tl.float32)
    if SCALES == "row":
        value = value * tl.load(scale + row * scale_row).to(tl.float32)
    elif SCALES == "tile":
        tile = row // ROWS * scale_row + c // COLUMNS
        value = value * tl.load(scale + tile, mask=inside, other=0).to(tl.float32)
    if FACTOR != 1:
        value = value * FACTOR
    tl.store(out + at + c, value.to(out.dtype.element_ty), mask=inside)


def scaled(
    out: Tensor, weight: Tensor, scale: Tensor, form: str, scales: str, tile: list[int], factor: float
) -> None:
    """Launch with tensors as `dequant.scaled_` describes them."""
    rows, columns = weight.shape
    chunks, scale_row = triton.cdiv(columns, BLOCK), 0 if scale.numel() == 1 else scale.stride(0)
    scaled_kernel[(rows * chunks,)](
        weight, scale, out, columns, chunks, scale_row,
        FORMAT=form, SCALES=scales, ROWS=tile[0], COLUMNS=tile[1], FACTOR=factor, BLOCK=BLOCK,
        num_warps=WARPS, enable_fp_fusion=False,
    )  # fmt: skip
