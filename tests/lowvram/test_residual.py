"""`--residual fp32`: asked for, planned, stored with the job, and the same bits wherever it and the blocks lie."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from device_peaks import Peaks, check, with_residual_in_ram
from strict_device import StrictRuntime, metered

from lowvram import BudgetError, Job, Pipeline, Plan, UsageError
from lowvram.bench import peaks
from lowvram.imagined import imagined_model
from lowvram.job import describe, make_job
from lowvram.machine import machine_profile
from lowvram.offload.budget import Budget
from lowvram.offload.placement import Placement
from lowvram.planning.choose import choose, make_plan
from lowvram.planning.facts import Facts, gather
from lowvram.sampling.presets import model_preset
from lowvram.state import list_jobs

PROMPT = "a red circle moves left on a black background"
GB = 10**9


@pytest.fixture(scope="module")
def pipe(tiny_model: Path) -> Pipeline:
    return StrictRuntime(GB, 2 * GB, "cpu", cache=False).load(str(tiny_model))


@pytest.fixture(scope="module")
def job(pipe: Pipeline) -> Job:
    return pipe.job(PROMPT, steps=2, shift=3.0, frames=5, residual="fp32")


def half(pipe: Pipeline, job: Job) -> Facts:
    """The facts of a card that computes in bf16."""
    return replace(gather(job, pipe.model, pipe.runtime.machine), dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def plan(pipe: Pipeline, job: Job) -> Plan:
    return choose(half(pipe, job), pipe.runtime.budget)


def test_the_same_bits_wherever_it_lies_and_what_was_planned(pipe: Pipeline, job: Job, plan: Plan) -> None:
    whole = pipe.run(job, plan=plan).latent
    on_disk = Placement(dict.fromkeys(plan.denoise.where, "disk"), slots=2, ring=2)
    assert torch.equal(pipe.run(job, plan=replace(plan, denoise=on_disk)).latent, whole)
    for each in (plan, with_residual_in_ram(plan, half(pipe, job))):
        with metered() as tracker:
            stages = Peaks(tracker)
            video = pipe.run(job, plan=each, listener=stages)
            list(video.frames())
        check(each, stages)
        assert torch.equal(video.latent, whole)
    usual = pipe.run(replace(job, residual="auto"), plan=plan).latent
    assert 0 < (usual - whole).norm() < 0.2 * whole.norm()


def test_it_costs_twice_the_residual_and_a_refusal_proposes_to_do_without() -> None:
    spec = model_preset("wan2.2-t2v-a14b")
    model, machine = imagined_model("wan2.2-t2v-a14b", spec, "fp8"), machine_profile("rtx4090")
    plans = []
    for residual in (None, "fp32"):
        job = make_job(spec, model="a14b", files={}, width=1280, height=720, frames=121, residual=residual)
        plans.append(make_plan(job, model, Budget(16 * GB, 64 * GB), machine))
    usual, exact = (plan.stage("denoise") for plan in plans)
    assert exact.claims["residual"] == 2 * usual.claims["residual"] == 2 * 2 * 2 * 111_600 * 5120
    assert exact.vram <= 16 * GB
    assert "bfloat16" in usual.choices["residual"]
    assert exact.choices["residual"].startswith("float32 as asked")
    least = peaks.load()["wan2.2-t2v-a14b fp8 1280x720x121"]["least"]["vram"]
    with pytest.raises(BudgetError) as refused:
        make_plan(job, model, Budget(least, 64 * GB), machine)
    assert refused.value.nearest["residual"] == "auto"


def test_it_is_stored_with_the_job_and_told_of_the_video(
    cli: Callable[..., Any], jobs: Path, tmp_path: Path
) -> None:
    flags = ("--steps", 1, "--frames", 1, "--size", "32x32", "--vram", "2GB", "--residual", "fp32")
    made = cli("generate", PROMPT, *flags, "-o", tmp_path / "a.mp4")
    assert made.code == 0, made.err
    assert list_jobs(jobs)[-1].load().job.residual == "fp32"
    assert '"residual":"fp32"' in cli("inspect", tmp_path / "a.mp4", "--json").out


def test_what_it_is_not_kept_in_is_refused(pipe: Pipeline) -> None:
    with pytest.raises(UsageError, match="--residual"):
        pipe.job(PROMPT, residual="fp16")
    assert describe(pipe.job(PROMPT), "0")["residual"] == "auto"
