"""The product of int8 is its reference bit for bit; rows of int8 are their reference but where a last bit rounds."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lowvram.triton_kernels import gemm_triton, quantise_triton, tiles
from lowvram.triton_kernels.dispatch import try_w8a8
from lowvram.triton_kernels.gemm import LowRank, QuantisedMatrix, int8_linear, low_rank
from lowvram.triton_kernels.modulate import gated
from lowvram.triton_kernels.quantise import (
    PEAK,
    Form,
    QuantisedRows,
    gelu_quantise,
    modulate_quantise,
    quantise,
)
from lowvram.triton_kernels.tiles import GemmTile

TILE = GemmTile(64, 32, 64, 4, 2)
DTYPES = [torch.float16, torch.bfloat16]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def int8(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(-127, 128, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int8)


def operands(m: int, n: int, k: int, dtype: torch.dtype) -> tuple[QuantisedRows, QuantisedMatrix, Tensor]:
    """Rows of activations and of the weight that do not touch, and a bias."""
    a, w = int8(m, k + 32, seed=1)[:, :k], int8(n, k + 64, seed=2)[:, :k]
    rows = QuantisedRows(a, normal(m, seed=3).abs() / 100, 0, dtype)
    return rows, QuantisedMatrix(w, normal(n, seed=4).abs() / 100, 0), normal(n, seed=5).to(dtype)


def launched(
    out: Tensor,
    x: QuantisedRows,
    w: QuantisedMatrix,
    bias: Tensor | None,
    gate: Tensor | None,
    lora: LowRank | None = None,
) -> Tensor:
    low, up = None, None
    if lora is not None:
        low = out.new_empty(len(out), len(lora.down.values))
        launched(low, x, lora.down, None, None)
        up = lora.up
    gemm_triton.linear(out, x.values, x.scale, w.values, w.scale, bias, gate, low, up, TILE)
    return out


def whole(
    m: int, n: int, k: int, rank: int, dtype: torch.dtype
) -> tuple[QuantisedRows, QuantisedMatrix, LowRank]:
    """Operands whose products and sums float32 holds exactly, so that their order does not matter."""
    a, w, down, up = (
        torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int8)
        for seed, shape in enumerate([(m, k), (n, k), (rank, k), (n, rank)])
    )
    some = QuantisedRows(down, torch.full((rank,), 0.5), 0, dtype)
    return (
        QuantisedRows(a, 2.0 ** torch.arange(m).remainder(3), 0, dtype),
        QuantisedMatrix(w, 2.0 ** -torch.arange(n).remainder(3), 0),
        low_rank([some], [up.to(dtype)], [0.25]),
    )


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32])
@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 1, 1), (64, 32, 64), (65, 33, 65), (150, 70, 200), (3, 100, 1030)]
)
def test_any_size_bit_for_bit(dtype: torch.dtype, m: int, n: int, k: int) -> None:
    x, w, bias = operands(m, n, k, dtype)
    for b in (None, bias):
        wide = torch.full((m, n + 7), 5.0, dtype=dtype)
        assert torch.equal(launched(wide[:, :n], x, w, b, None), int8_linear(x, w, b))
        assert (wide[:, n:] == 5).all()


def test_the_largest_sums_are_exact() -> None:
    x, w, _ = operands(2, 3, 1030, torch.float32)
    x.values.fill_(127)
    w.values.fill_(-127)
    ones = (
        QuantisedRows(x.values, torch.ones(2), 0, torch.float32),
        QuantisedMatrix(w.values, torch.ones(3), 0),
    )
    assert (launched(torch.empty(2, 3), *ones, None, None) == -127 * 127 * 1030).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_gate_and_residual(dtype: torch.dtype) -> None:
    x, w, bias = operands(70, 50, 96, torch.float32)
    residual, gate = normal(70, 60, seed=6).to(dtype), normal(1, 50, seed=7)
    want = gated(residual[:, :50], int8_linear(x, w, bias), gate)
    got = residual.clone()
    assert torch.equal(launched(got[:, :50], x, w, bias, gate), want)
    assert torch.equal(got[:, 50:], residual[:, 50:])


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32])
@pytest.mark.parametrize(("m", "n", "k", "rank"), [(1, 1, 2, 1), (65, 33, 65, 32), (70, 100, 96, 45)])
def test_a_lora_in_the_epilogue_bit_for_bit(dtype: torch.dtype, m: int, n: int, k: int, rank: int) -> None:
    x, w, lora = whole(m, n, k, rank, dtype)
    bias, gate, residual = (int8(*shape).to(dtype) for shape in ((n,), (1, n), (m, n + 5)))
    wide = torch.full((m, n + 7), 5.0, dtype=dtype)
    assert torch.equal(launched(wide[:, :n], x, w, bias, None, lora), int8_linear(x, w, bias, lora))
    assert (wide[:, n:] == 5).all()
    assert not torch.equal(wide[:, :n], int8_linear(x, w, bias))
    want, got = residual[:, :n].clone(), residual.clone()
    gate = 2.0 ** gate.float().remainder(3)
    exact = QuantisedRows(x.values, x.scale, 0, torch.float32)
    low = int8_linear(x, lora.down, None).float()  # the sum with the branch is not rounded before it is gated
    want = gated(want, int8_linear(exact, w, bias) + low @ lora.up.float().mT, gate)
    assert torch.equal(launched(got[:, :n], x, w, bias, gate, lora), want)
    assert torch.equal(got[:, n:], residual[:, n:])


def test_a_lora_of_any_numbers() -> None:
    x, w, bias = operands(70, 50, 96, torch.float32)
    downs = [quantise(normal(rank, 96, seed=rank), 0) for rank in (3, 40)]
    lora = low_rank(downs, [normal(50, rank, seed=rank + 1) for rank in (3, 40)], [0.7, -2.0])
    want = int8_linear(x, w, bias, lora)
    assert torch.allclose(
        launched(torch.empty(70, 50), x, w, bias, None, lora), want, atol=1e-6 * want.abs().max()
    )


def test_a_row_that_is_not_finite_stays_so_and_others_do_not_see_it() -> None:
    x, w, bias = operands(5, 6, 64, torch.float32)
    x.scale[2] = torch.nan
    got = launched(torch.empty(5, 6), x, w, bias, None)
    assert (
        torch.isnan(got).any(1).tolist() == [False, False, True, False, False] and torch.isnan(got[2]).all()
    )


def test_the_test_on_a_card_passes_with_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "arch_of", lambda device: "sm_86")
    assert try_w8a8("int8", torch.device("cpu")) == ""


# ---- rows


def near(got: tuple[Tensor, Tensor], want: QuantisedRows) -> None:
    values, scale = got
    assert torch.allclose(scale, want.scale, rtol=1e-2 if want.dtype == torch.bfloat16 else 2e-3)
    difference = (values.int() - want.values.int()).abs()
    assert difference.max() <= 1 and (difference > 0).float().mean() < 0.02


def hard(n: int, width: int, dtype: torch.dtype) -> Tensor:
    """Rows that break quantisers, not touching."""
    x = normal(n, width + 16, seed=1)[:, :width]
    x[0] = 0
    x[1] *= 300
    x[2, 5] = 200
    x[:, 7] += 20
    return x.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [0, 256])
@pytest.mark.parametrize("width", [256, 768])
def test_rows(dtype: torch.dtype, group: int, width: int) -> None:
    x = hard(5, width, dtype)
    near(quantise_triton.quantise(x, group, "int8"), quantise(x, group))
    near(quantise_triton.gelu(x, group, "int8"), gelu_quantise(x, group))
    for rows in (1, 5):
        shift, scale = normal(rows, width, seed=2), normal(rows, width, seed=3)
        near(
            quantise_triton.modulate(x, shift, scale, group, "int8"),
            modulate_quantise(x, shift, scale, group),
        )


def test_rows_of_any_width_without_rotation() -> None:
    for n, width in ((1, 1), (4, 300)):
        x = normal(n, width).half()
        near(quantise_triton.quantise(x, 0, "int8"), quantise(x, 0))


def test_a_rotation_evens_out_a_channel() -> None:
    x = torch.zeros(1, 512, dtype=torch.float16)
    x[0, 300] = 16
    values, scale = quantise_triton.quantise(x, 256, "int8")
    assert scale.item() == pytest.approx(1 / 127) and (values[0, :256] == 0).all()
    assert (values[0, 256:].abs() == 127).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [256, 700])
def test_rows_of_fp8(dtype: torch.dtype, width: int) -> None:
    x = hard(5, width, dtype)
    shift, scale = normal(5, width, seed=2), normal(1, width, seed=3)
    for (values, of_row), want in (
        (quantise_triton.quantise(x, 0, "fp8"), quantise(x, 0, "fp8")),
        (quantise_triton.gelu(x, 0, "fp8"), gelu_quantise(x, 0, "fp8")),
        (quantise_triton.modulate(x, shift, scale, 0, "fp8"), modulate_quantise(x, shift, scale, 0, "fp8")),
    ):
        assert values.dtype == torch.float8_e4m3fn
        assert torch.allclose(of_row, want.scale, rtol=1e-2 if dtype == torch.bfloat16 else 2e-3)
        got, right = values.float(), want.values.float()
        assert (got.abs().amax(1) == 448)[1:].all() and (got[0].abs() <= 448).all()
        steps = (got - right).abs() / right.abs().clamp_min(2**-6)
        assert steps.max() <= 0.126 and (steps > 0).float().mean() < 0.04


@pytest.mark.parametrize(("form", "group"), [("int8", 0), ("int8", 256), ("fp8", 0)])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_is_in_the_scale(form: Form, group: int, bad: float) -> None:
    x = normal(3, 256).half()
    x[1, 9] = bad
    for values, scale in (
        quantise_triton.quantise(x, group, form),
        quantise_triton.modulate(x, *normal(2, 1, 256), group, form),
    ):
        assert torch.isnan(scale).tolist() == [False, True, False]
        assert (values.float()[[0, 2]].abs().amax(1) == PEAK[form]).all()
    reference = quantise(x, group, form)
    assert torch.isnan(reference.scale).tolist() == [False, True, False]


def test_rows_beyond_what_32_bits_count(far: Callable[[Tensor], Tensor]) -> None:
    x, w, bias = operands(3, 3, 64, torch.float32)
    a, b, out = far(x.values), far(w.values), far(torch.zeros(3, 3))
    gemm_triton.linear(out, a, x.scale, b, w.scale, bias, None, None, None, TILE)
    assert torch.equal(out, int8_linear(x, w, bias))
    gate, residual = normal(1, 3, seed=7), out.clone()
    gemm_triton.linear(out, a, x.scale, b, w.scale, bias, gate, None, None, TILE)
    assert torch.equal(out, gated(residual, int8_linear(x, w, bias), gate))
    rows = normal(3, 256, seed=1).half()
    shift = normal(3, 256, seed=2)
    near(quantise_triton.quantise(far(rows), 0, "int8"), quantise(rows, 0))
    near(
        quantise_triton.modulate(far(rows), far(shift), shift, 0, "int8"),
        modulate_quantise(rows, shift, shift, 0),
    )
