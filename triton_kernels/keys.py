"""Keys and values of all tokens as an attention mode keeps them, and attention to them.

Two stretches of device memory, for keys and for values, are allocated once for the largest mode of a run and carved
here for the mode at hand: a mode may change from step to step and from block to block.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lowvram.triton_kernels import backends
from lowvram.triton_kernels.attention import (
    HEAD_DIM,
    KEY_TILE,
    V_RUN,
    attend_,
    attention,
    pool_keys,
    select_tiles,
)
from lowvram.triton_kernels.modes import Mode
from lowvram.triton_kernels.norm_rope import balance_of, centre_of
from lowvram.triton_kernels.ops import Ops

SAMPLE = 64
"""One token in so many says where the keys of a head lie, in a sequence of 4,096 to 65,536 tokens."""
_SAMPLED = 64, 1024
"""Tokens of a sample at least, if there are as many, and at most."""
_V_DTYPES: Mapping[str, torch.dtype] = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8": torch.float8_e4m3fn,
}


@dataclass(frozen=True, slots=True)
class Keys:
    """Keys and values of `k.shape[0]` heads."""

    mode: Mode
    k: Tensor
    """[heads, n, 128] int8, or in the compute dtype"""
    v: Tensor
    """[heads, n, 128]; fp8: [heads, 128, n padded]"""
    k_scale: Tensor
    """[heads, n] float32; empty if keys are not quantised, as the next two"""
    v_scale: Tensor
    """[heads, ceil(n / V_RUN), 128] float32"""
    pooled: Tensor
    """[heads, ceil(n / KEY_TILE), 128] float32: mean key of each tile, where tiles are selected"""
    half: bool
    """whether P V of a tile is added up in float16"""

    @property
    def heads(self) -> int:
        return self.k.shape[0]

    @property
    def tokens(self) -> int:
        return self.k.shape[1]

    def stride_of_sample(self) -> int:
        """Distance of the tokens that are sampled for the centre."""
        return sample_stride(self.tokens)


def sample_stride(tokens: int) -> int:
    """Distance of the tokens that are sampled, of so many."""
    least, most = _SAMPLED
    return max(1, min(SAMPLE, tokens // least), -(-tokens // most))


def _parts(mode: Mode, heads: int, tokens: int, dtype: torch.dtype) -> tuple[list[int], list[int]]:
    """Bytes of (k, k_scale, pooled) and of (v, v_scale), each a multiple of 128."""
    if not mode.quantised:
        return [heads * tokens * HEAD_DIM * dtype.itemsize], [heads * tokens * HEAD_DIM * dtype.itemsize]
    padded = -(-tokens // KEY_TILE) * KEY_TILE
    keys = [heads * tokens * HEAD_DIM, _aligned(4 * heads * tokens)]
    if mode.keep < 1:
        keys.append(4 * heads * -(-tokens // KEY_TILE) * HEAD_DIM)
    values = [
        heads * (padded if mode.v_format == "fp8" else tokens) * HEAD_DIM * _V_DTYPES[mode.v_format].itemsize
    ]
    if mode.v_format != "bf16":
        values.append(4 * heads * -(-tokens // V_RUN) * HEAD_DIM)
    return keys, values


def _aligned(nbytes: int) -> int:
    return -(-nbytes // 128) * 128


def stored_bytes(mode: Mode, heads: int, tokens: int, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes that keys and values of `tokens` tokens take."""
    keys, values = _parts(mode, heads, tokens, dtype)
    return sum(keys), sum(values)


def carve(
    mode: Mode,
    heads: int,
    tokens: int,
    dtype: torch.dtype,
    keys: Tensor,
    values: Tensor,
    *,
    half: bool = True,
) -> Keys:
    """The views of a mode in two uint8 buffers of at least `stored_bytes`."""
    key_parts, value_parts = _parts(mode, heads, tokens, dtype)
    k, *more_k = keys[: sum(key_parts)].split(key_parts)
    v, *more_v = values[: sum(value_parts)].split(value_parts)
    nothing = keys[:0].view(torch.float32)
    if not mode.quantised:
        shape = heads, tokens, HEAD_DIM
        return Keys(
            mode, k.view(dtype).view(shape), v.view(dtype).view(shape), nothing, nothing, nothing, False
        )
    shape = (heads, HEAD_DIM, -1) if mode.v_format == "fp8" else (heads, tokens, HEAD_DIM)
    return Keys(
        mode,
        k.view(torch.int8).view(heads, tokens, HEAD_DIM),
        v.view(_V_DTYPES[mode.v_format]).view(shape),
        more_k[0].view(torch.float32)[: heads * tokens].view(heads, tokens),
        more_v[0].view(torch.float32).view(heads, -1, HEAD_DIM) if more_v else nothing,
        more_k[1].view(torch.float32).view(heads, -1, HEAD_DIM) if len(more_k) > 1 else nothing,
        half and mode.v_format != "bf16",
    )


