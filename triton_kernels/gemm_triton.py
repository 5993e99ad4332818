"""The kernel of `gemm`: a tile of the product a program, int8 on the tensor cores, the epilogue in registers."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lowvram.triton_kernels.gemm import RANK
from lowvram.triton_kernels.tiles import GemmTile

GROUP = 8
"""Tiles of rows that share the tiles of the weight while those are in L2."""


@triton.jit
def dequantised(total, a_scale, w_scale, bias, columns, n, BIASED: tl.constexpr):
    """Sums [rows, columns] as float32 with their scales and the bias."""
    inside = columns < n
    y = total.to(tl.float32) * a_scale[:, None]
    y = y * tl.load(w_scale + columns, mask=inside, other=0)[None, :]
    if BIASED:
        y = y + tl.load(bias + columns, mask=inside, other=0).to(tl.float32)[None, :]
    return y


@triton.jit
def add_low_rank(y, low, up, rank, low_at, up_at, BLOCK: tl.constexpr):
    """y [rows, columns] float32 plus low [rows, rank] times up [columns, rank] transposed; rank a multiple of BLOCK."""
    r = tl.arange(0, BLOCK)
    low_at, up_at = low + low_at[:, None] + r[None, :], up + up_at[None, :] + r[:, None]
    for _ in tl.range(0, rank, BLOCK, num_stages=1):
        y = tl.dot(tl.load(low_at), tl.load(up_at), y, input_precision="ieee")
        low_at += BLOCK
        up_at += BLOCK
    return y


@triton.jit
def add_gated(y, gate, at, in_rows, columns, n):
    """Add y [rows, columns], gated, to the rows that `at` points to."""
    y = y * tl.load(gate + columns, mask=columns < n, other=0)[None, :]
    where, inside = at + columns[None, :], in_rows[:, None] & (columns < n)[None, :]
    y += tl.load(where, mask=inside, other=0).to(tl.float32)
    tl.store(where, y.to(at.dtype.element_ty), mask=inside)


@triton.jit
def linear_kernel(
    a,  # [m, k] int8
    a_scale,  # [m] float32
    w,  # [n, k] int8
    w_scale,  # [n] float32
    bias,  # [n]; read if BIASED
    gate,  # [n] float32; read if GATED
    low,  # [m, rank]; read if ADAPTED
    up,  # [n, rank]; read if ADAPTED
    out,  # [m, n]: written, or added to if GATED
    m,
    n,
    k,
    rank,
    a_row,
    w_row,
    low_row,
    up_row,
    out_row,
    BIASED: tl.constexpr,
    GATED: tl.constexpr,
    ADAPTED: tl.constexpr,
    EVEN: tl.constexpr,  # whether k is a multiple of BLOCK_K
    GROUP: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tiles_m, tiles_n = tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N)
    program = tl.program_id(0)
    first = program // (GROUP * tiles_n) * GROUP
    height = tl.minimum(tiles_m - first, GROUP)
    inner = program % (GROUP * tiles_n)
    rows = (first + inner % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    first_column = inner // height * BLOCK_N
    columns = first_column + tl.arange(0, BLOCK_N)
    in_rows = rows < m
    far = rows.to(tl.int64)
    depth = tl.arange(0, BLOCK_K)
    # Beyond the edge the last row is read again: a mask in the loop would cost registers, and nothing of it is stored.
    row, column = tl.minimum(far, m - 1), tl.minimum(columns, n - 1).to(tl.int64)
    a_at = a + row[:, None] * a_row + depth[None, :]
    w_at = w + column[None, :] * w_row + depth[:, None]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
    for start in range(0, k, BLOCK_K):
        if EVEN:
            a8, w8 = tl.load(a_at), tl.load(w_at)
        else:
            inside = start + depth < k
            a8 = tl.load(a_at, mask=inside[None, :], other=0)
            w8 = tl.load(w_at, mask=inside[:, None], other=0)
        total = tl.dot(a8, w8, total, out_dtype=tl.int32)
        a_at += BLOCK_K
        w_at += BLOCK_K
    scale = tl.load(a_scale + rows, mask=in_rows, other=0)
    y = dequantised(total, scale, w_scale, bias, columns, n, BIASED)
    if ADAPTED:
        y = add_low_rank(y, low, up, rank, row * low_row, column * up_row, RANK)
    at = out + far[:, None] * out_row
    if GATED:
        # Half of the columns at a time: the sums and a residual of their size would not fit the registers.
        HALF: tl.constexpr = BLOCK_N // 2
        left, right = tl.split(tl.permute(tl.reshape(y, [BLOCK_M, 2, HALF]), [0, 2, 1]))
        columns = first_column + tl.arange(0, HALF)
        add_gated(left, gate, at, in_rows, columns, n)
        add_gated(right, gate, at, in_rows, columns + HALF, n)
    else:
        inside = in_rows[:, None] & (columns < n)[None, :]
        tl.store(at + columns[None, :], y.to(out.dtype.element_ty), mask=inside)


def linear(
    out: Tensor,
    a: Tensor,
    a_scale: Tensor,
    w: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    low: Tensor | None,
    up: Tensor | None,
    tile: GemmTile,
) -> None:
    """Launch with tensors as `gemm.int8_linear_op` and `gemm.int8_linear_gated_op` describe them."""
    (m, k), n = a.shape, w.shape[0]
    if m == 0:
        return
    anything = out[:0]  # a pointer where none is read
    adapted = low is not None and up is not None
    low, up = (low, up) if low is not None and up is not None else (anything, anything)
    linear_kernel[(triton.cdiv(m, tile.m) * triton.cdiv(n, tile.n),)](
        a, a_scale, w, w_scale, anything if bias is None else bias, anything if gate is None else gate, low, up, out,
        m, n, k, low.shape[1], a.stride(0), w.stride(0), low.stride(0), up.stride(0), out.stride(0),
        BIASED=bias is not None, GATED=gate is not None, ADAPTED=adapted, EVEN=k % tile.k == 0, GROUP=GROUP, RANK=RANK,
        BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
