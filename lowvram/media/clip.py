"""Videos that a job reads: checked whole before anything is loaded, then decoded frame by frame.

A file is hostile until then: its packets are counted and timed, and its frames may have no other size than its
header says; both are bounded before anything is allocated for them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from lowvram.errors import FileError, StorageError
from lowvram.library.hashing import file_sha256
from lowvram.media.probe import open_media
from lowvram.media.video import Frames, read_frames

MAX_FRAMES = 108_000
"""An hour at 30 frames a second."""
MAX_SIDE = 16_384
"""Pixels; no video of this program is larger."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Clip:
    """A video file as a job knows it."""

    path: str
    """Absolute."""
    sha256: str
    """Of the file's bytes: a job that goes on later must see the same video."""
    width: int
    height: int
    """Pixels."""
    frames: int
    rate: tuple[int, int]
    """Frames per second as a fraction."""


def open_clip(path: Path) -> Clip:
    """What the video at `path` is, from its packets. FileError if it is none that can be used."""
    times: list[int] = []
    with open_media(path) as container:
        stream = container.streams.video[0]
        codec = stream.codec_context
        width, height = codec.width, codec.height
        if not (0 < width <= MAX_SIDE and 0 < height <= MAX_SIDE):
            raise _refused(path, f"a video of {width}x{height}", f"1 to {MAX_SIDE} pixels on a side")
        for packet in container.demux(stream):
            if not packet.size:
                continue
            if packet.is_corrupt:
                raise _refused(path, f"cut off after {len(times)} whole frames", "a whole video")
            if len(times) == MAX_FRAMES:
                raise _refused(path, f"more than {MAX_FRAMES} frames", "a shorter video")
            if packet.pts is None:
                raise _refused(path, f"frame {len(times)} has no time", "a time for every frame")
            times.append(packet.pts)
        base, named = Fraction(stream.time_base or 0), Fraction(stream.guessed_rate or 0)
    if not times:
        raise _refused(path, "a video without frames", "one frame or more")
    rate = _rate(sorted(times), base, named, path)
    with closing(read_frames(path)) as decoded:
        next(decoded, None)  # what its frames alone tell is told now, too
    return Clip(
        path=str(path.absolute()),
        sha256=file_sha256(path),
        width=width,
        height=height,
        frames=len(times),
        rate=(rate.numerator, rate.denominator),
    )


def _rate(times: Sequence[int], base: Fraction, named: Fraction, path: Path) -> Fraction:
    """Frames per second: the rate that the file names, if its times bear it out, else their mean.

    Containers round times, so a frame may be longer or shorter than the mean, but not by half.
    """
    if len(times) == 1:
        return named or Fraction(1)
    mean = Fraction(times[-1] - times[0], len(times) - 1)
    longest, shortest = (f(b - a for a, b in pairwise(times)) for f in (max, min))
    if mean <= 0 or base <= 0 or 2 * longest > 3 * mean or 2 * shortest < mean:
        found = (
            f"frames of different length, {float(shortest * base):.4g} to {float(longest * base):.4g} seconds"
        )
        advice = "give it a constant rate: ffmpeg -i IN -r 30 OUT.mp4"
        raise FileError(found, where=str(path), expected="a constant frame rate", advice=advice)
    rate = 1 / (mean * base)
    return (named if abs(named - rate) < rate / 100 else rate).limit_denominator(1001)


def _refused(path: Path, found: str, expected: str) -> FileError:
    return FileError(found, where=str(path), expected=expected, advice="make the video again")


class ClipReader:
    """Frames of a clip by number, decoded as they are asked for; a context manager.

    Reading forward costs each frame once. Only the last `kept` frames are remembered: asking for an older one
    begins again at the start. Raises StorageError if the file is no longer the clip's, FileError where it does not
    decode to what its packets promised.
    """

    def __init__(self, clip: Clip, kept: int) -> None:
        self._clip, self._path = clip, Path(clip.path)
        if file_sha256(self._path) != clip.sha256:
            raise StorageError(
                "the video is not the one this job began with",
                where=clip.path,
                expected=f"the file whose SHA-256 begins with {clip.sha256[:12]}",
                advice="put the video back, or start the job again with the new one",
            )
        self._recent: deque[Frames] = deque(maxlen=kept)
        self._frames: Iterator[Frames] = iter(())
        self._next = clip.frames  # nothing is open yet

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._frames = iter(())
        self._recent.clear()

    def read(self, numbers: Sequence[int]) -> Frames:
        """Frames [n, H, W, 3] uint8 RGB of these numbers, in this order; a number may come more than once."""
        clip = self._clip
        out: NDArray[np.uint8] = np.empty((len(numbers), clip.height, clip.width, 3), np.uint8)
        places: dict[int, list[int]] = {}
        for place, number in enumerate(numbers):
            places.setdefault(number, []).append(place)
        if min(places) < self._next - len(self._recent) or not self._recent:
            self._frames, self._next = read_frames(self._path), 0
            self._recent.clear()
        for back, frame in enumerate(reversed(self._recent), 1):
            out[places.get(self._next - back, [])] = frame
        while self._next <= max(places):
            frame = self._decode()
            out[places.get(self._next, [])] = frame
            self._recent.append(frame)
            self._next += 1
        return out

    def _decode(self) -> Frames:
        clip = self._clip
        frame = next(self._frames, None)
        if frame is None:
            raise _refused(
                self._path, f"only {self._next} of its {clip.frames} frames decode", "a whole video"
            )
        if frame.shape[:2] != (clip.height, clip.width):
            found = f"frame {self._next} is {frame.shape[1]}x{frame.shape[0]}"
            raise _refused(self._path, found, f"{clip.width}x{clip.height} like the first")
        return frame
