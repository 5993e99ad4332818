"""Self attention of the lean forward: by chunks of tokens, by groups of heads, in any mode.

Beside the residual stream only K and V of a group of heads exist for all tokens, as the mode keeps them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lowvram.models.rows import Rows
from lowvram.quant.linear import Params
from lowvram.quant.spec import HEAD_DIM
from lowvram.triton_kernels.keys import (
    Keys,
    attend,
    balanced_centre,
    finish_,
    sampled,
    write_keys_,
    write_values_,
)
from lowvram.triton_kernels.modes import MODES
from lowvram.triton_kernels.ops import TORCH, Ops
from lowvram.triton_kernels.quantise import QuantisedRows

CHUNK = 4096
"""Tokens processed at once. Fixed, so that a budget never changes how a matmul is cut."""


@dataclass(frozen=True, slots=True)
class Workspace:
    """The buffers of `block_` that grow with the sequence, and what runs on them; used by every block and pass."""

    keys: Keys
    """of all heads, or of a group of them"""
    dtype: torch.dtype
    """of what is multiplied"""
    out: Tensor | None = None
    """[L, dim] where heads are processed in groups: what their queries attend to"""
    chunk: int = CHUNK
    ops: Ops = TORCH
    unpacked: Tensor | None = None
    """uint8, `Params.unpacked_nbytes`: a block's matrices in the compute dtype; without it each is decoded at every use"""
    residuals: tuple[Rows, ...] = ()
    """[L, dim] for every context at once, of any dtype; made anew, in `dtype`, for each forward where there are none"""


def plain_workspace(k: Tensor, v: Tensor, out: Tensor | None = None, chunk: int = CHUNK) -> Workspace:
    """For attention in the dtype of k and v [heads of a group, L, 128]."""
    nothing = k.new_empty(0, dtype=torch.float32)
    return Workspace(Keys(MODES["sdpa"], k, v, nothing, nothing, nothing, False), k.dtype, out, chunk)


class Modulation(Protocol):
    """Part `index` of the modulation of tokens start, start + step.. before stop: [1 or tokens, dim]."""

    def __call__(self, index: int, start: int, stop: int, step: int = 1) -> Tensor: ...


def chunks(length: int, chunk: int) -> Iterator[tuple[int, int]]:
    for start in range(0, length, chunk):
        yield start, min(start + chunk, length)


def modulated(
    p: Params, ops: Ops, names: tuple[str, ...], x: Tensor, shift: Tensor, scale: Tensor, dtype: torch.dtype
) -> Tensor | QuantisedRows:
    """x normed and modulated, as the Linears `names` take it: in `dtype`, or as quantised rows that stand for it."""
    taking = p.takes(*names)
    if taking is None:
        return ops.modulate(x, shift, scale, dtype)
    return taking.ops.modulate(x, shift, scale, taking.group, dtype=dtype)


class SelfAttention:
    """Self attention of a block by chunks of tokens and groups of heads.

    The norm of q and k is over the full width, but all it needs from there is one factor per token. Where heads go
    in groups, a first sweep finds those; then q, k and v are projected again, group by group.
    """

    def __init__(self, p: Params, x: Rows, mod: Modulation, rope: Tensor, work: Workspace) -> None:
        self._p, self._x, self._mod, self._rope, self._work = p, x, mod, rope, work
        self._group = p  # holds the projections of the heads at hand
        self._factors: tuple[Tensor, Tensor] | None = None
        self._balance: Tensor | None = None  # of the heads at hand, where they are quantised
        if work.out is not None:
            q = torch.empty(x.shape[0], 1, dtype=torch.float32, device=x.device)
            self._factors = q, torch.empty_like(q)
            for name, factor in zip(("self_attn.q", "self_attn.k"), self._factors, strict=True):
                whole = p.slices((name,), work.dtype)
                for i, j in chunks(x.shape[0], work.chunk):
                    factor[i:j] = work.ops.rms_factor(whole.linear(name, self._modulated(i, j)))
                del whole

    def groups(self) -> Iterator[slice]:
        """Columns of the heads that go together."""
        width = self._work.keys.heads * HEAD_DIM
        for start in range(0, self._x.shape[1], width):
            yield slice(start, start + width)

    def fill(self, rows: slice | None) -> None:
        """Keys and values of the heads with these columns, of all tokens."""
        work, length = self._work, self._x.shape[0]
        if rows is not None:
            self._group = self._p.slices(("self_attn.q", "self_attn.k", "self_attn.v"), work.dtype, rows)
        centre = self._sample(rows) if work.keys.mode.quantised else None
        for i, j in chunks(length, work.chunk):
            h = self._modulated(i, j)
            k, weight, factor = self._projected("k", h, rows, i, j)
            write_keys_(work.ops, work.keys, i, k, weight, self._rope[i:j], factor, centre)
            write_values_(work.ops, work.keys, i, self._group.linear("self_attn.v", h))
        finish_(work.keys)

    def __call__(self, i: int, j: int, rows: slice | None, out: Tensor | None = None) -> Tensor:
        """What the queries of tokens i..j attend to, heads with these columns: [j - i, width], in `out` if given."""
        q, weight, factor = self._projected("q", self._modulated(i, j), rows, i, j)
        return attend(self._work.ops, self._work.keys, q, weight, self._rope[i:j], factor, out)

    def _sample(self, rows: slice | None) -> Tensor:
        """The centre of the keys of the heads at hand; their balance is kept."""
        work, length, step = self._work, self._x.shape[0], self._work.keys.stride_of_sample()
        self._balance = None
        h, rope = self._modulated(0, length, step), self._rope[::step].contiguous()
        q, k = (
            sampled(work.ops, x, weight, rope, factor)
            for x, weight, factor in (self._projected(name, h, rows, 0, length, step) for name in "qk")
        )
        self._balance, centre = balanced_centre(q, k)
        return centre

    def _modulated(self, i: int, j: int, step: int = 1) -> Tensor | QuantisedRows:
        names, mod = ("self_attn.q", "self_attn.k", "self_attn.v"), self._mod
        x, shift, scale = self._x[i:j:step], mod(0, i, j, step), mod(1, i, j, step)
        return modulated(self._p, self._work.ops, names, x, shift, scale, self._work.dtype)

    def _projected(
        self, name: str, h: Tensor | QuantisedRows, rows: slice | None, i: int, j: int, step: int = 1
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The projection of h, its norm's weight, and the factors of tokens i, i + step.. if they are known."""
        weight = self._p[f"self_attn.norm_{name}.weight"]
        weight = weight if rows is None else weight[rows]
        if self._balance is not None:
            weight = weight * self._balance if name == "q" else weight / self._balance
        factor = None if self._factors is None else self._factors["qk".index(name)][i:j:step]
        return (
            self._group.linear(f"self_attn.{name}", h),
            weight,
            factor,
        )
