"""The layers of the Wan video autoencoders, and what they remember between chunks.

A layer maps a chunk [B, C, T, H, W] to the next and keeps what its causal convolutions must know later in a
`History`; a clip cut into chunks of any length gives the same result as the clip at once. Formulas follow
Wan-Video/Wan2.2 `wan/modules/vae2_1.py` and `vae2_2.py`.

Where no gradient is wanted, a tensor is dropped as soon as it was read for the last time, and sums are written
over one of their terms. So a layer never writes into its input, which the history may refer to, and never
returns what the history refers to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

Weights = Mapping[str, Tensor]


@dataclass(slots=True)
class History:
    """What the causal convolutions remember between chunks, by layer name: their last input frames."""

    frames: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)
    """Oldest first, each [B, C, 1, H, W]; fewer than a layer looks back on as long as the clip is young."""
    begun: set[str] = field(default_factory=set)

    def first(self, name: str) -> bool:
        """Whether `name` asks for the first time in this clip."""
        asked = name in self.begun
        self.begun.add(name)
        return not asked

    def keep(self, name: str, x: Tensor, count: int) -> None:
        """Remember the last `count` frames of all that `name` was given, the end of which is x [B, C, T, H, W].

        What was remembered before may be overwritten.
        """
        frames = (*self.frames.get(name, ()), *x.split(1, dim=2))
        self.frames[name] = tuple(own(frame) for frame in frames[-count:])


def own(x: Tensor) -> Tensor:
    """x, or a copy if x is a view that keeps more memory alive than its own."""
    return x.clone() if x.untyped_storage().nbytes() > x.numel() * x.element_size() else x


# ---- elementary operations


def rms_norm(x: Tensor, gamma: Tensor) -> Tensor:
    """x / ||x|| * sqrt(C) * gamma over the channels (dim 1), statistics in float32 at least."""
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    scale = (x.shape[1] ** 0.5 / norm.clamp_min(1e-12)).to(x.dtype)
    gamma = gamma.to(x.dtype).view(-1, *(1,) * (x.ndim - 2))
    return x * scale * gamma if torch.is_grad_enabled() else (x * scale).mul_(gamma)


def add(fresh: Tensor, x: Tensor) -> Tensor:
    """fresh + x, where `fresh` is nobody else's."""
    return x + fresh if torch.is_grad_enabled() else fresh.add_(x)


