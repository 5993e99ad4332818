"""The choice under a budget: the fastest way to run that fits, then as many blocks near the device as fit beside."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from lowvram.job import Job
from lowvram.machine import Machine
from lowvram.model import Model
from lowvram.offload.budget import Budget
from lowvram.planning import words
from lowvram.planning.decode import plan_decode
from lowvram.planning.denoise import Room, Rung, ladder, place, plan_denoise
from lowvram.planning.facts import Facts, gather
from lowvram.planning.plan import Plan
from lowvram.planning.prepare import plan_prepare
from lowvram.planning.text import plan_text
from lowvram.stages.condition import plan_condition


def make_plan(job: Job, model: Model, budget: Budget, machine: Machine) -> Plan:
    """The plan with the most that fits. BudgetError, naming the true minimum, if nothing does."""
    return choose(gather(job, model, machine), budget)


def choose(facts: Facts, budget: Budget) -> Plan:
    """As `make_plan`, of facts already gathered."""
    before = (plan_text(facts, budget), *plan_condition(facts, budget), plan_prepare(facts, budget))
    after = (plan_decode(facts, budget),)
    tried, room = _descend(facts, budget, ladder(facts))
    rung = tried[-1]
    words.check(facts, budget, (*before, plan_denoise(facts, rung, room), *after))
    room = _fill(facts, budget, rung, room)
    denoise = plan_denoise(facts, rung, room)
    more = replace(budget, vram=budget.vram + 10**9)
    higher, wider = _descend(facts, more, tried)
    wider = _fill(facts, more, higher[-1], wider)
    return Plan(
        budget,
        facts.machine,
        facts.dtype,
        (*before, replace(denoise, choices=words.choices(facts, budget, denoise, rung, room)), *after),
        place(facts, room),
        rung.lean,
        words.advice(facts, denoise, room, plan_denoise(facts, higher[-1], wider), wider),
    )


def _descend(facts: Facts, budget: Budget, rungs: Iterable[Rung]) -> tuple[list[Rung], Room]:
    """The rungs down to the first that fits, and the least room for blocks there; all rungs if none fits.

    Every rung with two slots comes before any with one, which leaves no copy to overlap with.
    """
    tried: list[Rung] = []
    for rung in rungs:
        tried.append(rung)
        if _fits(facts, budget, rung, Room(slots=2)):
            return tried, Room(slots=2)
    for n, rung in enumerate(tried, 1):
        if _fits(facts, budget, rung, Room(slots=1)):
            return tried[:n], Room(slots=1)
    return tried, Room(slots=1)


def _fill(facts: Facts, budget: Budget, rung: Rung, room: Room) -> Room:
    """The rest of the memory: a second ring buffer, then residents, then blocks in RAM."""
    depth = facts.spec.dit.layers
    if _fits(facts, budget, rung, replace(room, ring=2)):
        room = replace(room, ring=2)
    residents = _most(depth, lambda n: _fits(facts, budget, rung, replace(room, residents=n)))
    room = replace(room, residents=residents)
    in_ram = _most(depth - residents, lambda n: _fits(facts, budget, rung, replace(room, in_ram=n)))
    return replace(room, in_ram=in_ram)


def _fits(facts: Facts, budget: Budget, rung: Rung, room: Room) -> bool:
    stage = plan_denoise(facts, rung, room)
    return stage.vram <= budget.vram and stage.ram <= budget.ram


def _most(limit: int, fits: Callable[[int], bool]) -> int:
    """The largest n in 0..limit for which `fits(n)`, which holds for 0 and for all below one for which it holds."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
