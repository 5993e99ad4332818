"""The autoencoders against diffusers' AutoencoderKLWan, and any cut in time against any other."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from lowvram.models import vae, vae_attention, vae_clip
from lowvram.models.vae_history import Kept
from lowvram.models.vae_tiles import Tiling

Error = Callable[[Tensor, Tensor], float]
Noise = Callable[..., Tensor]

EXACT = 1e-5
"""Float32 against what the reference gives in float64: two orders of summation in float32 may be twice as far apart."""
VERSIONS = ["2.1", "2.1-small", "2.2"]
CLIPS = [(1, 3, 5), (1, 1, 1), (5, 5, 3), (9, 3, 5), (13, 2, 3)]
"""Pixel frames, rows and columns of latents."""


def video(case: Any, noise: Noise, frames: int, rows: int, columns: int) -> Tensor:
    stride = case.spec.stride[1]
    return noise(1, 3, frames, rows * stride, columns * stride, seed=frames).clamp(-1, 1)


def latent(case: Any, noise: Noise, frames: int, rows: int, columns: int) -> Tensor:
    return noise(1, case.spec.z, (frames - 1) // 4 + 1, rows, columns, seed=frames)


def decode(case: Any, z: Tensor, chunk: int = 1, weights: Mapping[str, Tensor] | None = None) -> Tensor:
    with torch.no_grad():
        return torch.cat(list(vae.decode(case.spec, weights or case.weights, z, chunk)), dim=2)


def encode(case: Any, x: Tensor, chunk: int = 4, weights: Mapping[str, Tensor] | None = None) -> Tensor:
    with torch.no_grad():
        return vae.encode(case.spec, weights or case.weights, x, chunk)


@pytest.fixture(scope="session", params=VERSIONS)
def case(request: pytest.FixtureRequest, vae_case: Callable[[str], Any]) -> Any:
    return vae_case(request.param)


@pytest.fixture(scope="session")
def truth(case: Any) -> Any:
    """The reference in float64. Its own nearest upsampling passes through float32, which costs 6e-8."""
    return copy.deepcopy(case.reference).double()


def test_native_names_and_shapes_are_those_of_the_reference_class(case: Any) -> None:
    assert {k: tuple(v.shape) for k, v in case.weights.items()} == case.spec.shapes()


@pytest.mark.parametrize("clip", CLIPS)
def test_encode_equals_the_reference_posterior_mean(
    case: Any, truth: Any, noise: Noise, error: Error, clip: tuple[int, int, int]
) -> None:
    x = video(case, noise, *clip)
    with torch.no_grad():
        mean = truth.encode(x.double()).latent_dist.mean
    z = encode(case, x)
    assert z.shape == (1, case.spec.z, (clip[0] - 1) // 4 + 1, *clip[1:])
    assert error(z, (mean - case.mean) / case.std) <= EXACT


@pytest.mark.parametrize("clip", CLIPS)
def test_decode_equals_the_reference(
    case: Any, truth: Any, noise: Noise, error: Error, clip: tuple[int, int, int]
) -> None:
    """diffusers clamps to -1..1, so only what lies inside is compared: enough of it, and not all.

    How far float32 comes depends on the processor's order of summation, and diffusers' own float32 is up to 8e-6 away:
    where that is more than half of the bound, as far again is allowed.
    """
    z = latent(case, noise, *clip)
    with torch.no_grad():
        expected = truth.decode(z.double() * case.std + case.mean).sample
        theirs = error(case.reference.decode(z * case.std + case.mean).sample, expected)
    pixels = decode(case, z)
    inside = (pixels.abs() < 1).float().mean()
    assert 0.5 < inside < 0.97
    assert error(pixels.clamp(-1, 1), expected) <= max(EXACT, 2 * theirs)


@pytest.mark.parametrize("tiling", [Tiling(2, 3), Tiling(3, 1, visit=2, kept=False)])
def test_tiles_equal_the_untiled_reference(
    case: Any, truth: Any, noise: Noise, error: Error, tiling: Tiling
) -> None:
    """diffusers' own tiles do not: they blend, and each sees another middle block."""
    x, z = video(case, noise, 9, 3, 5), latent(case, noise, 9, 3, 5)
    cpu, spec, weights = torch.device("cpu"), case.spec, case.weights
    with torch.no_grad():
        expected = truth.decode(z.double() * case.std + case.mean).sample
        moments = truth.encode(x.double()).latent_dist.mean
        clip = torch.empty_like(expected, dtype=z.dtype)
        for piece in vae_clip.decode(spec, weights, z, tiling, Kept(), cpu, z.dtype):
            clip[:, :, piece.frame, slice(*piece.rows), slice(*piece.columns)] = piece.pixels[:, :, 0]
        latents = vae_clip.encode(spec, weights, x[0].unbind(1), (3, 5), tiling, Kept(), cpu, x.dtype)
        made = torch.cat(list(latents), dim=2)
    assert error(clip.clamp(-1, 1), expected) <= EXACT
    assert error(made, (moments - case.mean) / case.std) <= EXACT


