"""How a clip is encoded: the fastest tiling of the VAE's encoder inside a budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from lowvram.codings import Encodings, encodings
from lowvram.machine import Machine
from lowvram.model import Model
from lowvram.models.vae_tiles import Tiling
from lowvram.offload.budget import exact_size, segment_size
from lowvram.offload.slab import build_layout
from lowvram.quant.spec import numel
from lowvram.tiling import Measured, anew
from lowvram.tiling_search import Cost, forecast

if TYPE_CHECKING:
    from lowvram.planning.facts import Facts


@dataclass(frozen=True, slots=True)
class EncodePlan:
    """How one clip is encoded: what `lowvram.stages.encode` is given, and what a stage that calls it must claim."""

    shape: tuple[int, int, int]
    """Frames (1 + 4k), rows and columns of pixels."""
    dtype: torch.dtype
    """What is computed in."""
    tiling: Tiling
    claims: Mapping[str, int]
    """Device bytes by name."""
    ram_claims: Mapping[str, int]
    disk_read: int
    h2d: int
    seconds: float
    """A forecast."""
    choice: str
    """The tiling and its reason, in words."""


def ways_to_encode(
    model: Model,
    shape: tuple[int, int, int],
    machine: Machine,
    dtype: torch.dtype = torch.float32,
    measured: Measured = anew,
) -> Encodings:
    """All ways to encode `shape` pixels on a machine."""
    return encodings(model, shape, dtype, segment_size if machine.kind == "cuda" else exact_size, measured)


def planned(facts: Facts, frames: int, vram: int, ram: int) -> EncodePlan:
    """As `plan_encode`, of the first `frames` frames of a job."""
    shape = frames, facts.job.height, facts.job.width
    return plan_encode(facts.model, shape, vram, ram, facts.machine, ways=facts.once(_ways, shape))


def _ways(facts: Facts, shape: tuple[int, int, int]) -> Encodings:
    return ways_to_encode(facts.model, shape, facts.machine, measured=facts.measured)


def plan_encode(
    model: Model,
    shape: tuple[int, int, int],
    vram: int,
    ram: int,
    machine: Machine,
    dtype: torch.dtype = torch.float32,
    ways: Encodings | None = None,
) -> EncodePlan:
    """The fastest way to encode `shape` pixels inside `vram` and `ram` bytes; the smallest if none fits.

    `vram` and `ram` are what a stage has left beside its other claims (the context and the program are among those).
    A stage that encodes several clips one after the other claims the most of each name. bf16 loses detail that an
    encoder cannot do without; float32 is what the authors compute in. ways: those of an earlier plan.
    """
    spec, ways = model.spec.vae, ways or ways_to_encode(model, shape, machine, dtype)
    stored, latent = build_layout(ways.weights.refs).nbytes, ways.latent
    # 2.1: 18 TFLOP per latent at 1280x720 (wan-models 6.5), in the format that `matmul` was measured in
    native = 2 if machine.kind == "cuda" else 4
    flops = 18e12 * numel(latent[1:]) / (90 * 160) * (spec.base / 96) ** 2 * dtype.itemsize / native

    def seconds(coding: Cost) -> Any:
        return forecast(coding, flops / machine.matmul, machine.link)

    weights = ways.rounding(stored)
    found = ways.choose(vram - weights, ram - stored, seconds)
    host = {
        "ring 0": stored,
        "frames": found.frames,
        "vae planes": found.waiting,
        "ram histories": found.shelf,
    }
    return EncodePlan(
        shape,
        dtype,
        found.tiling,
        {"vae weights": weights, "vae histories": found.slab, "vae scratch": found.scratch},
        {name: nbytes for name, nbytes in host.items() if nbytes},
        stored,
        stored + found.moved + found.passed,
        stored / machine.disk + float(seconds(found)),
        found.explain(),
    )
