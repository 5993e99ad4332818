"""The sound of one file for the video of another: as long as the video, cut or filled with silence."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lowvram.errors import FileError
from lowvram.media.probe import open_media

RATE = 48_000
"""Samples per second."""
BLOCK = 1024
"""Samples of a frame of AAC."""

Samples = NDArray[np.float32]
"""[2, n], left and right, in -1..1."""


def check_sound(path: Path) -> None:
    """FileError if the video at `path` has no sound that can be decoded."""
    next(samples(path), None)


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
    """The decoded sound from the moment of the first picture on; silence first where it begins later."""
    import av

    with open_media(path) as container:
        if not container.streams.audio:
            raise FileError(
                "no sound", where=str(path), expected="a video with sound", advice="leave --audio-from out"
            )
        stream, picture = container.streams.audio[0], container.streams.video[0]
        early = _start(picture.start_time, picture.time_base) - _start(stream.start_time, stream.time_base)
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
