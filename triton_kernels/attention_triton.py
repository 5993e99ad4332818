"""The attention kernel of modes R1 to R4, in Triton. Its arithmetic in torch is `attention.attend_reference`.

One program holds a tile of queries of one head and walks over tiles of keys with the running softmax of Flash
attention. The query tile is the fastest grid axis: programs of one head then read the same keys at the same time,
and those fit a 6 MB L2 cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowvram.triton_kernels.attention import FACTOR, QUERY_TILE, V_RUN
from lowvram.triton_kernels.tiles import Tile


@triton.jit
def attend_kernel(
    q,  # [heads, n_q, 128] int8
    q_scale,  # [heads, n_q] float32
    k,  # [heads, n_k, 128] int8
    k_scale,  # [heads, n_k] float32
    v,  # [heads, n_k, 128] bfloat16 or float16; [heads, 128, padded n_k] float8_e4m3fn, zero beyond n_k
    v_scale,  # [heads, runs, 128] float32; not read for bfloat16
    index,  # [heads, tiles of queries, count] int32, tiles of keys to visit; read if SPARSE
    out,  # [n_q, heads * 128]
    factor,  # logits to powers of two: log2(e) / sqrt(128)
    n_q,
    n_k,
    count,
    q_head,
    qs_head,
    k_head,
    ks_head,
    v_head,
    v_row,
    vs_head,
    index_head,
    index_row,
    out_row,
    V_FORMAT: tl.constexpr,
    HALF: tl.constexpr,  # accumulate P V of one tile in float16
    SPARSE: tl.constexpr,
    SELECT_M: tl.constexpr,  # queries that share a row of `index`
    V_RUN: tl.constexpr,  # keys that share a row of v_scale
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    D: tl.constexpr = 128
    tl.static_assert(V_RUN % BLOCK_N == 0)
    tl.static_assert(not SPARSE or BLOCK_N == 64)  # what an index counts in
    tl.static_assert(V_FORMAT != "fp8" or BLOCK_N <= 64)  # 64 * 224 * 4.5 is the most a float16 holds
    tile, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, D)
    n = tl.arange(0, BLOCK_N)
    rows = m.to(tl.int64)
    q8 = tl.load(q + head * q_head + rows[:, None] * D + d[None, :], mask=m[:, None] < n_q, other=0)
    qs = tl.load(q_scale + head * qs_head + m, mask=m < n_q, other=0) * factor
    k_base = k + head * k_head
    ks_base = k_scale + head * ks_head
    v_base = v + head * v_head
    vs_base = v_scale + head * vs_head + d
    index_base = index + head * index_head + (tile * BLOCK_M // SELECT_M) * index_row

    top = tl.full([BLOCK_M], -1e30, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    steps = count if SPARSE else tl.cdiv(n_k, BLOCK_N)
    for step in range(steps):
        start = step * BLOCK_N
        if SPARSE:
            start = tl.load(index_base + step) * BLOCK_N
        key = start + n
        inside = key < n_k
        far = key.to(tl.int64)
        k8 = tl.load(k_base + far[None, :] * D + d[:, None], mask=inside[None, :], other=0)
        ks = tl.load(ks_base + key, mask=inside, other=0)
        s = tl.dot(q8, k8, out_dtype=tl.int32).to(tl.float32) * qs[:, None] * ks[None, :]
        s = tl.where(inside[None, :], s, -1e30)
        higher = tl.maximum(top, tl.max(s, 1))
        fade = tl.exp2(top - higher)
        p = tl.exp2(s - higher[:, None])
        top = higher
        if V_FORMAT == "fp8":
            p8 = (p * 224.0).to(tl.float8e4nv)
            total = total * fade + tl.sum(p8.to(tl.float32), 1)
            # Rows of channels, contiguous along the keys: read without a mask, since what pads V is zero.
            v8 = tl.trans(tl.load(v_base + d[:, None] * v_row + key[None, :]))
            vs = tl.load(vs_base + (start // V_RUN) * D)
            if HALF:
                part = tl.dot(p8, v8, out_dtype=tl.float16).to(tl.float32)
            else:
                part = tl.dot(p8, v8, out_dtype=tl.float32)
            acc = acc * fade[:, None] + part * vs[None, :]
        elif V_FORMAT == "fp16":
            p16 = p.to(tl.float16)
            total = total * fade + tl.sum(p16.to(tl.float32), 1)
            v16 = tl.load(v_base + far[:, None] * v_row + d[None, :], mask=inside[:, None], other=0)
            vs = tl.load(vs_base + (start // V_RUN) * D)
            if HALF:
                part = tl.dot(p16, v16, out_dtype=tl.float16).to(tl.float32)
            else:
                part = tl.dot(p16, v16, out_dtype=tl.float32)
            acc = acc * fade[:, None] + part * vs[None, :]
        else:
            b16 = p.to(tl.bfloat16)
            total = total * fade + tl.sum(b16.to(tl.float32), 1)
            v16 = tl.load(v_base + far[:, None] * v_row + d[None, :], mask=inside[:, None], other=0)
            acc = tl.dot(b16, v16, acc * fade[:, None])
    acc = acc / tl.maximum(total, 1e-30)[:, None]
    where = out + rows[:, None] * out_row + head * D + d[None, :]
    tl.store(where, acc.to(out.dtype.element_ty), mask=m[:, None] < n_q)


def attend(
    out: Tensor,
    q: Tensor,
    q_scale: Tensor,
    k: Tensor,
    k_scale: Tensor,
    v: Tensor,
    v_scale: Tensor,
    index: Tensor | None = None,
    *,
    v_format: str,
    half: bool,
    tile: Tile,
) -> None:
    """Launch the kernel with tensors as `attention.attend_` describes them."""
    heads, n_q, _ = q.shape
    grid = (triton.cdiv(n_q, tile.m), heads)
    visit = q_scale.new_empty(1, 1, 0, dtype=torch.int32) if index is None else index
    attend_kernel[grid](
        q, q_scale, k, k_scale, v, v_scale, visit, out,
        FACTOR, n_q, k.shape[1], visit.shape[2],
        q.stride(0), q_scale.stride(0), k.stride(0), k_scale.stride(0), v.stride(0), v.stride(1),
        v_scale.stride(0), visit.stride(0), visit.stride(1), out.stride(0),
        V_FORMAT=v_format, HALF=half, SPARSE=index is not None, SELECT_M=QUERY_TILE, V_RUN=V_RUN,
        BLOCK_M=tile.m, BLOCK_N=tile.n, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
