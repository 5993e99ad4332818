"""Which weights a step runs with: an expert, and how strongly each of its LoRAs acts."""

from __future__ import annotations

from dataclasses import dataclass

from lowvram.job import Job
from lowvram.model import Transformer


@dataclass(frozen=True, slots=True)
class Phase:
    """Steps of one phase run with the same weights."""

    expert: int
    strengths: tuple[float, ...]
    """Of each LoRA of the expert."""


def phase(job: Job, transformers: tuple[Transformer, ...], step: int) -> Phase:
    """The weights of the blocks in `step`."""
    expert = job.schedule.experts[step]
    loras = transformers[expert].loras
    return Phase(expert, tuple(lora.strength(step, len(job.schedule)) for lora in loras))


def outer_phase(job: Job, transformers: tuple[Transformer, ...], step: int) -> Phase:
    """The weights outside the blocks in `step`.

    A LoRA that changes nothing there keeps its first strength, so that steps which differ in it alone share a phase.
    """
    now, first = phase(job, transformers, step), transformers[job.schedule.experts[step]].strengths
    loras = transformers[now.expert].loras
    return Phase(
        now.expert,
        tuple(
            strength if lora.outside_blocks else one
            for lora, strength, one in zip(loras, now.strengths, first, strict=True)
        ),
    )


def outer_phases(job: Job, transformers: tuple[Transformer, ...], expert: int) -> list[Phase]:
    """The different weights outside the blocks that one expert runs with, in the order of its steps; one if it has none."""
    steps = [i for i, e in enumerate(job.schedule.experts) if e == expert]
    found = list(dict.fromkeys(outer_phase(job, transformers, i) for i in steps))
    return found or [Phase(expert, transformers[expert].strengths)]
