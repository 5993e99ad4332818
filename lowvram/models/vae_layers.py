"""The layers of the Wan video autoencoders, and what they remember between chunks.

A layer maps a chunk [B, C, T, H, W] to the next and keeps what its causal convolutions must know later in a
`History`; a clip cut into chunks of any length gives the same result as the clip at once. Formulas follow
Wan-Video/Wan2.2 `wan/modules/vae2_1.py` and `vae2_2.py`.

Where no gradient is wanted, a tensor is dropped as soon as it was read for the last time, and sums are written
over one of their terms. So a layer never writes into its input, which the history may refer to, and never
returns what the history refers to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from lowvram.models.vae_bands import Band
from lowvram.triton_kernels.vae_norm import rms_silu

FOLDED = 64
"""Channels of a convolution whose weights are summed at once."""
Weights = Mapping[str, Tensor]
Norm = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""RMS norm over the channels and SiLU: (x [B, C, T, H, W], gamma, where to write or None) -> result."""


@dataclass(slots=True)
class History:
    """What the causal convolutions remember between chunks, by layer name: their last input frames."""

    frames: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)
    """Oldest first, each [B, C, 1, H, W]; fewer than a layer looks back on as long as the clip is young."""
    begun: set[str] = field(default_factory=set)
    band: Band | None = None
    """In space: which band of a plane is under way, if the plane is in bands."""
    norm: Norm = rms_silu
    """What makes the frames that are remembered: in torch, or fused for a card."""

    def first(self, name: str) -> bool:
        """Whether `name` asks for the first time in this clip."""
        asked = name in self.begun
        self.begun.add(name)
        return not asked

    def place(self, name: str) -> Tensor | None:
        """Where the next frame that `name` remembers has to lie; None if anywhere. The oldest frame may lie there."""
        return None

    def push(self, name: str, frame: Tensor, count: int) -> None:
        """Remember `frame` [B, C, 1, H, W], which lies in `place` if there is one, and of the others the last of
        `count` in all."""
        self.frames[name] = (*self.frames.get(name, ()), frame)[-count:]

    def keep(self, name: str, frame: Tensor, count: int) -> Tensor:
        """`push` a frame that may lie anywhere; where it is remembered."""
        place = self.place(name)
        kept = own(frame) if place is None else place.copy_(frame)
        self.push(name, kept, count)
        return kept


def own(x: Tensor) -> Tensor:
    """x, or a copy if x is a view that keeps more memory alive than its own."""
    return x.clone() if x.untyped_storage().nbytes() > x.numel() * x.element_size() else x


# ---- elementary operations


def _fill(norm: Norm, gamma: Tensor, x: Tensor, place: Tensor) -> Tensor:
    return norm(x, gamma, place)


def add(fresh: Tensor, x: Tensor) -> Tensor:
    """fresh + x, where `fresh` is nobody else's."""
    return x + fresh if torch.is_grad_enabled() else fresh.add_(x)


def planes(x: Tensor) -> Tensor:
    """Frames as a batch of planes, channels last in memory: [B, C, T, H, W] -> [B * T, C, H, W].

    What a convolution is given, dense, so that it makes no copy of its own that no plan knows of.
    """
    return x.transpose(1, 2).flatten(0, 1).contiguous(memory_format=torch.channels_last)


def plane_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int = 1,
    padding: int | tuple[int, int] | None = None,
) -> Tensor:
    """2-D convolution of every frame: [B, C, T, H, W] -> [B, C', T, H', W']; keeps the size if nothing is said."""
    padding = weight.shape[-1] // 2 if padding is None else padding
    weight = weight.contiguous(memory_format=torch.channels_last)
    y = functional.conv2d(planes(x), weight, bias, stride=stride, padding=padding)
    return y.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)


