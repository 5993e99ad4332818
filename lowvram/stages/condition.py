"""Pictures and what else a model is shown -> tensors that prepare and denoise use.

`lowvram.conditions.contract` says what a variant has to do to be conditioned here.
"""

from __future__ import annotations

from lowvram.conditions.animate import Animate
from lowvram.conditions.contract import Condition, Conditioning, held
from lowvram.conditions.first_frame import FirstFrame
from lowvram.conditions.pictures import PictureChannels
from lowvram.job import Job
from lowvram.model import Model
from lowvram.offload.budget import Budget
from lowvram.planning.facts import Facts
from lowvram.planning.plan import StagePlan
from lowvram.quant.spec import ModelSpec
from lowvram.stages.run import Run


def conditioning(spec: ModelSpec, job: Job) -> Conditioning | None:
    """How a job on a model of `spec` is conditioned; None if by its prompt alone."""
    if spec.variant == "animate":
        return Animate()
    if spec.variant == "i2v":
        return PictureChannels()
    return FirstFrame() if spec.variant == "ti2v" and job.image is not None else None


def plan_condition(facts: Facts, budget: Budget) -> list[StagePlan]:
    """Its stages; none for a prompt alone."""
    way = conditioning(facts.spec, facts.job)
    return [] if way is None else way.plan(facts, budget)


def held_claims(facts: Facts) -> dict[str, int]:
    """What the condition takes of the host once it is made; nothing for a prompt alone."""
    way = conditioning(facts.spec, facts.job)
    return {} if way is None else held(way, facts)


def condition(run: Run, model: Model, job: Job) -> Condition:
    """Run those stages."""
    way = conditioning(model.spec, job)
    return Condition() if way is None else way.run(run, model, job)
