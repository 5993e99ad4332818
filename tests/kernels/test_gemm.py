"""W8A8 in torch: near the exact product, the same for any cut into chunks, and what is not finite stays so."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowvram.quant.encodings.int8 import Int8
from lowvram.triton_kernels import quantise
from lowvram.triton_kernels.gemm import LowRank, QuantisedMatrix, int8_linear, int8_linear_gated_, low_rank
from lowvram.triton_kernels.ops import FUSED, TORCH, W8A8Ops


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def matrix(weight: Tensor, group: int) -> QuantisedMatrix:
    parts = Int8(group=group).encode(weight)
    return QuantisedMatrix(parts["weight"], parts["scale"].flatten(), group)


@pytest.mark.parametrize("group", [0, 256])
@pytest.mark.parametrize("shape", [(1,), (40,), (2, 9), (0,)])
def test_a_product_is_near_the_exact_one(group: int, shape: tuple[int, ...]) -> None:
    x, weight, bias = normal(*shape, 512), normal(70, 512, seed=1) / 20, normal(70, seed=2)
    want = x @ weight.mT + bias
    got = int8_linear(quantise.quantise(x, group), matrix(weight, group), bias)
    assert got.shape == want.shape and (got - want).norm() <= 0.02 * want.norm()


def test_rotation_is_what_makes_outlier_channels_harmless() -> None:
    x, weight = normal(64, 1024), normal(100, 1024, seed=1)
    x[:, ::200] *= 15
    exact = x @ weight.mT
    plain, rotated = (
        float((int8_linear(quantise.quantise(x, g), matrix(weight, g), None) - exact).norm() / exact.norm())
        for g in (0, 256)
    )
    assert rotated < 0.015 and plain > 1.5 * rotated


def test_chunks_and_strides_never_change_a_bit() -> None:
    n = quantise.RUN + 70
    x, weight, bias = (
        normal(n, 300, seed=3)[:, :256],
        matrix(normal(32, 256, seed=1), 256),
        normal(32, seed=2),
    )
    whole = int8_linear(quantise.quantise(x, 256), weight, bias)
    for chunk in (1, 64, 1000):
        some = slice(chunk, 2 * chunk)
        assert torch.equal(int8_linear(quantise.quantise(x[some], 256), weight, bias), whole[some])


def test_what_is_not_finite_spoils_its_own_row() -> None:
    x, weight = normal(4, 256), matrix(normal(8, 256, seed=1), 256)
    x[1, 3], x[2, 5] = torch.nan, -torch.inf
    y = int8_linear(quantise.quantise(x, 256), weight, None)
    assert (
        torch.isfinite(y).all(1).tolist() == torch.isfinite(y).any(1).tolist() == [True, False, False, True]
    )


def test_zero_rows_and_the_gated_sum() -> None:
    x, weight, bias = normal(5, 256), matrix(normal(8, 256, seed=1), 0), normal(8, seed=2)
    x[3] = 0
    rows, residual = quantise.quantise(x, 0), normal(5, 8, seed=3)
    y = int8_linear(rows, weight, bias)
    assert torch.equal(y[3], bias)
    for gates in (1, 5):
        gate, got = normal(gates, 8, seed=4), residual.clone()
        int8_linear_gated_(got, rows, weight, bias, gate)
        assert torch.equal(got, residual + y * gate)


@pytest.mark.parametrize("group", [0, 256])
def test_a_lora_is_as_exact_as_the_weight_beside_it(group: int) -> None:
    x, weight, bias = normal(40, 512), normal(70, 512, seed=1) / 20, normal(70, seed=2)
    factors = [(normal(rank, 512, seed=rank), normal(70, rank, seed=rank + 1)) for rank in (4, 40)]
    lora = low_rank(
        [quantise.quantise(down, group) for down, _ in factors], [up for _, up in factors], [0.3, -0.5]
    )
    assert lora.down.values.shape == (64, 512) and lora.up.shape == (70, 64)
    branch = sum(s * x @ down.mT @ up.mT for s, (down, up) in zip((0.3, -0.5), factors, strict=True))
    rows = quantise.quantise(x, group)
    plain, got = (int8_linear(rows, matrix(weight, group), bias, some) for some in (None, lora))
    assert (got - plain - branch).norm() <= 0.02 * branch.norm()
    gate, into = normal(1, 70, seed=5), normal(40, 70, seed=6)
    want = into + got * gate
    int8_linear_gated_(into, rows, matrix(weight, group), bias, gate, lora)
    assert torch.equal(into, want)


def test_activations_must_be_rotated_as_the_weight_is() -> None:
    with pytest.raises(AssertionError, match="rotated otherwise"):
        int8_linear(quantise.quantise(normal(2, 256), 0), matrix(normal(8, 256), 256), None)


@pytest.mark.parametrize("ops", [TORCH.int8, FUSED.int8], ids=["torch", "fused"])
def test_a_plan_sees_the_shapes_of_both_paths(ops: W8A8Ops) -> None:
    with torch.device("meta"):
        x = torch.empty(3, 5, 256, dtype=torch.bfloat16)
        weight = QuantisedMatrix(torch.empty(8, 256, dtype=torch.int8), torch.empty(8), 256)
        shift, residual = torch.empty(1, 256), torch.empty(5, 8, dtype=torch.bfloat16)
        rows = ops.quantise(x, 256)
        assert rows.values.shape == x.shape and rows.values.dtype == torch.int8
        assert rows.scale.shape == (3, 5) and rows.scale.dtype == torch.float32
        lora = LowRank(
            QuantisedMatrix(torch.empty(32, 256, dtype=torch.int8), torch.empty(32), 256),
            torch.empty(8, 32, dtype=torch.bfloat16),
        )
        for branch in (None, lora):
            y = ops.linear(rows, weight, None, branch)
            assert y.shape == (3, 5, 8) and y.dtype == torch.bfloat16
        for some in (ops.modulate(x[0], shift, shift, 256), ops.gelu(x[0], 256)):
            assert some.values.shape == (5, 256) and some.scale.shape == (5,)
            ops.linear_gated_(residual, some, weight, None, torch.empty(1, 8), lora)
            ops.linear_gated_(residual[2:4], some[2:4], weight, None, torch.empty(1, 8), None)
        wide = ops.modulate(x[0].float(), shift, shift, 256, dtype=torch.bfloat16)
        assert wide.dtype == torch.bfloat16
        ops.linear_gated_(torch.empty(5, 8), wide, weight, None, torch.empty(1, 8), lora)
