"""The denoise stage: ways to run the forward, and blocks placed in what memory a way leaves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from lowvram import footprint
from lowvram.conditions.contract import kept
from lowvram.models.self_attention import CHUNK
from lowvram.offload.budget import allocated_size
from lowvram.offload.placement import BlockId, Buffers, Placement, Where, plan_buffers, spread, visits_of
from lowvram.offload.rows import WINDOWS
from lowvram.offload.slab import BlockLayout, build_layout
from lowvram.planning.facts import Facts, Transformers
from lowvram.planning.plan import Lean, StagePlan
from lowvram.planning.prepare import kept_claims
from lowvram.planning.visits import order_of, step_visits
from lowvram.quant.spec import HEAD_DIM, numel
from lowvram.sampling.guidance import needs_uncond
from lowvram.sampling.solvers import kept_tensors
from lowvram.stages.condition import conditioning, held_claims
from lowvram.triton_kernels.keys import sample_stride, stored_bytes
from lowvram.triton_kernels.ops import ops_for

CHUNKS = (CHUNK, CHUNK // 2, CHUNK // 4)
"""Tokens at once. The first, wherever it fits, so that a budget does not change how a matmul is cut."""
GROUPS = (8, 4, 2, 1)
"""Heads at once, where not all are."""


@dataclass(frozen=True, slots=True)
class Way:
    """One way to run the forward, and what it takes whatever the placement."""

    lean: Lean
    slots: int
    """Device buffers for blocks that move; 1 leaves no copy to overlap with."""
    claims: Mapping[str, int]
    """Device memory that does not move."""
    ram_claims: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Room:
    """How much of the memory goes to blocks."""

    ring: int = 1
    residents: int = 0
    """Of each expert."""
    in_ram: int = 0
    """Of each expert."""


# ---- ways


def ways(facts: Facts) -> Iterator[Way]:
    """From the fastest to the slowest, by forecast; of equals, the one that moves less first.

    Every way with chunks of full length comes before any with shorter ones.
    """
    return (facts.once(_way, *way) for way in facts.once(_by_time))


def _way(facts: Facts, lean: Lean, slots: int) -> Way:
    return Way(lean, slots, facts.once(_claims, lean), facts.once(_ram_claims, lean))


def _by_time(facts: Facts) -> list[tuple[Lean, int]]:
    """Every lean and its slots, in the order of `ways`."""
    packed = facts.once(_unpacked_bytes) > 0
    found = [(lean, slots) for lean in _leans(facts, packed) for slots in (2, 1)]

    def slowness(way: tuple[Lean, int]) -> tuple[int, float]:
        lean, slots = way
        return -lean.chunk, _seconds(facts, lean, slots, _carried(facts, lean, slots, Room()).h2d)

    return sorted(found, key=slowness)


def _leans(facts: Facts, packed: bool) -> list[Lean]:
    """packed: whether any weight has to be decoded before it is used."""
    heads, guided = facts.spec.dit.heads, facts.passes == 2
    groups = [g for g in GROUPS if g < heads and heads % g == 0]
    found = []
    for chunk in CHUNKS:
        small = Lean(together=not guided, chunk=chunk, unpacked=not packed)
        found += [Lean(chunk=chunk)] + ([Lean(together=False, chunk=chunk)] if guided else [])
        found += [small] if packed else []
        found += [replace(small, group=g) for g in groups]
        found += [replace(small, group=g, away=True) for g in (0, *groups)]
    return found


def _claims(facts: Facts, lean: Lean) -> dict[str, int]:
    spec, tokens = facts.spec.dit, facts.tokens
    heads = lean.group or spec.heads
    stored = [stored_bytes(mode, heads, tokens, facts.dtype) for mode in facts.job.attention.modes()]
    state = kept_tensors(facts.job.schedule.solver)
    # in the blocks: the latent, what the solver keeps, and the velocity of the pass before
    latents = 1 + state + (0 if lean.together else facts.passes - 1)
    solving = 3 + facts.passes + state - latents  # between the blocks of two steps
    scratch = facts.once(_scratch, lean.chunk, lean.group > 0, lean.unpacked)
    claims = {
        **_residual_claims(facts, lean),
        "keys": allocated_size(max(keys for keys, _ in stored)),
        "values": allocated_size(max(values for _, values in stored)),
        "attention output": allocated_size(tokens * spec.dim * facts.dtype.itemsize),
        "rotary table": allocated_size(4 * tokens * HEAD_DIM),
        "token order": allocated_size(8 * tokens),
        "latents": latents * _latent_bytes(facts),
        "scratch": max(scratch, solving * _latent_bytes(facts) + _preview_scratch(facts)),
    }
    claims |= facts.once(_preview_weights)
    unpacked = facts.once(_unpacked_bytes) if lean.unpacked else 0
    if unpacked:
        claims["unpacked block"] = allocated_size(unpacked)
    claims |= facts.once(_condition)
    if not lean.group:
        del claims["attention output"]
    if not facts.job.attention.selects:
        del claims["token order"]
    return kept_claims(facts) | claims


def _condition(facts: Facts) -> dict[str, int]:
    condition = conditioning(facts.spec, facts.job)
    return {} if condition is None else {"condition": kept(condition, facts)}


def _residual_claims(facts: Facts, lean: Lean) -> dict[str, int]:
    """On the device: the residual streams, or what passes of those in RAM."""
    row = facts.spec.dit.dim * facts.residual.itemsize
    if not lean.away:
        return {"residual": _streams(facts, lean) * allocated_size(facts.tokens * row)}
    claims = {"residual window": WINDOWS * allocated_size(min(lean.chunk, facts.tokens) * row)}
    if any(mode.quantised for mode in facts.job.attention.modes()):
        sampled = -(-facts.tokens // sample_stride(facts.tokens))
        claims["residual sample"] = allocated_size(sampled * row)
    return {name: _streams(facts, lean) * nbytes for name, nbytes in claims.items()}


def _ram_claims(facts: Facts, lean: Lean) -> dict[str, int]:
    stream = facts.tokens * facts.spec.dit.dim * facts.residual.itemsize
    away = {f"ram residual {n}": stream for n in range(_streams(facts, lean))} if lean.away else {}
    return facts.once(held_claims) | facts.once(_preview_ram) | away


def _streams(facts: Facts, lean: Lean) -> int:
    """Residual streams at once."""
    return facts.passes if lean.together else 1


def _scratch(facts: Facts, chunk: int, grouped: bool, unpacked: bool) -> int:
    """Transient bytes of a block or of the head, whichever takes more.

    Groups of fewer heads take no more than the largest, so that one stands for all.
    """
    spec, tokens, n = facts.spec.dit, facts.tokens, min(facts.tokens, 2 * chunk)
    group = next(g for g in GROUPS if g < spec.heads and spec.heads % g == 0) if grouped else 0
    per_frame = tokens // facts.latent[1] if facts.time_rows > 1 else 0
    found, machine, matmul = [], facts.machine, facts.job.matmul
    for block in facts.transformers.blocks:
        what = n, per_frame, max(facts.lengths), facts.dtype
        for mode in facts.job.attention.modes():
            measure = partial(
                footprint.block_scratch, spec, block, *what, group=group, chunk=chunk,
                unpacked=unpacked, attention=mode, matmul=matmul, ops=ops_for(machine.arch, machine.unfused),
                residual=facts.residual,
            )  # fmt: skip
            how = (
                group,
                chunk,
                unpacked,
                mode.name,
                matmul.mode,
                machine.arch,
                machine.unfused,
                facts.residual,
            )
            inside = facts.measured(measure, "block", block.kind, *what, *how)
            factors = footprint.factor_bytes(tokens) - footprint.factor_bytes(n) if group else 0
            found.append(inside + factors)
        if spec.face_blocks:
            face = tokens, facts.latent[1], facts.dtype, chunk, facts.residual
            attend = partial(footprint.attend_scratch, spec, block, *face)
            found.append(facts.measured(attend, "face", block.kind, *face))
    found.append(facts.once(_ends_scratch, chunk))
    return max(found) + allocated_size(2 * spec.layers)  # two truths a block


def _ends_scratch(facts: Facts, chunk: int) -> int:
    """Of what is before the blocks and behind them."""
    found = []
    for outer in facts.transformers.outers:
        ends, key = (facts.spec.dit, outer, facts.grid), (outer.kind, facts.grid)
        head = partial(footprint.head_scratch, *ends, facts.residual, chunk=chunk)
        behind = facts.measured(head, "head", *key, facts.residual, chunk)
        slabs = facts.job.attention.selects
        embed = partial(footprint.embed_scratch, *ends, facts.dtype, slabs=slabs)
        before = facts.measured(embed, "embed", *key, facts.dtype, slabs)
        found += [behind + _latent_bytes(facts), before]
    return max(found)


def _preview_weights(facts: Facts) -> dict[str, int]:
    if facts.preview is None:
        return {}
    return {"preview weights": facts.footprint(build_layout(facts.preview.weights.refs).nbytes)}


def _preview_scratch(facts: Facts) -> int:
    """Of a preview by a decoder, made between two steps: the scratch of the blocks is free then."""
    if facts.preview is None:
        return 0
    what = facts.latent, facts.dtype
    measure = partial(footprint.preview_scratch, facts.preview, *what)
    return facts.measured(measure, "preview", facts.preview.weights.kind, *what)


def _preview_ram(facts: Facts) -> dict[str, int]:
    """The decoder on its way to the device, and the pictures it makes."""
    if facts.preview is None:
        return {}
    pictures = facts.preview.pictures_bytes(facts.latent[1], facts.latent[2:])
    nbytes = build_layout(facts.preview.weights.refs).nbytes
    return {"ram preview": nbytes, "preview pictures": pictures}


def _unpacked_bytes(facts: Facts) -> int:
    """Of a block's matrices in the compute dtype; 0 if they are stored in it."""
    dtype, matmul = facts.dtype, facts.job.matmul
    return max(
        facts.measured(
            partial(footprint.unpacked_nbytes, block, dtype, matmul),
            "unpacked",
            block.kind,
            dtype,
            matmul.mode,
        )
        for block in facts.transformers.blocks
    )


