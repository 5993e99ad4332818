"""Small videos: written, read, and with times of one's choice."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from lowvram.media.video import VideoWriter, read_frames


def write_video(path: Path, frames: Sequence[np.ndarray], rate: Fraction | int = 30) -> None:
    height, width = frames[0].shape[:2]
    with VideoWriter(path, width, height, rate) as writer:
        for frame in frames:
            writer.write(frame[None])


def frames_of(path: Path) -> np.ndarray:
    return np.stack(list(read_frames(path)))


def packets(path: Path, side: int, times: Sequence[int]) -> None:
    """A video of grey frames shown at these times, in thirtieths of a second; without any, an mp4 keeps no stream."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt = side, side, "yuv420p"
        container.start_encoding()
        for time in times:
            frame = av.VideoFrame.from_ndarray(np.full((side, side, 3), 90, np.uint8), format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 30)
            container.mux(stream.encode(frame))
        if times:
            container.mux(stream.encode(None))
