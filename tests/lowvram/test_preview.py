"""Previews: the right colours in the right places, nothing changed by looking, and nothing stopped by a failure."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from lowvram import Pipeline, Runtime
from lowvram.cli.preview import half_blocks, preview_path
from lowvram.errors import UsageError
from lowvram.preview import Colours, Preview, animated, colours_of, pictures
from lowvram.quant.spec import VaeSpec
from lowvram.sampling.presets import load_models

PROMPT = "a green circle moves right on a navy background"


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return Runtime("1GB", "2GB", "cpu").load("nano")


def test_a_preview_is_written_and_shows_what_the_prompt_says(cli: Callable[..., Any], tmp_path: Path) -> None:
    target = tmp_path / "out.mp4"
    said = cli("generate", PROMPT, "--preset", "lightning-4", "--preview", 2, "--seed", 0, "-o", target)
    assert said.code == 0 and "after step 2 of 4" in said.err and "after step 4 of 4" in said.err
    with Image.open(preview_path(target)) as file:
        frames = [np.asarray(f.convert("RGB")).astype(int) for f in ImageSequence.Iterator(file)]
    assert len(frames) == 3 and frames[0].shape == (256, 256, 3)
    greenest = [np.unravel_index((f[..., 1] - f[..., 0] - f[..., 2]).argmax(), (256, 256)) for f in frames]
    assert [int(place[1]) for place in greenest] == sorted(int(place[1]) for place in greenest)
    assert greenest[-1][1] - greenest[0][1] > 60
    for frame, (row, column) in zip(frames, greenest, strict=True):
        red, green, blue = frame[row, column]
        assert green > red + 60 and green > blue + 60
        corner = frame[:32, :32].mean((0, 1))
        assert corner[2] > corner[1]  # navy


def test_looking_changes_no_bit_and_a_failure_stops_nothing(pipe: Pipeline) -> None:
    job = pipe.job(PROMPT, steps=3, frames=5)
    plain = pipe.run(job).latent
    seen: list[int] = []
    colours = colours_of(pipe.model.spec.vae)
    preview = Preview(colours, 2, lambda done, frames: seen.append(done))
    assert torch.equal(pipe.run(job, preview=preview).latent, plain) and seen == [2]

    def fail(done: int, frames: Any) -> None:
        seen.append(done)
        raise OSError("no room for pictures")

    failing = Preview(colours, 1, fail)
    video = pipe.run(job, preview=failing)
    assert torch.equal(video.latent, plain) and seen == [2, 1]
    assert video.notes[-1] == "no more previews: no room for pictures"


def test_the_guess_is_what_is_left_of_the_noise() -> None:
    latent, noise = torch.rand(2, 3, 4, 5) - 0.5, torch.randn(2, 3, 4, 5)
    colours = Colours(torch.tensor([[1.0, 0, 0], [0, 1.0, 0]]), torch.tensor([0, 0, -1.0]))
    found = np.stack(list(pictures(0.7 * noise + 0.3 * latent, noise - latent, 0.7, colours)))
    expected = (latent.permute(1, 2, 3, 0).numpy() + 1) * 127.5
    assert np.abs(found[..., :2] - expected).max() <= 1 and not found[..., 2].any()


def test_every_frame_of_nano_has_the_colours_of_its_pixels(pipe: Pipeline) -> None:
    """The first latent frame too, whose components are others than those of the frames after it."""
    video = pipe.run(pipe.job(PROMPT, preset="lightning-4", seed=0))
    shown = np.stack(list(video.frames())).astype(np.float32)
    groups = [shown[:1], *np.split(shown[1:], video.latent.shape[1] - 1)]
    clean = torch.zeros_like(video.latent)
    for seen, frames in zip(
        pictures(video.latent, clean, 0.0, colours_of(pipe.model.spec.vae)), groups, strict=True
    ):
        cells = frames.reshape(len(frames), 8, 8, 8, 8, 3).mean((0, 2, 4))
        assert np.sqrt(np.mean((seen - cells) ** 2)) < 12  # of 255


def test_every_vae_of_wan_has_a_map_and_another_is_refused() -> None:
    for spec in load_models().values():
        colours = colours_of(spec.vae)
        assert colours.factors.shape == (spec.vae.z, 3) and colours.bias.shape == (3,)
    with pytest.raises(UsageError, match="no preview"):
        colours_of(VaeSpec("2.1", 8, 8, 16, 1))


def test_a_terminal_shows_two_pixels_a_character() -> None:
    picture = np.zeros((90, 160, 3), np.uint8)
    picture[45:, :, 0] = 255
    lines = half_blocks(picture).plain.splitlines()
    assert {len(line) for line in lines} == {56} and len(lines) == 16
    styles = [str(span.style) for span in half_blocks(picture).spans]
    assert styles[0] == "rgb(0,0,0) on rgb(0,0,0)" and styles[-1] == "rgb(255,0,0) on rgb(255,0,0)"
    assert animated([picture], 100)[:4] == b"RIFF"
