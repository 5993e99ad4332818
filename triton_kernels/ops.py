"""The operations of a lean block as one value: in torch, or fused for a card. Which, is settled before a run.

Both give the same numbers but for the last rounding. What writes in place says so with an underscore.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from lowvram.triton_kernels import fp8_gemm as f8
from lowvram.triton_kernels import gemm as g
from lowvram.triton_kernels import modulate as m
from lowvram.triton_kernels import norm_rope as n
from lowvram.triton_kernels import quantise as q
from lowvram.triton_kernels import vae_norm as vn
from lowvram.triton_kernels.gemm import LowRank, QuantisedMatrix
from lowvram.triton_kernels.modes import INT8_GEMM
from lowvram.triton_kernels.quantise import Form, QuantisedRows


class Modulate(Protocol):
    """(x [n, width], shift, scale [1 or n, width]) -> LN(x) * (1 + scale) + shift in `dtype`, or in that of x"""

    def __call__(
        self, x: Tensor, shift: Tensor, scale: Tensor, dtype: torch.dtype | None = None, /
    ) -> Tensor: ...


class ModulateQuantise(Protocol):
    """`Modulate`, quantised after so many columns were rotated together, or 0"""

    def __call__(
        self, x: Tensor, shift: Tensor, scale: Tensor, group: int, /, *, dtype: torch.dtype | None = None
    ) -> QuantisedRows: ...


@dataclass(frozen=True, slots=True)
class W8A8Ops:
    """The multiplications by weights of one 8-bit form, and what makes rows for them."""

    form: Form
    quantise: Callable[[Tensor, int], QuantisedRows]
    """(x [..., width], columns rotated together or 0)"""
    modulate: ModulateQuantise
    gelu: Callable[[Tensor, int], QuantisedRows]
    """`Ops.gelu`, quantised; its argument may be lost"""
    linear: Callable[[QuantisedRows, QuantisedMatrix, Tensor | None, LowRank | None], Tensor]
    """(x [..., in], weight [out, in], bias, LoRA) -> [..., out]"""
    linear_gated_: Callable[
        [Tensor, QuantisedRows, QuantisedMatrix, Tensor | None, Tensor, LowRank | None], None
    ]
    """(x [n, out], y [n, in], weight, bias, gate [1, out], LoRA): x += linear(y) * gate"""
    multiple: int = 1
    """Rows and columns of a weight have to be multiples of it."""


@dataclass(frozen=True, slots=True)
class Ops:
    """The operations between the multiplications."""

    modulate: Modulate
    gated_: Callable[[Tensor, Tensor, Tensor], None]
    """(x, y [n, width], gate [1 or n, width]): x += y * gate; x may be of another dtype than y"""
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
    rms_silu: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    """(x [1, C, 1, H, W], gamma, where to write or None), of the autoencoders"""
    int8: W8A8Ops
    fp8: W8A8Ops

    def w8a8(self, form: str) -> W8A8Ops:
        return {"int8": self.int8, "fp8": self.fp8}[form]


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
    m.gelu_(x)
    return x


def _fused_quantise(x: Tensor, group: int, *, form: Form) -> QuantisedRows:
    values, scale = q.quantise_op(x.flatten(0, -2), group, form)
    return QuantisedRows(values.view(x.shape), scale.view(x.shape[:-1]), group, x.dtype)


def _fused_modulate_quantise(
    x: Tensor, shift: Tensor, scale: Tensor, group: int, *, form: Form, dtype: torch.dtype | None = None
) -> QuantisedRows:
    values, of_row = q.modulate_quantise_op(x, shift, scale, group, form)
    return QuantisedRows(values, of_row, group, dtype or x.dtype)


def _fused_gelu_quantise(x: Tensor, group: int, *, form: Form) -> QuantisedRows:
    values, scale = q.gelu_quantise_op(x, group, form)
    return QuantisedRows(values, scale, group, x.dtype)


def _fused_int8_linear(
    x: QuantisedRows, weight: QuantisedMatrix, bias: Tensor | None, lora: LowRank | None = None
) -> Tensor:
    rows = x.values.flatten(0, -2), x.scale.flatten()
    branch = _low(rows, lora, x.dtype)
    y: Tensor = g.int8_linear_op(*rows, weight.values, weight.scale, bias, *branch, x.dtype)
    return y.view(*x.values.shape[:-1], y.shape[1])


def _low(
    rows: tuple[Tensor, Tensor], lora: LowRank | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """What the epilogue of a product takes of a LoRA."""
    if lora is None:
        return None, None
    down = lora.down
    return g.int8_linear_op(*rows, down.values, down.scale, None, None, None, dtype), lora.up


def _fused_int8_linear_gated_(
    x: Tensor,
    y: QuantisedRows,
    weight: QuantisedMatrix,
    bias: Tensor | None,
    gate: Tensor,
    lora: LowRank | None = None,
) -> None:
    if x.dtype != y.dtype:  # a residual too wide for the epilogue's registers
        m.gated_(x, _fused_int8_linear(y, weight, bias, lora), gate)
    else:
        rows = y.values, y.scale
        branch = _low(rows, lora, y.dtype)
        g.int8_linear_gated_op_(x, *rows, weight.values, weight.scale, bias, *branch, gate)


_INT8 = W8A8Ops("int8", q.quantise, q.modulate_quantise, q.gelu_quantise, g.int8_linear, g.int8_linear_gated_)
_FP8 = W8A8Ops(
    "fp8",
    partial(q.quantise, form="fp8"),
    partial(q.modulate_quantise, form="fp8"),
    partial(q.gelu_quantise, form="fp8"),
    f8.fp8_linear,
    f8.fp8_linear_gated_,
    f8.MULTIPLE,
)
TORCH = Ops(
    m.modulate, _gated_, m.gelu, n.rms_factor, _norm_rope_, _norm_rope_int8_, _quantise_values_, vn.rms_silu, _INT8, _FP8
)  # fmt: skip
"""The reference, and the CPU path."""


def _fused(ops: W8A8Ops, *, linear: Callable[..., Tensor], linear_gated_: Callable[..., None]) -> W8A8Ops:
    """`ops`, its rows made by kernels, with these linears."""
    return replace(
        ops,
        quantise=partial(_fused_quantise, form=ops.form),
        modulate=partial(_fused_modulate_quantise, form=ops.form),
        gelu=partial(_fused_gelu_quantise, form=ops.form),
        linear=linear,
        linear_gated_=linear_gated_,
    )


FUSED = Ops(
    m.modulate_op, m.gated_, _fused_gelu, n.rms_factor_op, n.norm_rope_, n.norm_rope_int8_, n.quantise_values_,
    vn.fused_rms_silu,
    _fused(_INT8, linear=_fused_int8_linear, linear_gated_=_fused_int8_linear_gated_),
    _fused(_FP8, linear=f8.fp8_linear_on_card, linear_gated_=f8.fp8_linear_gated_on_card_),
)  # fmt: skip
"""Triton; fp8 by torch."""


def _by_int_mm_gated_(
    x: Tensor,
    y: QuantisedRows,
    weight: QuantisedMatrix,
    bias: Tensor | None,
    gate: Tensor,
    lora: LowRank | None = None,
) -> None:
    m.gated_(x, g.int8_linear(y, weight, bias, lora), gate)


_BY_INT_MM = replace(FUSED, int8=replace(FUSED.int8, linear=g.int8_linear, linear_gated_=_by_int_mm_gated_))


def ops_for(arch: str, unfused: str) -> Ops:
    """What runs on an architecture; `unfused` says why nothing of Triton does, if nothing does."""
    if unfused:
        return TORCH
    return _BY_INT_MM if INT8_GEMM.get(arch) == "torch" else FUSED
