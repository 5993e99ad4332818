"""Memory runs out in a step in spite of the plan: the step is done again by a smaller plan, or the job ends well."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lowvram import Runtime
from lowvram.api import Pipeline
from lowvram.cli.main import _run
from lowvram.errors import BudgetError, DeviceLostError, OutOfMemoryError
from lowvram.job import Job
from lowvram.models import dit
from lowvram.offload.budget import Budget, Ledger
from lowvram.offload.device import CpuDevice
from lowvram.planning.choose import make_plan
from lowvram.planning.plan import Plan
from lowvram.stages import condition, denoise, text
from lowvram.stages.denoise import State
from lowvram.stages.run import Run
from lowvram.stages.steadfast import denoise_steadfastly

STEPS = 3


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return Runtime(vram="64MB", ram="2GB", device="cpu").load("nano")


@pytest.fixture(scope="module")
def job(pipe: Pipeline) -> Job:
    return pipe.job("a red circle moves left on a black background", steps=STEPS, frames=1)


@pytest.fixture(scope="module")
def plan(pipe: Pipeline, job: Job) -> Plan:
    return pipe.plan_job(job)


@pytest.fixture
def run(plan: Plan) -> Run:
    return Run(CpuDevice(plan.budget.vram, ram=Ledger(plan.budget.ram, "RAM")), plan)


def latent(run: Run, pipe: Pipeline, job: Job, save: Callable[[State], None]) -> Tensor:
    texts = text.encode(run, pipe.model, [job.prompt, job.negative])
    made = condition.condition(run, pipe.model, job)
    return denoise_steadfastly(
        run, pipe.model, job, texts, made, denoise.initial_state(job, pipe.model), save
    )


def failing(
    monkeypatch: pytest.MonkeyPatch,
    calls: range,
    said: RuntimeError = torch.OutOfMemoryError("made to fail"),  # noqa: B008 never changed
) -> None:
    """A forward whose calls of these numbers, from 1 on, fail as is `said`."""
    forward, n = dit.forward, 0

    def found(*args: Any, **kwargs: Any) -> Any:
        nonlocal n
        n += 1
        if n in calls:
            raise said
        return forward(*args, **kwargs)

    monkeypatch.setattr(dit, "forward", found)


@pytest.mark.parametrize("call", range(1, STEPS + 1))
def test_a_step_that_found_no_memory_is_done_again_by_a_smaller_plan(
    call: int, run: Run, pipe: Pipeline, job: Job, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = latent(run, pipe, job, lambda state: None)
    assert run.notes == []
    failing(monkeypatch, range(call, call + 1))
    saved: list[int] = []
    assert torch.equal(latent(run, pipe, job, lambda state: saved.append(state.step)), whole)
    assert saved == list(range(1, STEPS + 1))
    (note,) = run.notes
    assert f"step {call} (of {STEPS} steps)" in note
    planned = [report.vram_predicted for report in run.reports if report.name == "denoise"]
    assert planned[-1] <= plan.stage("denoise").vram * 7 // 8
    assert run.device.ledger.used == 0 and run.device.ram.used == 0


def test_what_others_took_is_not_planned_with(
    run: Run, pipe: Pipeline, job: Job, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = latent(run, pipe, job, lambda state: None)
    left = plan.stage("denoise").vram * 84 // 100
    monkeypatch.setattr(CpuDevice, "memory_free", lambda device: left)
    failing(monkeypatch, range(2, 3))
    assert torch.equal(latent(run, pipe, job, lambda state: None), whole)
    assert run.reports[-1].vram_predicted <= left


def test_a_step_that_never_finds_memory_ends_the_job_and_keeps_what_is_done(
    run: Run, pipe: Pipeline, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, range(2, 99))
    saved: list[int] = []
    with pytest.raises(OutOfMemoryError) as told:
        latent(run, pipe, job, lambda state: saved.append(state.step))
    assert told.value.exit_code == 5 and "denoise" in told.value.found
    assert saved == [1] and len(run.notes) == 1
    assert run.device.ledger.used == 0 and run.device.ram.used == 0


# ---- memory that is found to be short between two steps


def from_step(n: int, monkeypatch: pytest.MonkeyPatch) -> Callable[[State], None]:
    """Others take an eighth of the VRAM after step n."""
    whole = CpuDevice.memory_free
    done = 0

    def save(state: State) -> None:
        nonlocal done
        done = state.step

    def memory_free(device: CpuDevice) -> int:
        cap = device.ledger.cap or 0
        return whole(device) if done < n else cap * 7 // 8 - device.ledger.used

    monkeypatch.setattr(CpuDevice, "memory_free", memory_free)
    return save


def tight(pipe: Pipeline, job: Job) -> Run:
    """A run whose plan takes nearly all of its budget."""
    vram = pipe.plan_job(job).stage("denoise").vram
    plan = make_plan(job, pipe.model, Budget(vram, 2 * 10**9), pipe.runtime.machine)
    assert plan.stage("denoise").vram > 0.9 * vram
    return Run(CpuDevice(vram, ram=Ledger(2 * 10**9, "RAM")), plan)


def test_vram_that_others_take_is_given_up_before_the_next_step(
    run: Run, pipe: Pipeline, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = latent(run, pipe, job, lambda state: None)
    shrinking = tight(pipe, job)
    cap = shrinking.plan.budget.vram
    assert torch.equal(latent(shrinking, pipe, job, from_step(1, monkeypatch)), whole)
    (note,) = shrinking.notes
    assert "before step 2, other programs take VRAM" in note and "planned again" in note
    planned = [report.vram_predicted for report in shrinking.reports if report.name == "denoise"]
    assert (
        planned == [planned[0]] and planned[0] <= cap * 7 // 8
    )  # the first denoise was left without a report
    assert shrinking.device.ledger.used == 0 and shrinking.device.ram.used == 0


def test_vram_that_nothing_fits_into_any_more_ends_the_job_with_its_steps_saved(
    pipe: Pipeline, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    shrinking = tight(pipe, job)
    saved: list[int] = []
    monkeypatch.setattr(
        CpuDevice, "memory_free", lambda device: -device.ledger.used + (1000 if saved else 10**9)
    )
    with pytest.raises(OutOfMemoryError, match="other programs take VRAM") as told:
        latent(shrinking, pipe, job, lambda state: saved.append(state.step))
    assert told.value.exit_code == 5 and "lowvram resume last" in told.value.advice
    assert saved == [1] and shrinking.device.ledger.used == 0 and shrinking.device.ram.used == 0


def test_more_ram_than_its_cap_is_given_back_by_reading_blocks_from_disk(
    run: Run, pipe: Pipeline, job: Job
) -> None:
    whole = latent(run, pipe, job, lambda state: None)
    machine = pipe.runtime.machine
    with pytest.raises(BudgetError) as refused:
        make_plan(job, pipe.model, Budget(1000, 10**9), machine)
    vram, cap, excess = refused.value.minimum_vram or 0, 800 * 10**6, 10**6
    plan = make_plan(job, pipe.model, Budget(vram, cap), machine)
    assert plan.blocks()["ram"] > 0
    seen: list[int] = []
    over = cap + plan.stage("denoise").vram + excess
    greedy = Run(CpuDevice(vram, ram=Ledger(cap, "RAM")), plan, began=0)
    # until what was planned first is given back
    greedy.rss = lambda: over if len(seen) == 1 and greedy.under_way else 0
    assert torch.equal(latent(greedy, pipe, job, lambda state: seen.append(state.step)), whole)
    assert seen == list(range(1, STEPS + 1))
    (note,) = greedy.notes
    assert "before step 2, this process holds" in note
    claims = [sample.ram for sample in greedy.samples if sample.stage == "denoise"]
    assert claims[-1] <= plan.stage("denoise").ram - excess


# ---- as the libraries of a GPU say it


@pytest.mark.parametrize(
    "said",
    [
        torch.AcceleratorError("CUDA error: out of memory"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_memory_that_others_than_torch_miss_is_met_in_the_same_way(
    said: RuntimeError, run: Run, pipe: Pipeline, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = latent(run, pipe, job, lambda state: None)
    failing(monkeypatch, range(2, 3), said)
    assert torch.equal(latent(run, pipe, job, lambda state: None), whole)
    assert "memory ran out in step 2" in run.notes[-1]


def test_a_device_that_stops_answering_ends_the_job_with_its_steps_saved(
    run: Run, pipe: Pipeline, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, range(2, 3), torch.AcceleratorError("CUDA error: unspecified launch failure\nmore"))
    saved: list[int] = []
    with pytest.raises(DeviceLostError) as told:
        latent(run, pipe, job, lambda state: saved.append(state.step))
    assert (
        told.value.found.endswith("unspecified launch failure") and "lowvram resume last" in told.value.advice
    )
    assert saved == [1] and run.device.ledger.used == 0 and run.device.ram.used == 0


def test_what_is_neither_is_not_taken_for_it(
    run: Run, pipe: Pipeline, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, range(1, 2), RuntimeError("shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="shapes"):
        latent(run, pipe, job, lambda state: None)


def test_the_command_line_goes_on_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LOWVRAM_STATE", str(tmp_path / "jobs"))
    failing(monkeypatch, range(2, 3))
    texts = ["generate", "a red circle", "--steps", "3", "--frames", "1", "--vram", "64MB", "--ram", "2GB"]
    assert _run([*texts, "-o", str(tmp_path / "a.mp4")], debug=False, as_json=False) == 0
    assert "memory ran out in step 2 (of 3 steps): planned again" in capsys.readouterr().err
