"""How the colours of a video of several segments move away from those of the first.

Every segment goes on from the frames of the one before it, once more through the transformer and the autoencoder, and
what that does to their colours adds up. Measured are mean and spread of every channel over the new frames of a segment.
A scene that changes moves them as well: the numbers say where to look, not what is wrong.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

CHANNELS = ("red", "green", "blue")
NOTABLE = 8.0
"""Levels of 255 that a mean or a spread may move before it is told of: about what is seen where two frames meet."""

Triple = tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class Colours:
    """Of the frames of one segment: levels 0..255 of red, green and blue."""

    segment: int
    mean: Triple
    spread: Triple
    """Standard deviation."""


class Gauge:
    """Counts the levels of the frames that pass; exact, whatever their number."""

    def __init__(self) -> None:
        self._counts = np.zeros((3, 256), np.int64)

    def watch(self, frames: Iterable[NDArray[np.uint8]]) -> Iterator[NDArray[np.uint8]]:
        """The same frames [H, W, 3] RGB."""
        for frame in frames:
            for channel in range(3):
                self._counts[channel] += np.bincount(frame[..., channel].ravel(), minlength=256)
            yield frame

    def colours(self, segment: int) -> Colours | None:
        """Of the frames so far; None if there were none."""
        total = int(self._counts[0].sum())
        if total == 0:
            return None
        share, levels = self._counts / total, np.arange(256)
        mean = share @ levels
        spread = np.sqrt(np.maximum(share @ levels**2 - mean**2, 0))
        return Colours(segment, _triple(mean), _triple(spread))


def shift(colours: Colours, first: Colours) -> tuple[Triple, Triple]:
    """By how many levels mean and spread differ from the first segment's."""
    means, spreads = (
        np.subtract(a, b) for a, b in ((colours.mean, first.mean), (colours.spread, first.spread))
    )
    return _triple(means), _triple(spreads)


def drift_note(segments: Sequence[Colours], *, matched: bool) -> str | None:
    """A line for people if any segment is notably far from the first; it names the farthest."""
    found = []
    for colours in segments[1:]:
        for what, values in zip(("brightness", "contrast"), shift(colours, segments[0]), strict=True):
            found += [
                (abs(v), v, what, channel, colours.segment)
                for v, channel in zip(values, CHANNELS, strict=True)
            ]
    size, value, what, channel, segment = max(found, default=(0.0, 0.0, "", "", 0))
    if size < NOTABLE:
        return None
    advice = (
        "--match-colours holds no more"
        if matched
        else "--match-colours holds them, if that is no change of scene"
    )
    return f"colours: segment {segment + 1} differs from the first by {value:+.0f} of 255 in the {what} of {channel}; {advice}"


def _triple(values: NDArray[np.float64]) -> Triple:
    red, green, blue = (round(float(v), 2) for v in values)
    return red, green, blue
