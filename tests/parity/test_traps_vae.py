"""Easy ways to be subtly wrong in the autoencoders, one test each: ours is the truth, the wrong way would show.

A number in a test's name is that of the mistake in the project's list.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
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
"""Float32 against float32 in another order of summation."""


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
