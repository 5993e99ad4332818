"""In which order the tokens of a grid pass through the blocks.

Upstream's is raster order: frame by frame, row by row. There 64 tokens in a row are a thin stripe of one frame, and what
one of them attends to says little about what the others do. Attention to some tiles of keys only (`sparse`) wants tokens
that lie together in space and time: `compact_order`. Nothing between patches and head but the rotary table looks at
places, so an order costs one look-up where patches are made and one where they are put together, none in a block.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from lowvram.triton_kernels.attention import KEY_TILE

DEPTH = 4
"""Latent frames that tokens are taken from at once."""


@dataclass(frozen=True, slots=True)
class TokenOrder:
    """Slab after slab of whole latent frames; inside a slab in any order."""

    raster: Tensor
    """[L] int64: the number in raster order of the token at each place"""
    slabs: tuple[tuple[int, int], ...]
    """First and end frame of each"""

    def inside(self, slab: int) -> Tensor:
        """The places inside a slab: numbers in raster order of its frames alone."""
        first, end = self.slabs[slab]
        per_frame = self.raster.shape[0] // self.slabs[-1][1]
        return self.raster[first * per_frame : end * per_frame] - first * per_frame


def compact_order(
    grid: tuple[int, int, int], *, framewise: bool = False, device: torch.device | None = None
) -> TokenOrder:
    """The order in which any KEY_TILE tokens in a row make a block of about the same number of frames, rows and columns.

    Frames are cut into slabs, a slab into bands of rows, and a band is passed column by column, each with all its rows
    and frames; the next band goes back. So no tile has to begin anywhere, and no length has to divide: bands and slabs
    differ by one at most. The first frame is a slab of its own: it has another time where a picture is given.

    framewise: every frame is a slab, for models in which each frame hears something else (Animate's faces).
    """
    frames, rows, columns = grid
    slabs = [(0, 1), *((1 + a, 1 + b) for a, b in _split(frames - 1, 1 if framewise else DEPTH))]
    runs = []
    for first, end in slabs:
        depth = end - first
        places = torch.arange(first * rows * columns, end * rows * columns, device=device)
        places = places.view(depth, rows, columns).permute(2, 1, 0)
        for n, (top, bottom) in enumerate(_split(rows, round(math.sqrt(KEY_TILE / depth)))):
            band = places[:, top:bottom]
            runs.append((band.flip(0) if n % 2 else band).flatten())
    return TokenOrder(torch.cat(runs), tuple(slabs))


def _split(length: int, most: int) -> list[tuple[int, int]]:
    """`length` in the fewest parts of at most `most`, which differ by one at most."""
    parts = -(-length // most)
    ends = [length * n // parts for n in range(parts + 1)] if parts else []
    return list(pairwise(ends))
