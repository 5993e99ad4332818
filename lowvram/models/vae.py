"""The Wan video autoencoders, 2.1 and 2.2: causal in time, chunk by chunk, with an explicit history.

A network is a tuple of layers built from a `VaeSpec`; see `lowvram.models.vae_layers`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lowvram.models.vae_attention import Attention
from lowvram.models.vae_layers import (
    Conv,
    Crop,
    Double,
    Down,
    Head,
    History,
    Residual,
    Stage,
    Up,
    Weights,
)
from lowvram.quant.spec import VaeSpec

MULTIPLIERS = (1, 2, 4, 4)
DECODER = ("conv2.", "decoder.")
"""How the names of the decoder's weights begin."""
ENCODER = ("conv1.", "encoder.")
"""How the names of the encoder's weights begin."""

Layer = Conv | Residual | Attention | Double | Up | Down | Stage | Head | Crop


def decoder_middle(spec: VaeSpec) -> tuple[Layer, ...]:
    """The part whose attention needs the whole latent plane, from scaled latents."""
    d = "decoder"
    middle = (Residual(f"{d}.middle.0"), Attention(f"{d}.middle.1"), Residual(f"{d}.middle.2"))
    return (Conv("conv2", radius=0), Conv(f"{d}.conv1"), *middle)


def decoder_upsampling(spec: VaeSpec) -> tuple[Layer, ...]:
    """The part that is only convolutions: three upsampling stages, a last stage and the head."""
    d, n = "decoder", spec.res_blocks + 1
    layers: list[Layer] = []
    for stage in range(4):
        up = stage < 3
        if spec.version == "2.1":
            first = stage * (n + 1)
            layers += [Residual(f"{d}.upsamples.{first + j}") for j in range(n)]
            if stage < 2:
                layers.append(Double(f"{d}.upsamples.{first + n}"))
            if up:
                layers.append(Up(f"{d}.upsamples.{first + n}"))
            continue
        name = f"{d}.upsamples.{stage}"
        inner: list[Residual | Up | Down] = [Residual(f"{name}.upsamples.{j}") for j in range(n)]
        if up:
            inner.append(Up(f"{name}.upsamples.{n}", time=stage < 2))
            width = spec.decoder_base * MULTIPLIERS[3 - stage]
            layers.append(Stage(name, tuple(inner), width, time=2 if stage < 2 else 1, space=2, up=True))
        else:
            layers += inner
    return (*layers, Head(f"{d}.head"))


def encoder(spec: VaeSpec) -> tuple[Layer, ...]:
    """Pixels (patchified for 2.2) to the moments: 2 * z channels, mean first."""
    return encoder_downsampling(spec) + encoder_middle(spec)


def encoder_downsampling(spec: VaeSpec) -> tuple[Layer, ...]:
    """The part that is only convolutions: four stages."""
    e, n = "encoder", spec.res_blocks
    layers: list[Layer] = [Conv(f"{e}.conv1")]
    for stage in range(4):
        down = stage < 3
        if spec.version == "2.1":
            first = stage * (n + 1)
            layers += [Residual(f"{e}.downsamples.{first + j}") for j in range(n)]
            if down:
                layers.append(Down(f"{e}.downsamples.{first + n}", time=stage > 0))
            continue
        name = f"{e}.downsamples.{stage}"
        inner: list[Residual | Up | Down] = [Residual(f"{name}.downsamples.{j}") for j in range(n)]
        if down:
            inner.append(Down(f"{name}.downsamples.{n}", time=stage > 0))
        width = spec.base * MULTIPLIERS[stage]
        time, space = (2 if down and stage > 0 else 1), (2 if down else 1)
        layers.append(Stage(name, tuple(inner), width, time=time, space=space, up=False))
    return tuple(layers)


def encoder_middle(spec: VaeSpec) -> tuple[Layer, ...]:
    """The part whose attention needs the whole latent plane, to the moments."""
    e = "encoder"
    middle = (Residual(f"{e}.middle.0"), Attention(f"{e}.middle.1"), Residual(f"{e}.middle.2"))
    return (*middle, Head(f"{e}.head"), Conv("conv1", radius=0))


def run(layers: tuple[Layer, ...], x: Tensor, w: Weights, history: History) -> Tensor:
    """The whole chunk through every layer."""
    for layer in layers:
        x = layer(x, w, history)
    return x


