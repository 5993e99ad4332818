"""Rows of activations as int8 with a scale each: what an int8 weight is multiplied by, rotated as the weight is.

    q = floor(y * 127 / max|y| + 1/2),   y = x R,   x R ~ q * max|y| / 127

R is the Hadamard rotation of ConvRot weights by groups of columns (`hadamard`), or nothing. It spreads an outlier
channel over its group, and (x R)(W R)^T = x W^T. A row sees no other row, so the numbers do not depend on how tokens
are cut into chunks. `quantise` is the arithmetic, and the CPU path; the ops do it behind the operation that makes the
row, in one pass.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowvram.triton_kernels.hadamard import root, rotate
from lowvram.triton_kernels.modulate import gelu, modulate
from lowvram.triton_kernels.norm_rope import LEAST

GROUPS = (0, 256)
"""Columns rotated together that there are kernels for; 0 for no rotation."""
RUN = 1024
"""Rows at once in torch: bounds what float32 takes of them."""


@dataclass(frozen=True, slots=True)
class Int8Rows:
    """Activations [..., width], quantised."""

    values: Tensor
    """[..., width] int8"""
    scale: Tensor
    """[...] float32; NaN where a row held NaN or infinity"""
    group: int
    """Columns that were rotated together, or 0."""
    dtype: torch.dtype
    """What they were quantised from, and the type of what is made of them."""


def quantise(x: Tensor, group: int) -> Int8Rows:
    """x [..., width] -> its rows in int8."""
    rows = x.reshape(-1, x.shape[-1])
    values = torch.empty(rows.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty(rows.shape[0], dtype=torch.float32, device=x.device)
    for start in range(0, rows.shape[0], RUN):
        some = slice(start, start + RUN)
        y = rows[some].float()
        if group:
            y = rotate(y, group) / root(group)
        most = y.abs().amax(-1, keepdim=True).clamp_min(LEAST)
        values[some] = torch.floor(y * (127 / most) + 0.5).nan_to_num_(0.0).clamp_(-127, 127)
        # Integers cannot say that a row was not finite: its scale does.
        scale[some] = torch.where(torch.isfinite(most), most / 127, torch.nan).squeeze(-1)
    return Int8Rows(values.view(x.shape), scale.view(x.shape[:-1]), group, x.dtype)


def modulate_int8(x: Tensor, shift: Tensor, scale: Tensor, group: int) -> Int8Rows:
    """`modulate`, then `quantise`."""
    return quantise(modulate(x, shift, scale), group)


def gelu_int8(x: Tensor, group: int) -> Int8Rows:
    """`gelu`, then `quantise`."""
    return quantise(gelu(x), group)


# ---- ops: x [n, width] with any distance between rows


@torch.library.custom_op("lowvram::quantise", mutates_args=())
def quantise_op(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """`quantise`: values and scales."""
    from lowvram.triton_kernels import quantise_triton

    return quantise_triton.quantise(x, group)


@quantise_op.register_fake
def _(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    return _like(x)


@torch.library.custom_op("lowvram::modulate_int8", mutates_args=())
def modulate_int8_op(x: Tensor, shift: Tensor, scale: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """`modulate_int8`; shift and scale [1 or n, width] float32."""
    from lowvram.triton_kernels import quantise_triton

    return quantise_triton.modulate(x, shift, scale, group)


@modulate_int8_op.register_fake
def _(x: Tensor, shift: Tensor, scale: Tensor, group: int) -> tuple[Tensor, Tensor]:
    return _like(x)


@torch.library.custom_op("lowvram::gelu_int8", mutates_args=())
def gelu_int8_op(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """`gelu_int8`."""
    from lowvram.triton_kernels import quantise_triton

    return quantise_triton.gelu(x, group)


@gelu_int8_op.register_fake
def _(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    return _like(x)


def _like(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[0], dtype=torch.float32)
