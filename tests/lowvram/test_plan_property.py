"""Any job, any budget: the plan is inside both caps, or the refusal names the true minimum and settings that fit.

    LOWVRAM_PLANS=10000 python -m pytest -q -n 2 tests/lowvram/test_plan_property.py

plans ten thousand jobs; the gate plans a few. What the networks allocate is imagined here, as a round number a token or
a cell: the promise holds whatever it is, and running them on meta tensors would take most of the time.
"""

from __future__ import annotations

import os
import random
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest

from lowvram.errors import BudgetError
from lowvram.job import Job, make_job
from lowvram.machine import Machine, machine_profile
from lowvram.media.picture import Picture
from lowvram.model import Model, imagined_model
from lowvram.offload.budget import Budget
from lowvram.planning.choose import choose
from lowvram.planning.facts import gather
from lowvram.planning.plan import Plan
from lowvram.quant.spec import CLIP_TOKENS, numel
from lowvram.sampling.presets import load_models

PLANS = int(os.environ.get("LOWVRAM_PLANS", "24"))
PARTS = 2
"""Processes that can share the work."""
GB = 10**9
SPACE: dict[str, list[Any]] = {
    "sizes": [(832, 480), (480, 832), (1280, 704), (640, 640), (320, 192), (64, 64), (1920, 1088)],
    "weights": ["bf16", "fp8", "int8", "nf4"],
    "machines": ["rtx3060", "rtx4060ti16", "rtx4090", "rtx5090", "h100"],
}


@dataclass(frozen=True)
class Case:
    """One job and what it may take."""

    job: Job
    model: Model
    machine: Machine
    budget: Budget
    weights: str


def cases(seed: int) -> Iterator[Case]:
    rng = random.Random(seed)
    while True:
        name = rng.choice(MODELS)
        spec = load_models()[name]
        weights = rng.choice(SPACE["weights"])
        width, height = rng.choice(SPACE["sizes"])
        steps = rng.choice([1, 4, 20, 50])
        guidance = rng.choice([(1.0, 1.0), (4.0, 3.0), (1.0, 3.5)])
        taken = rng.choice([(640, 480), (6000, 4000)])
        picture = Picture(path="a.png", sha256="0" * 64, width=taken[0], height=taken[1])
        frames = rng.choice([1, 5, 17, 49, 81, 121, 241])
        both = spec.variant == "i2v" and spec.dit.image_tokens != CLIP_TOKENS and frames > 1
        shown = spec.variant == "i2v" or (spec.variant == "ti2v" and rng.random() < 0.5)
        job = make_job(
            spec,
            model=name,
            files={},
            width=width,
            height=height,
            frames=frames,
            image=picture if shown else None,
            last_image=picture if both and rng.random() < 0.5 else None,
            steps=steps,
            guidance=guidance,
            solver=rng.choice(["unipc", "dpm++", "euler"]),
        )
        machine = machine_profile(rng.choice(SPACE["machines"]))
        machine = replace(machine, link=machine.link * rng.choice([0.1, 1, 1]), disk=rng.choice([1e8, 3e9]))
        sizes = [int(GB * 10 ** rng.uniform(-1.5, 2)) for _ in range(2)]
        yield Case(job, imagined_model(name, spec, weights), machine, Budget(*sizes), weights)


