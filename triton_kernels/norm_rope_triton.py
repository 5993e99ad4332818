"""The kernels of `norm_rope`: one read of a projection, one write of what attention takes."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowvram.triton_kernels.attention import HEAD_DIM, KEY_TILE, V_PEAK, V_RUN
from lowvram.triton_kernels.hadamard_triton import sylvester
from lowvram.triton_kernels.norm_rope import EPS, LEAST

ROWS = 16
"""Tokens of a program: the least that a tensor core multiplies by the Hadamard matrix."""
WARPS = 4


@triton.jit
def rms_factor_kernel(x, factor, n, x_row, EPS: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr):
    D: tl.constexpr = 128
    rows = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    d = tl.arange(0, D)
    squares = tl.zeros([BLOCK], tl.float32)
    for h in range(HEADS):
        part = tl.load(x + rows[:, None] * x_row + h * D + d[None, :], mask=rows[:, None] < n, other=0)
        squares += tl.sum(part.to(tl.float32) * part.to(tl.float32), 1)
    tl.store(factor + rows, 1.0 / tl.sqrt_rn(squares / (HEADS * D) + EPS), mask=rows < n)


@triton.jit
def norm_rope_kernel(
    x,  # [n, HEADS * 128]
    weight,  # [HEADS * 128]
    rope,  # [n, 64, 2] float32
    factor,  # [n] float32; read if GIVEN
    centre,  # [HEADS, 128] float32; read if CENTRED
    out,  # [HEADS, n, 128]
    scale,  # [HEADS, n] float32; written if INT8
    n,
    x_row,
    out_head,
    out_row,
    scale_head,
    root,  # 1 / sqrt(128)
    EPS: tl.constexpr,
    LEAST: tl.constexpr,
    HEADS: tl.constexpr,
    GIVEN: tl.constexpr,
    INT8: tl.constexpr,
    CENTRED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    D: tl.constexpr = 128
    dtype = x.dtype.element_ty
    rows = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    inside = rows < n
    d = tl.arange(0, D)
    pair = tl.arange(0, D // 2)
    at = x + rows[:, None] * x_row + d[None, :]
    if GIVEN:
        f = tl.load(factor + rows, mask=inside, other=0)
    else:
        squares = tl.zeros([BLOCK], tl.float32)
        for h in range(HEADS):
            part = tl.load(at + h * D, mask=inside[:, None], other=0).to(tl.float32)
            squares += tl.sum(part * part, 1)
        f = 1.0 / tl.sqrt_rn(squares / (HEADS * D) + EPS)
    angle = rope + rows[:, None] * D + 2 * pair[None, :]
    cos = tl.load(angle, mask=inside[:, None], other=0)
    sin = tl.load(angle + 1, mask=inside[:, None], other=0)
    if INT8:
        rotation = sylvester(D).to(dtype)
    place = out + rows[:, None] * out_row + d[None, :]
    place_of_scale = scale + rows
    for h in range(HEADS):
        y = tl.load(at + h * D, mask=inside[:, None], other=0).to(tl.float32) * f[:, None]
        w = tl.load(weight + h * D + d).to(dtype).to(tl.float32)
        y = (y.to(dtype).to(tl.float32) * w[None, :]).to(dtype).to(tl.float32)
        a, b = tl.split(tl.reshape(y, [BLOCK, D // 2, 2]))
        y = tl.interleave(a * cos - b * sin, a * sin + b * cos).to(dtype)
        if INT8:
            y = tl.dot(y, rotation, out_dtype=tl.float32) * root
            if CENTRED:
                y = y - tl.load(centre + h * D + d)[None, :]
            most = tl.maximum(tl.max(tl.abs(y), 1), LEAST)
            y = tl.floor(y * (127.0 / most)[:, None] + 0.5)
            y = tl.minimum(tl.maximum(y, -127.0), 127.0).to(tl.int8)
            tl.store(place_of_scale, most / 127.0, mask=inside)
        tl.store(place, y, mask=inside[:, None])
        place += out_head
        place_of_scale += scale_head


@triton.jit
def quantise_values_kernel(
    v,  # [n, heads * 128]
    out,  # fp16: [heads, n, 128]; fp8: [heads, 128, n padded to PAD]
    scale,  # [heads, runs, 128] float32
    n,
    v_row,
    out_head,
    out_row,
    scale_head,
    LEAST: tl.constexpr,
    PEAK: tl.constexpr,
    FP8: tl.constexpr,
    RUN: tl.constexpr,
    PAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    D: tl.constexpr = 128
    run, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    d = tl.arange(0, D)
    step = tl.arange(0, BLOCK)
    first = run * RUN
    most = tl.full([D], LEAST, tl.float32)
    for i in range(0, RUN, BLOCK):
        rows = (first + i + step).to(tl.int64)
        part = tl.load(v + rows[:, None] * v_row + head * D + d[None, :], mask=rows[:, None] < n, other=0)
        most = tl.maximum(most, tl.max(tl.abs(part.to(tl.float32)), 0))
    tl.store(scale + head * scale_head + run * D + d, most / PEAK)
    ratio = PEAK / most
    for i in range(0, RUN, BLOCK):
        rows = (first + i + step).to(tl.int64)
        part = tl.load(v + rows[:, None] * v_row + head * D + d[None, :], mask=rows[:, None] < n, other=0)
        part = tl.minimum(tl.maximum(part.to(tl.float32) * ratio[None, :], -PEAK), PEAK)
        if FP8:
            padded = tl.cdiv(n, PAD) * PAD
            where = out + head * out_head + d[:, None] * out_row + rows[None, :]
            tl.store(where, tl.trans(part).to(tl.float8e4nv), mask=rows[None, :] < padded)
        else:
            where = out + head * out_head + rows[:, None] * out_row + d[None, :]
            tl.store(where, part.to(tl.float16), mask=rows[:, None] < n)


def rms_factor(x: Tensor) -> Tensor:
    """x [n, width] -> [n, 1] float32."""
    n, width = x.shape
    factor = x.new_empty(n, 1, dtype=torch.float32)
    grid = (triton.cdiv(n, ROWS),)
    rms_factor_kernel[grid](
        x, factor, n, x.stride(0), EPS=EPS, HEADS=width // HEAD_DIM, BLOCK=ROWS, num_warps=WARPS
    )
    return factor


def norm_rope(
    out: Tensor,
    scale: Tensor | None,
    x: Tensor,
    weight: Tensor,
    rope: Tensor,
    factor: Tensor | None,
    centre: Tensor | None,
) -> None:
    """Launch the kernel with tensors as `norm_rope.norm_rope_` and `norm_rope.norm_rope_int8_` describe them."""
    n, width = x.shape
    anything = rope  # a pointer where none is read
    grid = (triton.cdiv(n, ROWS),)
    norm_rope_kernel[grid](
        x, weight, rope, anything if factor is None else factor, anything if centre is None else centre,
        out, anything if scale is None else scale,
        n, x.stride(0), out.stride(0), out.stride(1), 0 if scale is None else scale.stride(0),
        1 / math.sqrt(HEAD_DIM),
        EPS=EPS, LEAST=LEAST, HEADS=width // HEAD_DIM, GIVEN=factor is not None, INT8=scale is not None,
        CENTRED=centre is not None, BLOCK=ROWS, num_warps=WARPS,
    )  # fmt: skip


def quantise_values(out: Tensor, scale: Tensor, v: Tensor, v_format: str) -> None:
    """Launch the kernel with tensors as `norm_rope.quantise_values_` describes them."""
    n, width = v.shape
    grid = (triton.cdiv(n, V_RUN), width // HEAD_DIM)
    quantise_values_kernel[grid](
        v, out, scale, n, v.stride(0), out.stride(0), out.stride(1), scale.stride(0),
        LEAST=LEAST, PEAK=V_PEAK[v_format], FP8=v_format == "fp8", RUN=V_RUN, PAD=KEY_TILE, BLOCK=64,
        num_warps=WARPS,
    )  # fmt: skip
