"""A job that does not fit: the least budget that it can do with, and the nearest settings that fit this one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

from lowvram.errors import BudgetError
from lowvram.imagined import imagined_model
from lowvram.model import Model
from lowvram.offload.budget import Budget, format_bytes
from lowvram.planning.facts import Facts
from lowvram.planning.once import Once
from lowvram.planning.plan import StagePlan
from lowvram.triton_kernels.modes import SDPA

Planner = Callable[[Facts, Budget], Sequence[StagePlan]]
"""Plans stages, none if the job has no such: each the fastest inside the budget. If nothing fits: the least VRAM inside
the RAM, or else the least RAM inside the VRAM, or else the least VRAM."""

ENDLESS = 2**62
"""Bytes of RAM that hold anything."""
SMALLER_WEIGHTS = ("fp8",)
"""What is proposed instead of larger ones, the better first."""
SIXTEENTHS = range(15, 3, -1)
"""Of width and height: sizes that are proposed."""


def refusal(facts: Facts, budget: Budget, planners: Sequence[Planner]) -> BudgetError:
    """The error that says so. `budget` must not hold the job. planners: of all stages, the quickest first."""
    need, job = minimum(facts, budget, planners), facts.job
    found, flags = [], []
    if need.vram > budget.vram:
        stages = (stage for plan in planners for stage in plan(facts, need))
        stage = next(stage for stage in stages if stage.vram == need.vram)
        largest = max(stage.claims, key=lambda name: stage.claims[name])
        found.append(
            f"{format_bytes(need.vram)} of VRAM in stage {stage.name} (most of it {largest}), the budget is "
            f"{format_bytes(budget.vram)}"
        )
        flags.append(f"--vram {_up(need.vram)}")
    if need.ram > budget.ram:
        found.append(f"{format_bytes(need.ram)} of RAM, the budget is {format_bytes(budget.ram)}")
        flags.append(f"--ram {_up(need.ram)}")
    settings = nearest(facts, budget, planners)
    instead = " or ".join(f"--{name} {value}" for name, value in settings.items())
    smaller = "no smaller video fits" if job.driving is None else "shorter segments do not fit either"
    return BudgetError(
        f"{job.width}x{job.height}, {job.frames} frames needs " + " and ".join(found),
        expected=f"{' and '.join(flags)} or more",
        advice=f"raise the budget, or take {instead}" if instead else f"raise the budget: {smaller}",
        minimum_vram=need.vram if need.vram > budget.vram else None,
        minimum_ram=need.ram if need.ram > budget.ram else None,
        nearest=settings,
    )


def inside(stages: Iterable[StagePlan], budget: Budget) -> bool:
    """Whether all fit."""
    return all(stage.inside(budget) for stage in stages)


def minimum(facts: Facts, budget: Budget, planners: Sequence[Planner]) -> Budget:
    """`budget` with VRAM raised to the least that its RAM allows; or else the RAM, for its VRAM; or else both.

    Each stage is asked to fit into what those before it need anyhow: only the most counts, and to look for the least of
    all of them would take long.
    """
    found = _with_vram(facts, budget, planners) or _with_ram(facts, budget, planners)
    if found is None:
        endless = _with_vram(facts, replace(budget, ram=ENDLESS), planners)
        assert endless is not None
        found = _with_ram(facts, replace(budget, vram=endless.vram), planners)
    assert found is not None
    return found


def _with_vram(facts: Facts, budget: Budget, planners: Sequence[Planner]) -> Budget | None:
    """As much more as its RAM asks for; None if that is too little for any VRAM."""
    for plan in planners:
        stages = plan(facts, budget)
        if any(stage.ram > budget.ram for stage in stages):
            return None
        budget = replace(budget, vram=max([budget.vram, *(stage.vram for stage in stages)]))
    return budget


def _with_ram(facts: Facts, budget: Budget, planners: Sequence[Planner]) -> Budget | None:
    """As much more as its VRAM asks for; None if that is too little for any RAM."""
    for plan in planners:
        stages = plan(facts, budget)
        if not inside(stages, budget):
            stages = plan(facts, replace(budget, ram=1))  # the least RAM: nothing fits into that
        if any(stage.vram > budget.vram for stage in stages):
            return None
        budget = replace(budget, ram=max([budget.ram, *(stage.ram for stage in stages)]))
    return budget


def nearest(facts: Facts, budget: Budget, planners: Sequence[Planner]) -> dict[str, str]:
    """By flag without its dashes: the value nearest to what was asked with which the job fits.

    A driven job has the size of its videos, and is as long: its segments may be shorter.
    """
    found: dict[str, str] = {}

    def fits(other: Facts) -> bool:
        return all(inside(plan(other, budget), budget) for plan in planners)

    job = facts.job
    carried = 0 if job.driving is None else job.driving.carried
    none = (carried - 1) // 4  # not tried: what is carried over makes no segment
    low, high = none, (job.frames - 1) // 4  # fits at low, unless that is none; not at high
    while high - low > 1:
        middle = (low + high) // 2
        shorter = facts.sized(job.width, job.height, 1 + 4 * middle)
        low, high = (middle, high) if fits(shorter) else (low, middle)
    if low > none:
        found["frames" if job.driving is None else "segment"] = str(1 + 4 * low)
    for width, height in _smaller(facts) if job.driving is None else ():
        if fits(facts.sized(width, height, job.frames)):
            found["size"] = f"{width}x{height}"
            break
    if job.attention.mode != "sdpa" and fits(facts.once(_with_sdpa)):
        found["attention"] = "sdpa"
    if job.residual != "auto" and fits(facts.once(_with_usual_residual)):
        found["residual"] = "auto"
    heaviest = max(layout.nbytes for layout in facts.transformers.layouts.values())
    for weights in SMALLER_WEIGHTS:
        other = facts.once(_stored_as, weights)
        if max(layout.nbytes for layout in other.transformers.layouts.values()) < heaviest and fits(other):
            found["weights"] = weights
            break
    return found


def _with_sdpa(facts: Facts) -> Facts:
    return replace(facts, job=replace(facts.job, attention=SDPA))


def _with_usual_residual(facts: Facts) -> Facts:
    return replace(facts, job=replace(facts.job, residual="auto"))


def _stored_as(facts: Facts, weights: str) -> Facts:
    """The same with transformers in another encoding."""
    return replace(facts, of_model=facts.of_model(_imagined, weights))


def _imagined(model: Model, weights: str) -> Once[Model]:
    imagined = imagined_model(model.name, model.spec, weights).transformers
    return Once(replace(model, transformers=imagined))


def _smaller(facts: Facts) -> Iterator[tuple[int, int]]:
    """Sizes of about the same shape, from large to small."""
    job, unit = facts.job, 2 * facts.spec.vae.stride[1]
    last = job.width, job.height
    for part in SIXTEENTHS:
        size = job.width * part // 16 // unit * unit, job.height * part // 16 // unit * unit
        if min(size) >= unit and size != last:
            yield size
            last = size


def _up(nbytes: int) -> str:
    """A size to type that is not less than `nbytes`."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if nbytes >= size:
            tenths = -(-nbytes * 10 // size)
            return f"{tenths // 10}.{tenths % 10}{unit}" if tenths % 10 else f"{tenths // 10}{unit}"
    return f"{nbytes}B"