def write_keys_(
    ops: Ops,
    keys: Keys,
    start: int,
    x: Tensor,
    weight: Tensor,
    rope: Tensor,
    factor: Tensor | None,
    centre: Tensor | None,
) -> None:
    """The projection x [n, heads * 128] of tokens start.. -> keys. centre: of `balanced_centre`, if quantised."""
    some = slice(start, start + x.shape[0])
    if keys.mode.quantised:
        ops.norm_rope_int8_(keys.k[:, some], keys.k_scale[:, some], x, weight, rope, factor, centre)
    else:
        ops.norm_rope_(keys.k[:, some], x, weight, rope, factor)


def write_values_(ops: Ops, keys: Keys, start: int, x: Tensor) -> None:
    """The projection x [n, heads * 128] of tokens start.. -> values. `start` is a multiple of V_RUN if quantised."""
    stop = start + x.shape[0]
    if keys.mode.v_format in ("", "bf16"):
        keys.v[:, start:stop].copy_(x.unflatten(-1, (-1, HEAD_DIM)).transpose(0, 1))
        return
    assert start % V_RUN == 0
    runs = slice(start // V_RUN, -(-stop // V_RUN))
    padded = -(-stop // KEY_TILE) * KEY_TILE
    out = keys.v[:, :, start:padded] if keys.mode.v_format == "fp8" else keys.v[:, start:stop]
    ops.quantise_values_(out, keys.v_scale[:, runs], x, keys.mode.v_format)


def sampled(ops: Ops, x: Tensor, weight: Tensor, rope: Tensor, factor: Tensor | None) -> Tensor:
    """Queries or keys of some tokens from their projections x [n, heads * 128]: [heads, n, 128]."""
    rows = x.new_empty(x.shape[1] // HEAD_DIM, x.shape[0], HEAD_DIM)
    ops.norm_rope_(rows, x, weight, rope, factor)
    return rows


def balanced_centre(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """From samples of queries and keys [heads, n, 128]: the balance [heads * 128] to multiply the weight of q's norm by
    and to divide that of k's by, and the centre [heads, 128] of the keys that are made so. Both float32."""
    balance = balance_of(q, k)
    return balance.flatten(), centre_of(k / balance.unsqueeze(-2))


def finish_(keys: Keys) -> None:
    """All keys are written: what selects among them is made."""
    if keys.mode.keep < 1:
        pool_keys(keys.k, keys.k_scale, keys.pooled)


def attend(
    ops: Ops,
    keys: Keys,
    x: Tensor,
    weight: Tensor,
    rope: Tensor,
    factor: Tensor | None,
    out: Tensor | None = None,
) -> Tensor:
    """Attention of the projection x [n, heads * 128] of some queries to all keys: [n, heads * 128], in `out` if given."""
    n = x.shape[0]
    if keys.mode.quantised:
        q = x.new_empty(keys.heads, n, HEAD_DIM, dtype=torch.int8)
        scale = x.new_empty(keys.heads, n, dtype=torch.float32)
        ops.norm_rope_int8_(q, scale, x, weight, rope, factor, None)
        index = select_tiles(q, scale, keys.pooled, keys.mode.keep) if keys.mode.keep < 1 else None
        y = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
        attend_(
            y, q, scale, keys.k, keys.k_scale, keys.v, keys.v_scale, index,
            v_format=keys.mode.v_format, half=keys.half,
        )  # fmt: skip
        return y
    q = x.new_empty(n, keys.heads, HEAD_DIM).transpose(0, 1)  # in memory as the result shall lie
    ops.norm_rope_(q, x, weight, rope, factor)
    y = (
        attention(q, keys.k, keys.v)
        if keys.mode.ours
        else backends.attention_by(q, keys.k, keys.v, keys.mode.package)
    )
    return y if out is None else out.copy_(y)
