"""--preview of `lowvram animate`: every segment is shown while it is made, without the reference picture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from device_peaks import Peaks, check
from PIL import Image
from safetensors.torch import save_file
from strict_device import StrictRuntime, metered

from lowvram.animation import Animation
from lowvram.cli.preview import preview_path
from lowvram.driving import open_folder
from lowvram.models.tae import TaeSpec
from lowvram.preview import Preview, open_decoder


def small_decoder(folder: Path) -> Path:
    path, generator = folder / "taew2_1.safetensors", torch.Generator().manual_seed(1)
    shapes = TaeSpec(16, 1).shapes().items()
    save_file({name: torch.randn(shape, generator=generator).half() / 10 for name, shape in shapes}, path)
    return path


def test_the_command_shows_the_segment_under_way(
    tiny_animate: Path, drive: Callable[..., Path], tmp_path: Path, cli: Callable[..., Any]
) -> None:
    target = tmp_path / "out.mp4"
    said = cli(
        *("animate", drive(9), "--model", tiny_animate, "--segment", 5, "--steps", 2, "--seed", 3),
        *("--preview", 2, "--preview-decoder", small_decoder(tmp_path), "-o", target, "--device", "cpu"),
    )
    assert said.code == 0 and said.err.count("after step 2 of 2") == 2 and "no more" not in said.err
    with Image.open(preview_path(target)) as file:
        assert file.n_frames == 5


def test_a_driven_job_that_is_shown_stays_inside_its_plan(
    tiny_animate: Path, drive: Callable[..., Path], tmp_path: Path, settings: dict[str, Any]
) -> None:
    pipe = StrictRuntime("2GB", "4GB", "cpu", cache=False).load(str(tiny_animate))
    job = pipe.driven_job(open_folder(drive(5), "animate"), "", **(settings | {"frames": 5}))
    decoder = open_decoder(small_decoder(tmp_path), pipe.model.spec.vae)
    plan, shown = pipe.plan_job(job, decoder), []
    assert plan.stage("denoise").claims["preview weights"] > 9e6 * 2
    preview = Preview(decoder, 1, lambda done, frames: shown.append((done, len(frames))), before=1)
    with metered() as tracker:
        stages = Peaks(tracker)
        report = Animation(pipe, job, plan, stages, preview=preview).save(tmp_path / "a.mp4")
    assert shown == [(1, 5), (2, 5)] and not [note for note in report.notes if "preview" in note]
    check(plan, stages)
