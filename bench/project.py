"""What cases would take on cards that are not here: plans for their profiles, marked as projections."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from lowvram.bench.cases import GB, Case
from lowvram.bench.results import Projection
from lowvram.elsewhere import plan_without_files
from lowvram.errors import BudgetError

_STAGES: Mapping[str, str] = {"text": "text", "forward": "denoise", "step": "denoise", "decode": "decode"}
"""The stage that a case is about, where it is not the whole job."""
CARDS = ("rtx3060", "rtx4060ti16", "rtx4090", "rtx5090", "h100")


def project(cases: Sequence[Case], cards: Sequence[str], budgets: Sequence[int]) -> Iterator[Projection]:
    """A projection for every case, card and budget that fits; the card's memory bounds the budget."""
    for case in cases:
        for card in cards:
            for budget in budgets:
                try:
                    plan = plan_without_files(
                        case.model,
                        weights=case.weights,
                        machine=card,
                        vram=budget,
                        ram=32 * GB,
                        **case.settings(),
                    )
                except BudgetError:
                    continue
                if budget > plan.machine.vram:
                    continue
                about = _STAGES.get(case.what)
                stages = [plan.stage(about)] if about else list(plan.stages)
                yield Projection(
                    case=case.name,
                    model=case.model,
                    machine=plan.machine.label,
                    vram_budget=budget,
                    seconds=sum(stage.seconds for stage in stages),
                    vram=max(stage.vram for stage in stages),
                    ram=max(stage.ram for stage in stages),
                )
