"""Int8 weights times int8 activations (W8A8), with everything that follows the sum done where it lies.

    y = (q W^T) * scale of the row * scale of the column + bias (+ low up^T)      `int8_linear`
    x += y * gate                                                                 `int8_linear_gated_`

q and W are int8 and their sum of products int32, which is exact in any order; what follows is float32, rounded once. With
a LoRA, low = q down^T is such a product too, rounded to the dtype of the activations: its rows are quantised as those of
the weight are, and it reads the same quantised activations, so the branch is as exact as the weight it stands beside.
So the numbers of a row depend neither on the other rows nor on how a kernel cuts the product. `int8_linear` in torch,
by `torch._int_mm`, is the reference, the CPU path, and on a card the rival of the kernel in `gemm_triton`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from lowvram.triton_kernels.modulate import gated
from lowvram.triton_kernels.quantise import RUN, QuantisedRows

LEAST_ROWS = 17
"""Rows of the left operand that `torch._int_mm` wants on CUDA."""


@dataclass(frozen=True, slots=True)
class QuantisedMatrix:
    """A weight [out, in] in 8 bits: its values times the scale of their row are W, rotated if `group` is not 0."""

    values: Tensor
    """[out, in] int8 or float8_e4m3fn; rows may be strided"""
    scale: Tensor
    """[out] float32, contiguous"""
    group: int
    """Columns rotated together, or 0."""

    def to(self, device: torch.device) -> QuantisedMatrix:
        return replace(self, values=self.values.to(device), scale=self.scale.to(device))


RANK = 32
"""Ranks of a LoRA are filled up to a multiple of it with zeros."""


@dataclass(frozen=True, slots=True)
class LowRank:
    """The LoRA branches of a Linear as one: y += (x down^T) up^T."""

    down: QuantisedMatrix
    """[rank, in], rotated as the weight is, strengths in its scale; rank a multiple of RANK"""
    up: Tensor
    """[out, rank] in the dtype of the activations, contiguous but for the distance of its rows"""


def low_rank(downs: Sequence[QuantisedRows], ups: Sequence[Tensor], strengths: Sequence[float]) -> LowRank:
    """One of several: down [rank, in] quantised by its rows, up [out, rank], of each."""
    some, missing = downs[0], -sum(up.shape[1] for up in ups) % RANK
    values = torch.cat([*(d.values for d in downs), torch.zeros_like(some.values[:1]).expand(missing, -1)])
    scales = (d.scale * strength for d, strength in zip(downs, strengths, strict=True))
    scale = torch.cat([*scales, some.scale.new_zeros(missing)])
    up = torch.cat([*ups, ups[0].new_zeros(ups[0].shape[0], missing)], 1)
    return LowRank(QuantisedMatrix(values, scale, some.group), up)


def int8_linear(
    x: QuantisedRows, weight: QuantisedMatrix, bias: Tensor | None, lora: LowRank | None = None
) -> Tensor:
    """x [..., in] -> [..., out] in the dtype of x; bias [out]."""
    assert x.group == weight.group, "activations rotated otherwise than the weight"
    low, up = None, None
    if lora is not None:
        low, up = int8_linear(x, lora.down, None).flatten(0, -2), lora.up.to(torch.float32).mT
    rows, scale = x.values.flatten(0, -2), x.scale.flatten().unsqueeze(-1)
    out = torch.empty(rows.shape[0], weight.values.shape[0], dtype=x.dtype, device=rows.device)
    for start in range(0, rows.shape[0], RUN):
        some = slice(start, start + RUN)
        y = _product(rows[some], weight.values).to(torch.float32)
        y.mul_(scale[some]).mul_(weight.scale)
        if bias is not None:
            y.add_(bias)
        if low is not None and up is not None:
            y.addmm_(low[some].to(torch.float32), up)
        out[some] = y
    return out.view(*x.values.shape[:-1], out.shape[1])


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a [m, k] times b [n, k] transposed, int32."""
    m = a.shape[0]
    if a.is_cuda and m < LEAST_ROWS:
        a = functional.pad(a, (0, 0, 0, LEAST_ROWS - m))
    return torch._int_mm(a, b.mT)[:m]


def int8_linear_gated_(
    x: Tensor,
    y: QuantisedRows,
    weight: QuantisedMatrix,
    bias: Tensor | None,
    gate: Tensor,
    lora: LowRank | None = None,
) -> None:
    """x [n, out] += int8_linear(y [n, in]) * gate [1, out] float32, in place."""
    x.copy_(gated(x, int8_linear(y, weight, bias, lora), gate))


# ---- ops: a [m, k] and w [n, k] int8; with low [m, rank] and up [n, rank] of a LoRA


@torch.library.custom_op("lowvram::int8_linear", mutates_args=())
def int8_linear_op(
    a: Tensor,
    a_scale: Tensor,
    w: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    low: Tensor | None,
    up: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """`int8_linear`: [m, n] in `dtype`. The int32 sums never leave the registers."""
    from lowvram.triton_kernels import gemm_triton, tiles

    out = torch.empty(a.shape[0], w.shape[0], dtype=dtype, device=a.device)
    tile = tiles.gemm_tile(tiles.arch_of(a.device), w.shape[0])
    gemm_triton.linear(out, a, a_scale, w, w_scale, bias, None, low, up, tile)
    return out


@int8_linear_op.register_fake
def _(
    a: Tensor,
    a_scale: Tensor,
    w: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    low: Tensor | None,
    up: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    return a.new_empty(a.shape[0], w.shape[0], dtype=dtype)


@torch.library.custom_op("lowvram::int8_linear_gated_", mutates_args=("x",))
def int8_linear_gated_op_(
    x: Tensor,
    a: Tensor,
    a_scale: Tensor,
    w: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    low: Tensor | None,
    up: Tensor | None,
    gate: Tensor,
) -> None:
    """`int8_linear_gated_` with one gate [1, n] for all rows; the sum is not rounded before it is added."""
    from lowvram.triton_kernels import gemm_triton, tiles

    tile = tiles.gemm_tile(tiles.arch_of(a.device), w.shape[0])
    gemm_triton.linear(x, a, a_scale, w, w_scale, bias, gate, low, up, tile)


@int8_linear_gated_op_.register_fake
def _(
    x: Tensor,
    a: Tensor,
    a_scale: Tensor,
    w: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    low: Tensor | None,
    up: Tensor | None,
    gate: Tensor,
) -> None:
    return None
