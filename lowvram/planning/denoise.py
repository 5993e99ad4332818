"""The denoise stage: a ladder of ways to run the forward, and blocks placed in what memory a way leaves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from lowvram import footprint
from lowvram.model import kinds
from lowvram.offload.budget import allocated_size
from lowvram.offload.placement import BlockId, Placement, Where, plan_traffic, spread
from lowvram.planning.facts import Facts
from lowvram.planning.plan import Lean, StagePlan
from lowvram.planning.prepare import kept_claims
from lowvram.planning.visits import visiting_order
from lowvram.quant.spec import HEAD_DIM, numel
from lowvram.sampling.guidance import needs_uncond
from lowvram.sampling.solvers import kept_tensors
from lowvram.stages.condition import conditioning
from lowvram.triton_kernels.keys import stored_bytes
from lowvram.triton_kernels.ops import FUSED, TORCH


@dataclass(frozen=True, slots=True)
class Rung:
    """One way to run the forward, and what it takes whatever the placement."""

    lean: Lean
    claims: dict[str, int]
    """Device memory that does not move."""
    order: tuple[BlockId, ...]
    """Visits of the whole job."""
    compute: float
    """Seconds of all steps, if nothing is waited for."""


@dataclass(frozen=True, slots=True)
class Room:
    """How much of the memory goes to blocks."""

    slots: int
    ring: int = 1
    residents: int = 0
    """Of each expert."""
    in_ram: int = 0
    """Of each expert."""


def ladder(facts: Facts) -> Iterator[Rung]:
    """Ways to run the forward, each slower and smaller than the one before."""
    known: dict[tuple[int, int, bool], int] = {}
    unpacked = max(footprint.unpacked_nbytes(block, facts.dtype) for block in facts.block_kinds)
    for lean in _leans(facts, packed=unpacked > 0):
        key = lean.group, lean.chunk, lean.unpacked
        if key not in known:
            known[key] = _scratch(facts, lean)
        order = visiting_order(facts.job, facts.spec, lean.together)
        claims = _claims(facts, lean, known[key])
        if lean.unpacked and unpacked:
            claims["unpacked block"] = allocated_size(unpacked)
        yield Rung(lean, claims, tuple(order), _compute(facts, lean))


def _leans(facts: Facts, packed: bool) -> Iterator[Lean]:
    """packed: whether any weight has to be decoded before it is used."""
    lean = Lean()
    yield lean
    if facts.passes == 2:
        lean = replace(lean, together=False)
        yield lean
    if packed:
        lean = replace(lean, unpacked=False)
        yield lean
    heads = facts.spec.dit.heads
    groups = [g for g in (8, 4, 2, 1) if g < heads and heads % g == 0]
    for group in groups:
        yield replace(lean, group=group)
    if groups:
        yield from (replace(lean, group=groups[-1], chunk=chunk) for chunk in (2048, 1024))


def _scratch(facts: Facts, lean: Lean) -> int:
    """Transient bytes of a block or of the head, whichever takes more."""
    spec, tokens = facts.spec.dit, facts.tokens
    per_frame = tokens // facts.latent[1] if facts.time_rows > 1 else 0
    blocks = [
        footprint.block_scratch(
            spec,
            block,
            tokens,
            per_frame,
            max(facts.lengths),
            facts.dtype,
            group=lean.group,
            chunk=lean.chunk,
            unpacked=lean.unpacked,
            attention=mode,
            ops=TORCH if facts.machine.unfused else FUSED,
        )
        for block in facts.block_kinds
        for mode in facts.job.attention.modes()
    ]
    outers = kinds(groups["outer"] for groups in facts.groups.values())
    heads = [
        footprint.head_scratch(spec, outer, facts.grid, facts.dtype, chunk=lean.chunk) for outer in outers
    ]
    embed = max(footprint.embed_scratch(spec, outer, facts.grid, facts.dtype) for outer in outers)
    finite = allocated_size(2 * spec.layers)  # two truths a block
    attend = max(
        footprint.attend_scratch(spec, block, tokens, facts.latent[1], facts.dtype, lean.chunk)
        for block in facts.block_kinds
    )
    return max(*blocks, max(heads) + _latent_bytes(facts), embed, attend) + finite


def _latent_bytes(facts: Facts) -> int:
    return allocated_size(4 * numel(facts.latent))


def _claims(facts: Facts, lean: Lean, scratch: int) -> dict[str, int]:
    spec, tokens, width = facts.spec.dit, facts.tokens, facts.dtype.itemsize
    stream = allocated_size(tokens * spec.dim * width)
    heads = lean.group or spec.heads
    stored = [stored_bytes(mode, heads, tokens, facts.dtype) for mode in facts.job.attention.modes()]
    latents = 3 + facts.passes + kept_tensors(facts.job.schedule.solver)
    claims = {
        "residual": (facts.passes if lean.together else 1) * stream,
        "keys": allocated_size(max(keys for keys, _ in stored)),
        "values": allocated_size(max(values for _, values in stored)),
        "rotary table": allocated_size(4 * tokens * HEAD_DIM),
        "latents": latents * _latent_bytes(facts),
        "scratch": scratch,
    }
    way = conditioning(facts.spec, facts.job)
    if way is not None:
        claims["condition"] = way.kept(facts)
    return kept_claims(facts) | claims | ({"attention output": stream} if lean.group else {})


def _compute(facts: Facts, lean: Lean) -> float:
    """Linears on tokens, text keys and values, both attentions (wan-models 1.8); every layer, step and pass."""
    spec, t = facts.spec.dit, facts.tokens
    d, f, n = spec.dim, spec.ffn, spec.text_len
    linears: float = 2 * t * (6 * d * d + 2 * d * f) + 4 * n * d * d
    if lean.group:  # q and k are projected twice
        linears += 4 * t * d * d
    machine, guidance, attention = facts.machine, facts.job.schedule.guidance, facts.job.attention
    seconds = 0.0
    for step, scale in enumerate(guidance):
        gain = attention.of_step(step, len(guidance)).gain or {}
        one = linears / machine.matmul + 4 * t * n * d / machine.attention
        one += 4 * t * t * d / (machine.attention * gain.get(machine.arch, 1.0))
        seconds += (1 + needs_uncond(scale)) * spec.layers * one
    return seconds


def place(facts: Facts, room: Room) -> Placement:
    """Residents, and of the others those held in RAM, spread evenly over the depth of every expert."""
    where: dict[BlockId, Where] = {}
    depth = facts.spec.dit.layers
    fixed = spread(depth, room.residents)
    moving = [n for n in range(depth) if n not in fixed]
    held = {moving[i] for i in spread(len(moving), min(room.in_ram, len(moving)))}
    for expert in facts.groups:
        for n in range(depth):
            where[expert, n] = "resident" if n in fixed else "ram" if n in held else "disk"
    return Placement(where, slots=room.slots, ring=room.ring)


def plan_denoise(facts: Facts, rung: Rung, room: Room) -> StagePlan:
    """The stage on this rung with blocks placed in this room."""
    machine, layouts, placement = facts.machine, facts.layouts, place(facts, room)
    traffic = plan_traffic(layouts, placement, rung.order)
    disk = sum(layouts[load.block].nbytes for load in traffic.loads)
    moved = [block for block in rung.order if placement.where[block] != "resident"]
    h2d = sum(layouts[b].nbytes for b in moved) + sum(
        layout.nbytes for b, layout in layouts.items() if placement.where[b] == "resident"
    )
    copies = h2d / machine.link
    # one slot leaves nothing to overlap with
    seconds = rung.compute + copies if room.slots == 1 else max(rung.compute, copies)
    return StagePlan(
        "denoise",
        len(facts.job.schedule),
        facts.context | rung.claims | traffic.device_claims(facts.footprint),
        facts.host(traffic.host_claims()),
        disk,
        h2d,
        max(seconds, disk / machine.disk),
    )
