"""From a projection to rows that attention reads: full-width RMS norm, 3D rotary embedding, and for 8-bit attention
centring, Hadamard rotation and one int8 scale a row.

Plain functions are the reference and the CPU path. Those with an underscore are ops that write into given tensors and
run a fused kernel on CUDA. A row x of a head is stored as integers i and a scale s with

    i * s = (x - m) H,    H the Hadamard matrix of 128 over sqrt(128)

H is orthonormal, so products of rotated rows are the products of the rows; it spreads an outlier channel over all of
them. Subtracting any m from all keys adds a constant to each row of logits, which the softmax ignores; m is the mean
of a sample of keys, which takes away what they have in common. What is left of an offset turns with the rotary
embedding and makes some channels of k larger than those of q: `balance_of` divides one and multiplies the other.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lowvram.triton_kernels.attention import HEAD_DIM, KEY_TILE, V_PEAK, V_RUN

EPS = 1e-6
LEAST = 1e-12
"""The least maximum that a scale is made from: rows of zeros stay finite."""
_WIDEST = 4
"""The largest power of two in a balance: a sample that says nothing keeps numbers in the range of their type."""


# ---- norm and rotary embedding


def rms_factor(x: Tensor) -> Tensor:
    """[..., width] -> [..., 1] float32: 1 / sqrt(mean square + eps)."""
    return torch.rsqrt(x.float().square().mean(-1, keepdim=True) + EPS)


def scaled(x: Tensor, factor: Tensor, weight: Tensor) -> Tensor:
    """x * factor in float32, cast, then the weight."""
    return (x.float() * factor).to(x.dtype) * weight.to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """RMS over the full width, before the split into heads."""
    return scaled(x, rms_factor(x), weight)


def heads(x: Tensor) -> Tensor:
    """[..., n, dim] -> [..., heads, n, 128] (a view)."""
    view: Tensor = x.unflatten(-1, (-1, HEAD_DIM)).transpose(-2, -3)
    return view


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Rotate interleaved pairs of x [..., heads, n, 128] by rope [n, 64, 2], in float32, rounded once."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.view_as_complex(rope)).flatten(-2).to(x.dtype)


# ---- int8 rows


def hadamard(like: Tensor) -> Tensor:
    """The Hadamard matrix of 128 in Sylvester's order, entries 1 and -1, in the dtype and on the device of `like`.

    Entry (i, j) says how many bits i and j share: -1 if an odd number. Made on the device: a matrix that comes from the
    host would make it wait for the queue.
    """
    n = torch.arange(HEAD_DIM, dtype=torch.int32, device=like.device)
    shared = n[:, None] & n
    for half in (4, 2, 1):
        shared = shared ^ (shared >> half)
    return (1 - 2 * (shared & 1)).to(like.dtype)


def centre_of(k: Tensor) -> Tensor:
    """What to subtract from keys: the mean of k [heads, sample, 128], rotated like rows: [heads, 128] float32."""
    mean = k.float().mean(-2)
    return mean @ hadamard(mean) / math.sqrt(HEAD_DIM)


def balance_of(q: Tensor, k: Tensor) -> Tensor:
    """What to multiply channels of queries by, and to divide those of keys by, from samples [heads, n, 128] of both:
    [heads, 128] float32.

    Rounding errors of rotated rows are white, so those of the logits grow as |q| |k|: the least product over scales s of
    channels is at s^2 = rms(k) / rms(q), in each. Powers of two, so that no product of q and k changes by a bit; the same
    for both channels of a pair, so that the rotary embedding does not see it.
    """
    queries = q.float().square().mean(-2)
    keys = k.float().var(-2, correction=0)  # around the centre, which is taken away
    ratio = keys.unflatten(-1, (-1, 2)).sum(-1).clamp_min(LEAST) / queries.unflatten(-1, (-1, 2)).sum(
        -1
    ).clamp_min(LEAST)
    return torch.exp2(torch.round(torch.log2(ratio) / 4).clamp(-_WIDEST, _WIDEST)).repeat_interleave(2, -1)


def quantise_rows(x: Tensor, centre: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x [heads, n, 128] -> int8 of that shape and scales [heads, n] float32. centre: of `centre_of`, for keys."""
    rows = x.float()
    rows = (rows @ hadamard(rows)) * (1 / math.sqrt(HEAD_DIM))
    if centre is not None:
        rows = rows - centre.unsqueeze(-2)
    most = rows.abs().amax(-1, keepdim=True).clamp_min(LEAST)
    integers = torch.floor(rows * (127 / most) + 0.5).clamp(-127, 127).to(torch.int8)
    return integers, most.squeeze(-1) / 127


