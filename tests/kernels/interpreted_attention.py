"""The attention kernel is `attend_reference`, on lengths and data that break such kernels."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lowvram.bench.parts import Setup, attending
from lowvram.triton_kernels import attention_triton, modes
from lowvram.triton_kernels.attention import (
    KEY_TILE,
    V_RUN,
    attend_reference,
    pool_keys,
    select_tiles,
)
from lowvram.triton_kernels.keys import carve, stored_bytes, write_keys_, write_values_
from lowvram.triton_kernels.norm_rope import centre_of, quantise_rows, quantise_values
from lowvram.triton_kernels.ops import FUSED
from lowvram.triton_kernels.tiles import Tile

TILE = Tile(64, 64, 4, 2)
MODES = [("bf16", False), ("fp16", True), ("fp8", True), ("fp8", False)]
TOLERANCE = 2e-3
"""Relative, of the whole result: P rounds otherwise where exp2 differs in its last bit, and into float16 the
interpreter rounds once a tile, the reference once an instruction."""


def rows(heads: int, n: int, seed: int = 0) -> Tensor:
    return torch.randn(heads, n, 128, generator=torch.Generator().manual_seed(seed))


def stored(k: Tensor, v: Tensor, v_format: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if v_format == "bf16":
        return *quantise_rows(k, centre_of(k[:, ::64])), v.bfloat16(), torch.empty(1, 1, 128)
    return *quantise_rows(k, centre_of(k[:, ::64])), *quantise_values(v, v_format)


def difference(q: Tensor, k: Tensor, v: Tensor, mode: tuple[str, bool], tile: Tile = TILE) -> float:
    v_format, half = mode
    q8, qs = quantise_rows(q)
    parts = stored(k, v, v_format)
    want = attend_reference(q8, qs, *parts, v_format=v_format, half=half, tile=tile.n)
    got = torch.full_like(want, float("nan"))
    attention_triton.attend(got, q8, qs, *parts, v_format=v_format, half=half, tile=tile)
    assert torch.isfinite(got).all()
    return float((got - want).norm() / want.norm().clamp_min(1e-20))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("m", "n"), [(200, 177), (1, 1), (64, 64), (65, 129), (3, 63)])
def test_any_length(mode: tuple[str, bool], m: int, n: int) -> None:
    assert difference(rows(2, m, 1), rows(2, n, 2), rows(2, n, 3), mode) < TOLERANCE


@pytest.mark.parametrize("mode", MODES)
def test_a_sink_takes_most_of_the_mass(mode: tuple[str, bool]) -> None:
    q, k, v = rows(1, 70, 1), rows(1, 200, 2), rows(1, 200, 3)
    k[:, 5] = 8 * torch.nn.functional.normalize(q.mean(1), dim=-1)
    q[:] += 4 * k[:, 5]
    assert difference(q, k, v, mode) < TOLERANCE


@pytest.mark.parametrize("mode", MODES)
def test_outlier_channels_and_tokens(mode: tuple[str, bool]) -> None:
    q, k, v = rows(2, 70, 1), rows(2, 150, 2), rows(2, 150, 3)
    k[..., 7] += 8
    q[:, ::9] *= 6
    v[..., 3] *= 300
    v[:, 11] *= 50
    assert difference(q, k, v, mode) < TOLERANCE


@pytest.mark.parametrize("mode", MODES)
def test_rows_of_zeros_stay_finite(mode: tuple[str, bool]) -> None:
    q, k, v = rows(2, 70, 1), rows(2, 150, 2), rows(2, 150, 3)
    q[:, 3] = 0
    k[:, 5:80] = 0
    v[1] = 0
    assert difference(q, k, v, mode) < TOLERANCE
    assert difference(q * 0, k * 0, v, mode) < TOLERANCE


@pytest.mark.parametrize("mode", MODES)
def test_equal_logits_and_values_at_their_maximum_do_not_overflow_half_precision(
    mode: tuple[str, bool],
) -> None:
    """All of P at its peak and all of V at its own: the largest sum a tile can make."""
    q, k, v = rows(1, 3, 1) * 0, rows(1, 192, 2) * 0, torch.full((1, 192, 128), 3e4)
    assert difference(q, k, v, mode) < TOLERANCE


@pytest.mark.parametrize("mode", MODES)
def test_heads_and_rows_may_be_strided(mode: tuple[str, bool]) -> None:
    v_format, half = mode
    q8, qs = quantise_rows(rows(4, 90, 1))
    parts = stored(rows(4, 100, 2), rows(4, 100, 3), v_format)
    want = attend_reference(q8, qs, *parts, v_format=v_format, half=half)
    wide = torch.zeros(90, 5 * 128)
    some = slice(1, 3)  # a group of the heads, written into its columns of a wider result
    scales = parts[3] if v_format == "bf16" else parts[3][some]
    attention_triton.attend(
        wide[:, 256:512], q8[some], qs[some], parts[0][some], parts[1][some], parts[2][some], scales,
        v_format=v_format, half=half, tile=TILE,
    )  # fmt: skip
    assert (wide[:, :256] == 0).all() and (wide[:, 512:] == 0).all()
    assert (wide[:, 256:512] - want[:, 128:384]).norm() < TOLERANCE * want.norm()


@pytest.mark.parametrize("mode", MODES)
def test_more_than_one_run_of_values(mode: tuple[str, bool]) -> None:
    v = rows(1, 1100, 3)
    v[:, 1024:] *= 40
    assert difference(rows(1, 20, 1), rows(1, 1100, 2), v, mode) < TOLERANCE


@pytest.mark.parametrize("tile", [Tile(128, 64, 8, 3), Tile(128, 32, 8, 3)], ids=str)
def test_other_tiles(tile: Tile) -> None:
    assert difference(rows(1, 200, 1), rows(1, 177, 2), rows(1, 177, 3), ("fp16", True), tile) < 2e-3


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("keep", [0.4, 1.0])
def test_an_index_skips_tiles(mode: tuple[str, bool], keep: float) -> None:
    v_format, half = mode
    q8, qs = quantise_rows(rows(2, 200, 1))
    parts = stored(rows(2, 300, 2), rows(2, 300, 3), v_format)
    pooled = torch.empty(2, 5, 128)
    pool_keys(parts[0], parts[1], pooled)
    index = select_tiles(q8, qs, pooled, keep)
    assert index.shape == (2, 2, 2 if keep < 1 else 5)
    want = attend_reference(q8, qs, *parts, index, v_format=v_format, half=half)
    dense = attend_reference(q8, qs, *parts, v_format=v_format, half=half)
    assert ((want - dense).norm() < 1e-6 * dense.norm()) == (keep == 1)
    got = torch.empty_like(want)
    attention_triton.attend(got, q8, qs, *parts, index, v_format=v_format, half=half, tile=TILE)
    assert (got - want).norm() < TOLERANCE * want.norm()
    assert TILE.n == KEY_TILE


@pytest.mark.parametrize(("name", "n"), [("int8", 150), ("int8-fp16", 150), ("int8-fp8", V_RUN + 66)])
def test_rows_that_calls_before_quantised_serve_attention_bit_for_bit(name: str, n: int) -> None:
    """Head by head and chunk by chunk, every projection gone before attention begins, as all at once."""
    m, heads, mode = 21, 2, modes.MODES[name]
    half = mode.v_format != "bf16"
    weight, turn = torch.rand(heads * 128, generator=torch.Generator().manual_seed(5)), rows(1, n)[0, :, :64]
    rope, centre = torch.stack([turn.cos(), turn.sin()], -1), rows(heads, 1, 6)[:, 0]
    alive: list[weakref.ref[Tensor]] = []

    def projected(what: int, tokens: slice = slice(None), columns: slice = slice(None)) -> Tensor:
        x = rows(1, n, what)[0].repeat(1, heads).mul_(torch.arange(1, heads * 128 + 1) / 200)
        alive.append(weakref.ref(made := x.bfloat16()[tokens, columns].clone()))
        return made

    q, k, v = (projected(what) for what in (1, 2, 3))
    q8, k8 = torch.empty(heads, m, 128, dtype=torch.int8), torch.empty(heads, n, 128, dtype=torch.int8)
    qs, ks = torch.empty(heads, m), torch.empty(heads, n)
    FUSED.norm_rope_int8_(q8, qs, q[:m], weight, rope[:m], None, None)
    FUSED.norm_rope_int8_(k8, ks, k, weight, rope, None, centre)
    values = v.unflatten(-1, (heads, 128)).transpose(0, 1).contiguous(), torch.empty(heads, 2, 128)
    if half:
        values = tuple(torch.empty_like(x) for x in quantise_values(values[0], mode.v_format))
        FUSED.quantise_values_(*values, v, mode.v_format)
    want = torch.empty(m, heads * 128, dtype=torch.bfloat16)
    attention_triton.attend(want, q8, qs, k8, ks, *values, v_format=mode.v_format, half=half, tile=TILE)

    factors = FUSED.rms_factor(q), FUSED.rms_factor(k)
    del q, k, v
    got = torch.full_like(want, torch.nan)
    garbage = (torch.full((size,), 0x7F, dtype=torch.uint8) for size in stored_bytes(mode, 1, n, want.dtype))
    kept = carve(mode, 1, n, want.dtype, *garbage, half=half)
    for head in range(heads):
        some = slice(head * 128, (head + 1) * 128)
        for start in range(0, n, 96):
            part = slice(start, start + 96)
            key, factor = projected(2, part, some), factors[1][part]
            write_keys_(FUSED, kept, start, key, weight[some], rope[part], factor, centre[head : head + 1])
            del key
        for start in range(0, n, V_RUN):
            write_values_(FUSED, kept, start, projected(3, slice(start, start + V_RUN), some))
        asked = projected(1, slice(0, m), some)
        q8, qs = torch.empty(1, m, 128, dtype=torch.int8), torch.empty(1, m)
        FUSED.norm_rope_int8_(q8, qs, asked, weight[some], rope[:m], factors[0][:m], None)
        del asked
        assert alive and not any(x() is not None for x in alive)
        for part in (slice(0, 16), slice(16, m)):
            attention_triton.attend(
                got[part, some], q8[:, part], qs[:, part], kept.k, kept.k_scale, kept.v, kept.v_scale,
                v_format=mode.v_format, half=half, tile=TILE,
            )  # fmt: skip
    assert torch.equal(got, want)


def test_the_result_takes_the_type_of_its_buffer() -> None:
    q8, qs = quantise_rows(rows(1, 20, 1))
    parts = stored(rows(1, 30, 2), rows(1, 30, 3), "fp16")
    want = attend_reference(q8, qs, *parts, v_format="fp16", half=True)
    for dtype, step in ((torch.float16, 2**-10), (torch.bfloat16, 2**-7)):
        got = torch.empty_like(want, dtype=dtype)
        attention_triton.attend(got, q8, qs, *parts, v_format="fp16", half=True, tile=TILE)
        assert (got.float() - want).abs().max() < 2 * step * want.abs().max()


def test_attention_in_a_dry_acceptance_run_passes(tmp_path: Path) -> None:
    (verdict,) = attending(Setup(True, str(tmp_path)))
    assert verdict.outcome == "passed" and not verdict.why
    ours = {mode.name for mode in modes.MODES.values() if mode.quantised}
    assert {name.partition(",")[0] for name in verdict.facts} >= {"sdpa", *ours}


@pytest.mark.parametrize("mode", MODES)
def test_heads_and_rows_beyond_what_32_bits_count(
    mode: tuple[str, bool], far: Callable[[Tensor], Tensor]
) -> None:
    v_format, half = mode
    q8, qs = quantise_rows(rows(3, 3, 1))
    k8, ks, v, vs = stored(rows(3, 70, 2), rows(3, 70, 3), v_format)
    want = attend_reference(q8, qs, k8, ks, v, vs, v_format=v_format, half=half)
    out = far(torch.zeros_like(want))
    bits = far(v.view(torch.uint8)).view(v.dtype) if v_format == "fp8" else far(v)
    attention_triton.attend(out, far(q8), qs, far(k8), ks, bits, vs, v_format=v_format, half=half, tile=TILE)
    assert (out - want).norm() < TOLERANCE * want.norm()