def tap_conv(
    frames: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor,
    sum_: Tensor | None = None,
    padding: tuple[int, int] | None = None,
) -> Tensor:
    """3-D convolution of `frames`, each [B, C, 1, H, W], to one: a sum of 2-D ones, a frame under each tap.

    The last frame lies under the last tap; where there are fewer frames than taps there are zeros before them.
    `sum_` is what earlier frames gave, bias included, and may be overwritten. Nothing is joined, and what the library
    would make of a 3-D convolution (three times the memory with cuDNN of torch 2.9, a slow loop on a CPU) does not
    matter.
    """
    for frame, tap in zip(frames, weight.unbind(2)[-len(frames) :], strict=True):
        if sum_ is None:
            sum_ = plane_conv(frame, tap, bias, padding=padding)
        else:
            sum_ = add(sum_, plane_conv(frame, tap, None, padding=padding))
    assert sum_ is not None
    return sum_


def causal_conv(x: Tensor, name: str, w: Weights, history: History, norm: str = "", parts: int = 1) -> Tensor:
    """3-D convolution whose time padding is the end of the previous chunk (zeros before the first frame).

    Spatial padding keeps the size; time stride 1. With `norm`, the name of an RMS norm, that and SiLU come before it.
    Of every frame, `parts` equal parts of the channels become frames in a row.
    """
    weights, biases = w[f"{name}.weight"].chunk(parts), w[f"{name}.bias"].chunk(parts)
    taps, frames, made = weights[0].shape[2], list(x.split(1, dim=2)), []
    band = history.band if weights[0].shape[-1] > 1 else None
    padding = band.padding if band else None
    del x
    while frames:
        frame, past = frames.pop(0), history.frames.get(name, ())
        sums: list[Tensor | None] = [None] * parts
        if 0 < len(past) == taps - 1:  # the oldest has its turn first: the new frame may take its place
            sums = [
                tap_conv(past[:1], v[:, :, :1], b, padding=padding)
                for v, b in zip(weights, biases, strict=True)
            ]
            past = past[1:]
        if band:
            fill = partial(_fill, history.norm, w[f"{norm}.gamma"]) if norm else None
            frame = band.given(name, frame, history.place(name), fill)
            history.push(name, frame, taps - 1)
        elif norm:
            frame = history.norm(frame, w[f"{norm}.gamma"], history.place(name))
            history.push(name, frame, taps - 1)
        elif taps > 1:
            frame = history.keep(name, frame, taps - 1)
        given = (*past, frame)
        made += [
            tap_conv(given, v[:, :, 1:] if y is not None else v, b, y, padding)
            for v, b, y in zip(weights, biases, sums, strict=True)
        ]
        del frame, given, past, sums
    return made[0] if len(made) == 1 else torch.cat(made, dim=2)


