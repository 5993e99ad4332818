"""What a plan says: why it chose as it did, what more memory would buy, and what to do if nothing fits."""

from __future__ import annotations

from collections.abc import Sequence

from lowvram.errors import BudgetError
from lowvram.models.self_attention import CHUNK
from lowvram.offload.budget import Budget, format_bytes
from lowvram.planning.denoise import Room, Rung
from lowvram.planning.facts import Facts
from lowvram.planning.plan import StagePlan


def check(facts: Facts, budget: Budget, stages: Sequence[StagePlan]) -> None:
    """BudgetError if the least that the stages can do with is more than the budget."""
    job = facts.job
    what = f"{job.width}x{job.height}, {job.frames} frames"
    stage = max(stages, key=lambda s: s.vram)
    if stage.vram > budget.vram:
        largest = max(stage.claims, key=lambda name: stage.claims[name])
        raise BudgetError(
            f"{what} needs {format_bytes(stage.vram)} of VRAM in stage {stage.name} (most of it {largest}), "
            f"the budget is {format_bytes(budget.vram)}",
            expected=f"--vram {_up(stage.vram)} or more",
            advice=f"raise --vram to {_up(stage.vram)}, or make the video smaller or shorter",
            minimum_vram=stage.vram,
        )
    need = max(s.ram for s in stages)
    if need > budget.ram:
        raise BudgetError(
            f"{what} needs {format_bytes(need)} of RAM, the budget is {format_bytes(budget.ram)}",
            expected=f"--ram {_up(need)} or more",
            advice=f"raise --ram to {_up(need)}",
            minimum_ram=need,
        )


def choices(facts: Facts, budget: Budget, stage: StagePlan, rung: Rung, room: Room) -> dict[str, str]:
    """The choices of the denoise stage, and why."""
    spec, lean, depth = facts.spec.dit, rung.lean, facts.spec.dit.layers
    block = max(layout.nbytes for layout in facts.layouts.values())
    rest = stage.vram - sum(n for name, n in stage.claims.items() if name.startswith("resident "))
    small = f"for all {spec.heads} heads at once, the fastest"
    if lean.group:
        small = f"{lean.group} of {spec.heads} heads at a time: more do not fit beside the rest"
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
    elif "unpacked block" in rung.claims:
        weights["weights"] = "decoded once a block, the fastest"
    return {
        "dtype": f"{str(facts.dtype).removeprefix('torch.')}, the "
        + ("tensor cores' format" if facts.machine.kind == "cuda" else "fastest on this processor"),
        "blocks": f"{room.residents} of {depth} resident per expert: what {format_bytes(budget.vram)} leaves beside "
        f"{format_bytes(rest)} of buffers, at {format_bytes(block)} a block",
        "ram": f"{room.in_ram} of the others held in RAM, {depth - room.residents - room.in_ram} read from disk "
        "every time",
        "slots": f"{room.slots} on the device, {room.ring} between disk and device",
        "passes": passes,
        "attention": f"{facts.job.attention.why or facts.job.attention.mode}; keys and values {small}",
        "kernels": f"those of torch: {facts.machine.unfused}"
        if facts.machine.unfused
        else "fused, in Triton",
        "chunk": chunk,
    } | weights


def advice(facts: Facts, stage: StagePlan, room: Room, better: StagePlan, wider: Room) -> tuple[str, ...]:
    """What 1 GB more VRAM would buy: `stage` would become `better`."""
    if room.residents == facts.spec.dit.layers:
        return ("everything is resident: more memory would not make it faster",)
    saved = stage.seconds - better.seconds
    gain = f"saves about {saved:.0f} s" if saved >= 1 else "saves no time: copies already hide behind compute"
    return (
        f"1 GB more VRAM: {wider.residents} instead of {room.residents} blocks resident per expert, {gain}",
    )


def _up(nbytes: int) -> str:
    """A size to type that is not less than `nbytes`."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if nbytes >= size:
            tenths = -(-nbytes * 10 // size)
            return f"{tenths // 10}.{tenths % 10}{unit}" if tenths % 10 else f"{tenths // 10}{unit}"
    return f"{nbytes}B"
