"""The producers are their references: rows for attention, values, modulation, activation, residual."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lowvram.triton_kernels import modulate, modulate_triton, norm_rope, norm_rope_triton
from lowvram.triton_kernels.attention import KEY_TILE

DTYPES = [torch.float16, torch.bfloat16]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def angles(n: int) -> Tensor:
    turn = normal(n, 64, seed=9) * 3
    return torch.stack([turn.cos(), turn.sin()], -1)


def close(got: Tensor, want: Tensor, steps: float = 2) -> None:
    """Equal but for `steps` steps of the type of `want`."""
    eps = torch.finfo(want.dtype).eps
    error = (got.float() - want.float()).abs()
    assert (error <= steps * eps * want.float().abs() + 1e-6).all(), float(error.max())


def expected(x: Tensor, weight: Tensor, rope: Tensor, factor: Tensor | None) -> Tensor:
    f = norm_rope.rms_factor(x) if factor is None else factor
    return norm_rope.rotate(norm_rope.heads(norm_rope.scaled(x, f, weight)), rope)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "heads"), [(1, 1), (16, 2), (37, 3)])
def test_norm_and_rotary_embedding(dtype: torch.dtype, n: int, heads: int) -> None:
    wide = (normal(n, heads * 128 + 128) * 3).to(dtype)
    x, weight, rope = wide[:, 128:], normal(heads * 128, seed=1), angles(n)
    close(norm_rope_triton.rms_factor(x), norm_rope.rms_factor(x), 8)
    for factor in (None, normal(n, 1, seed=2).abs()):
        room = torch.zeros(heads, n + 5, 128, dtype=dtype)
        norm_rope_triton.norm_rope(room[:, 2 : n + 2], None, x, weight, rope, factor, None)
        want = expected(x, weight, rope, factor)
        # A rounding may fall otherwise where a factor differs in its last bit; rotated, it stays near the norm.
        eps = torch.finfo(dtype).eps
        assert (room[:, 2 : n + 2].float() - want.float()).abs().max() <= 3 * eps * want.float().abs().max()
        assert (room[:, :2] == 0).all() and (room[:, n + 2 :] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("centred", [False, True])
def test_int8_rows(dtype: torch.dtype, centred: bool) -> None:
    n, heads = 37, 2
    x, weight, rope = normal(n, heads * 128).to(dtype), normal(heads * 128, seed=1), angles(n)
    x[3] = 0
    x[5] *= 50
    rotated = expected(x, weight, rope, None)
    centre = norm_rope.centre_of(rotated[:, ::8]) if centred else None
    want, want_scale = norm_rope.quantise_rows(rotated, centre)
    got, scale = torch.zeros(heads, n, 128, dtype=torch.int8), torch.zeros(heads, n)
    norm_rope_triton.norm_rope(got, scale, x, weight, rope, None, centre)
    eps = torch.finfo(dtype).eps
    assert (scale - want_scale).abs().max() <= 4 * eps * want_scale.max()
    numbers, exact = got.float() * scale[..., None], want.float() * want_scale[..., None]
    assert (numbers - exact).norm() <= (2 * eps + 1e-3) * exact.norm()
    assert (got.int() - want.int()).abs().max() <= 2 and torch.isfinite(scale).all() and (scale > 0).all()


@pytest.mark.parametrize("v_format", ["fp16", "fp8"])
@pytest.mark.parametrize("n", [1, 100, 1024, 1090])
def test_values(v_format: str, n: int) -> None:
    heads = 2
    v = (normal(n, heads * 128) * 5).bfloat16()
    v[0, 7] = 3e38  # the largest of its channel, beyond float16
    v[:, 200] = 0
    want, want_scale = norm_rope.quantise_values(norm_rope.heads(v), v_format)
    got, scale = torch.full_like(want, 9.0), torch.zeros_like(want_scale)
    norm_rope_triton.quantise_values(got, scale, v, v_format)
    close(scale, want_scale)
    bits = torch.int8 if v_format == "fp8" else torch.int16
    assert (got.view(bits).int() - want.view(bits).int()).abs().max() <= 1  # neighbours
    if v_format == "fp8":
        assert got.shape[2] % KEY_TILE == 0 and (got[:, :, n:].float() == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 5])
def test_modulation_activation_and_residual(dtype: torch.dtype, rows: int) -> None:
    n, width = 5, 1300
    x, y = (normal(n, width, seed=s).to(dtype) for s in (0, 1))
    shift, scale, gate = (normal(rows, width, seed=s) for s in (2, 3, 4))
    x[1] = 7  # no variance
    wide = torch.cat([x, x], 1)[:, :width]  # rows that do not touch
    close(modulate_triton.modulate(wide, shift, scale), modulate.modulate(x, shift, scale), 16)
    got = wide.clone(memory_format=torch.preserve_format)
    modulate_triton.gated(got, y, gate)
    close(got, modulate.gated(x, y, gate))
    exact = normal(n, width, seed=6)  # a residual in float32 beside numbers of `dtype`
    close(
        modulate_triton.modulate(exact, shift, scale, dtype),
        modulate.modulate(exact, shift, scale, dtype),
        16,
    )
    got = exact.clone()
    modulate_triton.gated(got, y, gate)
    close(got, modulate.gated(exact, y, gate))
    got = y.clone() * 4
    want = modulate.gelu(got.float()).to(dtype)
    modulate_triton.gelu(got)
    close(got, want, 4)


def test_rows_beyond_what_32_bits_count(far: Callable[[Tensor], Tensor]) -> None:
    n, width = 3, 256
    x, y, row = normal(n, width).half(), normal(n, width, seed=1).half(), normal(n, width, seed=2)
    close(modulate_triton.modulate(far(x), far(row), row), modulate.modulate(x, row, row), 16)
    got = far(x)
    modulate_triton.gated(got, far(y), far(row))
    close(got, modulate.gated(x, y, row))
    got = far(x)
    modulate_triton.gelu(got)
    close(got, modulate.gelu(x.float()).half(), 4)
    close(norm_rope_triton.rms_factor(far(x)), norm_rope.rms_factor(x), 8)
    x, weight, rope = normal(n, 3 * 128).half(), normal(3 * 128, seed=1), angles(n)
    want, out = expected(x, weight, rope, None), far(torch.zeros(3, n, 128).half())
    norm_rope_triton.norm_rope(out, None, far(x), weight, rope, None, None)
    assert (out.float() - want.float()).abs().max() <= 3 * 2**-10 * want.float().abs().max()
    values, scale = norm_rope.quantise_values(norm_rope.heads(x), "fp16")
    out, scales = far(values * 0), far(scale * 0)
    norm_rope_triton.quantise_values(out, scales, far(x), "fp16")
    close(scales, scale)
    close(out, values)