def causal_conv(x: Tensor, name: str, w: Weights, history: History, norm: str = "") -> Tensor:
    """3-D convolution whose time padding is the end of the previous chunk (zeros before the first frame).

    Spatial padding keeps the size; time stride 1. A time kernel of 1 needs no history. With `norm`, the name of
    an RMS norm, that and SiLU come before it.
    """
    if norm:
        x = functional.silu(rms_norm(x, w[f"{norm}.gamma"]), inplace=not torch.is_grad_enabled())
    weight, bias = w[f"{name}.weight"], w[f"{name}.bias"]
    kt, kh, kw = weight.shape[2:]
    if kt == 1:
        x = own(x)
    else:
        past = history.frames.get(name, ())
        nothing = x.new_zeros(()).expand(*x.shape[:2], kt - 1 - len(past), *x.shape[3:])
        joined = torch.cat([nothing, *past, x], dim=2)
        history.keep(name, x, kt - 1)
        x, past = joined, ()
        del joined
    return functional.conv3d(x, weight, bias, padding=(0, kh // 2, kw // 2))


def plane_conv(x: Tensor, name: str, w: Weights, stride: int = 1, padding: int = 1) -> Tensor:
    """2-D convolution of every frame: [B, C, T, H, W] -> [B, C', T, H', W']."""
    b, _, t = x.shape[:3]
    y = functional.conv2d(
        x.transpose(1, 2).flatten(0, 1),
        w[f"{name}.weight"],
        w[f"{name}.bias"],
        stride=stride,
        padding=padding,
    )
    return y.unflatten(0, (b, t)).transpose(1, 2)


def frame_by_frame(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`f`, which treats every frame alone, over the frames of x: one at a time where no gradient is wanted."""
    if x.shape[2] == 1 or torch.is_grad_enabled():
        return f(x)
    return torch.cat([f(frame) for frame in x.split(1, dim=2)], dim=2)


# ---- layers


@dataclass(frozen=True, slots=True)
class Conv:
    """A causal convolution with a kernel of 2 * radius + 1 on every axis."""

    name: str
    radius: int = 1

    def __call__(self, x: Tensor, w: Weights, history: History) -> Tensor:
        return causal_conv(x, self.name, w, history)


@dataclass(frozen=True, slots=True)
class Residual:
    """RMS - SiLU - conv - RMS - SiLU - conv, plus the input (through a 1x1x1 convolution if widths differ)."""

    name: str

    def __call__(self, x: Tensor, w: Weights, history: History) -> Tensor:
        n = f"{self.name}.residual"
        # nested, so that nothing holds on to what lies between the two
        y = causal_conv(
            causal_conv(x, f"{n}.2", w, history, norm=f"{n}.0"), f"{n}.6", w, history, norm=f"{n}.3"
        )
        if f"{self.name}.shortcut.weight" in w:
            x = causal_conv(x, f"{self.name}.shortcut", w, history)
        return add(y, x)


@dataclass(frozen=True, slots=True)
class Double:
    """Every frame but the clip's first becomes two."""

    name: str

    def __call__(self, x: Tensor, w: Weights, history: History) -> Tensor:
        first = x[:, :, :0]
        if history.first(self.name):
            # the first frame passes untouched, and is no part of what the convolution remembers
            first, x = x[:, :, :1], x[:, :, 1:]
            if x.shape[2] == 0:
                return first
        # the first half of the channels is the earlier frame
        y = (
            causal_conv(x, f"{self.name}.time_conv", w, history)
            .unflatten(1, (2, -1))
            .movedim(1, 3)
            .flatten(2, 3)
        )
        return torch.cat([first, y], dim=2) if first.shape[2] else y


@dataclass(frozen=True, slots=True)
class Up:
    """Nearest x2 in space, then a convolution; with `time`, `Double` before it."""

    name: str
    time: bool = False

    def __call__(self, x: Tensor, w: Weights, history: History) -> Tensor:
        if self.time:
            x = Double(self.name)(x, w, history)
        return frame_by_frame(lambda x: plane_conv(_widen(x), f"{self.name}.resample.1", w), x)


def _widen(x: Tensor) -> Tensor:
    """Nearest x2: [B, C, T, H, W] -> [B, C, T, 2H, 2W]."""
    b, c, t, height, width = x.shape
    x = x[:, :, :, :, None, :, None].expand(b, c, t, height, 2, width, 2)
    return x.reshape(b, c, t, 2 * height, 2 * width)


@dataclass(frozen=True, slots=True)
class Down:
    """A strided convolution in space; with `time`, then pairs of frames (all but the clip's first) become one."""

    name: str
    time: bool

    def __call__(self, x: Tensor, w: Weights, history: History) -> Tensor:
        x = frame_by_frame(lambda x: self._narrow(x, w), x)
        if not self.time:
            return x
        conv = f"{self.name}.time_conv"
        past = history.frames.get(conv, ())
        first = x[:, :, :0] if past else x[:, :, :1]
        joined = torch.cat([*past, x], dim=2) if past else x
        history.keep(conv, x, 1)
        if joined.shape[2] == 1:
            return first.clone()  # the history refers to the first frame, and a result is the receiver's own
        y = functional.conv3d(joined, w[f"{conv}.weight"], w[f"{conv}.bias"], stride=(2, 1, 1))
        return torch.cat([first, y], dim=2) if first.shape[2] else y

    def _narrow(self, x: Tensor, w: Weights) -> Tensor:
        return plane_conv(functional.pad(x, (0, 1, 0, 1)), f"{self.name}.resample.1", w, stride=2, padding=0)


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
        if not self.up:
            return add(y, self._average(x))
        surplus = self.time - 1 if history.first(self.name) else 0
        shortcut = self._repeat(x)
        if torch.is_grad_enabled():
            return y + shortcut.flatten(6, 7).flatten(4, 5).flatten(2, 3)[:, :, surplus:]
        for i, frame in enumerate(y.unbind(2), surplus):
            blocks = frame.unflatten(3, (-1, self.space)).unflatten(2, (-1, self.space))
            blocks += shortcut[:, :, i // self.time, i % self.time]
        return y

    def _average(self, x: Tensor) -> Tensor:
        b, c, t, height, width = x.shape
        ft, fs = self.time, self.space
        if t % ft:  # an odd frame count: a zero frame in front
            x = functional.pad(x, (0, 0, 0, 0, ft - t % ft, 0))
        x = x.view(b, c, -1, ft, height // fs, fs, width // fs, fs).permute(0, 1, 3, 5, 7, 2, 4, 6)
        return x.reshape(b, self.width, -1, *x.shape[5:]).mean(dim=2)

    def _repeat(self, x: Tensor) -> Tensor:
        """x [B, C, T, H, W] -> [B, width, T, time, H, space, W, space], a view."""
        ft, fs = self.time, self.space
        b, c, t, height, width = x.shape
        x = x[:, :, None].expand(b, c, self.width * ft * fs * fs // c, t, height, width)
        return x.reshape(b, self.width, ft, fs, fs, t, height, width).permute(0, 1, 5, 2, 6, 3, 7, 4)


@dataclass(frozen=True, slots=True)
class Head:
    """RMS - SiLU - conv."""

    name: str

    def __call__(self, x: Tensor, w: Weights, history: History) -> Tensor:
        return causal_conv(x, f"{self.name}.2", w, history, norm=f"{self.name}.0")


@dataclass(frozen=True, slots=True)
class Crop:
    """The part of the plane that the next layer needs, in cells of this tensor. What a tile is made of."""

    rows: slice
    columns: slice

    def __call__(self, x: Tensor, w: Weights, history: History) -> Tensor:
        return x[..., self.rows, self.columns]
