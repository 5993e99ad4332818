"""Frames in and out of files: nothing is lost, colours are right, the same frames give the same file."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import psutil
import pytest

from lowvram.errors import FileError, InternalError, StorageError, UsageError
from lowvram.media import video
from lowvram.media.probe import probe
from lowvram.media.target import finishing_path, partial_path
from lowvram.media.video import VideoWriter, read_frames
from lowvram.offload import io

WIDTH, HEIGHT, FPS = 96, 64, 8


def moving(count: int, seed: int = 0) -> np.ndarray:
    """[count, HEIGHT, WIDTH, 3] uint8: a smooth picture that moves by 2 pixels per frame."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(60, 200, (HEIGHT // 16, WIDTH // 16, 3)).astype(np.uint8)
    picture = coarse.repeat(16, 0).repeat(16, 1)
    return np.stack([np.roll(picture, 2 * i, 1) for i in range(count)])


def noise(count: int) -> np.ndarray:
    """[count, HEIGHT, WIDTH, 3] uint8: what compresses worst."""
    return np.random.default_rng(0).integers(0, 256, (count, HEIGHT, WIDTH, 3), dtype=np.uint8)


def decode(path: Path) -> np.ndarray:
    return np.stack(list(read_frames(path)))


def write(path: Path, frames: np.ndarray, cut: int = 5, **options: bool) -> None:
    with VideoWriter(path, WIDTH, HEIGHT, FPS, {"comment": "c"}, **options) as writer:
        for start in range(0, len(frames), cut):
            writer.write(frames[start : start + cut])


# ---- what is written


def test_every_frame_comes_back_in_order(tmp_path: Path) -> None:
    frames = moving(29)
    write(tmp_path / "a.mp4", frames)
    back = decode(tmp_path / "a.mp4")
    assert back.shape == frames.shape and back.dtype == np.uint8
    nearest = [int(np.abs(back[i].astype(int) - frames).mean((1, 2, 3)).argmin()) for i in range(len(back))]
    assert nearest == list(range(29))
    assert np.abs(back.astype(int) - frames).mean() < 4


@pytest.mark.parametrize(
    "rgb", [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (17, 130, 201)], ids=str
)
def test_colours_are_bt709_limited_in_the_planes_and_back_in_rgb(
    tmp_path: Path, rgb: tuple[int, int, int]
) -> None:
    path = tmp_path / "a.mp4"
    frame = np.empty((1, HEIGHT, WIDTH, 3), np.uint8)
    frame[:] = rgb
    write(path, frame)
    with av.open(str(path)) as container:
        context = container.streams.video[0].codec_context
        planes = next(container.decode(video=0)).to_ndarray()
        assert (context.color_primaries, context.color_trc, context.colorspace) == (1, 1, 1)
        assert (context.color_range, context.pix_fmt) == (1, "yuv420p")
    red, green, blue = (c / 255 for c in rgb)
    luma = 0.2126 * red + 0.7152 * green + 0.0722 * blue  # ITU-R BT.709-6, items 3.2, 3.3 and 4.6
    expected = (16 + 219 * luma, 128 + 224 * (blue - luma) / 1.8556, 128 + 224 * (red - luma) / 1.5748)
    found = (planes[:HEIGHT].mean(), *planes[HEIGHT:].reshape(2, -1).mean(1))
    assert found == pytest.approx(expected, abs=1.5)
    assert np.abs(decode(path)[0].astype(int) - rgb).max() <= 4


