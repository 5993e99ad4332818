"""Easy ways to be subtly wrong, one test each: ours is the truth, and the wrong way would have shown.

The truth is computed here from the formulas alone, in float64, with a switch for each mistake; nothing of
`lowvram.models` is used for it. Numbers in the names of sections are those of the list the project keeps of such
mistakes; those of them that concern schedules, text or files have their tests elsewhere.
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

from lowvram.models import vae
from lowvram.quant.spec import LATENT_MEAN_21, LATENT_MEAN_22, LATENT_STD_21, LATENT_STD_22, VaeSpec

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
    w: Weights, latent: Tensor, t: Tensor, text: Tensor, image: Tensor | None = None, way: Way = RIGHT
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


# ---- 14 to 18: the autoencoders


def test_14_an_encoded_clip_is_the_posterior_mean(
    vae_case: Callable[[str], Any], noise: Noise, error: Error
) -> None:
    for version in ("2.1", "2.2"):
        case = vae_case(version)
        x = noise(1, 3, 5, 32, 48, seed=51).clamp(-1, 1)
        with torch.no_grad():
            mu = vae.encode(case.spec, case.weights, x) * case.std + case.mean
            posterior = case.reference.encode(x).latent_dist
        assert error(mu, posterior.mean) <= EXACT
        assert error(posterior.sample(torch.Generator().manual_seed(1)), mu) > 0.1
        assert error(posterior.logvar, mu) > 0.1


def test_15_latents_are_shifted_before_they_are_scaled(
    vae_case: Callable[[str], Any], noise: Noise, error: Error
) -> None:
    case = vae_case("2.1")
    plain = replace(case.spec, mean=(0.0,) * 16, std=(1.0,) * 16)
    x = noise(1, 3, 1, 16, 24, seed=52).clamp(-1, 1)
    with torch.no_grad():
        mu = vae.encode(plain, case.weights, x)
        z = vae.encode(case.spec, case.weights, x)
        pixels = next(iter(vae.decode(case.spec, case.weights, z)))
        right = next(iter(vae.decode(plain, case.weights, mu)))
        swapped = next(iter(vae.decode(plain, case.weights, (z + case.mean) * case.std)))
    assert error(z, (mu - case.mean) / case.std) <= EXACT
    assert error(mu / case.std - case.mean, z) > 0.1
    assert error(pixels, right) <= 3 * EXACT
    assert error(swapped, pixels) > 0.1


def test_15_each_version_has_its_own_statistics(vae_case: Callable[[str], Any]) -> None:
    spec, config = VaeSpec(), vae_case("2.1-small").reference.config
    assert (spec.mean, spec.std) == (LATENT_MEAN_21, LATENT_STD_21)
    assert (list(spec.mean), list(spec.std)) == (config.latents_mean, config.latents_std)
    assert len(LATENT_MEAN_22) == len(LATENT_STD_22) == 48
    assert LATENT_MEAN_22[:16] != LATENT_MEAN_21


def _doubled(x: Tensor, w: Weights, way: str = "right") -> Tensor:
    """Frames [C, T, H, W] after the time half of an upsampling, frame by frame."""
    kernel, bias = w["up.time_conv.weight"][..., 0, 0], w["up.time_conv.bias"][:, None, None]
    frames = list(x.unbind(1))
    out = [] if way == "first too" else [frames[0]]
    for t in range(0 if way == "first too" else 1, len(frames)):
        known = 0 if way in ("history of first", "first too") else 1
        taps = [frames[i] if i >= known else torch.zeros_like(x[:, 0]) for i in (t - 2, t - 1, t)]
        both = bias + sum(torch.einsum("oi,ihw->ohw", kernel[:, :, j], tap) for j, tap in enumerate(taps))
        pair = list(both.chunk(2))
        out += pair[::-1] if way == "later half first" else pair
    return torch.stack(out[1:] if way == "first too" else out, 1)


@pytest.mark.parametrize("chunk", [1, 2, 5])
def test_16_upsampling_in_time_skips_the_first_latent_and_forgets_it(
    noise: Noise, error: Error, chunk: int
) -> None:
    x = noise(4, 5, 3, 2, seed=53).double()
    w = {
        "up.time_conv.weight": noise(8, 4, 3, 1, 1, seed=54).double(),
        "up.time_conv.bias": noise(8, seed=55).double(),
        "up.resample.1.weight": noise(2, 4, 3, 3, seed=56).double(),
        "up.resample.1.bias": noise(2, seed=57).double(),
    }

    def widened(frames: Tensor) -> Tensor:
        frames = frames.repeat_interleave(2, -1).repeat_interleave(2, -2).transpose(0, 1)
        y = functional.conv2d(frames, w["up.resample.1.weight"], w["up.resample.1.bias"], padding=1)
        return y.transpose(0, 1)

    layer, history = vae.Up("up", time=True), vae.History()
    ours = torch.cat([layer(part, w, history) for part in x[None].split(chunk, dim=2)], dim=2)[0]
    assert ours.shape == (2, 9, 6, 4)
    assert error(ours, widened(_doubled(x, w))) <= 1e-12
    for way in ("first too", "history of first", "later half first"):
        assert error(widened(_doubled(x, w, way)), ours) > 0.1


@pytest.mark.parametrize("chunk", [2, 4])
def test_16_downsampling_in_time_keeps_the_first_frame(noise: Noise, error: Error, chunk: int) -> None:
    x = noise(4, 5, 6, 4, seed=58).double()
    w = {
        "down.time_conv.weight": noise(4, 4, 3, 1, 1, seed=59).double(),
        "down.time_conv.bias": noise(4, seed=60).double(),
        "down.resample.1.weight": noise(4, 4, 3, 3, seed=61).double(),
        "down.resample.1.bias": noise(4, seed=62).double(),
    }
    kernel, bias = w["down.time_conv.weight"][..., 0, 0], w["down.time_conv.bias"][:, None, None]

    def narrowed(pad: tuple[int, int, int, int]) -> Tensor:
        y = functional.pad(x.transpose(0, 1), pad)
        return functional.conv2d(y, w["down.resample.1.weight"], w["down.resample.1.bias"], stride=2)

    def merged(s: Tensor, first: Tensor) -> Tensor:
        pairs = [(s[t - 2], s[t - 1], s[t]) for t in (2, 4)]
        later = [
            bias + sum(torch.einsum("oi,ihw->ohw", kernel[:, :, j], tap) for j, tap in enumerate(taps))
            for taps in pairs
        ]
        return torch.stack([first, *later], 1)

    s = narrowed((0, 1, 0, 1))
    layer, history = vae.Down("down", time=True), vae.History()
    parts = (x[None, :, :1], *x[None, :, 1:].split(chunk, dim=2))
    ours = torch.cat([layer(part, w, history) for part in parts], dim=2)[0]
    assert error(ours, merged(s, s[0])) <= 1e-12
    zero = torch.zeros_like(s[0])
    convolved = bias + torch.einsum("oi,ihw->ohw", kernel[:, :, 2], s[0]) + zero
    assert error(merged(s, convolved), ours) > 0.1
    padded_left = narrowed((1, 0, 1, 0))
    assert error(merged(padded_left, padded_left[0]), ours) > 0.1


def _zeros(**shapes: tuple[int, ...]) -> dict[str, Tensor]:
    return {k.replace("__", "."): torch.zeros(s, dtype=torch.float64) for k, s in shapes.items()}


def test_17_the_averaging_shortcut_puts_a_zero_frame_in_front_of_an_odd_count(
    noise: Noise, error: Error
) -> None:
    """The stage's convolutions are zero, so only its shortcut is left."""
    w = _zeros(
        s__d__time_conv__weight=(8, 8, 3, 1, 1),
        s__d__time_conv__bias=(8,),
        s__d__resample__1__weight=(8, 4, 3, 3),
        s__d__resample__1__bias=(8,),
    )
    stage = vae.Stage("s", (vae.Down("s.d", time=True),), width=8, time=2, space=2, up=False)
    x = noise(4, 5, 4, 6, seed=63).double()

    def averaged(frames: Tensor) -> Tensor:
        """[4, 2, H, W] -> [8, H/2, W/2]: 32 values of a block, ordered (channel, time, row, column), in 8 means."""
        out = torch.empty(8, 2, 3, dtype=torch.float64)
        for i in range(2):
            for j in range(3):
                out[:, i, j] = frames[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].reshape(8, 4).mean(1)
        return out

    history, zero = vae.History(), torch.zeros_like(x[:, :1])
    first, rest = stage(x[None, :, :1], w, history)[0], stage(x[None, :, 1:], w, history)[0]
    assert error(first[:, 0], averaged(torch.cat([zero, x[:, :1]], 1))) <= 1e-12
    assert error(rest, torch.stack([averaged(x[:, 1:3]), averaged(x[:, 3:5])], 1)) <= 1e-12
    for wrong in ([x[:, :1], zero], [x[:, :1], x[:, :1]]):
        assert error(averaged(torch.cat(wrong, 1)), first[:, 0]) > 0.1


