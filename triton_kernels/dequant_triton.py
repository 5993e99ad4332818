"""The kernels of `dequant`: stored bytes -> dense numbers, each byte read once, each number written once.

All arithmetic is in float32 in the order of the encodings in torch, and rounded once where it is stored. A fused
multiply-add would skip a rounding that torch does, so every launch forbids it. fp8 is taken apart as bytes: as a type it
does not compile for sm_86.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lowvram.triton_kernels.hadamard import root
from lowvram.triton_kernels.hadamard_triton import rotated_integers

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
    start = (tl.program_id(0) % chunks).to(tl.int64) * BLOCK  # a weight with one scale is a single row
    c = tl.arange(0, BLOCK)
    inside = c < tl.minimum(columns - start, BLOCK).to(tl.int32)
    at = row.to(tl.int64) * columns + start
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
        tile = row // ROWS * scale_row + (start.to(tl.int32) + c) // COLUMNS
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


@triton.jit
def rotated_kernel(
    weight, scale, out, columns, chunks, scale_row,
    PACKED: tl.constexpr, GROUP: tl.constexpr, SHRINK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A stretch of a row of whole numbers a program, rotated back. SHRINK is the factor of the rotation, a power of two."""
    row = tl.program_id(0) // chunks
    start = tl.program_id(0) % chunks * BLOCK
    c = start + tl.arange(0, BLOCK)
    if PACKED:
        pair = start // 2 + tl.arange(0, BLOCK // 2)
        at = weight + row.to(tl.int64) * (columns // 2)
        stored = tl.load(at + pair, mask=pair < columns // 2, other=0).to(tl.int32)
        q = tl.interleave(((stored & 15) ^ 8) - 8, stored >> 4)
    else:
        q = tl.load(weight + row.to(tl.int64) * columns + c, mask=c < columns, other=0).to(tl.int32)
    value = rotated_integers(q, GROUP, BLOCK) * (tl.load(scale + row * scale_row).to(tl.float32) * SHRINK)
    tl.store(out + row.to(tl.int64) * columns + c, value.to(out.dtype.element_ty), mask=c < columns)


def rotated(out: Tensor, weight: Tensor, scale: Tensor, group: int) -> None:
    """Launch with tensors as `dequant.rotated_` describes them."""
    rows, columns = out.shape
    chunks, scale_row = triton.cdiv(columns, BLOCK), 0 if scale.numel() == 1 else scale.stride(0)
    rotated_kernel[(rows * chunks,)](
        weight, scale, out, columns, chunks, scale_row,
        PACKED=weight.shape[1] != columns, GROUP=group, SHRINK=1 / root(group), BLOCK=BLOCK,
        num_warps=WARPS, enable_fp_fusion=False,
    )  # fmt: skip


@triton.jit
def in_tiles(row, g, groups):
    """Where the scale of group g of a row lies, in the order of tensor cores (`quant/encodings/tiles.py`)."""
    band = (row // 128).to(tl.int64) * tl.cdiv(groups, 4) * 512
    return band + g // 4 * 512 + row % 32 * 16 + row % 128 // 32 * 4 + g % 4


@triton.jit
def mxfp8_kernel(weight, scale, out, columns, chunks, BLOCK: tl.constexpr):
    row = tl.program_id(0) // chunks
    c = tl.program_id(0) % chunks * BLOCK + tl.arange(0, BLOCK)
    inside = c < columns
    at = row.to(tl.int64) * columns
    value = e4m3(tl.load(weight + at + c, mask=inside, other=0).to(tl.int32))
    exponent = tl.load(scale + in_tiles(row, c // 32, columns // 32), mask=inside, other=0).to(tl.int32)
    # 0 stands for 0, and 255 for NaN, not for infinity.
    bits = (exponent << 23) | tl.where(exponent == 255, 1 << 22, 0)
    value = value * bits.to(tl.float32, bitcast=True)
    tl.store(out + at + c, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def e2m1(code):
    """float32 of 4-bit floats; there is no negative zero."""
    mantissa, exponent = code & 1, (code >> 1) & 3
    quarters = tl.where(exponent == 0, 2 * mantissa, (2 + mantissa) << exponent)
    return tl.where(code >= 8, -quarters, quarters).to(tl.float32) * 0.25


@triton.jit
def nvfp4_kernel(
    weight, scale, whole, factors, out, columns, chunks,
    HIGH_FIRST: tl.constexpr, FACTORS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) // chunks
    start = tl.program_id(0) % chunks * BLOCK
    pair = start // 2 + tl.arange(0, BLOCK // 2)
    inside = pair < columns // 2
    stored = tl.load(weight + row.to(tl.int64) * (columns // 2) + pair, mask=inside, other=0).to(tl.int32)
    group = tl.load(scale + in_tiles(row, pair // 8, columns // 16), mask=inside, other=0).to(tl.int32)
    by = tl.load(whole) * e4m3(group)
    low, high = e2m1(stored & 15) * by, e2m1(stored >> 4) * by
    value = tl.interleave(high, low) if HIGH_FIRST else tl.interleave(low, high)
    c = start + tl.arange(0, BLOCK)
    if FACTORS:
        value = value * tl.load(factors + c, mask=c < columns, other=0).to(tl.float32)
    at = row.to(tl.int64) * columns
    tl.store(out + at + c, value.to(out.dtype.element_ty), mask=c < columns)


@triton.jit
def levels_kernel(
    weight, absmax, levels, outer, outer_levels, out, count, offset,
    COLUMNS: tl.constexpr, NESTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """bitsandbytes: two codes a byte, the first one high; a scale for COLUMNS weights, itself a code if NESTED."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    pair = start // 2 + tl.arange(0, BLOCK // 2)
    inside = pair < count // 2
    stored = tl.load(weight + pair, mask=inside, other=0).to(tl.int32)
    b = pair // (COLUMNS // 2)
    scale = tl.load(absmax + b, mask=inside, other=0)
    if NESTED:
        code = tl.load(outer_levels + scale.to(tl.int32), mask=inside, other=0)
        scale = code * tl.load(outer + b // NESTED, mask=inside, other=0) + offset
    high = tl.load(levels + (stored >> 4), mask=inside, other=0) * scale
    low = tl.load(levels + (stored & 15), mask=inside, other=0) * scale
    c = start + tl.arange(0, BLOCK)
    tl.store(out + c, tl.interleave(high, low).to(out.dtype.element_ty), mask=c < count)


@triton.jit
def halves_kernel(
    packed, scale, shift, out, count, half, COLUMNS: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr
):
    """quanto: of `count` weights the first `half` lie in low nibbles, the others in high ones."""
    c = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    stored = tl.load(packed + c, mask=c < half, other=0).to(tl.int32)
    for high in tl.static_range(2):
        to = high * half + c
        inside = (c < half) & (to < count)
        q = ((stored >> (4 * high)) & 15).to(tl.float32)
        by = tl.load(scale + to // COLUMNS, mask=inside, other=0).to(tl.float32)
        less = tl.load(shift + to // COLUMNS, mask=inside, other=0).to(tl.float32)
        value = (q - less) * by if WHOLE else q * by - less
        tl.store(out + to, value.to(out.dtype.element_ty), mask=inside)


def mxfp8(out: Tensor, weight: Tensor, scale: Tensor) -> None:
    """Launch with tensors as `dequant.mxfp8_` describes them."""
    rows, columns = out.shape
    chunks = triton.cdiv(columns, BLOCK)
    mxfp8_kernel[(rows * chunks,)](
        weight, scale, out, columns, chunks, BLOCK=BLOCK, num_warps=WARPS, enable_fp_fusion=False
    )


def nvfp4(
    out: Tensor, weight: Tensor, scale: Tensor, whole: Tensor, factors: Tensor | None, high_first: bool
) -> None:
    """Launch with tensors as `dequant.nvfp4_` describes them."""
    rows, columns = out.shape
    chunks = triton.cdiv(columns, BLOCK)
    nvfp4_kernel[(rows * chunks,)](
        weight, scale, whole, whole if factors is None else factors, out, columns, chunks,
        HIGH_FIRST=high_first, FACTORS=factors is not None, BLOCK=BLOCK,
        num_warps=WARPS, enable_fp_fusion=False,
    )  # fmt: skip


def levels(
    out: Tensor, weight: Tensor, absmax: Tensor, table: Tensor, outer: Tensor, outer_table: Tensor,
    block: int, nested: int, offset: float,
) -> None:  # fmt: skip
    """Launch with tensors as `dequant.levels_` describes them."""
    count = out.numel()
    levels_kernel[(triton.cdiv(count, BLOCK),)](
        weight, absmax, table, outer, outer_table, out, count, offset,
        COLUMNS=block, NESTED=nested, BLOCK=BLOCK, num_warps=WARPS, enable_fp_fusion=False,
    )  # fmt: skip


def halves(out: Tensor, packed: Tensor, scale: Tensor, shift: Tensor, group: int) -> None:
    """Launch with tensors as `dequant.halves_` describes them."""
    half = packed.numel()
    halves_kernel[(triton.cdiv(half, BLOCK),)](
        packed, scale, shift, out, out.numel(), half,
        COLUMNS=group, WHOLE=not shift.is_floating_point(), BLOCK=BLOCK,
        num_warps=WARPS, enable_fp_fusion=False,
    )  # fmt: skip
