"""Fp8 weights times fp8 activations (W8A8), a scale for every row of both.

    y = (q W^T) * scale of the row * scale of the column + bias (+ low up^T)

Products of two e4m3 numbers are exact in float32; their sums are float32, in whatever order the multiplication takes.
`fp8_linear` in torch is the reference and the CPU path; on sm_89 and later `fp8_linear_on_card` leaves it to
`torch._scaled_mm`, whose result is bfloat16: a LoRA is added to that, with one more rounding than where it is int8.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowvram.triton_kernels.gemm import LowRank, QuantisedMatrix
from lowvram.triton_kernels.modulate import gated, gated_
from lowvram.triton_kernels.quantise import RUN, QuantisedRows

MULTIPLE = 16
"""Rows and columns of a weight come in multiples of it for `torch._scaled_mm`."""


def fp8_linear(
    x: QuantisedRows, weight: QuantisedMatrix, bias: Tensor | None, lora: LowRank | None = None
) -> Tensor:
    """x [..., in] -> [..., out] in the dtype of x; bias [out]. The weight is widened RUN rows at a time."""
    rows, scale = x.values.flatten(0, -2).to(torch.float32), x.scale.flatten().unsqueeze(-1)
    low = None if lora is None else fp8_linear(x, lora.down, None).flatten(0, -2).to(torch.float32)
    out = torch.empty(rows.shape[0], weight.values.shape[0], dtype=x.dtype, device=rows.device)
    for start in range(0, weight.values.shape[0], RUN):
        some = slice(start, start + RUN)
        y = rows @ weight.values[some].to(torch.float32).mT
        y.mul_(scale).mul_(weight.scale[some])
        if bias is not None:
            y.add_(bias[some])
        if low is not None and lora is not None:
            y.addmm_(low, lora.up[some].to(torch.float32).mT)
        out[:, some] = y
    return out.view(*x.values.shape[:-1], out.shape[1])


def fp8_linear_gated_(
    x: Tensor,
    y: QuantisedRows,
    weight: QuantisedMatrix,
    bias: Tensor | None,
    gate: Tensor,
    lora: LowRank | None = None,
) -> None:
    """x [n, out] += fp8_linear(y [n, in]) * gate [1, out] float32, in place."""
    x.copy_(gated(x, fp8_linear(y, weight, bias, lora), gate))


def fp8_linear_on_card(
    x: QuantisedRows, weight: QuantisedMatrix, bias: Tensor | None, lora: LowRank | None = None
) -> Tensor:
    """`fp8_linear` of bfloat16 by `torch._scaled_mm`."""
    rows, scale = x.values.flatten(0, -2), x.scale.flatten().unsqueeze(-1)
    y = _scaled_mm(rows, scale, weight, bias, x.dtype)
    if lora is not None:
        y.addmm_(_scaled_mm(rows, scale, lora.down, None, x.dtype), lora.up.mT)
    return y.view(*x.values.shape[:-1], y.shape[1])


def _scaled_mm(
    rows: Tensor, scale: Tensor, weight: QuantisedMatrix, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    return torch._scaled_mm(
        rows, weight.values.mT, scale_a=scale, scale_b=weight.scale.unsqueeze(0), bias=bias, out_dtype=dtype
    )


def fp8_linear_gated_on_card_(
    x: Tensor,
    y: QuantisedRows,
    weight: QuantisedMatrix,
    bias: Tensor | None,
    gate: Tensor,
    lora: LowRank | None = None,
) -> None:
    """`fp8_linear_gated_`; the gated sum is a kernel of its own."""
    gated_(x, fp8_linear_on_card(y, weight, bias, lora), gate)
