"""A tiling of the autoencoder's plane and what it takes."""

from __future__ import annotations

from dataclasses import dataclass

from lowvram.models.vae_tiles import Tiling


@dataclass(frozen=True, slots=True)
class Coding:
    """A tiling, of either half, and what it takes, in bytes."""

    tiling: Tiling
    slab: int
    """Histories on the device."""
    scratch: int
    """Whatever else comes and goes on the device."""
    shelf: int
    """Histories on the host."""
    waiting: int
    """Planes between tiles and middle block on the host, until every tile has seen them or given its part."""
    frames: int
    """Frames on the host: until every tile has given its part, or of the latents that pass at once."""
    moved: int
    """Histories copied to the device, and as many back."""
    work: float
    """As a multiple of what the whole plane takes."""
    passed: int = 0
    """What a middle block in strips is given, and as much that it gives back."""

    @property
    def ahead(self) -> bool:
        return self.tiling.ahead

    @property
    def vram(self) -> int:
        return self.slab + self.scratch

    @property
    def resting(self) -> int:
        """What waits on the host beside the histories."""
        return self.waiting + self.frames

    @property
    def ram(self) -> int:
        return self.shelf + self.resting

    def explain(self) -> str:
        """The choice and its reason, in words."""
        tiling, cut = self.tiling, self.tiling.words
        if tiling.count == 1 and tiling.kept:
            return f"{cut}, the fastest"
        if tiling.count > 1:
            work = "nothing computed twice" if self.work == 1 else f"{self.work - 1:.0%} more work"
            cut = f"{cut}, {work} and the same pixels"
        if tiling.kept:
            return f"{cut}: whole frames do not fit"
        if self.shelf:
            return f"{cut}, histories moved to RAM and back every {tiling.visit} latents: they do not fit on the device"
        return (
            f"{cut}, one after the other: not all histories fit on the device, nor in RAM if the clip is long"
        )
