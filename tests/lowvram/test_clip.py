"""Videos that a job reads: known before anything is decoded, read in any order, refused by name."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from lowvram.errors import FileError, StorageError
from lowvram.media import clip
from lowvram.media.clip import ClipReader, open_clip

WIDTH, HEIGHT = 48, 32


def grey(number: int) -> np.ndarray:
    return np.full((HEIGHT, WIDTH, 3), 20 + 10 * number, np.uint8)


def make(path: Path, count: int, rate: Fraction | int = 30, times: Sequence[int] | None = None) -> Path:
    """Frame n is a flat grey of 20 + 10 n. times: of the frames, in frames."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for n in range(count):
            frame = av.VideoFrame.from_ndarray(grey(n), format="rgb24")
            frame.pts, frame.time_base = (times[n] if times else n), 1 / Fraction(rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def shades(frames: np.ndarray) -> list[int]:
    return [round((float(f.mean()) - 20) / 10) for f in frames]


def test_a_clip_is_known_by_its_packets(tmp_path: Path) -> None:
    found = open_clip(make(tmp_path / "a.mp4", 13, Fraction(30000, 1001)))
    assert (found.width, found.height, found.frames, found.rate) == (WIDTH, HEIGHT, 13, (30000, 1001))
    assert open_clip(make(tmp_path / "one.mp4", 1)).frames == 1


@pytest.mark.parametrize("suffix", ["mkv", "mov", "avi"])
def test_containers_that_round_times_have_a_constant_rate(tmp_path: Path, suffix: str) -> None:
    assert open_clip(make(tmp_path / f"a.{suffix}", 20, 30)).rate == (30, 1)


def test_frames_come_by_number_in_any_order_and_more_than_once(tmp_path: Path) -> None:
    with ClipReader(open_clip(make(tmp_path / "a.mp4", 20)), kept=2) as reader:
        for numbers in ([0, 1, 2, 3], [3, 4, 5], [19, 18, 18, 0], [7], [5, 6]):
            assert shades(reader.read(numbers)) == numbers


def test_reading_forward_decodes_every_frame_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    original, video = clip.read_frames, open_clip(make(tmp_path / "a.mp4", 20))
    monkeypatch.setattr(clip, "read_frames", lambda path: opened.append(path) or original(path))
    with ClipReader(video, kept=5) as reader:
        for start in (0, 4, 8):
            assert shades(reader.read(range(start, start + 9))) == list(range(start, start + 9))
        assert len(opened) == 1
        reader.read([3])
        assert len(opened) == 2


@pytest.mark.parametrize(
    ("times", "words"),
    [
        ([0, 1, 2, 4, 5, 6], "frames of different length"),
        ([0, 1, 2, 3, 10, 11], "frames of different length"),
    ],
)
def test_a_variable_frame_rate_is_refused(tmp_path: Path, times: list[int], words: str) -> None:
    with pytest.raises(FileError, match=words) as refused:
        open_clip(make(tmp_path / "a.mp4", 6, 30, times))
    assert refused.value.exit_code == 3 and "ffmpeg" in refused.value.advice


def test_a_script_that_names_other_files_is_no_video(tmp_path: Path) -> None:
    make(tmp_path / "real.mp4", 3)
    path = tmp_path / "a.mp4"
    path.write_text("ffconcat version 1.0\nfile real.mp4\n")
    with pytest.raises(FileError, match="not readable as video"):
        open_clip(path)


def test_a_video_without_frames_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        container.start_encoding()
    with pytest.raises(FileError):
        open_clip(path)


def test_a_size_that_only_a_header_would_claim_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clip, "MAX_SIDE", 40)
    with pytest.raises(FileError, match="48x32"):
        open_clip(make(tmp_path / "a.mp4", 3))


def test_more_frames_than_an_hour_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clip, "MAX_FRAMES", 5)
    with pytest.raises(FileError, match="more than 5 frames"):
        open_clip(make(tmp_path / "a.mp4", 6))


def test_frames_that_do_not_decode_are_told_with_their_number(tmp_path: Path) -> None:
    path = make(tmp_path / "a.mp4", 20)
    found = open_clip(path)
    longer = clip.Clip(
        path=found.path, sha256=found.sha256, width=WIDTH, height=HEIGHT, frames=25, rate=found.rate
    )
    with ClipReader(longer, kept=1) as reader, pytest.raises(FileError, match="only 20 of its 25 frames"):
        reader.read([24])


def test_a_changed_video_is_not_read_as_the_old_one(tmp_path: Path) -> None:
    found = open_clip(make(tmp_path / "a.mp4", 4))
    make(tmp_path / "a.mp4", 5)
    with pytest.raises(StorageError, match="not the one this job began with") as refused:
        ClipReader(found, kept=1)
    assert refused.value.exit_code == 6
