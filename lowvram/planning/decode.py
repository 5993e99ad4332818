"""The decode stage: the decoder is loaded whole, its plane cut as little as the budget asks for."""

from __future__ import annotations

from typing import Any

from lowvram.codings import Decodings
from lowvram.media.video import AHEAD
from lowvram.model import Group, Model
from lowvram.models import vae
from lowvram.offload.budget import Budget
from lowvram.offload.slab import build_layout
from lowvram.planning.facts import Facts
from lowvram.planning.plan import StagePlan
from lowvram.quant.spec import numel
from lowvram.stages.condition import held_claims
from lowvram.tiling_search import Cost, forecast

WRITER_FRAMES = 16 + AHEAD
"""Frames the video encoder may hold, and those that wait for it."""


def decoder_group(model: Model) -> Group:
    """The half of the VAE that makes pictures."""
    return Group(tuple(ref for name, ref in model.vae.items() if name.startswith(vae.DECODER)), {})


def _weights(model: Model) -> tuple[Group, int]:
    """That half, and the bytes of its slab."""
    group = decoder_group(model)
    return group, build_layout(group.refs).nbytes


def _ways(facts: Facts) -> Decodings:
    """The ways to decode the video."""
    job, (group, _) = facts.job, facts.of_model(_weights)
    latent = facts.spec.latent_shape(job.width, job.height, job.frames)
    return Decodings(
        facts.spec.vae, group, latent, _frame(facts), facts.dtype, facts.footprint, facts.measured
    )


def _frame(facts: Facts) -> int:
    """Bytes of a frame. Those of a driven video leave the decoder as float32: the next segment goes on from the last."""
    return 3 * facts.job.width * facts.job.height * (4 if facts.spec.variant == "animate" else 1)


def plan_decode(facts: Facts, budget: Budget) -> tuple[StagePlan]:
    """The fastest tiling that fits; the smallest, too large for the budget, if none does."""
    job, machine, spec = facts.job, facts.machine, facts.spec
    ways, frame, (_, nbytes) = facts.once(_ways), _frame(facts), facts.of_model(_weights)
    device = facts.context | {"vae weights": facts.footprint(nbytes)}
    host = facts.host(
        {"ring 0": nbytes, "frames": WRITER_FRAMES * frame, "ram outgoing": 2 * frame}
        | {"latent": 4 * numel(facts.latent)}
        # the next segment of a driven video takes over what the condition says of the picture, and goes on to draw noise
        | (facts.once(held_claims) | facts.state if spec.variant == "animate" else {})
    )
    # 2.1: 31 TFLOP per latent at 1280x720 (wan-models 6.6); other widths and sizes in proportion
    flops = 31.1e12 * numel(ways.latent[1:]) / (90 * 160) * (spec.vae.decoder_base / 96) ** 2

    def seconds(coding: Cost) -> Any:
        return forecast(coding, flops / machine.matmul, machine.link)

    found = ways.choose(budget.vram - sum(device.values()), budget.ram - sum(host.values()), seconds)
    host["frames"] += found.frames
    return (
        StagePlan(
            "decode",
            job.frames,
            device | {"vae histories": found.slab, "vae scratch": found.scratch},
            host | {k: n for k, n in (("vae middle", found.waiting), ("ram histories", found.shelf)) if n},
            nbytes,
            nbytes + found.moved + found.passed,
            nbytes / machine.disk + float(seconds(found)),
            {"decode": found.explain()},
            found.tiling,
        ),
    )
