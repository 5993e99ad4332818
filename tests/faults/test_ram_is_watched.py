"""More RAM than the cap is met where it is found, in every stage: planned anew where that helps, or told, nothing lost."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lowvram import api
from lowvram.api import Pipeline, Runtime
from lowvram.cli.main import _run
from lowvram.coding import Coding
from lowvram.conditions.contract import Condition
from lowvram.errors import OutOfMemoryError
from lowvram.job import Job
from lowvram.models.vae_tiles import Tiling
from lowvram.offload.budget import Budget, Ledger
from lowvram.offload.device import CpuDevice
from lowvram.planning.choose import make_plan
from lowvram.planning.facts import PROGRAM_RAM
from lowvram.stages import denoise, text
from lowvram.stages.room import GROWTH, SqueezedError, check_ram
from lowvram.stages.run import Run
from lowvram.stages.tiles import in_tiles

GB = 10**9
EXCESS = 1000


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return Runtime(GB, 2 * GB, device="cpu", cache=False).load("nano")


@pytest.fixture(scope="module")
def job(pipe: Pipeline) -> Job:
    return pipe.job("a red circle", width=64, height=64, frames=1, steps=1)


def greedy(run: Run, stage: str, when: Callable[[int], bool]) -> Run:
    """The process holds too much whenever it is looked at in `stage` for the nth time, n from 1, and `when(n)`."""
    seen = 0

    def rss() -> int:
        nonlocal seen
        looked = run.under_way
        if looked is None or looked.name != stage:
            return 0
        seen += 1
        return 2 * GB + looked.vram + EXCESS if when(seen) else 0

    run.rss, run.began = rss, 0
    return run


def made(pipe: Pipeline, job: Job) -> Run:
    plan = make_plan(job, pipe.model, Budget(GB, 2 * GB), pipe.runtime.machine)
    return Run(CpuDevice(GB, ram=Ledger(2 * GB, "RAM")), plan)


def prepared(run: Run, pipe: Pipeline, job: Job) -> None:
    texts = text.encode(run, pipe.model, [job.prompt, job.negative])
    state = denoise.initial_state(job, pipe.model)
    denoise.denoise(run, pipe.model, job, texts, Condition(), state, lambda state: None)


@pytest.mark.parametrize(("stage", "look"), [("text", 3), ("prepare", 1)])
def test_stages_that_cannot_take_less_say_so_and_leave_nothing_behind(
    stage: str, look: int, pipe: Pipeline, job: Job
) -> None:
    run = greedy(made(pipe, job), stage, lambda n: n == look)
    with pytest.raises(SqueezedError) as told:
        prepared(run, pipe, job)
    assert told.value.exit_code == 5 and told.value.where == f"stage {stage}"
    assert told.value.excess == EXCESS and "larger --ram" in told.value.advice
    assert run.device.ledger.used == run.device.ram.used == 0 and run.under_way is None
    prepared(run, pipe, job)  # the next look finds nothing


@pytest.mark.parametrize("began", [300_000_000, PROGRAM_RAM - 10_000_000, 3 * GB])
def test_a_program_may_grow_beside_its_job_however_large_it_was(began: int, pipe: Pipeline, job: Job) -> None:
    """Libraries are loaded while a job runs, as much in a program that held 690 MB before as in one that held 300."""
    run = made(pipe, job)
    stage = run.plan.stage("denoise")
    own = run.device.ram.cap or 0
    check_ram(run.device, stage, began + 46_000_000 + stage.vram + own - PROGRAM_RAM, began)
    with pytest.raises(SqueezedError):
        check_ram(
            run.device, stage, max(began + GROWTH, PROGRAM_RAM) + stage.vram + own - PROGRAM_RAM + 1, began
        )


CODINGS = (
    Coding(Tiling(rows=2), 100, 60, shelf=50, waiting=0, frames=20, moved=0, work=1.1),
    Coding(Tiling(rows=3), 120, 60, shelf=0, waiting=0, frames=10, moved=0, work=1.3),
    Coding(Tiling(rows=4), 80, 70, shelf=0, waiting=0, frames=40, moved=0, work=1.2),
)


class Ways:
    """What `in_tiles` asks of the ways of an autoencoder, with sizes that are easily added."""

    def exactly(self, tiling: Tiling) -> Coding:
        return next(coding for coding in CODINGS if coding.tiling == tiling)

    def choose(self, vram: int, ram: int, seconds: Callable[[Coding], float]) -> Coding:
        fits = [c for c in CODINGS if c.vram <= vram and c.ram <= ram]
        return min(fits, key=seconds) if fits else min(CODINGS, key=lambda c: c.ram)


@pytest.mark.parametrize(("excess", "then"), [(25, Tiling(rows=4)), (35, None), (90, None)])
def test_tiles_go_on_with_as_much_less_ram_and_no_more_vram(excess: int, then: Tiling | None) -> None:
    device = CpuDevice(GB, ram=Ledger(2 * GB, "RAM"))
    told: list[tuple[int, Tiling, str]] = []

    def attempt(tiling: Tiling, first: int) -> Iterator[int]:
        for n in range(first, 5):
            if n == 2 and tiling.rows == 2:
                raise SqueezedError("too much", where="decode", expected="less", advice="", excess=excess)
            yield n

    results = in_tiles(device, Ways(), Tiling(rows=2), attempt, lambda *what: told.append(what))  # type: ignore[arg-type]
    if then is None:
        with pytest.raises(SqueezedError, match="too much"):
            list(results)
        assert told == []
    else:
        assert list(results) == [0, 1, 2, 3, 4] and told == [(2, then, "too much")]
    assert device.ram.used == 0


def test_smaller_tiles_have_the_memory_of_the_attempt_that_failed() -> None:
    device, held = CpuDevice(GB, ram=Ledger(2 * GB, "RAM")), list[weakref.ref[Tensor]]()

    def fail() -> None:
        try:
            raise torch.OutOfMemoryError("made to fail")
        except torch.OutOfMemoryError as error:
            raise OutOfMemoryError("a claim", advice="") from error  # as an allocation says it

    def attempt(tiling: Tiling, first: int) -> Iterator[int]:
        if tiling.rows == 2:
            scratch = torch.empty(1)
            held.append(weakref.ref(scratch))
            fail()
        assert held[0]() is None
        yield first

    class Halves(Ways):
        def choose(self, vram: int, ram: int, seconds: Callable[[Coding], float]) -> Coding:
            return CODINGS[2]

    assert list(in_tiles(device, Halves(), Tiling(rows=2), attempt, lambda *what: None)) == [0]  # type: ignore[arg-type]


def test_where_no_tiles_take_less_the_job_ends_and_can_be_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The latent is saved by then. A caller that keeps frames is not watched."""
    monkeypatch.setenv("LOWVRAM_STATE", str(tmp_path / "jobs"))
    held = 0
    monkeypatch.setattr(api, "_held_beside", lambda kept: held)
    begin = Runtime.begin

    def from_then_on(*args: Any, **kwargs: Any) -> Run:
        nonlocal held
        run = begin(*args, **kwargs)
        if (tmp_path / "jobs").exists() and list((tmp_path / "jobs").rglob("latent.safetensors")):
            held = 4 * GB
        return run

    flags = ["generate", "a red circle", "--steps", "1", "--frames", "5", "--vram", "64MB", "--ram", "2GB"]
    with monkeypatch.context() as patch:
        patch.setattr(Runtime, "begin", from_then_on)
        assert _run([*flags, "-o", str(tmp_path / "a.mp4")], debug=False, as_json=False) == 5
    said = capsys.readouterr().err
    assert (
        "this process holds 4.00 GB of RAM" in said
        and "stage decode" in said
        and "lowvram resume last" in said
    )
    assert not (tmp_path / "a.mp4").exists()
    held = 0
    assert _run(["resume", "last"], debug=False, as_json=False) == 0
    assert (tmp_path / "a.mp4").exists()
