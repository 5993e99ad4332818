"""Rows of activations in 8 bits with a scale each: what an 8-bit weight is multiplied by, rotated as the weight is.

    int8   q = floor(y * 127 / max|y| + 1/2),   y = x R,   x R ~ q * max|y| / 127
    fp8    q = e4m3(x * 448 / max|x|),                     x ~ q * max|x| / 448

R is the Hadamard rotation of ConvRot weights by groups of columns (`hadamard`), or nothing. It spreads an outlier
channel over its group, and (x R)(W R)^T = x W^T. A row sees no other row, so the numbers do not depend on how tokens
are cut into chunks. `quantise` is the arithmetic, and the CPU path; the ops do it behind the operation that makes the
row, in one pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

from lowvram.triton_kernels.hadamard import root, rotate
from lowvram.triton_kernels.modulate import gelu, modulate
from lowvram.triton_kernels.norm_rope import LEAST

GROUPS = (0, 256)
"""Columns rotated together that there are kernels for; 0 for no rotation."""
Form = Literal["int8", "fp8"]
PEAK: Mapping[str, float] = MappingProxyType({"int8": 127.0, "fp8": 448.0})
"""What the largest number of a row becomes."""
DTYPES: Mapping[str, torch.dtype] = MappingProxyType({"int8": torch.int8, "fp8": torch.float8_e4m3fn})
RUN = 1024
"""Rows at once in torch: bounds what float32 takes of them."""


@dataclass(frozen=True, slots=True)
class QuantisedRows:
    """Activations [..., width], quantised."""

    values: Tensor
    """[..., width] int8 or float8_e4m3fn"""
    scale: Tensor
    """[...] float32; NaN where a row held NaN or infinity"""
    group: int
    """Columns that were rotated together, or 0."""
    dtype: torch.dtype
    """What they were quantised from, and the type of what is made of them."""

    def __getitem__(self, some: slice) -> QuantisedRows:
        """Some of the rows; nothing is copied."""
        return replace(self, values=self.values[some], scale=self.scale[some])


def quantise(x: Tensor, group: int, form: Form = "int8") -> QuantisedRows:
    """x [..., width] -> its rows in 8 bits. Those in fp8 are not rotated: a float's error is relative already."""
    rows, peak = x.reshape(-1, x.shape[-1]), PEAK[form]
    values = torch.empty(rows.shape, dtype=DTYPES[form], device=x.device)
    scale = torch.empty(rows.shape[0], dtype=torch.float32, device=x.device)
    for start in range(0, rows.shape[0], RUN):
        some = slice(start, start + RUN)
        y = rows[some].float()
        if group:
            y = rotate(y, group) / root(group)
        most = y.abs().amax(-1, keepdim=True).clamp_min(LEAST)
        y = y * (peak / most)
        if form == "int8":
            y = torch.floor(y.add_(0.5))
        values[some] = y.nan_to_num_(0.0).clamp_(-peak, peak).to(values.dtype)
        # Integers cannot say that a row was not finite: its scale does.
        scale[some] = torch.where(torch.isfinite(most), most / peak, torch.nan).squeeze(-1)
    return QuantisedRows(values.view(x.shape), scale.view(x.shape[:-1]), group, x.dtype)


def modulate_quantise(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    group: int,
    form: Form = "int8",
    dtype: torch.dtype | None = None,
) -> QuantisedRows:
    """`modulate`, then `quantise`."""
    return quantise(modulate(x, shift, scale, dtype), group, form)


def gelu_quantise(x: Tensor, group: int, form: Form = "int8") -> QuantisedRows:
    """`gelu`, then `quantise`."""
    return quantise(gelu(x), group, form)


# ---- ops: x [n, width] with any distance between rows; form "int8" or "fp8"


@torch.library.custom_op("lowvram::quantise", mutates_args=())
def quantise_op(x: Tensor, group: int, form: str) -> tuple[Tensor, Tensor]:
    """`quantise`: values and scales."""
    from lowvram.triton_kernels import quantise_triton

    return quantise_triton.quantise(x, group, form)


@quantise_op.register_fake
def _(x: Tensor, group: int, form: str) -> tuple[Tensor, Tensor]:
    return room(x, form)


@torch.library.custom_op("lowvram::modulate_quantise", mutates_args=())
def modulate_quantise_op(
    x: Tensor, shift: Tensor, scale: Tensor, group: int, form: str
) -> tuple[Tensor, Tensor]:
    """`modulate_quantise`; shift and scale [1 or n, width] float32."""
    from lowvram.triton_kernels import quantise_triton

    return quantise_triton.modulate(x, shift, scale, group, form)


@modulate_quantise_op.register_fake
def _(x: Tensor, shift: Tensor, scale: Tensor, group: int, form: str) -> tuple[Tensor, Tensor]:
    return room(x, form)


@torch.library.custom_op("lowvram::gelu_quantise", mutates_args=())
def gelu_quantise_op(x: Tensor, group: int, form: str) -> tuple[Tensor, Tensor]:
    """`gelu_quantise`."""
    from lowvram.triton_kernels import quantise_triton

    return quantise_triton.gelu(x, group, form)


@gelu_quantise_op.register_fake
def _(x: Tensor, group: int, form: str) -> tuple[Tensor, Tensor]:
    return room(x, form)


def room(x: Tensor, form: str) -> tuple[Tensor, Tensor]:
    """Where the values and scales of the rows of x [n, width] go."""
    return x.new_empty(x.shape, dtype=DTYPES[form]), x.new_empty(x.shape[0], dtype=torch.float32)