def test_the_same_frames_give_the_same_bytes_however_they_are_cut(tmp_path: Path) -> None:
    width, height = 320, 192  # high enough for x264 to use several threads
    generator = np.random.default_rng(0)
    coarse = generator.integers(40, 220, (height // 16, width // 16, 3)).astype(np.int16)
    picture = coarse.repeat(16, 0).repeat(16, 1)
    frames = np.stack([np.roll(picture, 2 * i, 1) for i in range(24)])
    frames = (frames + generator.integers(-3, 4, frames.shape)).astype(np.uint8)

    def content(name: str, cut: int, last: int = 24) -> bytes:
        with VideoWriter(tmp_path / name, width, height, FPS) as writer:
            for start in range(0, last, cut):
                writer.write(frames[start : min(last, start + cut)])
        return (tmp_path / name).read_bytes()

    first = content("a.mp4", 5)
    assert content("b.mp4", 5) == content("c.mp4", 1) == content("d.mp4", 24) == first
    assert content("e.mp4", 5, last=23) != first


def test_the_finished_file_is_alone_plain_and_starts_at_zero(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    write(path, moving(30))
    assert list(tmp_path.iterdir()) == [path]
    content = path.read_bytes()
    assert content.index(b"moov") < content.index(b"mdat"), "the index is in front"
    assert b"moof" not in content, "no fragments are left"
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.start_time == 0
        assert stream.duration * stream.time_base == Fraction(30, FPS)
        times = [frame.pts * frame.time_base for frame in container.decode(stream)]
        assert times == [Fraction(i, FPS) for i in range(30)]


def test_probe_reads_back_size_rate_and_metadata(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    metadata = {"comment": '{"prompt": "кот 猫 \\n \\"x\\""}', "lowvram.job": "y" * 70_000}
    with VideoWriter(path, WIDTH, HEIGHT, Fraction(30000, 1001), metadata) as writer:
        writer.write(moving(3))
    info = probe(path)
    assert (info.width, info.height, info.frames, info.codec) == (WIDTH, HEIGHT, 3, "h264")
    assert info.fps == Fraction(30000, 1001)
    assert info.metadata == metadata


def test_memory_does_not_grow_with_the_number_of_frames(tmp_path: Path) -> None:
    size, chunk = 256, 8
    frames = np.full((chunk, size, size, 3), 90, np.uint8)
    process = psutil.Process()
    with VideoWriter(tmp_path / "a.mp4", size, size, FPS) as writer:
        for _ in range(8):
            writer.write(frames)
        before = process.memory_info().rss
        for _ in range(25):
            writer.write(frames)
        grown = process.memory_info().rss - before
    assert grown < 0.25 * 25 * frames.nbytes


# ---- what may go wrong


CHILD = """
import sys
from pathlib import Path
import numpy as np
from lowvram.media.video import VideoWriter
with VideoWriter(Path(sys.argv[1]), 96, 64, 8, {"comment": "kept"}) as writer:
    for i in range(10_000):
        writer.write(np.full((1, 64, 96, 3), i % 250, np.uint8))
        print(writer.durable, flush=True)
        if writer.durable >= 24:
            sys.stdin.read()
"""


def test_a_killed_process_leaves_a_playable_file(tmp_path: Path) -> None:
    target = tmp_path / "a.mp4"
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(target)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    durable = 0
    while durable < 24 and (line := child.stdout.readline()):
        durable = int(line)
    child.kill()
    child.wait()
    child.stdout.close()
    assert child.stdin is not None
    child.stdin.close()
    assert durable >= 24 and not target.exists()
    partial = partial_path(target)
    back = decode(partial)
    assert len(back) >= durable
    assert np.abs(back[:durable, 0, 0, 0].astype(int) - np.arange(durable)).max() <= 3
    info = probe(partial)
    assert info.frames == len(back) and info.metadata["comment"] == "kept"


def test_an_exception_keeps_all_frames_so_far_and_leaves_the_target(tmp_path: Path) -> None:
    target = tmp_path / "a.mp4"
    target.write_bytes(b"before")
    with (
        pytest.raises(KeyboardInterrupt),
        VideoWriter(target, WIDTH, HEIGHT, FPS, overwrite=True) as writer,
    ):
        writer.write(moving(11))
        raise KeyboardInterrupt
    assert target.read_bytes() == b"before"
    assert len(decode(partial_path(target))) == 11


def test_a_finished_video_waits_for_a_scanner_that_holds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows refuses to rename it then."""
    replace, refusals = os.replace, iter([PermissionError, PermissionError])

    def held(source: Path, target: Path) -> None:
        if (error := next(refusals, None)) is not None:
            raise error
        replace(source, target)

    monkeypatch.setattr(io, "_REPLACE_WAITS", (0.0, 0.0))
    monkeypatch.setattr(os, "replace", held)
    with VideoWriter(tmp_path / "a.mp4", 32, 32, 8) as video:
        video.write(np.zeros((1, 32, 32, 3), np.uint8))
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"] and next(refusals, None) is None


def test_a_file_that_does_not_decode_is_not_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "a.mp4"

    def lossy(source: Path, finished: Path, metadata: object) -> None:
        content = source.read_bytes()
        finished.write_bytes(content[: content.rindex(b"moof") - 4])

    monkeypatch.setattr(video, "remux", lossy)
    with pytest.raises(StorageError, match=r"only \d+ of 30 frames"):
        write(target, moving(30))
    assert not target.exists() and not finishing_path(target).exists()
    assert len(decode(partial_path(target))) == 30


def test_a_target_that_appears_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    target = tmp_path / "a.mp4"
    with (
        pytest.raises(StorageError, match="appeared"),
        VideoWriter(target, WIDTH, HEIGHT, FPS) as writer,
    ):
        writer.write(moving(9))
        target.write_bytes(b"theirs")
    assert target.read_bytes() == b"theirs"
    assert len(decode(partial_path(target))) == 9


@pytest.mark.skipif(os.name == "nt", reason="Windows does not remove a folder with an open file")
def test_a_folder_that_goes_away_is_a_storage_error(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    with (
        pytest.raises(StorageError, match="could not be written"),
        VideoWriter(folder / "a.mp4", WIDTH, HEIGHT, FPS) as writer,
    ):
        writer.write(moving(3))
        partial_path(folder / "a.mp4").unlink()
        folder.rmdir()


@pytest.mark.skipif(os.name == "nt", reason="needs a limit on file sizes")
def test_a_full_disk_is_a_storage_error_and_the_frames_so_far_stay(tmp_path: Path) -> None:
    import resource

    target = tmp_path / "a.mp4"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, before[1]))
        writer = VideoWriter(target, WIDTH, HEIGHT, FPS)
        with pytest.raises(StorageError, match="could not be written") as caught, writer:
            writer.write(noise(80))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert str(partial_path(target)) in caught.value.advice
    assert not target.exists() and not finishing_path(target).exists()
    back = []
    with contextlib.suppress(FileError):  # the last fragment is cut
        back.extend(read_frames(partial_path(target)))
    assert writer.durable >= FPS
    assert len(back) == probe(partial_path(target)).frames == writer.durable


@pytest.mark.parametrize(
    ("width", "height", "fps"), [(95, 64, 8), (96, 63, 8), (0, 64, 8), (96, 64, 0), (96, 64, float("nan"))]
)
def test_odd_sizes_and_impossible_rates_are_refused(
    tmp_path: Path, width: int, height: int, fps: float
) -> None:
    with pytest.raises(UsageError):
        VideoWriter(tmp_path / "a.mp4", width, height, fps)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "frames",
    [
        np.zeros((1, HEIGHT, WIDTH, 3), np.float32),
        np.zeros((HEIGHT, WIDTH, 3), np.uint8),
        np.zeros((1, WIDTH, HEIGHT, 3), np.uint8),
    ],
    ids=["float", "no time", "turned"],
)
def test_frames_of_another_shape_or_type_are_a_bug(tmp_path: Path, frames: np.ndarray) -> None:
    with pytest.raises(InternalError), VideoWriter(tmp_path / "a.mp4", WIDTH, HEIGHT, FPS) as writer:
        writer.write(frames)


def test_no_frames_leave_no_files(tmp_path: Path) -> None:
    with pytest.raises(InternalError, match="no frames"), VideoWriter(tmp_path / "a.mp4", WIDTH, HEIGHT, FPS):
        pass
    assert not list(tmp_path.iterdir())


# ---- encoders


def test_a_writer_that_does_not_start_leaves_no_file_and_nothing_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*_: object) -> None:
        raise OSError(28, "No space left on device")

    writer = VideoWriter(tmp_path / "a.mp4", 64, 64, 8)
    monkeypatch.setattr(video, "to_yuv", refuses)  # the last thing that is set up
    with pytest.raises(StorageError), writer:
        pass
    assert list(tmp_path.iterdir()) == []
    assert not any("a.partial" in each.path for each in psutil.Process().open_files())


def test_x264_needs_no_reason(tmp_path: Path) -> None:
    if "libx264" not in av.codecs_available:
        pytest.skip("this PyAV has no libx264")
    writer = VideoWriter(tmp_path / "a.mp4", WIDTH, HEIGHT, FPS)
    assert (writer.encoder, writer.fallback) == ("libx264", "")


def test_another_encoder_is_used_with_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video, "ENCODERS", ("no_such_h264", "mpeg4"))
    frames = moving(10)
    with VideoWriter(tmp_path / "a.mp4", WIDTH, HEIGHT, FPS) as writer:
        assert writer.encoder == "mpeg4"
        assert "no_such_h264" in writer.fallback
        writer.write(frames)
    assert np.abs(decode(tmp_path / "a.mp4").astype(int) - frames).mean() < 10


def test_no_encoder_at_all_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video, "ENCODERS", ("no_such_h264",))
    with pytest.raises(UsageError, match="no_such_h264") as caught:
        VideoWriter(tmp_path / "a.mp4", WIDTH, HEIGHT, FPS)
    assert "pip install" in caught.value.advice


# ---- what is read


def test_what_is_no_video_is_a_file_error(tmp_path: Path) -> None:
    whole = tmp_path / "whole.mp4"
    write(whole, moving(4))
    bad = {
        "empty.mp4": b"",
        "noise.mp4": np.random.default_rng(0).bytes(5000),
        "cut.mp4": whole.read_bytes()[:300],
        "list.mp4": f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{whole}\n#EXT-X-ENDLIST\n".encode(),
        "script.mp4": f"ffconcat version 1.0\nfile '{whole.name}'\n".encode(),
    }
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
    for name in (*bad, "missing.mp4"):
        with pytest.raises(FileError, match=name):
            probe(tmp_path / name)
        with pytest.raises(FileError, match=name):
            list(read_frames(tmp_path / name))


def test_sound_alone_is_a_file_error(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 44100
        container.mux(stream.encode(sound))
        container.mux(stream.encode(None))
    with pytest.raises(FileError, match="no video stream"):
        probe(path)


def test_damage_inside_a_file_is_a_file_error(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    write(path, noise(20))
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 20_000] = np.random.default_rng(0).bytes(20_000)
    path.write_bytes(content)
    with pytest.raises(FileError, match="not readable as video"):
        list(read_frames(path))
