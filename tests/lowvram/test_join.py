"""Segments become one video: every frame once, in order, and the sound as long as the pictures."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from lowvram.errors import FileError
from lowvram.media.join import join
from lowvram.media.sound import RATE
from lowvram.media.video import VideoWriter, read_frames

SIZE, FPS = (48, 32), Fraction(30000, 1001)


def part(path: Path, first: int, count: int) -> tuple[Path, int]:
    """Frame n of the whole is a flat grey of 10 + 5 n."""
    with VideoWriter(path, *SIZE, FPS) as writer:
        for n in range(first, first + count):
            writer.write(np.full((1, SIZE[1], SIZE[0], 3), 10 + 5 * n, np.uint8))
    return path, count


def tone(path: Path, seconds: float) -> Path:
    with av.open(str(path), "w") as container:
        picture = container.add_stream("libx264", rate=10)
        picture.width, picture.height, picture.pix_fmt = 32, 32, "yuv420p"
        sound = container.add_stream("aac", rate=RATE, layout="stereo")
        frame = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
        container.mux(picture.encode(frame))
        container.mux(picture.encode(None))
        wave = 0.5 * np.sin(2 * np.pi * 440 * np.arange(int(seconds * RATE)) / RATE).astype(np.float32)
        heard = av.AudioFrame.from_ndarray(np.stack([wave, wave]), format="fltp", layout="stereo")
        heard.sample_rate, heard.pts, heard.time_base = RATE, 0, Fraction(1, RATE)
        container.mux(sound.encode(heard))
        container.mux(sound.encode(None))
    return path


def lengths(path: Path) -> tuple[float, float]:
    """Seconds of pictures and of sound, as decoded."""
    with av.open(str(path)) as container:
        pictures = sum(1 for _ in container.decode(video=0))
    with av.open(str(path)) as container:
        heard = sum(frame.samples for frame in container.decode(audio=0))
    return float(pictures / FPS), heard / RATE


def test_every_frame_of_every_part_comes_once_at_its_time(tmp_path: Path) -> None:
    parts = [
        part(tmp_path / f"{n}.mp4", start, count) for n, start, count in ((0, 0, 13), (1, 13, 8), (2, 21, 1))
    ]
    join(parts, tmp_path / "out.mp4", SIZE, FPS, {"comment": "c"})
    back = np.stack(list(read_frames(tmp_path / "out.mp4")))
    assert [round((float(f.mean()) - 10) / 5) for f in back] == list(range(22))
    assert np.array_equal(back[:13], np.stack(list(read_frames(parts[0][0]))))
    with av.open(str(tmp_path / "out.mp4")) as container:
        times = [frame.pts * frame.time_base for frame in container.decode(video=0)]
        assert container.metadata["comment"] == "c"
    assert times == [n / FPS for n in range(22)]


@pytest.mark.parametrize("seconds", [0.2, 3.0])
def test_sound_is_as_long_as_the_pictures_within_one_frame(tmp_path: Path, seconds: float) -> None:
    parts = [part(tmp_path / f"{n}.mp4", 11 * n, 11) for n in range(3)]
    join(parts, tmp_path / "out.mp4", SIZE, FPS, {}, sound=tone(tmp_path / "tone.mp4", seconds))
    pictures, heard = lengths(tmp_path / "out.mp4")
    assert pictures == pytest.approx(33 / float(FPS))
    assert abs(pictures - heard) <= 1 / FPS


def test_a_missing_frame_leaves_nothing_behind(tmp_path: Path) -> None:
    path, count = part(tmp_path / "0.mp4", 0, 5)
    with pytest.raises(FileError, match="5 of 6 frames"):
        join([(path, count + 1)], tmp_path / "out.mp4", SIZE, FPS, {})
    assert [p.name for p in tmp_path.iterdir()] == ["0.mp4"]
