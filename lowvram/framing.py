"""Which size a video gets from its picture, and how a picture is laid onto the frame. Plain numbers.

Rules of the authors: Wan-Video/Wan2.2 `wan/image2video.py` and `wan/textimage2video.py` (wan-models 2).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lowvram.errors import UsageError
from lowvram.quant.spec import ModelSpec

LONGEST = 1024 * 16
"""Pixels on a side of a video: the rotary table has 1024 positions per axis."""


@dataclass(frozen=True, slots=True)
class Laid:
    """A picture is resized to `width` x `height`; the frame is the part that begins at (`left`, `top`)."""

    width: int
    height: int
    left: int
    top: int
    filtered: bool
    """Whether it is resized by Lanczos with a support as wide as the reduction, or else by plain bicubic."""


def size_for(spec: ModelSpec, width: int, height: int, area: int) -> tuple[int, int]:
    """Width and height of a video that begins with a picture of `width` x `height`, of about `area` pixels.

    UsageError for a picture so narrow that no such video exists.
    """
    unit = 2 * spec.vae.stride[1]
    rule = _nearest_aspect if spec.variant == "ti2v" else _floored
    found = rule(width, height, area, unit)
    if min(found) < unit or max(found) > LONGEST:
        raise UsageError(
            f"a picture of {width}x{height} pixels is too narrow for a video of its shape",
            where="--image",
            advice="give --size WIDTHxHEIGHT: the middle of the picture is used",
        )
    return found


def _floored(width: int, height: int, area: int, unit: int) -> tuple[int, int]:
    """The 14B models: each side of the exact rectangle, rounded down to whole tokens."""
    w, h = math.sqrt(area * width / height), math.sqrt(area * height / width)
    return int(w // unit) * unit, int(h // unit) * unit


def _nearest_aspect(width: int, height: int, area: int, unit: int) -> tuple[int, int]:
    """TI2V-5B: one side rounded down, the other as long as the area allows; whichever keeps the aspect better."""
    aspect = width / height
    wide = math.sqrt(area * aspect)
    w = int(wide // unit) * unit
    h = int(area / wide // unit) * unit
    if not (w and h):
        return w, h
    first, second = (w, int(area / w // unit) * unit), (int(area / h // unit) * unit, h)

    def off(size: tuple[int, int]) -> float:
        found = size[0] / size[1]
        return max(aspect / found, found / aspect)

    return first if first[1] and off(first) < off(second) else second


def lay(spec: ModelSpec, picture: tuple[int, int], frame: tuple[int, int]) -> Laid:
    """How a picture fills the frame (both width, height).

    The 14B models resize without cropping when the frame has the picture's shape but for the rounding to whole
    tokens. Any other frame is covered, and what sticks out on two sides is cut off.
    """
    (w, h), (width, height) = picture, frame
    unit, filtered = 2 * spec.vae.stride[1], spec.variant == "ti2v"
    if not filtered and abs(width - height * w / h) < unit * max(1.0, w / h):
        return Laid(width, height, 0, 0, filtered)
    scale = max(width / w, height / h)
    covering = max(width, round(w * scale)), max(height, round(h * scale))
    return Laid(*covering, (covering[0] - width) // 2, (covering[1] - height) // 2, filtered)
