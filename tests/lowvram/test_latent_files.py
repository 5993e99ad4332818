"""The autoencoder alone: a video to a latent file and back, and files that are not what they should be."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lowvram import FileError, OutOfMemoryError, Runtime, api
from lowvram.autoencoder import Autoencoder, VideoFile
from lowvram.media.probe import probe
from lowvram.media.video import VideoWriter, read_frames
from tests.support.videos import packets

Cli = Callable[..., Any]
BUDGET = ("--vram", "500MB", "--ram", "2GB", "--device", "cpu")


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    """Nine frames at 12 a second: a red square moves over black, as nano knows it."""
    path = tmp_path / "clip.mp4"
    with VideoWriter(path, 64, 64, 12) as video:
        for n in range(9):
            frame = np.zeros((1, 64, 64, 3), np.uint8)
            frame[:, 20:40, 4 * n : 4 * n + 20, 0] = 220
            video.write(frame)
    return path


def test_a_video_comes_back_from_its_latent(clip: Path, cli: Cli) -> None:
    latents, again = clip.with_name("latents.safetensors"), clip.with_name("again.mp4")
    said = cli("encode", clip, "-o", latents, *BUDGET)
    assert (said.code, said.out.strip()) == (0, str(latents))
    assert load_file(latents)["latent"].shape == (16, 3, 8, 8)
    assert cli("decode", latents, "-o", again, *BUDGET).code == 0
    info = probe(again)
    assert (info.width, info.height, info.frames, info.fps) == (64, 64, 9, 12)
    before, after = (np.stack(list(read_frames(p))).astype(float) for p in (clip, again))
    assert np.abs(before - after).mean() < 15 < before.std()


@pytest.mark.parametrize("frames", ["8", "13", "0"])
def test_a_number_of_frames_that_makes_no_latents_is_refused(clip: Path, cli: Cli, frames: str) -> None:
    said = cli("encode", clip, "-o", clip.with_name("x.safetensors"), "--frames", frames, *BUDGET)
    assert said.code == 2 and "--frames" in said.err and "4n+1" in said.err
    assert not clip.with_name("x.safetensors").exists()


def test_a_video_without_a_whole_frame_is_a_bad_file(tmp_path: Path, cli: Cli) -> None:
    packets(tmp_path / "whole.mkv", 64, [0, 1])
    data = (tmp_path / "whole.mkv").read_bytes()
    first = data.index(bytes.fromhex("1f43b675"))  # Matroska's mark of a cluster of frames
    (tmp_path / "cut.mkv").write_bytes(data[: first + 20])
    said = cli("encode", tmp_path / "cut.mkv", "-o", tmp_path / "a.safetensors", *BUDGET)
    assert said.code == 3 and "without a whole frame" in said.err


def test_latents_of_another_vae_are_refused(tmp_path: Path, cli: Cli) -> None:
    save_file({"latent": torch.zeros(48, 1, 4, 4)}, tmp_path / "a.safetensors")
    said = cli("decode", tmp_path / "a.safetensors", "-o", tmp_path / "a.mp4", *BUDGET)
    assert said.code == 2 and "48" in said.err and "16" in said.err


@pytest.mark.parametrize(
    "tensors", [{"other": torch.zeros(1)}, {"latent": torch.full((16, 1, 4, 4), float("nan"))}, None]
)
def test_files_without_a_latent_are_bad_files(tmp_path: Path, cli: Cli, tensors: Any) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"nothing") if tensors is None else save_file(tensors, path)
    assert cli("decode", path, "-o", tmp_path / "a.mp4", *BUDGET).code == 3


def test_a_latent_that_does_not_fit_is_refused_with_what_would(tmp_path: Path, cli: Cli) -> None:
    save_file({"latent": torch.zeros(16, 1, 8, 8)}, tmp_path / "a.safetensors")
    said = cli("decode", tmp_path / "a.safetensors", "-o", tmp_path / "a.mp4", "--vram", "1MB")
    assert said.code == 4 and "--vram" in said.err


def test_flags_of_a_latent_file_are_refused_beside_a_job(tmp_path: Path, cli: Cli) -> None:
    said = cli("decode", "last", "-o", tmp_path / "a.mp4", "--vram", "1GB")
    assert said.code == 2 and "--vram" in said.err


def test_frames_are_written_behind_in_order_and_errors_of_both_sides_come_out(tmp_path: Path) -> None:
    from lowvram.media.video import write_behind

    class Writer:
        def __init__(self, fails: int = -1) -> None:
            self.seen: list[int] = []
            self.fails = fails

        def write(self, chunk: Any) -> None:
            if len(self.seen) == self.fails:
                raise OSError("full")
            self.seen.append(int(chunk))

    def numbers(stop: int = 50) -> Iterator[Any]:
        for n in range(50):
            if n == stop:
                raise ValueError("stopped")
            yield np.uint8(n)

    writer: Any = Writer()
    write_behind(writer, numbers())
    assert writer.seen == list(range(50))
    with pytest.raises(OSError, match="full"):
        write_behind(Writer(fails=3), numbers())  # type: ignore[arg-type]
    writer = Writer()
    with pytest.raises(ValueError, match="stopped"):
        write_behind(writer, numbers(stop=7))
    assert writer.seen == list(range(7))


def test_an_output_that_cannot_be_written_is_told_before_anything_is_encoded(clip: Path, cli: Cli) -> None:
    (clip.parent / "folder.safetensors").mkdir()
    for output in ("none/a.safetensors", "folder.safetensors", "a.latent"):
        said = cli("encode", clip.with_name("no video here.mp4"), "-o", clip.parent / output, *BUDGET)
        assert said.code == 2 and "output" in said.err


def test_a_video_that_decodes_to_fewer_frames_than_it_names_is_a_bad_file(clip: Path) -> None:
    with pytest.raises(FileError, match="9 of its 13 frames"):
        list(VideoFile(clip, (13, 64, 64)))
    with pytest.raises(FileError, match="64x64"):
        list(VideoFile(clip, (9, 32, 64)))


def test_frames_that_a_caller_keeps_are_not_held_against_the_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = Runtime("500MB", "2GB", "cpu")
    alone = Autoencoder(runtime, runtime.load("nano").model)
    latent = torch.zeros(16, 3, 8, 8)
    plan = alone.plan_decode(latent)
    monkeypatch.setattr(api, "_held_beside", lambda kept: 10**12 if kept is None else 0)
    begun = api.Runtime.begin

    def before(*given: Any, **named: Any) -> Any:
        return replace(begun(*given, **named), began=0)

    monkeypatch.setattr(api.Runtime, "begin", before)
    assert len(list(alone.frames(latent, plan))) == 9
    with pytest.raises(OutOfMemoryError, match="holds"):
        alone.save(latent, plan, tmp_path / "a.mp4", 8)
