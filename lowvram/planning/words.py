"""What a plan says: why it chose as it did, and what more memory would buy."""

from __future__ import annotations

from collections import Counter

from lowvram.models.self_attention import CHUNK
from lowvram.offload.budget import Budget, format_bytes
from lowvram.planning.denoise import Room
from lowvram.planning.facts import Facts
from lowvram.planning.plan import Lean, StagePlan
from lowvram.planning.ways import Way


def choices(facts: Facts, budget: Budget, stage: StagePlan, way: Way, room: Room) -> dict[str, str]:
    """The choices of the denoise stage, and why."""
    lean, depth = way.lean, facts.spec.dit.layers
    block = max(layout.nbytes for layout in facts.transformers.layouts.values())
    rest = stage.vram - sum(n for name, n in stage.claims.items() if name.startswith("resident "))
    if facts.passes == 1:
        passes = "1 a step: guidance 1 needs no second"
    elif lean.together:
        passes = "2 a step, prompt and negative prompt share every visit of a block"
    else:
        passes = "2 a step, one after the other: two residual streams do not fit at once"
    chunk = f"{lean.chunk} tokens at once"
    if lean.chunk == CHUNK:
        chunk += ", the same under every budget that allows it, so that a budget does not change the result"
    else:
        chunk += f": {CHUNK} do not fit"
    weights = {}
    if not lean.unpacked:
        weights["weights"] = "decoded once a chunk: a whole block's do not fit beside the rest"
    elif "unpacked block" in stage.claims:
        weights["weights"] = "decoded once a block, the fastest"
    slots = f"{way.slots} on the device, {room.ring} between disk and device"
    if way.slots == 1:
        slots += ": nothing is copied while the device computes, every other way with such chunks that fits is slower"
    job = facts.job
    return {
        "job": f"{job.model}, {job.width}x{job.height}, {job.frames} frames, {len(job.schedule)} steps, "
        + _stored(facts),
        "dtype": f"{str(facts.dtype).removeprefix('torch.')}, the "
        + ("tensor cores' format" if facts.machine.kind == "cuda" else "fastest on this processor"),
        "blocks": f"{room.residents} of {depth} resident per expert: what {format_bytes(budget.vram)} leaves beside "
        f"{format_bytes(rest)} of buffers, at {format_bytes(block)} a block",
        "ram": f"{room.in_ram} of the others held in RAM, {depth - room.residents - room.in_ram} read from disk "
        "every time",
        "slots": slots,
        "passes": passes,
        "attention": f"{facts.job.attention.why or facts.job.attention.mode}; keys and values {_heads(facts, lean)}",
        "matmul": facts.job.matmul.why or facts.job.matmul.mode,
        "kernels": f"those of torch: {facts.machine.unfused}"
        if facts.machine.unfused
        else "fused, in Triton",
        "residual": _residual(facts, lean),
        "chunk": chunk,
    } | weights


def _stored(facts: Facts) -> str:
    """What most of a block is stored in, and whether anybody has looked at a file of it."""
    sizes: Counter[str] = Counter()
    for ref in facts.transformers.blocks[0].refs:
        sizes[ref.encoding.name] += ref.nbytes
    encoding = sizes.most_common(1)[0][0]
    return (
        f"transformers in {encoding}"
        if next(iter(facts.model.transformers.values())).is_here
        else f"transformers as if in {encoding} (see --weights)"
    )


def _heads(facts: Facts, lean: Lean) -> str:
    if not lean.group:
        return f"for all {facts.spec.dit.heads} heads at once, the fastest"
    return f"{lean.group} of {facts.spec.dit.heads} heads at a time: more do not fit beside the rest"


def _residual(facts: Facts, lean: Lean) -> str:
    kind = str(facts.residual).removeprefix("torch.")
    if facts.residual != facts.dtype:
        kind += " as asked, for twice the memory"
    if lean.away:
        return f"{kind}, in RAM, and through the device by chunk: the fastest that fits beside the rest"
    return f"{kind}, on the device"


Option = tuple[Way, Room, StagePlan]
"""A denoise stage and how it came about."""


def advice(facts: Facts, now: Option, then: Option) -> tuple[str, ...]:
    """What 1 GB more VRAM would buy: the stage `then` instead of `now`."""
    (way, room, stage), (better, wider, faster) = now, then
    if room.residents == facts.spec.dit.layers and way.lean == Lean():
        return ("everything is resident: more memory would not make it faster",)
    gains = _gains(facts, way, better)
    if wider.residents != room.residents:
        gains.append(f"{wider.residents} instead of {room.residents} blocks resident per expert")
    saved = stage.seconds - faster.seconds
    time = f"saves about {saved:.0f} s" if saved >= 1 else "saves no time: copies already hide behind compute"
    return (f"1 GB more VRAM: {', '.join(gains) or 'nothing changes'}; {time}",)


def _gains(facts: Facts, way: Way, better: Way) -> list[str]:
    """What changes from one way to another, in words."""
    old, new = way.lean, better.lean
    changes = {
        "prompt and negative prompt together": new.together and not old.together,
        f"keys and values of {new.group or 'all'} instead of {old.group or 'all'} heads at once": (
            (new.group or facts.spec.dit.heads) > (old.group or facts.spec.dit.heads)
        ),
        "weights decoded once a block": new.unpacked and not old.unpacked,
        "the residual on the device": old.away and not new.away,
        f"{new.chunk} instead of {old.chunk} tokens at once": new.chunk > old.chunk,
        "copies beside compute": better.slots > way.slots,
    }
    return [words for words, true in changes.items() if true]
