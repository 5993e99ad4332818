"""Fp8 times fp8: what `torch._scaled_mm` gives is the arithmetic in torch, and that is near the exact product."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowvram.quant.encodings.fp8 import Fp8, Scaling
from lowvram.triton_kernels.fp8_gemm import fp8_linear, fp8_linear_gated_, fp8_linear_on_card
from lowvram.triton_kernels.gemm import LowRank, QuantisedMatrix, low_rank
from lowvram.triton_kernels.ops import FUSED, TORCH, W8A8Ops
from lowvram.triton_kernels.quantise import RUN, quantise


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def matrix(weight: Tensor, scaling: Scaling = "row") -> QuantisedMatrix:
    encoding = Fp8("F8_E4M3", scaling)
    return encoding.w8a8_matrix(encoding.encode(weight), tuple(weight.shape))


def a_lora(dtype: torch.dtype) -> LowRank:
    return low_rank(
        [quantise(normal(20, 256, seed=7).to(dtype), 0, "fp8")], [normal(96, 20, seed=8).to(dtype)], [0.2]
    )


@pytest.mark.parametrize("scaling", ["none", "tensor", "row"])
@pytest.mark.parametrize("shape", [(1,), (40,), (2, 9), (0,)])
def test_a_product_is_near_the_exact_one(scaling: Scaling, shape: tuple[int, ...]) -> None:
    x, weight, bias = normal(*shape, 256), normal(RUN + 16, 256, seed=1) / 20, normal(RUN + 16, seed=2)
    weight[:, 3] *= 20
    want = x @ weight.mT + bias
    got = fp8_linear(quantise(x, 0, "fp8"), matrix(weight, scaling), bias)
    assert got.shape == want.shape and (got - want).norm() <= 0.04 * want.norm()


@pytest.mark.parametrize("scaling", ["none", "tensor", "row"])
def test_a_matrix_is_the_decoded_weight(scaling: Scaling) -> None:
    encoding, weight = Fp8("F8_E4M3", scaling, 0, "BF16"), normal(32, 48)
    parts = encoding.encode(weight)
    found = encoding.w8a8_matrix(parts, (32, 48))
    decoded = encoding.decode(parts, (32, 48), torch.float32)
    assert torch.equal(found.values.float() * found.scale.unsqueeze(1), decoded)


def test_only_e4m3_with_a_scale_a_row_or_for_all_is_multiplied_as_it_is() -> None:
    assert (
        Fp8("F8_E5M2", "row").w8a8
        is Fp8("F8_E4M3", "block", 64).w8a8
        is Fp8("F8_E4M3", "tile", 128).w8a8
        is None
    )


@pytest.mark.parametrize("m", [1, 70])
def test_scaled_mm_is_the_arithmetic_in_torch(m: int) -> None:
    x, weight, bias = (
        normal(m, 256).bfloat16(),
        matrix(normal(96, 256, seed=1) / 20),
        normal(96, seed=2).bfloat16(),
    )
    rows = quantise(x, 0, "fp8")
    for some in (None, bias):
        for lora in (None, a_lora(torch.bfloat16)):
            want, got = fp8_linear(rows, weight, some, lora), fp8_linear_on_card(rows, weight, some, lora)
            assert got.dtype == torch.bfloat16
            assert (got.float() - want.float()).norm() <= 0.006 * want.float().norm()  # one rounding more


def test_a_lora_is_as_exact_as_the_weight_beside_it() -> None:
    x, weight, bias, lora = (
        normal(40, 256),
        matrix(normal(96, 256, seed=1)),
        normal(96, seed=2),
        a_lora(torch.float32),
    )
    rows = quantise(x, 0, "fp8")
    branch = 0.2 * x @ normal(20, 256, seed=7).mT @ normal(96, 20, seed=8).mT
    plain, got = (fp8_linear(rows, weight, bias, some) for some in (None, lora))
    assert (got - plain - branch).norm() <= 0.04 * branch.norm()
    for gates in (1, 40):
        gate, into = normal(gates, 96, seed=5), normal(40, 96, seed=6)
        want = into + got * gate
        fp8_linear_gated_(into, rows, weight, bias, gate, lora)
        assert torch.equal(into, want)


def test_what_is_not_finite_spoils_its_own_row_and_zeros_stay() -> None:
    x, weight, bias = normal(4, 256), matrix(normal(16, 256, seed=1)), normal(16, seed=2)
    x[1, 3], x[2, 5], x[3] = torch.nan, -torch.inf, 0
    y = fp8_linear(quantise(x, 0, "fp8"), weight, bias)
    assert (
        torch.isfinite(y).all(1).tolist() == torch.isfinite(y).any(1).tolist() == [True, False, False, True]
    )
    assert torch.equal(y[3], bias)


@pytest.mark.parametrize("ops", [TORCH.fp8, FUSED.fp8], ids=["torch", "fused"])
def test_a_plan_sees_the_shapes_of_both_paths(ops: W8A8Ops) -> None:
    with torch.device("meta"):
        x = torch.empty(3, 5, 256, dtype=torch.bfloat16)
        weight = QuantisedMatrix(torch.empty(96, 256, dtype=torch.float8_e4m3fn), torch.empty(96), 0)
        lora = LowRank(
            QuantisedMatrix(torch.empty(32, 256, dtype=torch.float8_e4m3fn), torch.empty(32), 0),
            torch.empty(96, 32, dtype=torch.bfloat16),
        )
        rows = ops.quantise(x, 0)
        assert rows.values.shape == x.shape and rows.values.dtype == torch.float8_e4m3fn
        for branch in (None, lora):
            y = ops.linear(rows, weight, torch.empty(96, dtype=torch.bfloat16), branch)
            assert y.shape == (3, 5, 96) and y.dtype == torch.bfloat16
        for some in (ops.modulate(x[0], *torch.empty(2, 1, 256), 0), ops.gelu(x[0], 0)):
            assert some.values.shape == (5, 256) and some.scale.shape == (5,)
            ops.linear_gated_(
                torch.empty(5, 96, dtype=torch.bfloat16), some, weight, None, torch.empty(1, 96), lora
            )
