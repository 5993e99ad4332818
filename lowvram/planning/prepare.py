"""The stage before the first step: everything outside the blocks is used once, then only its results are kept."""

from __future__ import annotations

from functools import partial

from lowvram import footprint
from lowvram.models import dit
from lowvram.offload.budget import Budget, allocated_size
from lowvram.phases import outer_phases
from lowvram.planning.facts import Facts
from lowvram.planning.plan import StagePlan
from lowvram.stages.condition import held_claims


def plan_prepare(facts: Facts, budget: Budget) -> tuple[StagePlan]:
    """Time rows and text contexts, made expert by expert."""
    return (facts.once(_prepare),)


def _prepare(facts: Facts) -> StagePlan:
    sizes = facts.transformers.outer_bytes
    steps = max(facts.job.schedule.experts.count(e) for e in range(len(sizes)))
    one = sum(n for name, n in _kept_claims(facts, experts=1, steps=steps).items() if name != "texts")
    what = facts.lengths, steps, facts.time_rows, facts.dtype
    peak = max(
        facts.measured(
            partial(footprint.prepare_scratch, facts.spec.dit, outer, *what), "prepare", outer.kind, *what
        )
        for outer in facts.transformers.outers
    )
    claims = {"outer weights": facts.footprint(max(sizes)), "outer scratch": max(0, peak - one)}
    nbytes = sum(sizes)
    return StagePlan(
        "prepare",
        len(sizes),
        facts.context | claims | kept_claims(facts),
        facts.host({"ring 0": max(sizes)} | facts.state | held_claims(facts)),
        nbytes,
        nbytes,
        nbytes / min(facts.machine.disk, facts.machine.link),
    )


def kept_claims(facts: Facts) -> dict[str, int]:
    """What the preparation leaves behind for the steps.

    An expert counts once for each strength that a LoRA changes what is outside its blocks with.
    """
    return facts.once(_kept_claims)


def _kept_claims(facts: Facts, experts: int = 0, steps: int = 0) -> dict[str, int]:
    """Of so many experts and steps, or of all."""
    spec, width = facts.spec.dit, facts.dtype.itemsize
    experts, steps = experts or _outsides(facts), steps or len(facts.job.schedule)
    rows = [footprint.context_rows(spec, n) for n in facts.lengths]
    contexts = sum(allocated_size(n * spec.dim * width) + allocated_size(4 * n) for n in rows)
    contexts += allocated_size(spec.image_tokens * spec.dim * width)
    ends = sum(
        allocated_size(r.nbytes)
        for r in facts.transformers.first["outer"].refs
        if r.name.startswith(dit.ENDS)
    )
    texts = sum(allocated_size(n * spec.text_dim * width) for n in facts.lengths)
    return {
        "texts": texts,
        "contexts": experts * contexts,
        "time rows": steps * footprint.time_bytes(spec, facts.time_rows),
        "ends": experts * ends,
    }


def _outsides(facts: Facts) -> int:
    transformers = tuple(facts.model.transformers.values())
    return sum(len(outer_phases(facts.job, transformers, e)) for e in range(len(transformers)))