def test_float64_equals_the_reference_in_float64(
    case: Any, noise: Noise, error: Error, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing inside falls back to float32. Only diffusers' own nearest upsampling does: it is lifted here."""
    reference, (mean, std) = copy.deepcopy(case.reference).double(), case.statistics
    for module in reference.modules():
        if isinstance(module, torch.nn.Upsample):
            monkeypatch.setattr(type(module), "forward", torch.nn.Upsample.forward)
    x, z = video(case, noise, 9, 2, 3).double(), latent(case, noise, 9, 2, 3).double()
    with torch.no_grad():
        latents = (reference.encode(x).latent_dist.mean - mean) / std
        pixels = reference.decode(z * std + mean).sample
    assert error(encode(case, x, weights=case.double()), latents) <= 1e-12
    assert error(decode(case, z, weights=case.double()).clamp(-1, 1), pixels) <= 1e-12


@pytest.mark.parametrize("chunk", [1, 3, 8])
def test_decode_gives_frames_one_by_one(case: Any, noise: Noise, chunk: int) -> None:
    z = latent(case, noise, 13, 1, 2)
    stride = case.spec.stride[1]
    with torch.no_grad():
        shapes = [tuple(frame.shape) for frame in vae.decode(case.spec, case.weights, z, chunk)]
    assert shapes == [(1, 3, 1, stride, 2 * stride)] * 13


@pytest.mark.parametrize("chunk", [2, 3, 4, 8])
def test_decode_is_the_same_for_any_chunk(case: Any, noise: Noise, error: Error, chunk: int) -> None:
    z = latent(case, noise, 13, 2, 3)
    assert error(decode(case, z, chunk), decode(case, z)) <= EXACT
    exact = decode(case, z.double(), weights=case.double())
    assert error(decode(case, z.double(), chunk, case.double()), exact) <= 1e-12


def test_decode_equals_the_whole_clip_through_every_layer_at_once(
    case: Any, noise: Noise, error: Error
) -> None:
    z = latent(case, noise, 13, 2, 3)
    layers = vae.decoder_middle(case.spec) + vae.decoder_upsampling(case.spec)
    with torch.no_grad():
        whole = vae.run(layers, z * case.std + case.mean, case.weights, vae.History())
    assert error(decode(case, z), vae.unpatchify(whole, case.spec.patch)) <= EXACT


@pytest.mark.parametrize("chunk", [8, 12, 64])
def test_encode_is_the_same_for_any_chunk(case: Any, noise: Noise, error: Error, chunk: int) -> None:
    x = video(case, noise, 21, 2, 3)
    assert error(encode(case, x, chunk), encode(case, x)) <= EXACT
    exact = encode(case, x.double(), weights=case.double())
    assert error(encode(case, x.double(), chunk, case.double()), exact) <= 1e-12


def test_attention_is_the_same_for_any_number_of_queries_and_keys_at_once(
    case: Any, noise: Noise, error: Error, monkeypatch: pytest.MonkeyPatch
) -> None:
    z, x = latent(case, noise, 5, 3, 5), video(case, noise, 5, 3, 5)
    pixels, moments = decode(case, z), encode(case, x)
    monkeypatch.setattr(vae_attention, "QUERIES", 4)
    monkeypatch.setattr(vae_attention, "KEYS", 6)
    assert error(decode(case, z), pixels) <= EXACT
    assert error(encode(case, x), moments) <= EXACT


def test_a_batch_equals_its_clips_one_by_one(case: Any, noise: Noise, error: Error) -> None:
    z = noise(2, case.spec.z, 2, 2, 3, seed=1)
    x = video(case, noise, 5, 2, 3)
    x = torch.cat([x, -x.flip(-1)])
    pixels, moments = decode(case, z, chunk=2), encode(case, x)
    for i in range(2):
        assert error(pixels[i], decode(case, z[i : i + 1])[0]) <= EXACT
        assert error(moments[i], encode(case, x[i : i + 1])[0]) <= EXACT


def test_a_call_remembers_nothing_of_the_call_before(case: Any, noise: Noise) -> None:
    z, x = latent(case, noise, 9, 1, 2), video(case, noise, 9, 1, 2)
    assert torch.equal(decode(case, z), decode(case, z))
    assert torch.equal(encode(case, x), encode(case, x))


def test_unpatchify_undoes_patchify(noise: Noise) -> None:
    x = noise(2, 3, 2, 4, 6, seed=1)
    assert torch.equal(vae.unpatchify(vae.patchify(x, 2), 2), x)


def test_bf16_decode_loses_no_more_than_the_reference_in_bf16(case: Any, noise: Noise) -> None:
    """Rounding to 8 bits costs a relative 2^-9 / sqrt(3) = 0.0011 per value; some 100 roundings lie in a row
    between latent and pixel and add as squares to 0.011. The bound is twice that. The reference rounds at the same
    places, so ours may not be worse but for chance, 20 %. Root mean squares over clamped pixels.
    """
    z = latent(case, noise, 9, 2, 3).bfloat16()
    half = {k: v.bfloat16() for k, v in case.weights.items()}
    exact = decode(case, z.float(), weights={k: v.float() for k, v in half.items()}).clamp(-1, 1)
    ours = decode(case, z, weights=half).clamp(-1, 1)
    assert ours.dtype == torch.bfloat16
    with torch.no_grad():
        scaled = z * case.std.bfloat16() + case.mean.bfloat16()
        theirs = copy.deepcopy(case.reference).bfloat16().decode(scaled).sample

    def loss(x: Tensor) -> float:
        return float((x.float() - exact).square().mean().sqrt() / exact.square().mean().sqrt())

    assert loss(ours) <= 1.2 * loss(theirs)
    assert loss(ours) <= 0.022