def frame_by_frame(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`f`, which treats every frame alone, over the frames of x: one at a time where no gradient is wanted."""
    if x.shape[2] == 1 or torch.is_grad_enabled():
        return f(x)
    made = None
    for n in range(x.shape[2]):
        y = f(x[:, :, n : n + 1])
        if made is None:
            b, c, _, rows, columns = y.shape
            made = y.new_empty(b, x.shape[2], rows, columns, c).permute(0, 4, 1, 2, 3)
        made[:, :, n : n + 1] = y
        del y  # or it would live through the making of the next
    assert made is not None
    return made


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
        return history.band.add(self.name, y, x) if history.band else add(y, x)


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
        y = causal_conv(x, f"{self.name}.time_conv", w, history, parts=2)
        return torch.cat([first, y], dim=2) if first.shape[2] else y


@dataclass(frozen=True, slots=True)
class Up:
    """Nearest x2 in space, then a convolution; with `time`, `Double` before it."""

    name: str
    time: bool = False

    def __call__(self, x: Tensor, w: Weights, history: History) -> Tensor:
        if self.time:
            x = Double(self.name)(x, w, history)
        conv = f"{self.name}.resample.1"
        weight, bias, band = w[f"{conv}.weight"], w[f"{conv}.bias"], history.band
        if band is None:
            return frame_by_frame(lambda x: _widened_conv(x, weight, bias), x)
        return frame_by_frame(lambda x: _widened_conv(band.given(conv, x), weight, bias, band.padding), x)


def _widened_conv(x: Tensor, weight: Tensor, bias: Tensor, padding: tuple[int, int] = (1, 1)) -> Tensor:
    """Nearest x2, then a 3x3 convolution, without making what lies between: [B, C, T, H, W] -> [B, C', T, 2H, 2W].

    Where there is no `padding`, the outermost cells of x are neighbours only.

    A pixel of the wide plane and its neighbours are copies of 2x2 pixels: for each of the four places that it can
    have above its source, a 2x2 convolution with sums of the kernel's weights. Less than half of the multiplications.
    """
    b, _, t = x.shape[:3]
    height, width = (n - 2 * (not pad) for n, pad in zip(x.shape[3:], padding, strict=True))
    y = x.new_empty(b, t, 2 * height, 2 * width, weight.shape[0]).permute(0, 4, 1, 2, 3)
    x = planes(x).unflatten(0, (b, t)).transpose(1, 2)
    for down, right in ((0, 0), (0, 1), (1, 0), (1, 1)):
        z = plane_conv(x, _quarter(weight, down, right), bias, padding=padding)
        y[..., down::2, right::2] = z[..., down : down + height, right : right + width]
        del z
    return y


def _quarter(weight: Tensor, down: int, right: int) -> Tensor:
    """The 2x2 kernel of one of the four places, channels last: summed in float32 at least, some channels at a time."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    kernel = weight.new_empty(len(weight), 2, 2, weight.shape[1]).permute(0, 3, 1, 2)
    for i in range(0, len(weight), FOLDED):
        part = weight[i : i + FOLDED].to(wide)
        kernel[i : i + FOLDED] = _folded(_folded(part, 2, down), 3, right)
    return kernel


def _folded(kernel: Tensor, axis: int, odd: int) -> Tensor:
    """Three taps along `axis` on a doubled axis as two on the original: for its even cells, or its odd ones."""
    first, middle, last = kernel.split(1, dim=axis)
    return torch.cat([first + middle, last] if odd else [first, middle + last], dim=axis)


@dataclass(frozen=True, slots=True)
class Down:
    """A strided convolution in space; with `time`, then pairs of frames (all but the clip's first) become one."""

    name: str
    time: bool

    def __call__(self, x: Tensor, w: Weights, history: History) -> Tensor:
        x = frame_by_frame(lambda x: self._narrow(x, w, history.band), x)
        if not self.time:
            return x
        conv = f"{self.name}.time_conv"
        frames = (*history.frames.get(conv, ()), *x.split(1, dim=2))
        first = x[:, :, : 0 if conv in history.frames else 1]
        weight, bias = w[f"{conv}.weight"], w[f"{conv}.bias"]
        made = [tap_conv(frames[i : i + 3], weight, bias) for i in range(0, len(frames) - 2, 2)]
        history.keep(conv, frames[-1], 1)
        # the history refers to the first frame, and a result is the receiver's own
        return torch.cat([first, *made], dim=2) if first.shape[2] or len(made) > 1 else made[0]

    def _narrow(self, x: Tensor, w: Weights, band: Band | None) -> Tensor:
        conv = f"{self.name}.resample.1"
        if band is None:
            x = functional.pad(x, (0, 1, 0, 1))
        else:
            right, below = band.padding[::-1]
            x = functional.pad(band.given(conv, x, step=2), (0, right, 0, below))
        return plane_conv(x, w[f"{conv}.weight"], w[f"{conv}.bias"], stride=2, padding=0)


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
        if history.band:
            made = y.shape[history.band.axis]
            x = history.band.late(self.name, x, made // self.space if self.up else made * self.space)
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
