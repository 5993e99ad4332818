"""Videos that begin with a picture: every kind of model from files to frames, inside its plan, and resumed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lowvram import Pipeline, Runtime
from lowvram.conditions.contract import Condition
from lowvram.errors import BudgetError, UsageError
from lowvram.job import Job
from lowvram.media.video import read_frames
from lowvram.offload.placement import Placement
from lowvram.planning.facts import gather
from lowvram.stages.condition import conditioning
from lowvram.state import list_jobs

PROMPT = "a red circle moves left"
KINDS = ("tiny-i2v-a14b", "tiny-i2v-14b", "tiny-flf2v-14b", "tiny-ti2v-5b")
GB = 10**9


@pytest.fixture(scope="module")
def load(pictured_models: dict[str, Path]) -> Callable[..., Pipeline]:
    """load("tiny-ti2v-5b"): the model under a budget that lets everything be resident."""
    return lambda kind, vram=GB: Runtime(vram, 2 * GB, "cpu").load(str(pictured_models[kind]))


def job_of(pipe: Pipeline, kind: str, pictures: tuple[Path, Path], **more: Any) -> Job:
    """Two steps, one of each expert; the last picture where the model needs it."""
    last = {"last_image": pictures[1]} if "flf2v" in kind else {}
    settings: dict[str, Any] = {"image": pictures[0], "width": 64, "height": 64, "steps": 2, "shift": 3.0}
    return pipe.job(PROMPT, **settings | last | more)


@pytest.mark.parametrize("kind", KINDS)
def test_streamed_equals_resident_bit_for_bit(
    kind: str, load: Callable[..., Pipeline], picture_files: tuple[Path, Path]
) -> None:
    pipe = load(kind)
    job = job_of(pipe, kind, picture_files)
    plan = pipe.plan_job(job)
    assert plan.blocks()["disk"] == plan.blocks()["ram"] == 0
    made: list[Condition] = []
    resident = pipe.run(job, plan=plan, keep=made.append).latent
    sizes = {name: t.untyped_storage().nbytes() for name, t in made[0].to_tensors().items()}
    way = conditioning(pipe.model.spec, job)
    assert way is not None and way.makes(gather(job, pipe.model, plan.machine)) == sizes
    for stage in plan.stages[1:-1]:  # the text comes before, and the latent is decoded when all else is gone
        assert stage.ram_claims["condition"] == sum(sizes.values()), stage.name
    assert set(job.schedule.experts) == set(range(pipe.model.spec.experts))
    assert torch.isfinite(resident).all() and 0.1 < resident.std() < 10
    placement = Placement(dict.fromkeys(plan.denoise.where, "disk"), slots=1, ring=1)
    assert torch.equal(pipe.run(job, plan=replace(plan, denoise=placement)).latent, resident)


def test_the_smallest_budget_is_kept_and_gives_the_same_video_within_rounding(
    load: Callable[..., Pipeline], picture_files: tuple[Path, Path]
) -> None:
    kind = "tiny-ti2v-5b"
    pipe = load(kind)
    wide = pipe.run(job_of(pipe, kind, picture_files)).latent
    with pytest.raises(BudgetError) as refused:
        load(kind, vram=1000).plan_job(job_of(pipe, kind, picture_files))
    least = refused.value.minimum_vram
    assert least is not None
    narrow = load(kind, vram=least)
    latent = narrow.run(job_of(narrow, kind, picture_files)).latent  # the ledger refuses a byte more
    assert (latent - wide).abs().max() <= 1e-4 * wide.abs().max()


def test_pictures_change_the_video_and_the_first_frame_of_5b_is_the_picture_s(
    load: Callable[..., Pipeline], picture_files: tuple[Path, Path]
) -> None:
    last = picture_files[1]
    pipe = load("tiny-i2v-a14b")
    latents = [
        pipe.run(job_of(pipe, "i2v", picture_files, **change)).latent
        for change in ({}, {"image": last}, {"last_image": last})
    ]
    assert not torch.equal(latents[0], latents[1]) and not torch.equal(latents[0], latents[2])
    pipe = load("tiny-ti2v-5b")
    pictured = pipe.run(job_of(pipe, "5b", picture_files))
    other = pipe.run(job_of(pipe, "5b", picture_files, seed=9))
    assert torch.equal(pictured.latent[:, 0], other.latent[:, 0])
    assert not torch.equal(pictured.latent[:, 1], other.latent[:, 1])
    text_alone = pipe.plan(PROMPT, width=64, height=64, steps=2)
    assert [s.name for s in text_alone.stages] == ["text", "prepare", "denoise", "decode"]


def test_the_size_follows_the_picture_and_size_says_otherwise(
    load: Callable[..., Pipeline], picture_files: tuple[Path, Path]
) -> None:
    pipe = load("tiny-i2v-a14b")  # 64x64 by default, so 4096 pixels; the picture is 96x64
    assert [getattr(pipe.job(image=picture_files[0]), k) for k in ("width", "height")] == [64, 48]
    assert [getattr(pipe.job(image=picture_files[0], area=10_000), k) for k in ("width", "height")] == [
        112,
        80,
    ]
    job = job_of(pipe, "i2v", picture_files)
    assert (job.width, job.height) == (64, 64)


def test_a_resumed_job_needs_its_pictures_no_more(
    pictured_models: dict[str, Path],
    picture_files: tuple[Path, Path],
    tmp_path: Path,
    jobs: Path,
    cli: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    picture = tmp_path / "mine.png"
    picture.write_bytes(picture_files[0].read_bytes())
    command = ["generate", PROMPT, "--model", pictured_models["tiny-i2v-a14b"], "--image", picture, "--size", "64x64",
               "--steps", 3, "--shift", 3, "--device", "cpu", "--quiet"]  # fmt: skip
    assert cli(*command, "-o", tmp_path / "whole.mp4").code == 0

    from lowvram.cli import work

    save = work.save_state

    def stop(folder: Any, state: Any) -> None:
        save(folder, state)
        if state.step == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(work, "save_state", stop)
    assert cli(*command, "-o", tmp_path / "out.mp4").code == 130
    monkeypatch.setattr(work, "save_state", save)
    picture.unlink()
    resumed = cli("resume", "last", "--quiet", "--json")
    assert resumed.code == 0
    assert [s["name"] for s in resumed.objects[0]["report"]["stages"]] == [
        "text",
        "prepare",
        "denoise",
        "decode",
    ]
    whole, frames = (np.stack(list(read_frames(tmp_path / n))) for n in ("whole.mp4", "out.mp4"))
    assert np.array_equal(whole, frames)
    assert not list(list_jobs(jobs)[-1].path.glob("condition*"))
    said = cli("inspect", tmp_path / "out.mp4", "--json").objects[0]
    assert [p["file"] for p in said["job"]["pictures"]] == ["mine.png"] and str(tmp_path) not in str(
        said["job"]
    )


def test_a_picture_that_changed_before_it_was_read_is_a_storage_error(
    load: Callable[..., Pipeline], picture_files: tuple[Path, Path], tmp_path: Path
) -> None:
    from lowvram.errors import StorageError

    picture = tmp_path / "mine.png"
    picture.write_bytes(picture_files[0].read_bytes())
    pipe = load("tiny-i2v-a14b")
    job = job_of(pipe, "i2v", (picture, picture))
    picture.write_bytes(picture_files[1].read_bytes())
    with pytest.raises(StorageError, match="SHA-256"):
        pipe.run(job)


@pytest.mark.parametrize(
    ("kind", "given", "words"),
    [
        ("tiny-i2v-a14b", {}, "begins a video with a picture"),
        ("tiny-i2v-a14b", {"last_image": 1}, "without a first"),
        ("tiny-i2v-14b", {"image": 0, "last_image": 1}, "first one only"),
        ("tiny-flf2v-14b", {"image": 0}, "last is not given"),
        ("tiny-ti2v-5b", {"image": 0, "last_image": 1}, "first one only"),
        ("tiny-i2v-a14b", {"image": 0, "last_image": 1, "frames": 1}, "for one frame"),
    ],
)
def test_pictures_that_a_model_misses_or_has_no_use_for_are_named(
    kind: str,
    given: dict[str, int],
    words: str,
    load: Callable[..., Pipeline],
    picture_files: tuple[Path, Path],
) -> None:
    settings = {name: value if name == "frames" else picture_files[value] for name, value in given.items()}
    with pytest.raises(UsageError, match=words):
        load(kind)(PROMPT, width=64, height=64, steps=1, **settings)


def test_a_text_to_video_model_refuses_a_picture(
    tiny_model: Path, picture_files: tuple[Path, Path], cli: Callable[..., Any], tmp_path: Path
) -> None:
    said = cli(
        "generate", PROMPT, "--model", tiny_model, "--image", picture_files[0], "-o", tmp_path / "a.mp4"
    )
    assert said.code == 2 and "from text alone" in said.err and len(said.err.splitlines()) <= 3
    assert not list(tmp_path.iterdir())


def test_a_clip_encoder_is_asked_for_where_it_is_needed(
    pictured_models: dict[str, Path], cli: Callable[..., Any], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for path in pictured_models["tiny-i2v-14b"].iterdir():
        if not path.name.startswith("clip"):
            (folder / path.name).symlink_to(path)
    said = cli("plan", "--model", folder)
    assert said.code == 3 and "no CLIP vision encoder was found" in said.err and "--clip FILE" in said.err