def _latent_bytes(facts: Facts) -> int:
    return allocated_size(4 * numel(facts.latent))


# ---- time


def _seconds(facts: Facts, lean: Lean, slots: int, moved: int) -> float:
    """A forecast, if `moved` bytes of blocks are copied to the device."""
    compute = facts.once(_compute, lean.group > 0)
    copies = (moved + _passing(facts, lean)) / facts.machine.link
    return compute + copies if slots == 1 else max(compute, copies)


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
    return _carried(facts, way.lean, way.slots, room).placement


def _carried(facts: Facts, lean: Lean, slots: int, room: Room) -> Carried:
    each = tuple(step_visits(facts.job, facts.spec, lean.together))
    passage = facts.of_transformers(_passage, facts.job.schedule.experts, each)
    return facts.of_transformers(_carry, passage, slots, room, facts.machine.ram)


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
    return facts.once(_stage_plan, way.lean, way.slots, room)


def _stage_plan(facts: Facts, lean: Lean, slots: int, room: Room) -> StagePlan:
    carried = _carried(facts, lean, slots, room)
    buffers, seconds = carried.buffers, _seconds(facts, lean, slots, carried.h2d)
    return StagePlan(
        "denoise",
        len(facts.job.schedule),
        facts.context | facts.once(_claims, lean) | buffers.device_claims(facts.footprint),
        facts.host(facts.once(_ram_claims, lean) | buffers.host_claims()),
        carried.disk,
        carried.h2d + _passing(facts, lean),
        max(seconds, carried.disk / facts.machine.disk),
    )
