"""The sound of one file for the video of another: as long as the video, cut or filled with silence."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lowvram.errors import FileError
from lowvram.media.probe import open_sound

RATE = 48_000
"""Samples per second."""
BLOCK = 1024
"""Samples of a frame of AAC."""

Samples = NDArray[np.float32]
"""[2, n], left and right, in -1..1."""


def check_sound(path: Path) -> None:
    """FileError if the file at `path`, a video or sound alone, has no sound that can be decoded."""
    if next(samples(path), None) is None:
        raise FileError(
            "its sound is empty: no sound at all",
            where=str(path),
            expected="a video with sound, or a sound file",
            advice="leave --audio-from out",
        )


def fitted(path: Path, seconds: Fraction) -> Iterator[Samples]:
    """The sound of `path` from its first picture on, `seconds` of it, in blocks of BLOCK samples and a shorter last one.

    Memory does not grow with its length. FileError if there is no sound, or where it stops being one.
    """
    left = round(seconds * RATE)
    waiting: Samples = np.empty((2, 0), np.float32)
    for some in samples(path):
        waiting = np.concatenate([waiting, some[:, : left - waiting.shape[1]]], axis=1)
        while waiting.shape[1] >= BLOCK:
            yield waiting[:, :BLOCK]
            waiting, left = waiting[:, BLOCK:], left - BLOCK
        if waiting.shape[1] == left:
            break
    while left > 0:
        block: Samples = np.zeros((2, min(BLOCK, left)), np.float32)
        block[:, : waiting.shape[1]] = waiting
        yield block
        waiting, left = waiting[:, :0], left - block.shape[1]


def samples(path: Path) -> Iterator[Samples]:
    """The decoded sound from the moment of the first picture on; silence first where it begins later.

    Without moving pictures it begins where it begins: the cover of an album is shown at no time.
    """
    import av
    from av.stream import Disposition

    with open_sound(path) as container:
        stream = container.streams.audio[0]
        moving = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
        begins = _start(stream.start_time, stream.time_base)
        early = _start(moving[0].start_time, moving[0].time_base) - begins if moving else Fraction(0)
        skipped = round(early * RATE)
        for begun in range(0, -skipped, BLOCK):
            yield np.zeros((2, min(BLOCK, -skipped - begun)), np.float32)
        resampler = av.AudioResampler(format="fltp", layout="stereo", rate=RATE)
        for frame in container.decode(stream):
            for part in resampler.resample(frame):
                values = np.asarray(part.to_ndarray(), np.float32)
                yield values[:, max(skipped, 0) :]
                skipped = max(0, skipped - values.shape[1])


def _start(ticks: int | None, base: Fraction | None) -> Fraction:
    return Fraction(ticks or 0) * Fraction(base or 0)
