"""How a driving video is cut into segments, and which folders are refused."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image
from videos import write_video

from lowvram.driving import Driving, open_folder, reflected
from lowvram.errors import FileError, UsageError
from lowvram.media.clip import Clip
from lowvram.media.picture import Picture


def driving(frames: int, carried: int = 1) -> Driving:
    clip = Clip(path="/p", sha256="", width=64, height=32, frames=frames, rate=(30, 1))
    picture = Picture(path="/r", sha256="", width=64, height=32)
    return Driving(mode="animate", pose=clip, face=clip, picture=picture, carried=carried)


def test_past_its_end_a_video_is_played_to_and_fro_without_doubling_its_ends() -> None:
    assert [reflected(n, 5) for n in range(10)] == [0, 1, 2, 3, 4, 3, 2, 1, 0, 1]
    assert [reflected(n, 1) for n in range(4)] == [0, 0, 0, 0]
    assert [reflected(n, 2) for n in range(5)] == [0, 1, 0, 1, 0]


@pytest.mark.parametrize("carried", [1, 5])
@pytest.mark.parametrize("frames", [1, 5, 6, 76, 77, 78, 149, 153, 900])
def test_segments_show_every_frame_once_and_in_order(frames: int, carried: int) -> None:
    """The count is upstream's: frames padded until (total - carried) is a multiple of (77 - carried)."""
    d = driving(frames, carried)
    shown = []
    for k in range(d.segments(77)):
        numbers = d.numbers(k, 77)
        assert len(numbers) == 77
        shown += [numbers[n] for n in d.shown(k, 77)]
        if k:
            assert numbers[:carried] == d.numbers(k - 1, 77)[-carried:]
    assert shown == list(range(frames))
    if frames > carried:
        padded = frames + (-(frames - carried)) % (77 - carried)
        assert d.segments(77) == (padded - carried) // (77 - carried)


def video(path: Path, size: tuple[int, int], frames: int, light: int = 1, turned: int = 0) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.codec_context.color_trc = light
        if turned:
            stream.set_display_rotation(turned)
        for n in range(frames):
            rgb = np.full((size[1], size[0], 3), 10 * n, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(rgb, format="rgb24")))
        container.mux(stream.encode(None))


def cut_off(path: Path) -> None:
    """A video with its index in front, and without its last bytes."""
    path.unlink()
    write_video(path, [np.full((32, 64, 3), 40 * n, np.uint8) for n in range(4)])
    os.truncate(path, path.stat().st_size - 10)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("pose", "bg", "mask"):
        video(tmp_path / f"src_{name}.mp4", (64, 32), 4)
    video(tmp_path / "src_face.mp4", (512, 512), 4)
    Image.new("RGB", (40, 30), (200, 30, 30)).save(tmp_path / "src_ref.png")
    return tmp_path


def test_a_whole_folder_is_read_in_both_modes(folder: Path) -> None:
    found = open_folder(folder, "replace", carried=5)
    assert (found.frames, found.pose.width, found.picture.width) == (4, 64, 40)
    assert found.background is not None and found.mask is not None
    assert open_folder(folder, "animate").background is None


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no mask": (lambda f: (f / "src_mask.mp4").unlink(), "src_mask.mp4 is missing"),
    "no pose": (lambda f: (f / "src_pose.mp4").unlink(), "src_pose.mp4 is missing"),
    "shorter face": (lambda f: video(f / "src_face.mp4", (512, 512), 3), "3 frames"),
    "longer mask": (lambda f: video(f / "src_mask.mp4", (64, 32), 5), "5 frames"),
    "face of another size": (lambda f: video(f / "src_face.mp4", (256, 512), 4), "256x512"),
    "background of another size": (lambda f: video(f / "src_bg.mp4", (64, 64), 4), "frames of 64x64"),
    "HDR": (lambda f: video(f / "src_bg.mp4", (64, 32), 4, light=16), r"HDR video \(PQ\)"),
    "HDR of a camera": (lambda f: video(f / "src_pose.mp4", (64, 32), 4, light=18), r"HDR video \(HLG\)"),
    "turned": (lambda f: video(f / "src_bg.mp4", (64, 32), 4, turned=90), "turned by (90|270) degrees"),
    "cut off": (lambda f: cut_off(f / "src_bg.mp4"), "cut off after [0-3] whole frames"),
    "a script": (
        lambda f: (f / "src_bg.mp4").write_text("ffconcat version 1.0\nfile src_pose.mp4\n"),
        "not readable",
    ),
    "a picture of noise": (
        lambda f: (f / "src_ref.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(20)),
        "picture",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_a_folder_that_cannot_be_used_is_refused_by_name(folder: Path, what: str) -> None:
    spoil, words = BAD[what]
    spoil(folder)
    with pytest.raises(FileError, match=words) as refused:
        open_folder(folder, "replace")
    assert refused.value.exit_code == 3 and str(refused.value).count("\n") <= 2


def test_a_file_in_place_of_the_folder_is_told_from_nothing(folder: Path) -> None:
    for path, found in ((folder / "src_pose.mp4", "a file"), (folder / "nowhere", "no such folder")):
        with pytest.raises(FileError) as refused:
            open_folder(path, "animate")
        assert refused.value.found == found


def test_a_mode_or_a_count_that_is_none_is_a_mistake_of_usage(folder: Path) -> None:
    for given in ({"mode": "swap"}, {"mode": "animate", "carried": 3}):
        with pytest.raises(UsageError):
            open_folder(folder, **given)  # type: ignore[arg-type]