class Imagined(dict[Hashable, Any]):
    """Footprints that need no measuring; what is no footprint is kept as ever."""

    def __contains__(self, what: object) -> bool:
        return super().__contains__(what) or (isinstance(what, tuple) and what[0] != "cells")

    def __getitem__(self, what: Any) -> Any:
        match what:
            case ("cells", *_):
                return super().__getitem__(what)
            case ("text", _, rows, dtype):
                return int(180_000 * rows * dtype.itemsize)
            case ("prepare", kind, lengths, *_):
                return int(2 * sum(numel(shape) for _, shape, _ in kind) + 20_000 * sum(lengths))
            case ("block", kind, n, _, words, _, group, *_):
                width = max(max(shape) for _, shape, _ in kind)
                return int((6 if group else 8) * n * width + 10_000 * words)
            case ("unpacked", kind, dtype, *_):
                return int(dtype.itemsize * sum(numel(shape) for _, shape, _ in kind))
            case ("face", _, tokens, slots, dtype, chunk):
                return int(dtype.itemsize * (20_000 * slots + 9000 * min(tokens, chunk)))
            case ("faces", _, _, frames, dtype):
                return int(600_000_000 + 120_000 * frames * dtype.itemsize)
            case ("clip", spec, _, dtype):
                return int(9 * spec.tokens * spec.dim * dtype.itemsize)
            case ("embed", _, grid, _):
                return int(40_000 * numel(grid[1:]))
            case ("head", _, grid, *_):
                return 900 * numel(grid)
            case ("tile", _, spec, _, _, window, _):
                return int(40 * spec.decoder_base * 64 * numel([span.size for span in window]))
            case ("borders", _, spec, *_):
                return 30_000 * spec.decoder_base
            case ("middle", _, spec, _, _, plane):
                return int(90 * spec.decoder_base * numel(plane))
        raise AssertionError(what)


MODELS = list(load_models())
KNOWN = Imagined()


def plan(case: Case, budget: Budget, **changes: Any) -> Plan:
    job, model = replace(case.job, **{k: v for k, v in changes.items() if k != "weights"}), case.model
    if "weights" in changes:
        other = imagined_model(case.job.model, model.spec, changes["weights"])
        model = replace(model, transformers=other.transformers)
    return choose(gather(job, model, case.machine, KNOWN), budget)


def check_fits(case: Case, budget: Budget, **changes: Any) -> None:
    found = plan(case, budget, **changes)
    for stage in found.stages:
        assert 0 < stage.vram == sum(stage.claims.values()) <= budget.vram
        assert 0 < stage.ram == sum(stage.ram_claims.values()) <= budget.ram
        assert min(stage.claims.values()) >= 0 and min(stage.ram_claims.values()) >= 0
        assert stage.seconds >= 0 and stage.h2d >= stage.disk_read >= 0
    depth = case.model.spec.dit.layers * len(case.model.transformers)
    assert sum(found.blocks().values()) == depth
    assert found.choices and found.advice


def check_refused(case: Case, refused: BudgetError) -> None:
    budget = case.budget
    assert refused.minimum_vram is not None or refused.minimum_ram is not None
    least = Budget(refused.minimum_vram or budget.vram, refused.minimum_ram or budget.ram)
    assert least.vram >= budget.vram and least.ram >= budget.ram and least != budget
    check_fits(case, least)
    for name in ("vram", "ram"):
        if getattr(refused, f"minimum_{name}") is not None:
            with pytest.raises(BudgetError):
                plan(case, replace(least, **{name: getattr(least, name) - 1}))
    for flag, value in refused.nearest.items():
        if flag == "size":
            width, height = map(int, value.split("x"))
            check_fits(case, budget, width=width, height=height)
        else:
            check_fits(case, budget, **{flag: int(value) if flag == "frames" else value})
    if "frames" in refused.nearest:
        with pytest.raises(BudgetError):
            plan(case, budget, frames=int(refused.nearest["frames"]) + 4)
    assert len(str(refused).splitlines()) <= 3


@pytest.mark.parametrize("seed", range(4, 4 + PARTS))
def test_a_plan_is_inside_both_caps_or_names_the_true_minimum(seed: int) -> None:
    refusals = 0
    for number, case in zip(range(PLANS // PARTS), cases(seed), strict=False):
        job = case.job
        label = (
            f"{number}: {job.model} {case.weights} {job.width}x{job.height}x{job.frames} "
            f"{len(job.schedule)} steps {job.schedule.guidance[0]} {job.schedule.solver} on "
            f"{case.machine.name} link {case.machine.link:.3g} disk {case.machine.disk:.3g} in {case.budget}"
        )
        try:
            try:
                check_fits(case, case.budget)
            except BudgetError as refused:
                refusals += 1
                check_refused(case, refused)
        except Exception as problem:
            raise AssertionError(label) from problem
    assert 0 < refusals < PLANS // PARTS
