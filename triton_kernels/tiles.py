"""Tile sizes of the kernels by architecture: what `tuned.json` has, and defaults for what nobody has timed.

Every row builds for its architecture without spills and inside its shared memory; `bench/kernels.py aot` proves it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from lowvram.triton_kernels.modes import ARCHS, PRODUCTS
from lowvram.triton_kernels.tuned import TUNED, Tuned


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


CANDIDATES: tuple[Tile, ...] = (
    Tile(128, 64, 8, 3),
    Tile(128, 64, 8, 2),
    Tile(64, 64, 4, 2),
    Tile(128, 32, 8, 3),
)
"""What the tuning command tries. 64x64 with four warps lets two programs share a processor."""


def attention_tiles(tuned: Mapping[str, Tuned]) -> dict[str, dict[str, Tile]]:
    """By format of V, then by architecture: the tile of a tuning run, or the first candidate."""
    found: dict[str, dict[str, Tile]] = {}
    for v_format, archs in (("bf16", ARCHS), ("fp16", ARCHS), ("fp8", PRODUCTS["fp8"].archs)):
        tiles = {arch: tuned[arch].attention.get(v_format) if arch in tuned else None for arch in archs}
        found[v_format] = {arch: Tile(*tile) if tile else CANDIDATES[0] for arch, tile in tiles.items()}
    return found


ATTENTION: Mapping[str, Mapping[str, Tile]] = attention_tiles(TUNED)

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


GEMM_CANDIDATES: tuple[GemmTile, ...] = (
    GemmTile(128, 128, 128, 8, 3),
    GemmTile(64, 128, 128, 4, 3),
    GemmTile(128, 256, 128, 8, 3),
    GemmTile(256, 128, 64, 8, 4),
)
"""What the tuning command tries. The first two keep their sums in registers with every Triton from 3.6 to 3.9, and 64x128 lets
programs share a processor; from 3.8 on, which loads fragments early on sm_80 to sm_89, the others do not."""


def gemm_tiles(tuned: Mapping[str, Tuned]) -> dict[str, GemmTile]:
    """By architecture: the tile of a tuning run, or the first candidate."""
    return {arch: GemmTile(*tuned[arch].gemm) if arch in tuned else GEMM_CANDIDATES[0] for arch in ARCHS}


GEMM: Mapping[str, GemmTile] = gemm_tiles(TUNED)
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
