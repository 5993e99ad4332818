"""Tile sizes of the kernels by architecture: data, changed by hand from what `bench/kernels.py tune` measured.

Every row builds for its architecture without spills and inside its shared memory; `bench/kernels.py aot` proves it.
Rows that nobody has timed say so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from lowvram.triton_kernels.modes import ARCHS


@dataclass(frozen=True, slots=True)
class Tile:
    """What one program works on, and with what."""

    m: int
    """queries"""
    n: int
    """keys at a time"""
    warps: int
    stages: int
    """key tiles in flight between memory and use"""
    measured: bool = False
    """Whether it was the fastest of CANDIDATES in a run on a card of this architecture."""


CANDIDATES: tuple[Tile, ...] = (
    Tile(128, 64, 8, 3),
    Tile(128, 64, 8, 2),
    Tile(64, 64, 4, 2),
    Tile(128, 32, 8, 3),
)
"""What the tuning command tries. 64x64 with four warps lets two programs share a processor."""

ATTENTION: Mapping[str, Mapping[str, Tile]] = {
    "bf16": dict.fromkeys(ARCHS, Tile(128, 64, 8, 3)),
    "fp16": dict.fromkeys(ARCHS, Tile(128, 64, 8, 3)),
    "fp8": dict.fromkeys(("sm_89", "sm_90", "sm_120"), Tile(128, 64, 8, 3)),
}
"""By format of V, then by architecture."""

HALF: Mapping[str, Mapping[str, bool]] = {
    "bf16": {},
    "fp16": dict.fromkeys(ARCHS, True),
    "fp8": {"sm_89": True, "sm_90": False, "sm_120": True},
}
"""Whether P V of a tile is added up in float16: twice as fast on GeForce, no faster on the others."""


@dataclass(frozen=True, slots=True)
class GemmTile:
    """What one program of a product works on, and with what."""

    m: int
    """rows of activations"""
    n: int
    """rows of the weight"""
    k: int
    """columns of both at a time"""
    warps: int
    stages: int
    measured: bool = False
    """Whether it was the fastest of GEMM_CANDIDATES in a run on a card of this architecture."""


GEMM_CANDIDATES: tuple[GemmTile, ...] = (
    GemmTile(128, 256, 128, 8, 3),
    GemmTile(128, 128, 128, 8, 3),
    GemmTile(128, 128, 64, 4, 4),
    GemmTile(256, 128, 64, 8, 4),
)

GEMM: Mapping[str, GemmTile] = dict.fromkeys(ARCHS, GemmTile(128, 256, 128, 8, 3))
"""By architecture."""
NARROW = GemmTile(128, 64, 128, 4, 3)
"""For weights of few rows, such as those of a LoRA: wider tiles would multiply mostly nothing."""


def gemm_tile(arch: str, rows: int) -> GemmTile:
    """What a program of a product by a weight of `rows` rows works on."""
    return NARROW if rows <= NARROW.n else GEMM[arch]


def arch_of(device: torch.device) -> str:
    """ "sm_89" and the like; empty for anything that is not an NVIDIA card."""
    if device.type != "cuda" or torch.version.hip is not None:
        return ""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"
