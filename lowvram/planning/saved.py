"""What a job keeps on disk while it runs, so that a kill costs no more than a step."""

from __future__ import annotations

from lowvram.planning.facts import Facts
from lowvram.quant.spec import numel
from lowvram.sampling.solvers import kept_tensors


def saved(facts: Facts, condition: int) -> dict[str, int]:
    """Bytes by name, the most at any moment: a new state is whole before the old one goes.

    condition: bytes of what the video is conditioned by. Nothing here grows with the number of segments of a driven
    video; its finished segments come on top, and together weigh what the video does.
    """
    job, latent = facts.job, 4 * numel(facts.latent)
    state = 2 * latent * (1 + kept_tensors(job.schedule.solver))
    if job.driving is None:
        return {"state": state, "condition": condition, "latent": latent}
    carried = 4 * job.driving.carried * 3 * job.width * job.height
    return {"state": state, "condition": 2 * condition, "carried frames": 2 * carried}
