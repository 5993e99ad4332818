"""A model's file changes while a job runs: a documented error, the finished steps kept, and the same latent once it is
back."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowvram import Runtime
from lowvram.api import Pipeline
from lowvram.errors import FileError, LowvramError, StorageError
from lowvram.job import Job, LoraChoice
from lowvram.offload.io import write_atomic
from lowvram.offload.placement import Placement
from lowvram.planning.plan import Plan
from lowvram.stages.denoise import State

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="an open file cannot be changed there")

STEPS = 3
LORA = Path(__file__).parents[2] / "lowvram" / "assets" / "nano" / "loras" / "lightning-4-high.safetensors"


def truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def replaced(path: Path) -> None:
    write_atomic(path, bytes(path.stat().st_size))


def rewritten(path: Path) -> None:
    with open(path, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\1")
    os.utime(path, ns=(1, 1))


def deleted(path: Path) -> None:
    path.unlink()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model, where it may be damaged."""
    files = Runtime("64MB", "2GB", "cpu").load("nano").files
    folder = tmp_path_factory.mktemp("nano") / "model"
    folder.mkdir()
    for path in set(files.values()):
        shutil.copy(path, folder)
    return folder


def load(folder: Path) -> Pipeline:
    return Runtime("64MB", "2GB", "cpu", cache=False).load("nano", models_dirs=(), **_parts(folder))


@pytest.fixture
def pipe(folder: Path) -> Pipeline:
    return load(folder)


def _parts(folder: Path) -> dict[str, str | None]:
    files = Runtime("64MB", "2GB", "cpu").load("nano").files
    return {part: str(folder / Path(path).name) for part, path in files.items()}


@pytest.fixture
def job(pipe: Pipeline) -> Job:
    return pipe.job("a red circle moves left on a black background", steps=STEPS, frames=1)


@pytest.fixture
def plan(pipe: Pipeline, job: Job) -> Plan:
    """Every block is read at every visit."""
    plan = pipe.plan_job(job)
    return replace(plan, denoise=Placement(dict.fromkeys(plan.denoise.where, "disk"), slots=1, ring=1))


@pytest.mark.parametrize("change", [truncated, replaced, rewritten, deleted])
def test_a_file_that_changes_ends_the_job_and_the_next_one_goes_on(
    change: Callable[[Path], None], folder: Path, pipe: Pipeline, job: Job, plan: Plan
) -> None:
    whole = pipe.run(job, plan=plan).latent
    files = [Path(job.files[expert]) for expert in pipe.model.spec.expert_names()]
    kept = {path: path.read_bytes() for path in files}
    saved: list[State] = []

    def save(state: State) -> None:
        saved.append(state)
        if len(saved) == 1:
            for path in files:
                change(path)

    try:
        latent = pipe.run(job, plan=plan, save=save).latent
    except LowvramError as told:
        assert isinstance(told, FileError | StorageError) and told.exit_code in (3, 6), repr(told)
        assert any(str(path) in told.where for path in files)
    else:
        assert change is deleted and torch.equal(latent, whole)  # what was opened before is still there
    finally:
        for path, data in kept.items():
            path.write_bytes(data)
    assert 1 <= len(saved) <= STEPS
    assert torch.equal(load(folder).run(job, plan=plan, state=saved[0]).latent, whole)


@pytest.mark.parametrize("change", [replaced, rewritten])
def test_a_file_that_changes_after_it_was_loaded_is_not_read_by_what_its_header_was(
    change: Callable[[Path], None], folder: Path, pipe: Pipeline, job: Job, plan: Plan
) -> None:
    """A file of the same size, read where the old header says: its numbers would be anything."""
    for part in (pipe.model.spec.expert_names()[0], "vae", "text"):
        path = Path(job.files[part])
        kept = path.read_bytes()
        fresh, want = load(folder), pipe.run(job, plan=plan)
        change(path)
        try:
            with pytest.raises(StorageError, match="whose header was read") as caught:
                if part == "vae":
                    next(fresh.video(job, want.latent, plan).frames())
                else:
                    fresh.run(job, plan=plan)
        finally:
            path.write_bytes(kept)
        assert caught.value.where == str(path)
        pipe = load(folder)


def test_a_lora_may_be_trained_further_between_two_jobs(folder: Path, pipe: Pipeline) -> None:
    lora = folder / "lora.safetensors"
    chosen = (LoraChoice(path=str(lora), strength=1.0),)
    latents = []
    for strength in (1.0, 2.0):
        save_file({n: t * strength for n, t in load_file(LORA).items()}, lora)
        latents.append(pipe.run(pipe.job("a red circle", steps=1, frames=1, loras=chosen)).latent)
    assert not torch.equal(*latents)