# ---- V


def quantise_values(v: Tensor, v_format: str) -> tuple[Tensor, Tensor]:
    """v [heads, n, 128] -> V as `attention.attend_` takes it, and its scales [heads, ceil(n / V_RUN), 128] float32."""
    count, n, _ = v.shape
    peak = V_PEAK[v_format]
    runs = -(-n // V_RUN)
    scale = v.new_empty(count, runs, HEAD_DIM, dtype=torch.float32)
    padded = -(-n // KEY_TILE) * KEY_TILE
    out = (
        v.new_zeros(count, HEAD_DIM, padded, dtype=torch.float8_e4m3fn)
        if v_format == "fp8"
        else v.new_empty(v.shape, dtype=torch.float16)
    )
    for run in range(runs):
        some = slice(run * V_RUN, min((run + 1) * V_RUN, n))
        rows = v[:, some].float()
        most = rows.abs().amax(1).clamp_min(LEAST)
        rows = (rows * (peak / most)[:, None]).clamp(-peak, peak)
        scale[:, run] = most / peak
        if v_format == "fp8":
            out[:, :, some] = rows.mT.to(out.dtype)
        else:
            out[:, some] = rows.to(out.dtype)
    return out, scale


# ---- ops


@torch.library.custom_op("lowvram::rms_factor", mutates_args=())
def rms_factor_op(x: Tensor) -> Tensor:
    """`rms_factor` in one pass and without a float32 copy of x [n, width]."""
    from lowvram.triton_kernels import norm_rope_triton

    return norm_rope_triton.rms_factor(x)


@rms_factor_op.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], 1, dtype=torch.float32)


@torch.library.custom_op("lowvram::norm_rope_", mutates_args=("out",))
def norm_rope_(out: Tensor, x: Tensor, weight: Tensor, rope: Tensor, factor: Tensor | None) -> None:
    """x [n, width] -> out [heads, n, 128] (any strides but the last): norm by `factor` [n, 1] or over the width,
    weight, rotary embedding."""
    from lowvram.triton_kernels import norm_rope_triton

    norm_rope_triton.norm_rope(out, None, x, weight, rope, factor, None)


@norm_rope_.register_fake
def _(out: Tensor, x: Tensor, weight: Tensor, rope: Tensor, factor: Tensor | None) -> None:
    return None


@torch.library.custom_op("lowvram::norm_rope_int8_", mutates_args=("out", "scale"))
def norm_rope_int8_(
    out: Tensor,
    scale: Tensor,
    x: Tensor,
    weight: Tensor,
    rope: Tensor,
    factor: Tensor | None,
    centre: Tensor | None,
) -> None:
    """`norm_rope_`, then `quantise_rows`, into out [heads, n, 128] int8 and scale [heads, n] in one pass."""
    from lowvram.triton_kernels import norm_rope_triton

    norm_rope_triton.norm_rope(out, scale, x, weight, rope, factor, centre)


@norm_rope_int8_.register_fake
def _(
    out: Tensor,
    scale: Tensor,
    x: Tensor,
    weight: Tensor,
    rope: Tensor,
    factor: Tensor | None,
    centre: Tensor | None,
) -> None:
    return None


@torch.library.custom_op("lowvram::quantise_values_", mutates_args=("out", "scale"))
def quantise_values_(out: Tensor, scale: Tensor, v: Tensor, v_format: str) -> None:
    """`quantise_values` of v [n, heads * 128] into given tensors."""
    from lowvram.triton_kernels import norm_rope_triton

    norm_rope_triton.quantise_values(out, scale, v, v_format)


@quantise_values_.register_fake
def _(out: Tensor, scale: Tensor, v: Tensor, v_format: str) -> None:
    return None
