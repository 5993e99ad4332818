"""The Wan video autoencoders, 2.1 and 2.2: causal in time, chunk by chunk, with an explicit history.

A network is a tuple of layers built from a `VaeSpec`. A layer maps a chunk [B, C, T, H, W] to the next and keeps
what its causal convolutions must remember in a `History`; a clip cut into chunks of any length gives the same
result as the clip at once. Formulas follow Wan-Video/Wan2.2 `wan/modules/vae2_1.py` and `vae2_2.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from lowvram.quant.spec import VaeSpec

Weights = Mapping[str, Tensor]
MULTIPLIERS = (1, 2, 4, 4)
QUERIES = 1024
"""Pixels whose attention logits exist at once; fixed, so that memory never changes the arithmetic."""


@dataclass(slots=True)
class History:
    """What the causal convolutions remember between chunks, by layer name: their last input frames."""

    frames: dict[str, Tensor] = field(default_factory=dict)


# ---- elementary operations


def rms_norm(x: Tensor, gamma: Tensor) -> Tensor:
    """x / ||x|| * sqrt(C) * gamma over the channels (dim 1), statistics in float32 at least."""
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    scale = (x.shape[1] ** 0.5 / norm.clamp_min(1e-12)).to(x.dtype)
    return x * scale * gamma.to(x.dtype).view(-1, *(1,) * (x.ndim - 2))


def causal_conv(x: Tensor, name: str, w: Weights, history: History) -> Tensor:
    """3-D convolution whose time padding is the end of the previous chunk (zeros before the first frame).

    Spatial padding keeps the size; time stride 1. A time kernel of 1 needs no history.
    """
    weight, bias = w[f"{name}.weight"], w[f"{name}.bias"]
    kt, kh, kw = weight.shape[2:]
    if kt > 1:
        past = history.frames.get(name)
        if past is None:
            past = x.new_zeros(*x.shape[:2], kt - 1, *x.shape[3:])
        x = torch.cat([past, x], dim=2)
        history.frames[name] = x[:, :, 1 - kt :].clone()
    return functional.conv3d(x, weight, bias, padding=(0, kh // 2, kw // 2))


def _plane_conv(x: Tensor, name: str, w: Weights, stride: int = 1, padding: int = 1) -> Tensor:
    """2-D convolution of every frame: [B, C, T, H, W] -> [B, C', T, H', W']."""
    b, _, t = x.shape[:3]
    y = functional.conv2d(
        x.transpose(1, 2).flatten(0, 1), w[f"{name}.weight"], w[f"{name}.bias"], stride=stride, padding=padding
    )
    return y.unflatten(0, (b, t)).transpose(1, 2)


# ---- layers


@dataclass(frozen=True, slots=True)
class Conv:
    """A causal convolution."""

    name: str

    def __call__(self, x: Tensor, w: Weights, history: History) -> Tensor:
        return causal_conv(x, self.name, w, history)


@dataclass(frozen=True, slots=True)
class Residual:
    """RMS - SiLU - conv - RMS - SiLU - conv, plus the input (through a 1x1x1 convolution if widths differ)."""

    name: str

    def __call__(self, x: Tensor, w: Weights, history: History) -> Tensor:
        n = f"{self.name}.residual"
        y = functional.silu(rms_norm(x, w[f"{n}.0.gamma"]))
        y = causal_conv(y, f"{n}.2", w, history)
        y = functional.silu(rms_norm(y, w[f"{n}.3.gamma"]))
        y = causal_conv(y, f"{n}.6", w, history)
        if f"{self.name}.shortcut.weight" in w:
            x = causal_conv(x, f"{self.name}.shortcut", w, history)
        return x + y


@dataclass(frozen=True, slots=True)
class Attention:
    """Single-head attention over the pixels of each frame."""

    name: str

    def __call__(self, x: Tensor, w: Weights, history: History) -> Tensor:
        b, c, t, height, width = x.shape
        frames = x.transpose(1, 2).flatten(0, 1)
        n = f"{self.name}"
        qkv = functional.conv2d(
            rms_norm(frames, w[f"{n}.norm.gamma"]), w[f"{n}.to_qkv.weight"], w[f"{n}.to_qkv.bias"]
        )
        wide = torch.promote_types(x.dtype, torch.float32)
        q, k, v = qkv.flatten(2).to(wide).chunk(3, dim=1)  # [frames, C, pixels]
        q = q * c**-0.5  # a width over 256 is more than fused kernels take, so the logits are made, a slice at a time
        pieces = [v @ (k.transpose(1, 2) @ part).softmax(1) for part in q.split(QUERIES, dim=2)]
        y = torch.cat(pieces, dim=2).to(x.dtype).unflatten(2, (height, width))
        y = functional.conv2d(y, w[f"{n}.proj.weight"], w[f"{n}.proj.bias"])
        return x + y.unflatten(0, (b, t)).transpose(1, 2)


@dataclass(frozen=True, slots=True)
class Up:
    """Nearest x2 in space, then a convolution; with `time` every frame but the clip's first becomes two."""

    name: str
    time: bool

    def __call__(self, x: Tensor, w: Weights, history: History) -> Tensor:
        if self.time:
            x = self._double(x, w, history)
        x = x.repeat_interleave(2, dim=3).repeat_interleave(2, dim=4)
        return _plane_conv(x, f"{self.name}.resample.1", w)

    def _double(self, x: Tensor, w: Weights, history: History) -> Tensor:
        conv = f"{self.name}.time_conv"
        if conv in history.frames:
            return self._pairs(causal_conv(x, conv, w, history))
        # the first frame passes untouched, and is no part of what the convolution remembers
        first, rest = x[:, :, :1], x[:, :, 1:]
        history.frames[conv] = x.new_zeros(*x.shape[:2], 2, *x.shape[3:])
        if rest.shape[2] == 0:
            return first
        return torch.cat([first, self._pairs(causal_conv(rest, conv, w, history))], dim=2)

    @staticmethod
    def _pairs(x: Tensor) -> Tensor:
        """[B, 2C, T, H, W] -> [B, C, 2T, H, W]; the first half of the channels is the earlier frame."""
        return x.unflatten(1, (2, -1)).movedim(1, 3).flatten(2, 3)


@dataclass(frozen=True, slots=True)
class Down:
    """A strided convolution in space; with `time`, then pairs of frames (all but the clip's first) become one."""

    name: str
    time: bool

    def __call__(self, x: Tensor, w: Weights, history: History) -> Tensor:
        x = _plane_conv(functional.pad(x, (0, 1, 0, 1)), f"{self.name}.resample.1", w, stride=2, padding=0)
        if not self.time:
            return x
        conv = f"{self.name}.time_conv"
        past = history.frames.get(conv)
        history.frames[conv] = x[:, :, -1:].clone()
        first = x[:, :, :0]
        if past is None:
            past = first = x[:, :, :1]
            x = x[:, :, 1:]
        if x.shape[2] == 0:
            return first
        y = functional.conv3d(
            torch.cat([past, x], dim=2), w[f"{conv}.weight"], w[f"{conv}.bias"], stride=(2, 1, 1)
        )
        return torch.cat([first, y], dim=2)


@dataclass(frozen=True, slots=True)
class Stage:
    """2.2: a run of layers with a parameter-free shortcut around it.

    Going down the shortcut averages space and time blocks folded into channels; going up it repeats channels and
    unfolds them.
    """

    name: str
    layers: tuple[Residual | Up | Down, ...]
    width: int
    """Channels that leave the stage."""
    time: int
    space: int
    up: bool

    def __call__(self, x: Tensor, w: Weights, history: History) -> Tensor:
        y = x
        for layer in self.layers:
            y = layer(y, w, history)
        if self.up:
            seen = self.name in history.frames
            history.frames[self.name] = x.new_zeros(0)
            return y + self._duplicate(x, first=not seen)
        return y + self._average(x)

    def _average(self, x: Tensor) -> Tensor:
        b, c, t, height, width = x.shape
        ft, fs = self.time, self.space
        if t % ft:  # an odd frame count: a zero frame in front
            x = functional.pad(x, (0, 0, 0, 0, ft - t % ft, 0))
        x = x.view(b, c, -1, ft, height // fs, fs, width // fs, fs).permute(0, 1, 3, 5, 7, 2, 4, 6)
        return x.reshape(b, self.width, -1, *x.shape[5:]).mean(dim=2)

    def _duplicate(self, x: Tensor, first: bool) -> Tensor:
        ft, fs = self.time, self.space
        b, c, t, height, width = x.shape
        x = x.repeat_interleave(self.width * ft * fs * fs // c, dim=1)
        x = x.view(b, self.width, ft, fs, fs, t, height, width).permute(0, 1, 5, 2, 6, 3, 7, 4)
        x = x.reshape(b, self.width, t * ft, height * fs, width * fs)
        return x[:, :, ft - 1 :] if first else x


@dataclass(frozen=True, slots=True)
class Head:
    """RMS - SiLU - conv."""

    name: str

    def __call__(self, x: Tensor, w: Weights, history: History) -> Tensor:
        return causal_conv(functional.silu(rms_norm(x, w[f"{self.name}.0.gamma"])), f"{self.name}.2", w, history)


Layer = Conv | Residual | Attention | Up | Down | Stage | Head


def decoder_middle(spec: VaeSpec) -> tuple[Layer, ...]:
    """The part whose attention needs the whole latent plane, from scaled latents."""
    d = "decoder"
    middle = (Residual(f"{d}.middle.0"), Attention(f"{d}.middle.1"), Residual(f"{d}.middle.2"))
    return (Conv("conv2"), Conv(f"{d}.conv1"), *middle)


def decoder_upsampling(spec: VaeSpec) -> tuple[Layer, ...]:
    """The part that is only convolutions: three upsampling stages, a last stage and the head."""
    d, n = "decoder", spec.res_blocks + 1
    layers: list[Layer] = []
    for stage in range(4):
        up = stage < 3
        if spec.version == "2.1":
            first = stage * (n + 1)
            layers += [Residual(f"{d}.upsamples.{first + j}") for j in range(n)]
            if up:
                layers.append(Up(f"{d}.upsamples.{first + n}", time=stage < 2))
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
    middle = (Residual(f"{e}.middle.0"), Attention(f"{e}.middle.1"), Residual(f"{e}.middle.2"))
    return (*layers, *middle, Head(f"{e}.head"), Conv("conv1"))


def run(layers: tuple[Layer, ...], x: Tensor, w: Weights, history: History) -> Tensor:
    """The whole chunk through every layer."""
    for layer in layers:
        x = layer(x, w, history)
    return x


def run_framewise(layers: tuple[Layer, ...], x: Tensor, w: Weights, history: History) -> Iterator[Tensor]:
    """`run`, but what a layer doubled in time goes on frame by frame: less memory, the same arithmetic."""
    for i, layer in enumerate(layers):
        x = layer(x, w, history)
        if isinstance(layer, (Up, Stage)) and x.shape[2] > 1:
            for frame in x.split(1, dim=2):
                yield from run_framewise(layers[i + 1 :], frame, w, history)
            return
    yield x


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


def _statistics(spec: VaeSpec, like: Tensor) -> tuple[Tensor, Tensor]:
    shape = (1, spec.z, 1, 1, 1)
    mean = torch.tensor(spec.mean, dtype=torch.float64).view(shape).to(like)
    return mean, torch.tensor(spec.std, dtype=torch.float64).view(shape).to(like)


def decode(spec: VaeSpec, w: Weights, latent: Tensor, chunk: int = 1) -> Iterator[Tensor]:
    """latent [B, z, F, H, W] as the transformer leaves it -> frames [B, 3, 1, 8H, 8W] in order, about -1..1.

    Not clamped. 1 + 4 * (F - 1) frames; `chunk` latent frames pass the middle block at once.
    """
    layers = decoder_middle(spec) + decoder_upsampling(spec)
    history = History()
    mean, std = _statistics(spec, latent)
    for z in latent.split(chunk, dim=2):
        for frame in run_framewise(layers, z * std + mean, w, history):
            yield unpatchify(frame, spec.patch)


def encode(spec: VaeSpec, w: Weights, video: Tensor, chunk: int = 4) -> Tensor:
    """video [B, 3, 1+4k, H, W] in -1..1 -> latent [B, z, 1+k, H/8, W/8]: the posterior mean, normalised.

    The first frame goes alone, then `chunk` frames at a time, a multiple of 4.
    """
    layers = encoder(spec)
    history = History()
    mean, std = _statistics(spec, video)
    pieces = []
    for part in (video[:, :, :1], *video[:, :, 1:].split(chunk, dim=2)):
        if part.shape[2]:
            pieces.append(run(layers, patchify(part, spec.patch), w, history)[:, : spec.z])
    return (torch.cat(pieces, dim=2) - mean) / std
