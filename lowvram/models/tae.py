"""The small decoders of madebyollin/taehv for Wan's latents (taew2_1, taew2_2): quick pictures, close but not exact.

Only convolutions of single frames. What a frame knows of time is the input that each memory block had for the frame
before it, so that a clip passes latent by latent in the memory of a few frames. Architecture: `taehv.py` of that
repository.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from lowvram.quant.spec import Shape

WIDTHS = (256, 128, 64, 64)
"""Channels of the three stages, and of what leaves the last."""
FRAMES = (1, 2, 2)
"""Frames that each stage makes of one."""
BAND = 64
"""Rows of the last stage that become pixels at once."""
TRIMMED = 3
"""Frames that the first latent gives too many: it stands for one."""


@dataclass(frozen=True, slots=True)
class TaeSpec:
    """A decoder: channels of a latent, and pixels folded into channels on each side behind the last convolution."""

    z: int = 16
    patch: int = 1

    def shapes(self) -> dict[str, Shape]:
        """Every tensor and its shape. A published `decoder.*.conv.weight` may have more rows: the last ones count."""
        shapes: dict[str, Shape] = {
            "decoder.1.weight": (WIDTHS[0], self.z, 3, 3),
            "decoder.1.bias": (WIDTHS[0],),
        }
        for stage, frames in enumerate(FRAMES):
            width = WIDTHS[stage]
            for name in _blocks(stage):
                for layer, inputs in ((0, 2 * width), (2, width), (4, width)):
                    shapes[f"{name}.{layer}.weight"] = (width, inputs, 3, 3)
                    shapes[f"{name}.{layer}.bias"] = (width,)
            shapes[_grow(stage)] = (frames * width, width, 1, 1)
            shapes[_project(stage)] = (WIDTHS[stage + 1], width, 3, 3)
        pixels = 3 * self.patch**2
        return shapes | {"decoder.22.weight": (pixels, WIDTHS[3], 3, 3), "decoder.22.bias": (pixels,)}


GROWING = tuple(f"decoder.{7 + 6 * stage}.conv.weight" for stage in range(len(FRAMES)))
"""The weights that may have more rows than are used."""


def _blocks(stage: int) -> list[str]:
    """The memory blocks of a stage."""
    return [f"decoder.{3 + 6 * stage + n}.conv" for n in range(3)]


def _grow(stage: int) -> str:
    return GROWING[stage]


def _project(stage: int) -> str:
    return f"decoder.{8 + 6 * stage}.weight"


def decode(spec: TaeSpec, w: Mapping[str, Tensor], latents: Iterable[Tensor]) -> Iterator[Tensor]:
    """Latents [B, z, h, w], normalised as the transformer knows them -> frames [B, 3, 8ph, 8pw] in order, 0..1.

    1 + 4 * (F - 1) frames of F latents, in the dtype of the latents; `w` has to give the same.
    """
    before: dict[str, Tensor] = {}
    missing = TRIMMED
    for latent in latents:
        x = _conv(w, "decoder.1", torch.tanh(latent / 3) * 3).relu_()
        for frame in _frames(w, 0, x, before):
            if missing:
                missing -= 1
            else:
                yield functional.pixel_shuffle(frame, spec.patch).clamp_(0, 1)


def _frames(w: Mapping[str, Tensor], stage: int, x: Tensor, before: dict[str, Tensor]) -> Iterator[Tensor]:
    """What the stages from `stage` on make of one frame; the frames that one stage makes go on one by one."""
    for name in _blocks(stage):
        x = _remembering(w, name, x, before)
    grow = w[_grow(stage)][-FRAMES[stage] * x.shape[1] :]
    for rows in grow.chunk(FRAMES[stage]):
        if stage + 1 < len(FRAMES):
            yield from _frames(w, stage + 1, _enlarged(w, stage, x, rows), before)
        else:
            yield _pixels(w, x, rows)


def _enlarged(w: Mapping[str, Tensor], stage: int, x: Tensor, grow: Tensor) -> Tensor:
    """The frame that `grow` makes of x, at twice its size.

    Upstream enlarges first; a 1x1 convolution of repeated pixels is the repeated convolution.
    """
    b, _, h, width = x.shape
    frame = functional.conv2d(x, grow)
    larger = frame[..., None, :, None].expand(b, -1, h, 2, width, 2).reshape(b, -1, 2 * h, 2 * width)
    del frame
    return functional.conv2d(larger, w[_project(stage)], padding=1)


def _pixels(w: Mapping[str, Tensor], x: Tensor, grow: Tensor) -> Tensor:
    """The last enlargement and the last convolution, band by band: at full size all channels are never there at once.

    Two 3x3 convolutions look two pixels around them, which is one of x: with so much more a band is exact.
    """
    bands, stage, height = [], len(FRAMES) - 1, x.shape[2]
    for top in range(0, height, BAND):
        bottom = min(top + BAND, height)
        first, last = max(top - 1, 0), min(bottom + 1, height)
        y = _conv(w, "decoder.22", _enlarged(w, stage, x[:, :, first:last], grow).relu_())
        bands.append(y[:, :, 2 * (top - first) : 2 * (bottom - first)])
    return torch.cat(bands, dim=2)


def _remembering(w: Mapping[str, Tensor], name: str, x: Tensor, before: dict[str, Tensor]) -> Tensor:
    """A memory block: the frame and the one before it through three convolutions, added to the frame."""
    past = before.pop(name, None)
    pair = torch.cat([x, torch.zeros_like(x) if past is None else past], dim=1)
    before[name] = x
    del past
    y = _conv(w, f"{name}.0", pair).relu_()
    del pair
    y = _conv(w, f"{name}.2", y).relu_()
    return _conv(w, f"{name}.4", y).add_(x).relu_()


def _conv(w: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    return functional.conv2d(x, w[f"{name}.weight"], w[f"{name}.bias"], padding=1)
