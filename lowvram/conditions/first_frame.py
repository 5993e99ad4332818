"""TI2V-5B from a picture: the first latent frame is the picture's, and stays it (wan-models 8)."""

from __future__ import annotations

from collections.abc import Mapping

from lowvram.conditions.contract import Condition, held
from lowvram.conditions.pictures import encode_frames, plan_frames
from lowvram.job import Job
from lowvram.model import Model
from lowvram.offload.budget import Budget
from lowvram.planning.facts import Facts
from lowvram.planning.plan import StagePlan
from lowvram.quant.spec import numel
from lowvram.stages.run import Run


class FirstFrame:
    """The first latent frame is given; the others are denoised beside it."""

    def plan(self, facts: Facts, budget: Budget) -> list[StagePlan]:
        return [plan_frames(facts, budget, 1, held(self, facts))]

    def makes(self, facts: Facts) -> Mapping[str, int]:
        z, _, *plane = facts.latent
        return {"fixed": 4 * z * numel(tuple(plane))}

    def run(self, run: Run, model: Model, job: Job) -> Condition:
        return Condition(fixed=encode_frames(run, model, job, frames=1))
