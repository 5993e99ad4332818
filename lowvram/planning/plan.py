"""The nouns of a plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from lowvram.machine import Machine
from lowvram.models.self_attention import CHUNK
from lowvram.models.vae_tiles import Tiling
from lowvram.offload.budget import Budget
from lowvram.offload.placement import Placement
from lowvram.planning.encode import EncodePlan

SCHEMA = "lowvram.plan/1"


@dataclass(frozen=True, slots=True)
class Lean:
    """How the forward trades time for memory. The default is the fastest."""

    together: bool = True
    """Prompt and negative prompt share every visit of a block; otherwise each goes through all blocks alone."""
    group: int = 0
    """Heads whose keys and values exist at once; 0 for all."""
    chunk: int = CHUNK
    """Tokens processed at once."""
    unpacked: bool = True
    """Whether a block's weights are decoded once into a buffer; otherwise each at every use, once a chunk."""
    away: bool = False
    """The residual stream lies in host memory and passes through the device by chunk."""


@dataclass(frozen=True, slots=True)
class StagePlan:
    """One stage. Bytes; seconds are a forecast."""

    name: str
    steps: int
    """How often it reports progress."""
    claims: Mapping[str, int]
    """Device memory by name, all held at once."""
    ram_claims: Mapping[str, int]
    disk_read: int
    h2d: int
    seconds: float
    choices: Mapping[str, str] = field(default_factory=dict)
    """Each automatic choice of this stage, and why."""
    tiling: Tiling | None = None
    """How the picture plane is cut, where a VAE decodes."""
    encode: EncodePlan | None = None
    """How it is cut, where a VAE encodes."""

    def inside(self, budget: Budget) -> bool:
        """Whether the stage fits."""
        return self.vram <= budget.vram and self.ram <= budget.ram

    @property
    def vram(self) -> int:
        return sum(self.claims.values())

    @property
    def ram(self) -> int:
        return sum(self.ram_claims.values())


@dataclass(frozen=True, slots=True)
class Plan:
    """What a job will do on a machine inside a budget."""

    budget: Budget
    machine: Machine
    dtype: torch.dtype
    """What the networks compute in."""
    stages: tuple[StagePlan, ...]
    denoise: Placement
    """Of the transformer blocks."""
    lean: Lean
    advice: tuple[str, ...]
    saved: Mapping[str, int] = field(default_factory=dict)
    """Bytes on disk while the job runs, by name, besides its video: see `lowvram.planning.saved`."""

    @property
    def vram(self) -> int:
        """Peak of the job."""
        return max(stage.vram for stage in self.stages)

    @property
    def ram(self) -> int:
        return max(stage.ram for stage in self.stages)

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages)

    @property
    def choices(self) -> dict[str, str]:
        """Each automatic choice, and why."""
        return {name: why for stage in self.stages for name, why in stage.choices.items()}

    def stage(self, name: str) -> StagePlan:
        return next(stage for stage in self.stages if stage.name == name)

    def blocks(self) -> dict[str, int]:
        """Transformer blocks (of all experts) by where they live."""
        where = list(self.denoise.where.values())
        return {kind: where.count(kind) for kind in ("resident", "ram", "disk")}  # type: ignore[arg-type]

    def to_json(self) -> dict[str, Any]:
        """The object of `plan --json`: bytes are integers."""
        return {
            "schema": SCHEMA,
            "fits": True,
            "machine": self.machine.name,
            "budget": {"vram": self.budget.vram, "ram": self.budget.ram},
            "peak": {"vram": self.vram, "ram": self.ram},
            "stages": [
                {
                    "name": s.name,
                    "vram": s.vram,
                    "ram": s.ram,
                    "disk_read": s.disk_read,
                    "h2d": s.h2d,
                    "seconds": round(s.seconds, 3),
                    "claims": dict(s.claims),
                    "ram_claims": dict(s.ram_claims),
                }
                for s in self.stages
            ],
            "saved": dict(self.saved),
            "blocks": self.blocks(),
            "choices": self.choices,
            "advice": list(self.advice),
        }