def test_17_the_repeating_shortcut_drops_the_leading_frame_of_the_clip_only(
    noise: Noise, error: Error
) -> None:
    """The stage's convolutions are zero, so only its shortcut is left."""
    w = _zeros(
        s__u__time_conv__weight=(16, 8, 3, 1, 1),
        s__u__time_conv__bias=(16,),
        s__u__resample__1__weight=(2, 8, 3, 3),
        s__u__resample__1__bias=(2,),
    )
    stage = vae.Stage("s", (vae.Up("s.u", time=True),), width=2, time=2, space=2, up=True)
    x = noise(8, 3, 2, 3, seed=64).double()

    def repeated(frame: Tensor) -> Tensor:
        """[8, H, W] -> [2, 2, 2H, 2W]: every channel twice, 16 values of a pixel ordered (channel, time, row, column)."""
        out = torch.empty(2, 2, 4, 6, dtype=torch.float64)
        for i in range(2):
            for j in range(3):
                values = frame[:, i, j].repeat_interleave(2).reshape(2, 2, 2, 2)
                out[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2] = values
        return out

    everything = torch.cat([repeated(x[:, t]) for t in range(3)], 1)
    for chunk in (1, 2, 3):
        history = vae.History()
        ours = torch.cat([stage(part, w, history) for part in x[None].split(chunk, dim=2)], dim=2)[0]
        assert error(ours, everything[:, 1:]) <= 1e-12
    assert error(everything[:, :-1], everything[:, 1:]) > 0.1


@pytest.mark.parametrize("version", ["2.1-small", "2.2"])
def test_18_latent_0_is_frame_0_alone_and_latent_k_ends_with_frame_4k(
    vae_case: Callable[[str], Any], noise: Noise, version: str
) -> None:
    """Why a mask repeats frame 0 four times before frames are packed by four: frame f belongs to latent
    ceil(f / 4). Packing by f // 4 would give frames 1 to 3 to the latent of frame 0.
    """
    case = vae_case(version)
    stride = case.spec.stride[1]
    x = noise(1, 3, 9, stride, 2 * stride, seed=65).clamp(-1, 1)
    with torch.no_grad():
        before = vae.encode(case.spec, case.weights, x)
        for frame in range(9):
            changed = x.clone()
            changed[:, :, frame] *= -1
            moved = (vae.encode(case.spec, case.weights, changed) != before).flatten(3).any(-1).any(1)[0]
            assert moved.tolist() == [k >= math.ceil(frame / 4) for k in range(3)]


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