def run_framewise(layers: tuple[Layer, ...], x: Tensor, w: Weights, history: History) -> Iterator[Tensor]:
    """`run`, but what a layer doubled in time goes on frame by frame: less memory, the same arithmetic."""
    for i, layer in enumerate(layers):
        x = layer(x, w, history)
        if isinstance(layer, (Double, Up, Stage)) and x.shape[2] > 1:
            for frame in x.split(1, dim=2):
                yield from run_framewise(layers[i + 1 :], frame, w, history)
            return
    yield x


def run_pairwise(layers: tuple[Layer, ...], x: Tensor, w: Weights, history: History) -> Tensor:
    """`run`, but frames reach a layer that halves time in pairs, and the layers before it one by one.

    x: the clip's first frame, or as many as become one. Less memory, the same arithmetic.
    """
    halving = [i for i, layer in enumerate(layers) if _halves(layer)]
    if not halving or x.shape[2] == 1:
        return run(layers, x, w, history)
    before, rest = layers[: halving[-1]], layers[halving[-1] :]
    return run(
        rest,
        torch.cat([run_pairwise(before, part, w, history) for part in x.chunk(2, dim=2)], dim=2),
        w,
        history,
    )


def _halves(layer: Layer) -> bool:
    return (isinstance(layer, Down) and layer.time) or (
        isinstance(layer, Stage) and not layer.up and layer.time > 1
    )


# ---- whole clips


def patchify(x: Tensor, patch: int) -> Tensor:
    """[B, C, T, H, W] -> [B, C*patch^2, T, H/patch, W/patch]; channel = (c, x offset, y offset)."""
    if patch == 1:
        return x
    b, c, t, height, width = x.shape
    x = x.view(b, c, t, height // patch, patch, width // patch, patch).permute(0, 1, 6, 4, 2, 3, 5)
    return x.reshape(b, c * patch * patch, t, height // patch, width // patch)


def unpatchify(x: Tensor, patch: int) -> Tensor:
    """The inverse of `patchify`."""
    if patch == 1:
        return x
    b, c, t, height, width = x.shape
    x = x.view(b, c // patch**2, patch, patch, t, height, width).permute(0, 1, 4, 5, 3, 6, 2)
    return x.reshape(b, c // patch**2, t, height * patch, width * patch)


def to_uint8(frame: Tensor) -> Tensor:
    """[1, 3, T, H, W] about -1..1 -> [T, H, W, 3] uint8: floor(255 * (x + 1) / 2) after clamping, as upstream."""
    pixels = frame[0].to(torch.float32, copy=True).clamp_(-1, 1).add_(1).mul_(127.5).to(torch.uint8)
    return pixels.permute(1, 2, 3, 0).contiguous()


def statistics(spec: VaeSpec, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the latents [1, z, 1, 1, 1], in the dtype and on the device of `like`."""
    shape = (1, spec.z, 1, 1, 1)
    mean = torch.tensor(spec.mean, dtype=torch.float64).view(shape).to(like)
    return mean, torch.tensor(spec.std, dtype=torch.float64).view(shape).to(like)


def decode(spec: VaeSpec, w: Weights, latent: Tensor, chunk: int = 1) -> Iterator[Tensor]:
    """latent [B, z, F, H, W] as the transformer leaves it -> frames [B, 3, 1, 8H, 8W] in order, about -1..1.

    Not clamped. 1 + 4 * (F - 1) frames; `chunk` latent frames pass the middle block at once.
    """
    layers = decoder_middle(spec) + decoder_upsampling(spec)
    history = History()
    mean, std = statistics(spec, latent)
    for z in latent.split(chunk, dim=2):
        for frame in run_framewise(layers, z * std + mean, w, history):
            yield unpatchify(frame, spec.patch)


def encode(spec: VaeSpec, w: Weights, video: Tensor, chunk: int = 4) -> Tensor:
    """video [B, 3, 1+4k, H, W] in -1..1 -> latent [B, z, 1+k, H/8, W/8]: the posterior mean, normalised.

    The first frame goes alone, then `chunk` frames at a time, a multiple of 4.
    """
    layers = encoder(spec)
    history = History()
    mean, std = statistics(spec, video)
    pieces = []
    for part in (video[:, :, :1], *video[:, :, 1:].split(chunk, dim=2)):
        if part.shape[2]:
            pieces.append(run(layers, patchify(part, spec.patch), w, history)[:, : spec.z])
    return (torch.cat(pieces, dim=2) - mean) / std
