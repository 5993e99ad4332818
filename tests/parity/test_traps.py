"""Easy ways to be subtly wrong in the transformer, one test each: ours is the truth, the wrong way would show.

The truth is computed here from the formulas alone, in float64, with a switch for each mistake; nothing of
`lowvram.models` is used for it. A number in a test's name is that of the mistake in the project's list.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

Error = Callable[[Tensor, Tensor], float]
Noise = Callable[..., Tensor]
Weights = Mapping[str, Tensor]

EXACT = 1e-5
"""Ours is float32, the truth float64."""


# ---- the transformer from its formulas


@dataclass(frozen=True)
class Way:
    """How to compute; every default is right."""

    padding: bool = True
    """Zero rows of text are attended."""
    rms_over_heads: bool = False
    """q and k normalised per head instead of over the full width."""
    half_split: bool = False
    """RoPE pairs (j, j + 64) instead of (2j, 2j + 1)."""
    one_spectrum: bool = False
    """RoPE frequencies 10000^(-j/64) over all 64 pairs instead of one spectrum per axis."""
    sines_first: bool = False
    head_by_e0: bool = False
    output_channel_slowest: bool = False
    input_channel_fastest: bool = False
    ffn_gelu: str = "tanh"
    image_gelu: str = "none"


RIGHT = Way()


def _linear(w: Weights, name: str, x: Tensor) -> Tensor:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def _layer_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()


def _affine(w: Weights, name: str, x: Tensor, eps: float = 1e-6) -> Tensor:
    return _layer_norm(x, eps) * w[f"{name}.weight"] + w[f"{name}.bias"]


def _rms(x: Tensor, weight: Tensor, way: Way) -> Tensor:
    groups = x.unflatten(-1, (-1, 128)) if way.rms_over_heads else x
    return (groups / (groups.square().mean(-1, keepdim=True) + 1e-6).sqrt()).reshape(x.shape) * weight


def _rope(x: Tensor, grid: tuple[int, int, int], way: Way) -> Tensor:
    """Rotate x [L, heads, 128] by the position of its token, pair by pair."""
    positions = torch.cartesian_prod(*(torch.arange(n).double() for n in grid))
    angles, pair = torch.empty(len(x), 64, dtype=torch.float64), 0
    for axis, pairs in enumerate((22, 21, 21)):
        for i in range(pairs):
            exponent = pair / 64 if way.one_spectrum else i / pairs
            angles[:, pair] = positions[:, axis] * 10000.0**-exponent
            pair += 1
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    out = torch.empty_like(x)
    first, second = (
        (slice(0, 64), slice(64, 128)) if way.half_split else (slice(0, None, 2), slice(1, None, 2))
    )
    out[..., first] = x[..., first] * cos - x[..., second] * sin
    out[..., second] = x[..., first] * sin + x[..., second] * cos
    return out


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[m, heads, 128] and [n, heads, 128] twice -> [m, heads * 128]"""
    weights = (torch.einsum("mhc,nhc->hmn", q, k) / math.sqrt(128)).softmax(-1)
    return torch.einsum("hmn,nhc->mhc", weights, v).flatten(1)


def _heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (-1, 128))


