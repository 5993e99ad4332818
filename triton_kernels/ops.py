"""The operations of a lean block as one value: in torch, or fused for a card. Which, is settled before a run.

Both give the same numbers but for the last rounding. What writes in place says so with an underscore.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from lowvram.triton_kernels import modulate as m
from lowvram.triton_kernels import norm_rope as n


@dataclass(frozen=True, slots=True)
class Ops:
    """The operations between the multiplications."""

    modulate: Callable[[Tensor, Tensor, Tensor], Tensor]
    """(x [n, width], shift, scale [1 or n, width]) -> LN(x) * (1 + scale) + shift"""
    gated_: Callable[[Tensor, Tensor, Tensor], None]
    """(x, y [n, width], gate [1 or n, width]): x += y * gate"""
    gelu: Callable[[Tensor], Tensor]
    """tanh GELU; its argument is lost"""
    rms_factor: Callable[[Tensor], Tensor]
    """[n, width] -> [n, 1] float32"""
    norm_rope_: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], None]
    """(out [heads, n, 128], x [n, width], weight, rope, factor)"""
    norm_rope_int8_: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None], None]
    """(out int8, scale [heads, n], x, weight, rope, factor, centre)"""
    quantise_values_: Callable[[Tensor, Tensor, Tensor, str], None]
    """(out, scale, v [n, heads * 128], format)"""


def _gated_(x: Tensor, y: Tensor, gate: Tensor) -> None:
    x.copy_(m.gated(x, y, gate))


def _norm_rope(x: Tensor, weight: Tensor, rope: Tensor, factor: Tensor | None) -> Tensor:
    f = n.rms_factor(x) if factor is None else factor
    return n.rotate(n.heads(n.scaled(x, f, weight)), rope)


def _norm_rope_(out: Tensor, x: Tensor, weight: Tensor, rope: Tensor, factor: Tensor | None) -> None:
    out.copy_(_norm_rope(x, weight, rope, factor))


def _norm_rope_int8_(
    out: Tensor,
    scale: Tensor,
    x: Tensor,
    weight: Tensor,
    rope: Tensor,
    factor: Tensor | None,
    centre: Tensor | None,
) -> None:
    integers, scales = n.quantise_rows(_norm_rope(x, weight, rope, factor), centre)
    out.copy_(integers)
    scale.copy_(scales)


def _quantise_values_(out: Tensor, scale: Tensor, v: Tensor, v_format: str) -> None:
    values, scales = n.quantise_values(n.heads(v), v_format)
    out.copy_(values)
    scale.copy_(scales)


def _fused_gelu(x: Tensor) -> Tensor:
    m.gelu_(x, None)
    return x


TORCH = Ops(m.modulate, _gated_, m.gelu, n.rms_factor, _norm_rope_, _norm_rope_int8_, _quantise_values_)
"""The reference, and the CPU path."""
FUSED = Ops(
    m.modulate_op, m.gated_, _fused_gelu, n.rms_factor_op, n.norm_rope_, n.norm_rope_int8_, n.quantise_values_
)
"""Triton."""
