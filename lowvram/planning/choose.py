"""The choice under a budget: the fastest way to run that fits, then as many blocks near the device as fit beside."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from lowvram.job import Job
from lowvram.machine import Machine
from lowvram.model import Model
from lowvram.offload.budget import Budget
from lowvram.planning import words
from lowvram.planning.decode import plan_decode
from lowvram.planning.denoise import Room, fastest, place, stage_plan, ways
from lowvram.planning.facts import Facts, gather
from lowvram.planning.plan import Plan, StagePlan
from lowvram.planning.prepare import plan_prepare
from lowvram.planning.refuse import Planner, inside, refusal
from lowvram.planning.saved import saved
from lowvram.planning.text import plan_text
from lowvram.planning.ways import Way
from lowvram.preview import Decoder
from lowvram.stages.condition import plan_condition


def _plan_denoise(facts: Facts, budget: Budget) -> tuple[StagePlan]:
    """With no more room for blocks than it needs."""
    return (stage_plan(facts, fastest(facts, budget, ways(facts)), Room()),)


JOB: tuple[Planner, ...] = (plan_text, plan_condition, plan_prepare, _plan_denoise, plan_decode)
"""The stages of a job, in the order in which they run."""
SEGMENT = JOB[1:]
STEPS = JOB[2:4]
QUICKEST: tuple[Planner, ...] = (plan_text, plan_prepare, _plan_denoise, plan_decode, plan_condition)
"""In the order of the time that planning takes: tiles take longest, and denoise is what most often does not fit."""

STEP = 10**9
"""Bytes more whose use a plan looks up."""


def make_plan(
    job: Job,
    model: Model,
    budget: Budget,
    machine: Machine,
    *,
    text_cached: bool = False,
    preview: Decoder | None = None,
) -> Plan:
    """The plan with the most that fits. BudgetError, naming the true minimum, if nothing does.

    text_cached: whether the features of all prompts are kept from an earlier job. preview: what makes previews
    """
    return choose(gather(job, model, machine, text_cached=text_cached, preview=preview), budget)


def plan_steps(
    job: Job, model: Model, budget: Budget, machine: Machine, preview: Decoder | None = None
) -> Plan:
    """As `make_plan`, of what is done once more when a step begins anew: the preparation and the denoise alone."""
    return choose(gather(job, model, machine, preview=preview), budget, STEPS)


def plan_segment(job: Job, model: Model, budget: Budget, machine: Machine) -> Plan:
    """As `make_plan`, of what is done for every segment of a driven video: all but the text."""
    return choose(gather(job, model, machine), budget, SEGMENT)


def choose(facts: Facts, budget: Budget, planners: Sequence[Planner] = JOB) -> Plan:
    """As `make_plan`, of facts already gathered, and of these stages of a job, the denoise among them."""
    stages: dict[Planner, Sequence[StagePlan]] = {}
    for plan in sorted(planners, key=QUICKEST.index):
        stages[plan] = plan(facts, budget)
        if not inside(stages[plan], budget):
            raise refusal(facts, budget, QUICKEST)
    known = ways(facts)
    way = fastest(facts, budget, known)
    room = _fill(facts, budget, way)
    denoise = stage_plan(facts, way, room)
    stages[_plan_denoise] = (replace(denoise, choices=words.choices(facts, budget, denoise, way, room)),)
    more = replace(budget, vram=budget.vram + STEP)
    better = fastest(facts, more, known[: known.index(way) + 1])
    wider = _fill(facts, more, better)
    return Plan(
        budget,
        facts.machine,
        facts.dtype,
        tuple(stage for plan in planners for stage in stages[plan]),
        place(facts, way, room),
        way.lean,
        words.advice(facts, (way, room, denoise), (better, wider, stage_plan(facts, better, wider))),
        saved(facts, denoise.ram_claims.get("condition", 0)),
    )


def fits(facts: Facts, budget: Budget) -> bool:
    """Whether there is a plan."""
    return all(inside(plan(facts, budget), budget) for plan in QUICKEST)


def _fill(facts: Facts, budget: Budget, way: Way) -> Room:
    """The rest of the memory: a second ring buffer, then residents, then blocks in RAM."""
    depth = facts.spec.dit.layers

    def fits(room: Room) -> bool:
        return stage_plan(facts, way, room).inside(budget)

    room = Room(ring=2 if fits(Room(ring=2)) else 1)
    room = replace(room, residents=_most(depth, lambda n: fits(replace(room, residents=n))))
    return replace(room, in_ram=_most(depth - room.residents, lambda n: fits(replace(room, in_ram=n))))


def _most(limit: int, fits: Callable[[int], bool]) -> int:
    """The largest n in 0..limit for which `fits(n)`, which holds for 0 and for all below one for which it holds."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
