"""How the autoencoder's plane is cut: the fastest tiling that fits, found without trying them all.

What the histories of a tiling take is known in closed form. What its largest tile allocates besides goes with
that tile's history, closely enough to choose by; a run of the tile on meta tensors has the last word.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from math import ceil
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from lowvram import vae_footprint
from lowvram.coding import Coding
from lowvram.model import Group
from lowvram.models.vae_attention import QUERIES
from lowvram.models.vae_clip import Half
from lowvram.models.vae_history import Memory, packed, packed_size, tile_memories
from lowvram.models.vae_middle import keys_on_device, most_strips
from lowvram.models.vae_tiles import (
    Tile,
    Tiling,
    band_edges,
    joined,
    long_axis,
    make_tile,
)
from lowvram.offload.estimate import Rounding
from lowvram.quant.spec import VaeSpec, numel
from lowvram.tiling_search import Columns, Search, Seconds
from lowvram.vae_footprint import Ends

VISIT = 16
"""Latents that pass a tile before the next has its turn, if histories are moved: 64 frames wait to be whole."""
CAREFUL = 0.6
"""Part of its guess that scratch has at least, where the smallest of all is looked for: a refusal names it."""
SMALLEST = 8
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
    """On the host, for each latent of a visit, if they take another place than the planes."""
    moved: int = 0
    """For each latent, to the device and as many back."""


_Grid = tuple[int, int, bool]
"""Rows, columns, and whether they are bands."""


class _Histories(NamedTuple):
    """Bytes that the tiles of a tiling remember."""

    tiling: Tiling
    largest: int
    total: int


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
    _known: dict[_Grid, tuple[int, int, int, int]] = field(default_factory=dict, init=False)
    """By grid of tiles: history of the largest, of all, scratch of the largest, what bands hand on for every latent."""
    _along_axis: dict[tuple[int, int, bool], NDArray[np.int64]] = field(default_factory=dict, init=False)
    """See `vae_footprint.remembered_cells`; by size of the axis, tiles, and whether they are bands."""
    _overlaps: dict[_Grid, tuple[float, float]] = field(default_factory=dict, init=False)
    _middles: dict[int, _Middle] = field(default_factory=dict, init=False)
    """By number of strips."""
    _rows: dict[int, Coding] = field(default_factory=dict, init=False)

    @property
    @abstractmethod
    def half(self) -> Half: ...

    @abstractmethod
    def tile_scratch(self, tile: Tile, before: Sequence[Tile]) -> int:
        """Transient bytes of one visit of a tile; `before` a band, one that hands on to it."""

    @abstractmethod
    def borders(self, band: Tile) -> int:
        """Bytes that the first band of a plane hands on for every latent."""

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
        best = Search(self).best
        found = (
            best(lambda c, n: (n <= vram) & (c.ram <= ram) & ~c.late, seconds)
            or best(lambda c, n: (n <= vram) & (c.ram <= ram), seconds)
            or best(lambda c, n: c.ram <= ram, seconds, lambda c, n: n, CAREFUL)
            or best(lambda c, n: n <= vram, seconds, lambda c, n: c.ram, CAREFUL)
            or best(lambda c, n: n > 0, seconds, lambda c, n: n, CAREFUL)
        )
        assert found is not None
        return found

    def exactly(self, tiling: Tiling) -> Coding:
        """What a given tiling takes."""
        return self._coding(tiling, *self._settled(tiling))

    def row(self, number: int) -> Coding:
        """What way `number` of the columns takes, exactly."""
        if number not in self._rows:
            self._rows[number] = self.exactly(self._ways[number].tiling)
        return self._rows[number]

    def settled(self, number: int) -> tuple[int, int, int]:
        """Of the grid of way `number`: history and scratch of the largest tile, what bands hand on for every latent."""
        largest, _, scratch, handed = self._settled(self._ways[number].tiling)
        return largest, scratch, handed

    def _settled(self, tiling: Tiling) -> tuple[int, int, int, int]:
        if tiling.grid not in self._known:
            self._known[tiling.grid] = self._settle(tiling)
        return self._known[tiling.grid]

    def _settle(self, tiling: Tiling) -> tuple[int, int, int, int]:
        down, across = self._axes(tiling.grid)
        frames = np.array([m.frames for m in self._whole_memories])
        row_bytes = np.array([m.shape[0] * self.dtype.itemsize for m in self._whole_memories])
        sizes = packed(down[:, None] * across[None] * row_bytes) @ frames
        half, cells = self._half, self._half.cells
        row, column = divmod(int(sizes.argmax()), tiling.columns)
        plane = self.plane[0] * cells, self.plane[1] * cells
        before: Sequence[Tile] = ()
        handed = 0
        if tiling.banded:
            line, band = (row, column)[:: 1 if self._long else -1]
            bands = tiling.lines(half.tiled, plane, cells)[line]
            tile, before = bands[band], [joined(bands[:band])] if band else []
            handed = self.measured(partial(self.borders, bands[0]), "borders", *self._of_half, repr(bands[0]))
        else:
            rows, columns = tiling.spans(half.tiled, plane)
            tile = make_tile(half.tiled, plane, rows[row], columns[column])
        scratch = self.measured(
            partial(self.tile_scratch, tile, before), "tile", *self._of_half, tile.window, repr(tile)
        ) + self.under_way(tile)
        return int(sizes.max()), int(sizes.sum()), scratch, handed

    def _coding(
        self, tiling: Tiling, largest: int, total: int, tile_scratch: int = 0, handed: int = 0
    ) -> Coding:
        visits, middle = ceil(self.latent[1] / tiling.visit), self._middle(tiling.strips)
        everything = total + middle.total
        away, largest = not tiling.kept and visits > 1, max(largest, middle.largest)
        return Coding(
            tiling,
            slab=self.rounding(everything if tiling.kept else (1 + (tiling.ahead and away)) * largest),
            scratch=self._scratch(tiling, tile_scratch, handed),
            shelf=everything if away else 0,
            waiting=tiling.visit * (self._plane + middle.results) + middle.resting,
            frames=self.frame * self.frames_held(tiling),
            moved=everything * (visits - 1) if away else 0,
            passed=middle.moved * self.latent[1],
            work=self._work(tiling.grid),
        )

    def _scratch(self, tiling: Tiling, of_tile: int, handed: int) -> int:
        middle = self._middle(tiling.strips)
        by_strips = middle.convolved + middle.handed * tiling.visit
        return max(middle.scratch, by_strips, of_tile) + handed * tiling.visit

    def _work(self, grid: _Grid) -> float:
        """As a multiple of what the whole plane takes; along bands nothing is computed twice."""
        return self._overlap(self._across(grid))[0]

    def _guessed_borders(self, grid: _Grid) -> int:
        """What bands hand on for every latent, in proportion to the largest tile across them."""
        return int(self._handed * self._overlap(self._across(grid))[1]) if grid[2] else 0

    def _overlap(self, grid: _Grid) -> tuple[float, float]:
        """What tiles, and the largest of them, remember as a multiple of what the whole plane does."""
        if grid not in self._overlaps:
            sizes, whole = self._sizes(grid), self._sizes((1, 1, False)).sum()
            self._overlaps[grid] = float(sizes.sum() / whole), float(sizes.max() / whole)
        return self._overlaps[grid]

    def _across(self, grid: _Grid) -> _Grid:
        """What of a grid overlaps: all of it, or the tiles across its bands."""
        rows, columns, banded = grid
        if not banded:
            return grid
        return (rows, 1, False) if self._long else (1, columns, False)

    def _middle(self, strips: int) -> _Middle:
        if strips not in self._middles:
            self._middles[strips] = self._whole_middle() if strips == 1 else self._middle_in_strips(strips)
        return self._middles[strips]

    def _late(self, tiling: Tiling) -> bool:
        """Whether all frames wait for the last tile, however long the clip."""
        return not tiling.kept and tiling.visit == self.latent[1] > VISIT

    # ---- what is known in closed form

    @cached_property
    def columns(self) -> Columns:
        """Every way as far as it is known in closed form."""
        ways, first = self._ways, dict[_Grid, _Histories]()
        for each in self._histories:
            first.setdefault(each.tiling.grid, each)
        numbers = {grid: n for n, grid in enumerate(first)}
        return Columns(
            grid=np.array([numbers[way.tiling.grid] for way in ways]),
            late=np.array([self._late(way.tiling) for way in ways]),
            least=np.array([way.scratch for way in ways]),
            visit=np.array([way.tiling.visit for way in ways]),
            slab=np.array([way.slab for way in ways]),
            ram=np.array([way.ram for way in ways]),
            moved=np.array([way.moved for way in ways]),
            passed=np.array([way.passed for way in ways]),
            ahead=np.array([way.ahead for way in ways]),
            work=np.array([way.work for way in ways]),
            largest=np.array([each.largest for each in first.values()]),
            banded=np.array([banded for _, _, banded in first]),
            handed=np.array([self._guessed_borders(grid) for grid in first]),
        )

    @cached_property
    def _ways(self) -> list[Coding]:
        """One for each of `_histories`, without scratch until its grid is known."""
        return [self._coding(*histories) for histories in self._histories]

    @cached_property
    def _histories(self) -> list[_Histories]:
        """Of every tiling that is worth a thought."""
        frames, found, strips = self.latent[1], [], sorted({1, self._strips})
        visits = {ceil(frames / ceil(frames / VISIT)), frames}
        shorter = {ceil(frames / ceil(frames / n)) for n in (VISIT // 4, VISIT // 2, VISIT)}
        for grid in (*self._grids(), *self._bands()):
            sizes, banded = self._sizes(grid), grid[2]
            largest, total = int(sizes.max()), int(sizes.sum())
            found.append(_Histories(Tiling(*grid[:2], banded=banded), largest, total))
            found += [
                _Histories(
                    Tiling(*grid[:2], n, kept=False, banded=banded, strips=cut, ahead=ahead), largest, total
                )
                for n in (shorter if banded else visits)
                for cut in strips
                for ahead in ((False, True) if n < frames else (False,))
            ]
        return found

    def _grids(self) -> Iterator[_Grid]:
        """Those of tiles that overlap."""
        counts = [[n for n in _COUNTS if n == 1 or n * SMALLEST <= size] for size in self.plane]
        return ((rows, columns, False) for rows in counts[0] for columns in counts[1])

    def _bands(self) -> Iterator[_Grid]:
        """Those of bands, alone and in tiles."""
        half, long, (size, other) = self._half, self._long, self.plane[:: -1 if self._long else 1]
        for bands in _COUNTS[1:]:
            if bands * SMALLEST > size or not band_edges(half.tiled, size, bands, half.cells):
                continue
            for tiles in _COUNTS:
                if tiles == 1 or tiles * SMALLEST <= other:
                    yield (tiles, bands, True) if long else (bands, tiles, True)

    def _sizes(self, grid: _Grid) -> NDArray[np.int64]:
        """Bytes [row, column] that tiles remember."""
        down, across = self._axes(grid)
        return (down * self._per_cell) @ across.T

    @cached_property
    def _per_cell(self) -> NDArray[np.int64]:
        """Bytes that each memory has for a cell."""
        of = (m.frames * m.shape[0] * self.dtype.itemsize for m in self._whole_memories)
        return np.array([*of], dtype=np.int64)

    @property
    def _long(self) -> int:
        """The axis of the plane along which bands lie, 1 for columns."""
        return long_axis(self.plane) - 3

    def _axes(self, grid: _Grid) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Cells [tile, memory] along rows and along columns."""
        rows, columns, banded = grid
        return self._along(0, rows, banded and not self._long), self._along(
            1, columns, banded and bool(self._long)
        )

    def _along(self, axis: int, count: int, banded: bool = False) -> NDArray[np.int64]:
        """See `vae_footprint.remembered_cells`; of the rows (0) or of the columns (1)."""
        what = self.plane[axis], count, banded
        if what not in self._along_axis:
            self._along_axis[what] = self.measured(
                partial(vae_footprint.remembered_cells, self._half, self.spec, *what),
                "cells",
                type(self),
                self.spec,
                *what,
            )
        return self._along_axis[what]

    @cached_property
    def _handed(self) -> int:
        """Bytes handed from band to band for every latent, where bands cross the whole plane."""
        rows, columns, _ = next(iter(self._bands()))
        first = self._half.tiles(Tiling(rows, columns, banded=True), self.plane)[0]
        return self.measured(partial(self.borders, first), "borders", *self._of_half, repr(first))

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
    def _whole(self) -> int:
        return packed_size(self._whole_memories, self.dtype)

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

    def _middle_in_strips(self, count: int) -> _Middle:
        middle = self._half.middle
        convolved, attended, handed = self.measured(
            partial(
                vae_footprint.strips_scratch,
                *(middle, self.ends, count, self.spec, self.weights, self.plane, self.dtype),
            ),
            *("strips", count, *self._of_half, self.plane),
        )
        sizes = [packed_size(found, self.dtype) for found in middle.memories(count, self.plane, self._shapes)]
        resting = 0 if keys_on_device(middle, self.plane, self.dtype) else 2 * self._plane
        passes = ceil(numel(self.plane) / QUERIES)  # of keys and values, one for each few queries
        return _Middle(
            largest=max(sizes),
            total=sum(sizes),
            scratch=max(convolved, attended),
            convolved=convolved,
            handed=handed,
            resting=resting,
            results=self.result * numel(self.plane) * self.dtype.itemsize,
            moved=3 * self._plane + resting * (passes + 1) // 2,  # a plane goes both ways three times
        )

    @property
    def _of_half(self) -> tuple[Hashable, ...]:
        """What its footprints depend on beside the size."""
        return type(self), self.spec, self.dtype, self.weights.kind