def truth(
    w: Weights, latent: Tensor, t: Tensor, text: Tensor, image: Tensor | None = None, *, way: Way = RIGHT
) -> Tensor:
    """Velocity [C, F, H, W] in float64. t: one per latent frame. Only loops, sums and products."""
    w = {k: v.double() for k, v in w.items()}
    dim, (channels, f, rows, columns) = w["patch_embedding.bias"].shape[0], latent.shape
    grid = (f, rows // 2, columns // 2)

    patches = latent.double().reshape(channels, f, grid[1], 2, grid[2], 2)
    order = (1, 2, 4, 3, 5, 0) if way.input_channel_fastest else (1, 2, 4, 0, 3, 5)
    x = patches.permute(order).reshape(-1, 4 * channels) @ w["patch_embedding.weight"].reshape(dim, -1).T
    x = x + w["patch_embedding.bias"]

    context = text.double()
    if way.padding:
        context = torch.cat([context, torch.zeros(512 - len(text), text.shape[1]).double()])
    context = functional.gelu(_linear(w, "text_embedding.0", context), approximate="tanh")
    context = _linear(w, "text_embedding.2", context)
    if image is not None:
        image = _affine(w, "img_emb.proj.0", image.double(), 1e-5)
        image = functional.gelu(_linear(w, "img_emb.proj.1", image), approximate=way.image_gelu)
        image = _affine(w, "img_emb.proj.4", _linear(w, "img_emb.proj.3", image), 1e-5)

    angle = t.double()[:, None] * torch.tensor([10000.0 ** (-i / 128) for i in range(128)]).double()
    waves = [angle.sin(), angle.cos()] if way.sines_first else [angle.cos(), angle.sin()]
    e = functional.silu(_linear(w, "time_embedding.0", torch.cat(waves, -1)))
    e = _linear(w, "time_embedding.2", e)
    e0 = _linear(w, "time_projection.1", functional.silu(e)).unflatten(-1, (6, dim))
    # From here on one row per token.
    e, e0 = (v.repeat_interleave(len(x) // len(v), 0) for v in (e, e0))

    layers = 1 + max(int(k.split(".")[1]) for k in w if k.startswith("blocks."))
    for n in range(layers):
        p = {k.removeprefix(f"blocks.{n}."): v for k, v in w.items() if k.startswith(f"blocks.{n}.")}
        shift, scale, gate, shift2, scale2, gate2 = (p["modulation"] + e0).unbind(1)
        h = _layer_norm(x) * (1 + scale) + shift
        q = _heads(_rms(_linear(p, "self_attn.q", h), p["self_attn.norm_q.weight"], way))
        k = _heads(_rms(_linear(p, "self_attn.k", h), p["self_attn.norm_k.weight"], way))
        y = _attention(_rope(q, grid, way), _rope(k, grid, way), _heads(_linear(p, "self_attn.v", h)))
        x = x + _linear(p, "self_attn.o", y) * gate
        h = _affine(p, "norm3", x)
        q = _heads(_rms(_linear(p, "cross_attn.q", h), p["cross_attn.norm_q.weight"], way))
        k = _heads(_rms(_linear(p, "cross_attn.k", context), p["cross_attn.norm_k.weight"], way))
        y = _attention(q, k, _heads(_linear(p, "cross_attn.v", context)))
        if image is not None:
            k = _heads(_rms(_linear(p, "cross_attn.k_img", image), p["cross_attn.norm_k_img.weight"], way))
            y = y + _attention(q, k, _heads(_linear(p, "cross_attn.v_img", image)))
        x = x + _linear(p, "cross_attn.o", y)
        h = _linear(p, "ffn.0", _layer_norm(x) * (1 + scale2) + shift2)
        x = x + _linear(p, "ffn.2", functional.gelu(h, approximate=way.ffn_gelu)) * gate2

    by = e0[:, :2] if way.head_by_e0 else e[:, None]
    shift, scale = (w["head.modulation"] + by).unbind(1)
    x = _linear(w, "head.head", _layer_norm(x) * (1 + scale) + shift)
    if way.output_channel_slowest:
        x = x.reshape(*grid, -1, 2, 2).permute(3, 0, 1, 4, 2, 5)
    else:
        x = x.reshape(*grid, 2, 2, -1).permute(5, 0, 1, 3, 2, 4)
    return x.reshape(-1, f, rows, columns)


@pytest.fixture(scope="module")
def clip_inputs(dit_case: Callable[[str], Any], noise: Noise) -> dict[str, Tensor]:
    spec = dit_case("i2v-clip").spec
    return {
        "latent": noise(spec.in_channels, 3, 6, 10, seed=41),
        "t": torch.tensor([637.0]),
        "text": noise(60, spec.text_dim, seed=42),
        "image": noise(spec.image_tokens, spec.image_dim, seed=43),
    }


@pytest.fixture(scope="module")
def wrong_by(
    dit_case: Callable[[str], Any], clip_inputs: dict[str, Tensor], error: Error
) -> Callable[..., float]:
    """wrong_by(padding=False): how far that way is from ours, which is checked to be the right one."""
    case = dit_case("i2v-clip")
    ours = case.plain(**clip_inputs)
    assert error(ours, truth(case.outer.tensors, **clip_inputs)) <= EXACT

    def measure(**way: Any) -> float:
        return error(truth(case.outer.tensors, **clip_inputs, way=replace(RIGHT, **way)), ours)

    return measure


# ---- 1 to 7: the transformer


def test_1_zero_padding_of_the_text_is_attended(wrong_by: Callable[..., float]) -> None:
    assert wrong_by(padding=False) > 0.03


def test_2_q_and_k_are_normalised_over_the_full_width(wrong_by: Callable[..., float]) -> None:
    assert wrong_by(rms_over_heads=True) > 0.003


def test_3_rope_turns_neighbouring_channels(wrong_by: Callable[..., float]) -> None:
    assert wrong_by(half_split=True) > 0.03


def test_3_rope_has_a_spectrum_per_axis(wrong_by: Callable[..., float]) -> None:
    assert wrong_by(one_spectrum=True) > 0.03


def test_4_cosines_come_before_sines_in_the_time_embedding(wrong_by: Callable[..., float]) -> None:
    assert wrong_by(sines_first=True) > 0.03


def test_5_the_head_is_modulated_by_e_and_not_by_e0(wrong_by: Callable[..., float]) -> None:
    assert wrong_by(head_by_e0=True) > 0.03


def test_6_the_channel_is_fastest_in_the_output_patch(wrong_by: Callable[..., float]) -> None:
    assert wrong_by(output_channel_slowest=True) > 0.03


def test_6_the_channel_is_slowest_in_the_input_patch(wrong_by: Callable[..., float]) -> None:
    assert wrong_by(input_channel_fastest=True) > 0.03


def test_7_gelu_is_the_tanh_form_in_the_ffn(wrong_by: Callable[..., float]) -> None:
    assert wrong_by(ffn_gelu="none") > 3e-5


def test_7_gelu_is_the_exact_form_in_the_image_embedding(wrong_by: Callable[..., float]) -> None:
    assert wrong_by(image_gelu="tanh") > 3e-5


# ---- 20: one noise level per latent frame


def test_20_a_given_first_frame_has_its_own_time_and_still_moves(
    dit_case: Callable[[str], Any], noise: Noise, error: Error
) -> None:
    """The tokens of the given frame see t = 0. The network predicts a velocity there too, as large as anywhere,
    so a sampler must put the given frame back after every step.
    """
    case = dit_case("ti2v")
    given = {"latent": noise(48, 3, 6, 10, seed=71), "text": noise(60, 64, seed=72)}
    t = torch.tensor([0.0, 637.0, 637.0])
    ours = case.plain(**given, t=t)
    assert error(ours, truth(case.outer.tensors, **given, t=t)) <= EXACT
    uniform = truth(case.outer.tensors, **given, t=t[1:2])
    assert error(uniform[:, :1], ours[:, :1]) > 0.1
    assert error(uniform[:, 1:], ours[:, 1:]) > 1e-3
    assert ours[:, 0].square().mean() > 0.1 * ours[:, 1:].square().mean()
