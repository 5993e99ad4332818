"""The choice under a budget: the fastest way to run that fits, then as many blocks near the device as fit beside."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

from lowvram.job import Job
from lowvram.machine import Machine
from lowvram.model import Model
from lowvram.offload.budget import Budget
from lowvram.planning import words
from lowvram.planning.decode import plan_decode
from lowvram.planning.denoise import Room, Way, place, stage_plan, ways
from lowvram.planning.facts import Facts, gather
from lowvram.planning.plan import Plan, StagePlan
from lowvram.planning.prepare import plan_prepare
from lowvram.planning.refuse import refusal
from lowvram.planning.saved import saved
from lowvram.planning.text import plan_text
from lowvram.preview import Decoder
from lowvram.stages.condition import plan_condition

Planner = Callable[[Facts, Budget], Sequence[StagePlan]]
"""Plans stages, none if the job has no such: each the fastest inside the budget. If nothing fits: the least VRAM inside
the RAM, or else the least RAM inside the VRAM, or else the least VRAM."""

BEFORE: tuple[Planner, ...] = (plan_text, plan_condition, plan_prepare)
"""Stages before the denoise, in the order in which they run."""
AFTER: tuple[Planner, ...] = (plan_decode,)

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
    return choose(gather(job, model, machine, preview=preview), budget, before=(plan_prepare,), after=())


def plan_segment(job: Job, model: Model, budget: Budget, machine: Machine) -> Plan:
    """As `make_plan`, of what is done for every segment of a driven video: all but the text."""
    return choose(gather(job, model, machine), budget, before=(plan_condition, plan_prepare))


def choose(
    facts: Facts, budget: Budget, *, before: Sequence[Planner] = BEFORE, after: Sequence[Planner] = AFTER
) -> Plan:
    """As `make_plan`, of facts already gathered, with these stages before and after the denoise."""
    first, last = list(_planned(before, facts, budget)), list(_planned(after, facts, budget))
    way, tried = _fastest(facts, budget, ways(facts))
    if not all(stage.inside(budget) for stage in (*first, stage_plan(facts, way, Room()), *last)):
        raise refusal(facts, budget, _least)
    room = _fill(facts, budget, way)
    denoise = stage_plan(facts, way, room)
    more = replace(budget, vram=budget.vram + STEP)
    better, _ = _fastest(facts, more, tried)
    wider = _fill(facts, more, better)
    return Plan(
        budget,
        facts.machine,
        facts.dtype,
        (*first, replace(denoise, choices=words.choices(facts, budget, denoise, way, room)), *last),
        place(facts, way, room),
        way.lean,
        words.advice(facts, (way, room, denoise), (better, wider, stage_plan(facts, better, wider))),
        saved(facts, denoise.ram_claims.get("condition", 0)),
    )


def fits(facts: Facts, budget: Budget) -> bool:
    """Whether there is a plan."""
    return all(stage.inside(budget) for stage in _least(facts, budget))


def _planned(planners: Iterable[Planner], facts: Facts, budget: Budget) -> Iterator[StagePlan]:
    return (stage for plan in planners for stage in plan(facts, budget))


def _least(facts: Facts, budget: Budget) -> Iterator[StagePlan]:
    """Every stage, the denoise with no more room for blocks than it needs; what is planned in no time comes first, and
    pictures and decoding last: their tiles take longest to plan, and denoise is what most often does not fit."""
    yield from _planned((plan_text, plan_prepare), facts, budget)
    yield stage_plan(facts, _fastest(facts, budget, ways(facts))[0], Room())
    yield from _planned((plan_condition, *AFTER), facts, budget)


def _fastest(facts: Facts, budget: Budget, found: Iterable[Way]) -> tuple[Way, list[Way]]:
    """The first that fits, as a `Planner` chooses, and all that were looked at."""
    tried: list[Way] = []
    for way in found:
        tried.append(way)
        if stage_plan(facts, way, Room()).inside(budget):
            return way, tried
    least = [(stage_plan(facts, way, Room()), way) for way in tried]
    in_ram = [pair for pair in least if pair[0].ram <= budget.ram]
    in_vram = [pair for pair in least if pair[0].vram <= budget.vram]
    if in_vram and not in_ram:
        return min(in_vram, key=lambda pair: pair[0].ram)[1], tried
    return min(in_ram or least, key=lambda pair: pair[0].vram)[1], tried


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
