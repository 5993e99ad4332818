"""The sound that goes with a video: as long as the video, whatever it was."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from lowvram.errors import FileError
from lowvram.media.sound import BLOCK, RATE, check_sound, fitted


def speaking(path: Path, seconds: float, rate: int = 44_100, pictures: int = 5) -> Path:
    """A video with a 440 Hz tone of `seconds`."""
    with av.open(str(path), "w") as container:
        picture = container.add_stream("libx264", rate=10)
        picture.width, picture.height, picture.pix_fmt = 32, 32, "yuv420p"
        sound = container.add_stream("aac", rate=rate, layout="mono")
        for n in range(pictures):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 40 * n, np.uint8), format="rgb24")
            frame.pts, frame.time_base = n, Fraction(1, 10)
            container.mux(picture.encode(frame))
        container.mux(picture.encode(None))
        tone = np.sin(2 * np.pi * 440 * np.arange(int(seconds * rate)) / rate).astype(np.float32)
        frame = av.AudioFrame.from_ndarray(0.5 * tone[None], format="fltp", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
        container.mux(sound.encode(frame))
        container.mux(sound.encode(None))
    return path


@pytest.mark.parametrize("seconds", [Fraction(1, 2), Fraction(77, 30), Fraction(1, 100)])
def test_sound_is_cut_or_filled_to_the_sample(tmp_path: Path, seconds: Fraction) -> None:
    pieces = list(fitted(speaking(tmp_path / "a.mp4", 1.0), seconds))
    assert all(piece.shape == (2, BLOCK) for piece in pieces[:-1])
    whole = np.concatenate(pieces, axis=1)
    assert whole.shape == (2, round(seconds * RATE)) and whole.dtype == np.float32
    heard = whole[:, : min(whole.shape[1], RATE)]
    if seconds > Fraction(1, 4):
        assert np.abs(heard).max() > 0.3
        assert np.abs(whole[:, RATE + 4096 :]).max(initial=0) < 0.01


def test_a_tone_keeps_its_pitch(tmp_path: Path) -> None:
    whole = np.concatenate(list(fitted(speaking(tmp_path / "a.mp4", 1.0), Fraction(1))), axis=1)[0]
    loudest = int(np.abs(np.fft.rfft(whole)).argmax())
    assert loudest == 440


def test_a_sound_file_is_heard_from_its_beginning(tmp_path: Path) -> None:
    """Whatever holds it; the cover of an album is no video."""
    tone = (0.5 * np.sin(2 * np.pi * 440 * np.arange(RATE // 2) / RATE)).astype(np.float32)
    for name, codec in (
        ("a.wav", "pcm_s16le"),
        ("a.mp3", "libmp3lame"),
        ("a.flac", "flac"),
        ("a.m4a", "aac"),
    ):
        with av.open(str(tmp_path / name), "w") as container:
            stream = container.add_stream(codec, rate=RATE, layout="stereo")
            planes = np.stack([tone, tone])
            frame = av.AudioFrame.from_ndarray(planes, format="fltp", layout="stereo")
            frame.sample_rate, frame.pts, frame.time_base = RATE, 0, Fraction(1, RATE)
            resampler = av.AudioResampler(format=stream.codec_context.format, layout="stereo", rate=RATE)
            for part in [*resampler.resample(frame), None]:
                container.mux(stream.encode(part))
        check_sound(tmp_path / name)
        whole = np.concatenate(list(fitted(tmp_path / name, Fraction(1))), axis=1)
        assert whole.shape == (2, RATE), name
        assert np.abs(whole[:, 4096 : RATE // 2 - 4096]).max() > 0.3, name
        assert np.abs(whole[:, RATE // 2 + 4096 :]).max() < 0.01, name


def test_what_is_no_sound_is_refused(tmp_path: Path) -> None:
    (tmp_path / "list.m3u8").write_text("#EXTM3U\nfile.wav\n")
    for path in (tmp_path / "list.m3u8", tmp_path / "gone.wav"):
        with pytest.raises(FileError) as refused:
            check_sound(path)
        assert str(refused.value).count("\n") <= 2


def test_a_video_without_sound_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        picture = container.add_stream("libx264", rate=10)
        picture.width, picture.height, picture.pix_fmt = 32, 32, "yuv420p"
        container.mux(
            picture.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24"))
        )
        container.mux(picture.encode(None))
    with pytest.raises(FileError, match="no sound") as refused:
        check_sound(path)
    assert refused.value.exit_code == 3


def test_a_file_whose_sound_is_empty_has_none(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "a.wav"), "w") as container:
        container.add_stream("pcm_s16le", rate=RATE, layout="mono")
        container.start_encoding()
    with pytest.raises(FileError, match="no sound"):
        check_sound(tmp_path / "a.wav")
