"""Ways to cut a plane of 16 x 10 latents: every kind that a plan may choose."""

from __future__ import annotations

from lowvram.models.vae_tiles import Tiling

TILINGS = (
    Tiling(),
    Tiling(1, 2),
    Tiling(2, 1, visit=1, kept=False),
    Tiling(1, 2, visit=2, kept=False),
    Tiling(2, 1, banded=True),
    Tiling(2, 1, visit=1, kept=False, banded=True),
    Tiling(2, 2, visit=1, kept=False, banded=True),
    Tiling(1, 2, visit=1, kept=False, ahead=True),
    Tiling(visit=1, kept=False, strips=2),
    Tiling(1, 2, visit=2, kept=False, strips=2, resident=False),
)
