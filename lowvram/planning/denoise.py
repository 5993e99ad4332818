"""The denoise stage: the fastest way to run the forward that fits, and blocks placed in what memory it leaves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from lowvram.offload.budget import Budget
from lowvram.offload.placement import BlockId, Buffers, Placement, Where, plan_buffers, spread, visits_of
from lowvram.offload.slab import BlockLayout
from lowvram.planning.facts import Facts, Transformers
from lowvram.planning.plan import Lean, StagePlan
from lowvram.planning.visits import order_of, step_visits
from lowvram.planning.ways import Way, claims, every_way, least_claims, ram_claims
from lowvram.sampling.guidance import needs_uncond


@dataclass(frozen=True, slots=True)
class Room:
    """How much of the memory goes to blocks."""

    ring: int = 1
    residents: int = 0
    """Of each expert."""
    in_ram: int = 0
    """Of each expert."""


# ---- the choice of a way


def ways(facts: Facts) -> list[Way]:
    """From the fastest to the slowest, by forecast; of equals, the one that moves less first.

    Every way with chunks of full length comes before any with shorter ones.
    """
    return facts.once(_by_time)


def _by_time(facts: Facts) -> list[Way]:
    def slowness(way: Way) -> tuple[int, float]:
        return -way.lean.chunk, _seconds(facts, way, _carried(facts, way, Room()).h2d)

    return sorted(every_way(facts), key=slowness)


def fastest(facts: Facts, budget: Budget, among: Sequence[Way]) -> Way:
    """The first that fits; if none does, the one that `lowvram.planning.choose.Planner` says."""
    for way in among:
        if _fits(facts, way, budget):
            return way
    in_ram = [way for way in among if _least(facts, way).ram <= budget.ram]
    if not in_ram:
        for way in sorted(among, key=lambda way: _least(facts, way).ram):
            if _fits(facts, way, Budget(budget.vram, _least(facts, way).ram)):
                return way
    return _smallest(facts, in_ram or among)


def _smallest(facts: Facts, among: Sequence[Way]) -> Way:
    """The one with the least VRAM. Blocks run only for those that may be it: a run takes a twentieth of a second."""
    ordered = sorted(among, key=lambda way: _least(facts, way).vram)
    best = ordered[0]
    for way in ordered[1:]:
        found = stage_plan(facts, best, Room()).vram
        if _least(facts, way).vram >= found:
            break
        best = way if stage_plan(facts, way, Room()).vram < found else best
    return best


def _fits(facts: Facts, way: Way, budget: Budget) -> bool:
    return _least(facts, way).inside(budget) and stage_plan(facts, way, Room()).inside(budget)


def _least(facts: Facts, way: Way) -> StagePlan:
    """Known without a run: the RAM of the way, and VRAM that it takes no less than."""
    return facts.once(_stage_plan, way, Room(), least_claims)


# ---- time


def _seconds(facts: Facts, way: Way, moved: int) -> float:
    """A forecast, if `moved` bytes of blocks are copied to the device."""
    compute = facts.once(_compute, way.lean.group > 0)
    copies = (moved + _passing(facts, way.lean)) / facts.machine.link
    return compute + copies if way.slots == 1 else max(compute, copies)


def _evaluations(facts: Facts) -> int:
    """Forwards of the whole job, one a prompt and step."""
    return sum(1 + needs_uncond(g) for g in facts.job.schedule.guidance)


def _compute(facts: Facts, grouped: bool) -> float:
    """Linears on tokens, text keys and values, both attentions (wan-models 1.8); every layer, step and pass."""
    spec, t = facts.spec.dit, facts.tokens
    d, f, n = spec.dim, spec.ffn, spec.text_len
    linears: float = 2 * t * (6 * d * d + 2 * d * f) + 4 * n * d * d
    if grouped:  # q and k are projected twice
        linears += 4 * t * d * d
    machine, guidance, attention = facts.machine, facts.job.schedule.guidance, facts.job.attention
    matmul = machine.matmul * facts.job.matmul.gain(machine.arch)
    seconds = 0.0
    for step, scale in enumerate(guidance):
        gain = attention.of_step(step, len(guidance)).gain or {}
        one = linears / matmul + 4 * t * n * d / machine.attention
        one += 4 * t * t * d / (machine.attention * gain.get(machine.arch, 1.0))
        seconds += (1 + needs_uncond(scale)) * spec.layers * one
    return seconds


def _passing(facts: Facts, lean: Lean) -> int:
    """Bytes of the residual that go to the device and back in the whole job, if it does not live there.

    A block reads it once for the norm factors and once a group, or once for all keys and values; then reads and
    writes it once. A face adapter does that once more, and so do the poses.
    """
    if not lean.away:
        return 0
    spec = facts.spec.dit
    sweeps = 2 + (1 + spec.heads // lean.group if lean.group else 1)
    stream = facts.tokens * spec.dim * facts.residual.itemsize
    driven = 2 * (1 + len(spec.face_blocks)) if spec.face_blocks else 0
    return _evaluations(facts) * stream * (spec.layers * sweeps + driven + 2)


# ---- the stage


@dataclass(frozen=True, eq=False, slots=True)
class Passage:
    """When each block is visited in the whole job."""

    visits: Mapping[BlockId, Sequence[int]]


@dataclass(frozen=True, eq=False, slots=True)
class Carried:
    """The transformer blocks in their places; the size of the video does not matter."""

    placement: Placement
    buffers: Buffers
    disk: int
    """Bytes read in the whole job."""
    h2d: int
    """Bytes copied to the device."""


def place(facts: Facts, way: Way, room: Room) -> Placement:
    """Residents, and of the others those held in RAM, spread evenly over the depth of every expert."""
    return _carried(facts, way, room).placement


def _carried(facts: Facts, way: Way, room: Room) -> Carried:
    each = tuple(step_visits(facts.job, facts.spec, way.lean.together))
    passage = facts.of_transformers(_passage, facts.job.schedule.experts, each)
    return facts.of_transformers(_carry, passage, way.slots, room, facts.machine.ram)


def _passage(transformers: Transformers, experts: tuple[int, ...], each: tuple[int, ...]) -> Passage:
    order = order_of(tuple(transformers.groups), transformers.depth, experts, each)
    return Passage(visits_of(order))


def _carry(transformers: Transformers, passage: Passage, slots: int, room: Room, ram: int) -> Carried:
    """On a machine with so much RAM."""
    layouts, visits, depth = transformers.layouts, passage.visits, transformers.depth
    fixed = spread(depth, room.residents)
    moving = [n for n in range(depth) if n not in fixed]
    held = {moving[i] for i in spread(len(moving), min(room.in_ram, len(moving)))}
    of_depth: list[Where] = [
        "resident" if n in fixed else "ram" if n in held else "disk" for n in range(depth)
    ]
    where = {(expert, n): of_depth[n] for expert in transformers.groups for n in range(depth)}
    placement = Placement(where, slots, room.ring, past_cache=_outgrows_cache(layouts, where, ram))
    return Carried(
        placement,
        plan_buffers(layouts, placement, visits),
        sum(layouts[b].nbytes * (len(at) if where[b] == "disk" else 1) for b, at in visits.items()),
        sum(layouts[b].nbytes * (1 if where[b] == "resident" else len(at)) for b, at in visits.items()),
    )


def _outgrows_cache(layouts: Mapping[BlockId, BlockLayout], where: Mapping[BlockId, Where], ram: int) -> bool:
    """Whether an expert's blocks outside of the device are more than the RAM: those on disk, read in turns, then find
    nothing in the system's cache."""
    outside: Counter[str] = Counter()
    for block, place in where.items():
        outside[block[0]] += 0 if place == "resident" else layouts[block].nbytes
    return "disk" in where.values() and max(outside.values()) > ram


def stage_plan(facts: Facts, way: Way, room: Room) -> StagePlan:
    """The stage run this way, with blocks placed in this room."""
    return facts.once(_stage_plan, way, room, claims)


def _stage_plan(
    facts: Facts, way: Way, room: Room, beside: Callable[[Facts, Lean], dict[str, int]]
) -> StagePlan:
    """beside: what it claims on the device beside blocks."""
    carried = _carried(facts, way, room)
    buffers, seconds = carried.buffers, _seconds(facts, way, carried.h2d)
    return StagePlan(
        "denoise",
        len(facts.job.schedule),
        facts.context | facts.once(beside, way.lean) | buffers.device_claims(facts.footprint),
        facts.host(facts.once(ram_claims, way.lean) | buffers.host_claims()),
        carried.disk,
        carried.h2d + _passing(facts, way.lean),
        max(seconds, carried.disk / facts.machine.disk),
    )
