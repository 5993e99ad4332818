"""How the autoencoder's plane is cut: the fastest tiling that fits, found without trying them all.

What a tiling remembers and hands on is known in closed form, and of what its largest tile allocates besides a floor;
a run of that tile on meta tensors has the last word.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from math import ceil
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from lowvram import vae_footprint
from lowvram.coding import Coding
from lowvram.model import Group
from lowvram.models.vae_attention import KEYS, QUERIES
from lowvram.models.vae_clip import Half
from lowvram.models.vae_history import Memory, packed, packed_size, tile_memories
from lowvram.models.vae_middle import most_strips
from lowvram.models.vae_tiles import Tile, Tiling, band_edges, long_axis, make_bands, make_tile
from lowvram.offload.budget import allocated_size
from lowvram.offload.estimate import Rounding
from lowvram.planning.once import Once
from lowvram.quant.spec import VaeSpec, numel
from lowvram.tiling_search import Columns, Search, Seconds
from lowvram.vae_footprint import Ends

VISIT = 16
"""Latents that pass a tile before the next has its turn, if histories are moved: 64 frames wait to be whole."""
FLOOR = 3
"""Times the largest frame that a layer remembers: a residual block holds what it was given, the sum of the taps so far and
what the next tap gives, each of them as large."""
SMALLEST = 6
"""Latents on a tile's side. A smaller tile would spend most of its work on what lies around it."""
_COUNTS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64)


class _Middle(NamedTuple):
    """What the middle block takes, whole or in strips, in bytes."""

    largest: int
    """History at one visit."""
    total: int
    """Histories of all visits."""
    scratch: int
    convolved: int = 0
    """As much of it as convolutions need in strips."""
    handed: int = 0
    """From strip to strip beside that, for each latent of a visit."""
    resting: int = 0
    """On the host beside the planes."""
    results: int = 0
    """On the host, for each latent of a visit: those that take another place than the planes, and what strips hand on."""
    moved: int = 0
    """For each latent, to the device and as many back."""


Grid = tuple[int, int, bool]
"""Rows, columns, and whether they are bands."""


class Cut(NamedTuple):
    """A grid in bytes."""

    largest: tuple[int, int]
    """Row and column of the tile that remembers most."""
    history: int
    """Its history."""
    total: int
    """Histories of all tiles."""
    handed: int
    """What bands hand on for every latent."""
    floor: int
    """The largest tile allocates no less."""


_T = TypeVar("_T")


class Measured(Protocol):
    """The result of `measure`, or of an earlier call that was told the same `what`."""

    def __call__(self, measure: Callable[[], _T], *what: Hashable) -> _T: ...


def anew(measure: Callable[[], _T], *what: Hashable) -> _T:
    """`Measured` that remembers nothing."""
    return measure()


