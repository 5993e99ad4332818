"""Attention as ops, so that a plan on meta tensors sees what they allocate: their results, never the logits.

    attention(q, k, v, bias)       softmax(q k^T / sqrt(d) + bias) v, by torch's scaled_dot_product_attention: R0.
                                   The reference, the fallback, and what cross attention uses.
    attend_(out, q, k, v, ...)     the same from quantised rows, written into `out`: R1 to R4.

scaled_dot_product_attention is at the ceiling of bf16 on every card this runs on. The others change the number
format, or skip work:

    R1  int8 q k, bf16 p v      fp32 accumulation
    R2  int8 q k, fp16 p v      fp16 accumulation inside a tile of keys, fp32 between tiles
    R3  int8 q k, fp8 p v       p up to 224 and v up to 4.5, so that a tile of 64 keys stays inside fp16
    R4  R1 to R3 on the tiles of keys that an index names; tokens are then in an order that puts neighbours in space and
        time into one tile (`lowvram.models.token_order`)

A row of q or k is int8 with one scale, quantised after a rotation by a Hadamard matrix (`norm_rope`). V is divided
by the maximum of each channel over V_RUN tokens. `attend_reference` is the arithmetic of the kernel, and the CPU path.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

HEAD_DIM = 128
KEY_TILE = 64
"""Keys that an index names at once; rows of fp8 V are padded to a multiple of it."""
QUERY_TILE = 128
"""Queries that share a row of an index."""
V_RUN = 1024
"""Tokens that share a scale of V per channel."""
V_PEAK: Final = {"bf16": 0.0, "fp16": 1.0, "fp8": 4.5}
"""Largest magnitude of stored V; 0 if V is stored as it is."""
P_PEAK = 224.0
"""Largest P of fp8: KEY_TILE * P_PEAK * 4.5 = 64512 is inside float16."""
FACTOR = math.log2(math.e) / math.sqrt(HEAD_DIM)
"""From a product of q and k to a power of two."""
_MMA_DEPTH: Final = {"fp16": 16, "fp8": 32}
"""Keys that one tensor core instruction adds up before it rounds to float16."""


# ---- R0


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """q [..., heads, m, d], k and v [..., heads, n, d] -> [..., m, heads * d], contiguous.

    bias: added to the logits, broadcastable to [..., heads, m, n], in the dtype of q.
    """
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return _sdpa(q, k, v, bias)
    out: Tensor = torch.ops.lowvram.attention(q, k, v, bias)
    return out


def _sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    # torch's fused kernels take four dimensions only: with three it would make the logits.
    batch = (None,) * (4 - q.dim())
    order = sdpa_order(q, biased=bias is not None) if q.is_cuda else []
    with sdpa_kernel(order, set_priority=True) if order else nullcontext():
        out = functional.scaled_dot_product_attention(
            q[batch], k[batch], v[batch], attn_mask=None if bias is None else bias[(None,) * (4 - bias.dim())]
        ).view(*q.shape[:-1], v.shape[-1])
    # The result lies as q does: where that is [m, heads, d] in memory, joining the heads is a view, not a copy.
    return out.transpose(-2, -3).flatten(-2)


_SOUND_CUDNN = 91501
"""Before this version, attention of cuDNN reads past keys whose number is no multiple of 128 (pytorch#169849)."""


def sdpa_order(q: Tensor, *, biased: bool = False) -> list[SDPBackend]:
    """Backends of torch in the order they are asked for.

    cuDNN wins on Hopper and the large Blackwells and is asked nowhere else. It is not asked with a bias: on cards for
    which it has no such kernel it fails only when it runs, and no other backend takes over. Flash takes no bias at all.
    """
    rest = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    if biased:
        return rest
    large = torch.cuda.get_device_capability(q.device)[0] in (9, 10)
    wins = large and (torch.backends.cudnn.version() or 0) >= _SOUND_CUDNN
    return [*[SDPBackend.CUDNN_ATTENTION] * wins, SDPBackend.FLASH_ATTENTION, *rest]


def sdpa_backend(q: Tensor) -> str:
    """The backend that attention of q [1, heads, n, 128] to itself takes on its card, such as "flash_attention"."""
    with sdpa_kernel(sdpa_order(q), set_priority=True):
        return SDPBackend(torch._fused_sdp_choice(q, q, q)).name.lower()


@torch.library.custom_op("lowvram::attention", mutates_args=())
def _attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    return _sdpa(q, k, v, bias)


@_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    *batch, heads, m, d = q.shape
    return q.new_empty(*batch, m, heads * d)


# ---- R1 to R4


def attend_(
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
) -> None:
    """Attention of int8 q [heads, m, 128] to int8 k [heads, n, 128], written into out [m, heads * 128].

    q_scale [heads, m], k_scale [heads, n]  float32: a row is its integers times its scale
    v         "bf16", "fp16": [heads, n, 128]; "fp8": [heads, 128, n padded to KEY_TILE], zero beyond n
    v_scale   [heads, ceil(n / V_RUN), 128] float32; not read for "bf16"
    index     [heads, ceil(m / QUERY_TILE), count] int32, ascending: tiles of KEY_TILE keys to attend to; None for all
    half      whether a tile's P V is added up in float16 ("fp16", "fp8")

    Rows of `out` and heads of all others may be strided; the last dimension is contiguous.
    """
    torch.ops.lowvram.attend_(out, q, q_scale, k, k_scale, v, v_scale, index, v_format, half)


@torch.library.custom_op("lowvram::attend_", mutates_args=("out",))
def _attend(
    out: Tensor,
    q: Tensor,
    q_scale: Tensor,
    k: Tensor,
    k_scale: Tensor,
    v: Tensor,
    v_scale: Tensor,
    index: Tensor | None,
    v_format: str,
    half: bool,
) -> None:
    if out.is_cuda:
        from lowvram.triton_kernels import attention_triton, tiles

        tile = tiles.ATTENTION[v_format][tiles.arch_of(out.device)]
        attention_triton.attend(
            out, q, q_scale, k, k_scale, v, v_scale, index, v_format=v_format, half=half, tile=tile
        )
    else:
        out.copy_(attend_reference(q, q_scale, k, k_scale, v, v_scale, index, v_format=v_format, half=half))


@_attend.register_fake
def _(
    out: Tensor,
    q: Tensor,
    q_scale: Tensor,
    k: Tensor,
    k_scale: Tensor,
    v: Tensor,
    v_scale: Tensor,
    index: Tensor | None,
    v_format: str,
    half: bool,
) -> None:
    heads, m, d = q.shape
    assert out.shape == (m, heads * d) and k.shape[0] == v.shape[0] == heads and q_scale.shape == (heads, m)


def attend_reference(
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
    tile: int = KEY_TILE,
) -> Tensor:
    """What the kernel computes, in torch: [m, heads * 128] float32. `tile`: keys between two promotions to float32.

    Products of int8 rows are exact in float32 (128 * 127^2 < 2^24), so the multiplication needs no integers.
    """
    m, n = q.shape[1], k.shape[1]
    rows = q.float()
    scale = (q_scale * FACTOR).unsqueeze(-1)
    top = torch.full_like(scale, -1e30)
    total, acc = torch.zeros_like(scale), torch.zeros_like(rows)
    for start in range(0, n, tile):
        stop = min(start + tile, n)
        s = (rows @ k[:, start:stop].float().mT) * scale * k_scale[:, None, start:stop]
        if index is not None:
            visited = (index == start // KEY_TILE).any(-1).repeat_interleave(QUERY_TILE, 1)[:, :m, None]
            s = torch.where(
                visited, s, -1e30
            )  # a row that has visited no tile yet is faded to nothing by its first
        higher = torch.maximum(top, s.amax(-1, keepdim=True))
        fade, p = torch.exp2(top - higher), torch.exp2(s - higher)
        top = higher
        p = _narrowed(p, v_format)
        total = total * fade + p.sum(-1, keepdim=True)
        acc = acc * fade + _tile_product(p, v, v_scale, start, stop, v_format, half)
    return (acc / total.clamp_min(1e-30)).transpose(0, 1).flatten(1)


def _narrowed(p: Tensor, v_format: str) -> Tensor:
    """P as the tensor cores see it, in float32. Its sum is taken from this, so that rounding cancels."""
    if v_format == "fp8":
        return (p * P_PEAK).to(torch.float8_e4m3fn).float()
    return p.to(torch.float16 if v_format == "fp16" else torch.bfloat16).float()


def _tile_product(
    p: Tensor, v: Tensor, v_scale: Tensor, start: int, stop: int, v_format: str, half: bool
) -> Tensor:
    """P V of one tile of keys, float32."""
    values = (v[..., start:stop].mT if v_format == "fp8" else v[:, start:stop]).float()
    if v_format == "bf16":
        return p @ values.to(torch.bfloat16).float()
    if half:
        depth = _MMA_DEPTH[v_format]
        part = torch.zeros(*p.shape[:-1], HEAD_DIM, device=p.device)
        for i in range(0, stop - start, depth):
            part = (part + p[..., i : i + depth] @ values[:, i : i + depth]).half().float()
    else:
        part = p @ values
    return part * v_scale[:, None, start // V_RUN]


# ---- R4: which tiles


def select_tiles(q: Tensor, q_scale: Tensor, pooled: Tensor, keep: float) -> Tensor:
    """The share `keep` of key tiles that matter most to each tile of queries: [heads, query tiles, count] int32.

    pooled: [heads, key tiles, 128] float32, the mean key of each tile in the space of int8 k (`pool_keys`). A tile
    is judged by the product of mean query and mean key, which needs no training and one small multiplication.
    """
    heads, m, _ = q.shape
    mean = q.new_empty(heads, -(-m // QUERY_TILE), HEAD_DIM, dtype=torch.float32)
    for t in range(mean.shape[1]):  # one tile's float32 at a time
        rows = slice(t * QUERY_TILE, (t + 1) * QUERY_TILE)
        mean[:, t] = (q[:, rows].float() * q_scale[:, rows, None]).mean(1)
    count = max(1, math.ceil(keep * pooled.shape[1]))
    return (mean @ pooled.mT).topk(count).indices.sort().values.to(torch.int32)


def pool_keys(k: Tensor, k_scale: Tensor, out: Tensor) -> None:
    """The mean key of every tile into out [heads, key tiles, 128] float32."""
    whole = k.shape[1] // KEY_TILE
    for h in range(k.shape[0]):  # one head's float32 at a time
        rows = k[h].float() * k_scale[h, :, None]
        out[h, :whole] = rows[: whole * KEY_TILE].unflatten(0, (whole, KEY_TILE)).mean(1)
        if whole < out.shape[1]:
            out[h, whole] = rows[whole * KEY_TILE :].mean(0)
