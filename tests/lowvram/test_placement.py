"""Where the weights live never changes the result, and every byte is claimed as the plan said."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from lowvram import Job, Pipeline, Plan, Runtime, Video
from lowvram.errors import BudgetError
from lowvram.offload.budget import Claim, Ledger
from lowvram.offload.device import Device
from lowvram.offload.placement import Placement, Where, plan_traffic
from lowvram.planning.visits import layouts_of, visiting_order

PROMPT = "a red circle moves left on a black background"
SETTINGS: dict[str, Any] = {"seed": 5, "steps": 6, "shift": 3.0}
GB = 10**9


@dataclass
class Log:
    """What each stage of a run claimed at its peak."""

    stage: str = ""
    peaks: dict[tuple[str, str], dict[str, int]] = field(default_factory=dict)
    """By (stage, "VRAM" or "RAM")."""

    def begin(self, stage: str, done: int = 0) -> None:
        self.stage = stage

    def step(self, vram: int | None = None) -> None:
        return

    def end(self) -> None:
        self.stage = ""

    def note(self, text: str) -> None:
        return

    def claimed(self, what: str, claims: dict[str, int]) -> None:
        assert self.stage, f"{claims} outside of any stage"
        key = (self.stage, what)
        if sum(claims.values()) > sum(self.peaks.get(key, {}).values()):
            self.peaks[key] = claims


class WatchedLedger(Ledger):
    """A ledger that tells every claim."""

    def __init__(self, of: Ledger, log: Log) -> None:
        super().__init__(of.cap, of.what)
        self._log = log

    def claim(self, name: str, nbytes: int) -> Claim:
        claim = super().claim(name, nbytes)
        self._log.claimed(self.what, self.claims)
        return claim


class WatchedRuntime(Runtime):
    """A runtime on this processor whose ledgers are watched."""

    def __init__(self, vram: int, ram: int) -> None:
        super().__init__(vram, ram, "cpu", cache=False)
        self.log = Log()

    @contextmanager
    def device(self) -> Iterator[Device]:
        with super().device() as device:
            device.ledger, device.ram = (
                WatchedLedger(device.ledger, self.log),
                WatchedLedger(device.ram, self.log),
            )
            yield device


@pytest.fixture(scope="module")
def pipe(tiny_model: Path) -> Pipeline:
    return Runtime(GB, 2 * GB, "cpu", cache=False).load(str(tiny_model))


@pytest.fixture(scope="module")
def job(pipe: Pipeline) -> Job:
    return pipe.job(PROMPT, **SETTINGS)


@pytest.fixture(scope="module")
def plan(pipe: Pipeline, job: Job) -> Plan:
    found = pipe.plan_job(job)
    assert found.blocks() == {"resident": 12, "ram": 0, "disk": 0}
    return found


@pytest.fixture(scope="module")
def resident(pipe: Pipeline, job: Job, plan: Plan) -> Video:
    """The video of the job with every block resident."""
    video = pipe.run(job, plan=plan)
    assert 0.1 < video.latent.std() < 10 and set(job.schedule.experts) == {0, 1}
    return video


def frames_of(video: Video) -> NDArray[np.uint8]:
    return np.stack(list(video.frames()))


def all_(where: Where) -> Callable[[int], Where]:
    return lambda n: where


def mixed(n: int) -> Where:
    kinds: tuple[Where, ...] = ("resident", "ram", "disk")
    return kinds[n * 2 % 3]


@pytest.mark.parametrize(
    ("where", "slots", "ring"),
    [
        (all_("disk"), 1, 1),
        (all_("disk"), 2, 3),
        (all_("ram"), 1, 1),
        (all_("ram"), 3, 1),
        (mixed, 1, 2),
        (mixed, 2, 2),
    ],
    ids=lambda value: getattr(value, "__qualname__", str(value)).partition(".")[0],
)
def test_placement_never_changes_bits(
    where: Callable[[int], Where],
    slots: int,
    ring: int,
    pipe: Pipeline,
    job: Job,
    plan: Plan,
    resident: Video,
) -> None:
    placed: dict[tuple[str, int], Where] = {(e, n): where(n) for e in ("high", "low") for n in range(6)}
    other = pipe.run(job, plan=replace(plan, denoise=Placement(placed, slots=slots, ring=ring)))
    assert torch.equal(other.latent, resident.latent)


def test_budgets_choose_the_placement_and_give_the_same_frames(
    tiny_model: Path, plan: Plan, resident: Video
) -> None:
    denoise = plan.stage("denoise")
    blocks = {name: nbytes for name, nbytes in denoise.claims.items() if name.startswith("resident")}
    vram = denoise.vram - sum(blocks.values()) + 2 * max(blocks.values())
    expected = frames_of(resident)
    assert expected.shape == (9, 64, 64, 3) and expected.std() > 10
    for ram, blocks_left in ((denoise.ram, "disk"), (2 * GB, "ram")):
        runtime = WatchedRuntime(vram, ram)
        pipe = runtime.load(str(tiny_model))
        video = pipe(PROMPT, listener=runtime.log, **SETTINGS)
        assert video.plan.blocks()[blocks_left] == 12 and video.plan.lean == plan.lean
        assert np.array_equal(frames_of(video), expected)
        check_claims(runtime.log, video.plan)


def test_the_smallest_budget_gives_the_same_video_within_rounding(tiny_model: Path, resident: Video) -> None:
    with pytest.raises(BudgetError) as refused:
        Runtime(1000, 2 * GB, "cpu", cache=False).load(str(tiny_model)).plan(PROMPT, **SETTINGS)
    least = refused.value.minimum_vram
    assert least is not None
    runtime = WatchedRuntime(least, 2 * GB)
    video = runtime.load(str(tiny_model))(PROMPT, listener=runtime.log, **SETTINGS)
    scale = resident.latent.abs().max()
    assert (video.latent - resident.latent).abs().max() <= 1e-4 * scale
    frames_of(video)
    check_claims(runtime.log, video.plan)


def check_claims(log: Log, plan: Plan) -> None:
    """Every stage claimed at its peak exactly what the plan said."""
    assert {stage for stage, _ in log.peaks} == {stage.name for stage in plan.stages}
    for stage in plan.stages:
        # A network that is loaded whole travels as a stream of one visit: its claim is a slot.
        planned = {"slot 0" if name.endswith(" weights") else name: n for name, n in stage.claims.items()}
        assert log.peaks[stage.name, "VRAM"] == planned, stage.name
        assert sum(planned.values()) == stage.vram <= plan.budget.vram
        assert log.peaks[stage.name, "RAM"] == dict(stage.ram_claims), stage.name


def test_claims_are_those_of_the_plan_with_everything_resident(tiny_model: Path) -> None:
    runtime = WatchedRuntime(GB, 2 * GB)
    video = runtime.load(str(tiny_model))(PROMPT, listener=runtime.log, **SETTINGS)
    frames_of(video)
    check_claims(runtime.log, video.plan)


@pytest.mark.parametrize("residents", [0, 2, 5, 6])
def test_a_job_resumed_at_any_step_stays_inside_its_plan(residents: int, pipe: Pipeline, job: Job) -> None:
    layouts = {}
    for expert, transformer in pipe.model.transformers.items():
        layouts |= layouts_of(transformer.groups(), expert)
    where: dict[tuple[str, int], Where] = {
        (e, n): "resident" if n < residents else "ram" if n % 2 else "disk"
        for e in ("high", "low")
        for n in range(6)
    }
    placement = Placement(where)
    order = visiting_order(job, pipe.model.spec, together=True)
    whole = plan_traffic(layouts, placement, order)
    for start in range(0, len(order), 6):
        rest = plan_traffic(layouts, placement, order[start:])
        assert sum(rest.device_claims().values()) <= sum(whole.device_claims().values())
        assert sum(rest.host_claims().values()) <= sum(whole.host_claims().values())


def test_the_prompt_the_seed_and_the_negative_prompt_each_change_the_video(
    pipe: Pipeline, resident: Video
) -> None:
    for change in ({"seed": 6}, {"negative": "slow"}, {"guidance": (2.0, 3.0)}):
        assert not torch.equal(pipe(PROMPT, **SETTINGS | change).latent, resident.latent)
    assert not torch.equal(pipe("a blue square", **SETTINGS).latent, resident.latent)
    assert torch.equal(pipe(f"  {PROMPT} ", **SETTINGS).latent, resident.latent)