@dataclass
class Codings(ABC):
    """The ways to bring one clip through half of an autoencoder."""

    spec: VaeSpec
    weights: Group
    """Of the half."""
    latent: tuple[int, int, int, int]
    """[z, F, h, w]"""
    frame: int
    """Bytes of a frame on the host."""
    dtype: torch.dtype
    rounding: Rounding
    """What the device gives up for a long-lived buffer."""
    measured: Measured = anew

    @cached_property
    def _once(self) -> Once[Codings]:
        return Once(self)

    @property
    @abstractmethod
    def half(self) -> Half: ...

    @abstractmethod
    def tile_scratch(self, tile: Tile, before: Tile | None) -> int:
        """Transient bytes of one visit of a tile. before: the band that hands on to it, if it is one that follows."""

    @abstractmethod
    def under_way(self, tile: Tile) -> int:
        """Bytes on the device of what a tile gave, while it gives the next."""

    @property
    @abstractmethod
    def ends(self) -> Ends:
        """What the middle block is given, and what becomes of its result."""

    @property
    @abstractmethod
    def result(self) -> int:
        """Channels of the middle block's result that do not go where its planes were."""

    @abstractmethod
    def frames_held(self, tiling: Tiling) -> int:
        """Frames on the host at once."""

    def choose(self, vram: int, ram: int, seconds: Seconds) -> Coding:
        """The fastest inside `vram` and `ram` bytes; all frames at the end only if there is no other way.

        If nothing fits: the least VRAM inside `ram`, or else the least RAM inside `vram`, or else the least VRAM.
        """
        best = self._search.best
        found = (
            best(lambda c, n: (n <= vram) & (c.ram <= ram) & ~c.late, seconds)
            or best(lambda c, n: (n <= vram) & (c.ram <= ram), seconds)
            or best(lambda c, n: c.ram <= ram, seconds, lambda c, n: n)
            or best(lambda c, n: n <= vram, seconds, lambda c, n: c.ram)
            or best(lambda c, n: n > 0, seconds, lambda c, n: n)
        )
        assert found is not None
        return self.exactly(found)

    def exactly(self, tiling: Tiling) -> Coding:
        """What a given tiling takes."""
        return self._coding(tiling, self.tile(tiling.grid))

    def _coding(self, tiling: Tiling, tile: int = 0) -> Coding:
        """tile: scratch of the largest."""
        visits, middle, cut = (
            ceil(self.latent[1] / tiling.visit),
            self._middle(tiling),
            self.cut(tiling.grid),
        )
        everything = cut.total + middle.total
        away, largest = not tiling.kept and visits > 1, max(cut.history, middle.largest)
        by_strips = middle.convolved + middle.handed * tiling.visit
        return Coding(
            tiling,
            slab=self.rounding(everything if tiling.kept else (1 + (tiling.ahead and away)) * largest),
            scratch=max(middle.scratch, by_strips, tile) + cut.handed * tiling.visit,
            shelf=everything if away else 0,
            waiting=tiling.visit * (self._plane + middle.results) + middle.resting,
            frames=self.frame * self.frames_held(tiling),
            moved=everything * (visits - 1) if away else 0,
            passed=middle.moved * self.latent[1],
            work=self._work(tiling.grid),
        )

    def _work(self, grid: Grid) -> float:
        """As a multiple of what the whole plane takes; along bands nothing is computed twice."""
        rows, columns, banded = grid
        if banded:
            grid = (rows, 1, False) if self._long else (1, columns, False)
        return self.cut(grid).total / self.cut((1, 1, False)).total

    def _middle(self, tiling: Tiling) -> _Middle:
        if tiling.strips == 1:
            return self._once(Codings._whole_middle)
        return self._once(Codings._middle_in_strips, tiling.strips, tiling.resident)

    def late(self, tiling: Tiling) -> bool:
        """Whether all frames wait for the last tile, however long the clip."""
        return not tiling.kept and tiling.visit == self.latent[1] > VISIT

    # ---- the ways, and what is known of them without a run

    @cached_property
    def _search(self) -> Search:
        grids = list(dict.fromkeys(tiling.grid for tiling in self.tilings))
        numbers = {grid: n for n, grid in enumerate(grids)}
        codings = [self._coding(tiling) for tiling in self.tilings]
        handed = np.array([self.cut(c.tiling.grid).handed * c.tiling.visit for c in codings])
        columns = Columns(
            self.tilings,
            grid=np.array([numbers[c.tiling.grid] for c in codings]),
            late=np.array([self.late(c.tiling) for c in codings]),
            least=np.array([c.scratch for c in codings]) - handed,
            beside=np.array([c.slab for c in codings]) + handed,
            ram=np.array([c.ram for c in codings]),
            moved=np.array([c.moved for c in codings]),
            passed=np.array([c.passed for c in codings]),
            ahead=np.array([c.ahead for c in codings]),
            work=np.array([c.work for c in codings]),
        )
        floors = np.array([self.cut(grid).floor for grid in grids])
        return Search(columns, floors, lambda number: self.tile(grids[number]))

    @cached_property
    def tilings(self) -> list[Tiling]:
        """Every tiling that is worth a thought."""
        frames, found = self.latent[1], list[Tiling]()
        strips = [(1, True)] + [(self._strips, here) for here in (True, False) if self._strips > 1]
        visits = {ceil(frames / ceil(frames / VISIT)), frames}
        shorter = {ceil(frames / ceil(frames / n)) for n in (VISIT // 4, VISIT // 2, VISIT)}
        for rows, columns, banded in (*self._grids(), *self._bands()):
            found.append(Tiling(rows, columns, banded=banded))
            found += [
                Tiling(rows, columns, n, kept=False, banded=banded, strips=cut, resident=here, ahead=ahead)
                for n in (shorter if banded else visits)
                for cut, here in strips
                for ahead in ((False, True) if n < frames else (False,))
            ]
        return found

    def _grids(self) -> Iterator[Grid]:
        """Those of tiles that overlap."""
        counts = [[n for n in _COUNTS if n == 1 or n * SMALLEST <= size] for size in self.plane]
        return ((rows, columns, False) for rows in counts[0] for columns in counts[1])

    def _bands(self) -> Iterator[Grid]:
        """Those of bands, alone and in tiles."""
        half, long, (size, other) = self._half, self._long, self.plane[:: -1 if self._long else 1]
        for bands in _COUNTS[1:]:
            if bands * SMALLEST > size or not band_edges(half.tiled, size, bands, half.cells):
                continue
            for tiles in _COUNTS:
                if tiles == 1 or tiles * SMALLEST <= other:
                    yield (tiles, bands, True) if long else (bands, tiles, True)

    def cut(self, grid: Grid) -> Cut:
        """What is known of a grid in closed form."""
        return self._once(Codings._cut, grid)

    def _cut(self, grid: Grid) -> Cut:
        down, across = self._axes(grid)
        frames = down[:, None] * across[None] * self._cell_bytes  # [row, column, memory]
        sizes = packed(frames) @ self._frames
        row, column = divmod(int(sizes.argmax()), grid[1])
        return Cut(
            (row, column),
            int(sizes.max()),
            int(sizes.sum()),
            self._once(Codings._handed_across, grid[0 if self._long else 1]) if grid[2] else 0,
            FLOOR * int(frames[row, column].max()),
        )

    def _handed_across(self, tiles: int) -> int:
        """Bytes that bands hand on for every latent, where so many tiles lie across them."""
        widest = int(self._along(0 if self._long else 1, tiles).sum(axis=1).argmax())
        band = self._line((tiles, 2, True) if self._long else (2, tiles, True), widest)[0]
        return vae_footprint.handed_bytes(band, self.spec, self.dtype, self._half.frames)

    @cached_property
    def _cell_bytes(self) -> NDArray[np.int64]:
        """Of a frame that each memory keeps."""
        return np.array([m.shape[0] * self.dtype.itemsize for m in self._whole_memories])

    @cached_property
    def _frames(self) -> NDArray[np.int64]:
        """That each memory keeps."""
        return np.array([m.frames for m in self._whole_memories])

    # ---- a run

    def tile(self, grid: Grid) -> int:
        """Scratch of the largest tile."""
        return self._once(Codings._run, grid)

    def _run(self, grid: Grid) -> int:
        tile, before = self._largest(grid)
        run = partial(self.tile_scratch, tile, before)
        scratch = self.measured(run, "tile", *self._of_half, tile.window, repr(tile))
        return scratch + self.under_way(tile)

    def _largest(self, grid: Grid) -> tuple[Tile, Tile | None]:
        """The largest tile, and the band before it."""
        row, column = self.cut(grid).largest
        if grid[2]:
            line, band = (row, column) if self._long else (column, row)
            bands = self._line(grid, line)
            return bands[band], bands[band - 1] if band else None
        rows, columns = Tiling(*grid[:2]).spans(self._half.tiled, self._input)
        return make_tile(self._half.tiled, self._input, rows[row], columns[column]), None

    def _line(self, grid: Grid, number: int) -> list[Tile]:
        """The bands of one tile across them."""
        half, size = self._half, self._input
        across = Tiling(*grid[:2]).spans(half.tiled, size)[0 if self._long else 1][number]
        return make_bands(half.tiled, size, 3 + self._long, grid[self._long], half.cells, across)

    @property
    def _input(self) -> tuple[int, int]:
        """Cells of the plane that tiles are given."""
        return self.plane[0] * self._half.cells, self.plane[1] * self._half.cells

    # ---- the half

    @property
    def _long(self) -> int:
        """The axis of the plane along which bands lie, 1 for columns."""
        return long_axis(self.plane) - 3

    def _axes(self, grid: Grid) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Cells [tile, memory] along rows and along columns."""
        rows, columns, banded = grid
        return self._along(0, rows, banded and not self._long), self._along(
            1, columns, banded and bool(self._long)
        )

    def _along(self, axis: int, count: int, banded: bool = False) -> NDArray[np.int64]:
        """See `vae_footprint.remembered_cells`; of the rows (0) or of the columns (1)."""
        return self._once(Codings._cells, self.plane[axis], count, banded)

    def _cells(self, size: int, count: int, banded: bool) -> NDArray[np.int64]:
        run = partial(vae_footprint.remembered_cells, self._half, self.spec, size, count, banded)
        return self.measured(run, "cells", type(self), self.spec, size, count, banded)

    @cached_property
    def _half(self) -> Half:
        return self.half

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return self.spec.shapes()

    @property
    def plane(self) -> tuple[int, int]:
        """Rows and columns of latents."""
        return self.latent[2], self.latent[3]

    @cached_property
    def _whole_memories(self) -> list[Memory]:
        (whole,) = self._half.tiles(Tiling(), self.plane)
        return tile_memories(whole, self._shapes)

    @cached_property
    def _plane(self) -> int:
        """Bytes of what attention sees of a latent."""
        return self._half.middle.channels * numel(self.plane) * self.dtype.itemsize

    def _whole_middle(self) -> _Middle:
        middle = self._half.middle
        scratch = self.measured(
            partial(
                vae_footprint.middle_scratch,
                *(middle, self.ends, self.spec, self.weights, self.plane, self.dtype),
            ),
            *("middle", *self._of_half, self.plane),
        )
        (history,) = middle.memories(1, self.plane, self._shapes)
        nbytes = packed_size(history, self.dtype)
        return _Middle(nbytes, nbytes, scratch)

    @cached_property
    def _strips(self) -> int:
        return most_strips(self._half.middle, self.plane)

    def _middle_in_strips(self, count: int, resident: bool) -> _Middle:
        middle = self._half.middle
        convolved, attended, handed = self.measured(
            partial(
                vae_footprint.strips_scratch,
                *(middle, self.ends, count, self.spec, self.weights, self.plane, self.dtype),
            ),
            *("strips", count, *self._of_half, self.plane),
        )
        sizes = [packed_size(found, self.dtype) for found in middle.memories(count, self.plane, self._shapes)]
        passes = ceil(numel(self.plane) / QUERIES)  # of keys and values, one for each few queries
        there = numel(self.plane) if resident else min(numel(self.plane), KEYS)
        attended += 2 * allocated_size(there * middle.channels * self.dtype.itemsize)
        away = 0 if resident else 2 * self._plane
        left = 0 if resident else handed
        return _Middle(
            largest=max(sizes),
            total=sum(sizes),
            scratch=max(convolved + left, attended),  # what the last strip left for a plane comes and goes
            convolved=convolved,
            handed=handed - left,
            resting=away,
            results=self.result * numel(self.plane) * self.dtype.itemsize + left,
            # a plane goes both ways three times, and what strips leave from each of them to the next
            moved=3 * self._plane + away * (passes + 1) // 2 + 2 * (count - 1) * left,
        )

    @property
    def _of_half(self) -> tuple[Hashable, ...]:
        """What its footprints depend on beside the size."""
        return type(self), self.spec, self.dtype, self.weights.kind
