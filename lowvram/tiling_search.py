"""The search for a tiling: all ways as columns of numbers, and a guess for what has not been measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lowvram.coding import Coding


@dataclass(slots=True)
class Columns:
    """The ways to code a clip, an entry for each: all at once are compared faster than one by one."""

    grid: NDArray[np.int64]
    """The number of its grid, in the order of `largest`."""
    late: NDArray[np.bool_]
    least: NDArray[np.int64]
    """Scratch, if a tile took none and nothing were handed on."""
    visit: NDArray[np.int64]
    slab: NDArray[np.int64]
    ram: NDArray[np.int64]
    moved: NDArray[np.int64]
    passed: NDArray[np.int64]
    ahead: NDArray[np.bool_]
    work: NDArray[np.float64]
    largest: NDArray[np.int64]
    """Histories of the largest tile of each grid, in closed form."""
    banded: NDArray[np.bool_]
    """Of each grid."""
    handed: NDArray[np.int64]
    """Of each grid: what bands hand on for every latent, at a guess."""

    def copy(self) -> Columns:
        """Can be put right without changing this."""
        changed = ("slab", "ram", "moved", "work", "handed")
        return replace(self, **{name: getattr(self, name).copy() for name in changed})


class Cost(Protocol):
    """What a forecast depends on: of one `Coding`, or of many at once."""

    @property
    def moved(self) -> Any: ...

    @property
    def passed(self) -> Any: ...

    @property
    def ahead(self) -> Any: ...

    @property
    def work(self) -> Any: ...


def forecast(cost: Cost, whole: float, link: float) -> Any:
    """Seconds, where the whole plane takes `whole` and `link` bytes pass between host and device in one.

    Histories that move ahead do it beside the work.
    """
    computed, moving = cost.work * whole, 2 * cost.moved / link
    worked = np.where(cost.ahead, np.maximum(computed, moving), computed + moving)
    return worked + 2 * cost.passed / link


Seconds = Callable[[Cost], Any]
Fits = Callable[[Columns, NDArray[np.int64]], NDArray[np.bool_]]
Key = Callable[[Columns, NDArray[np.int64]], NDArray[np.int64]]


class Ways(Protocol):
    """The ways to code a clip, numbered."""

    @property
    def columns(self) -> Columns:
        """Every way as far as it is known in closed form."""

    def row(self, number: int) -> Coding:
        """What a way takes, exactly."""

    def settled(self, number: int) -> tuple[int, int, int]:
        """Of the grid of a way: history and scratch of the largest tile, what bands hand on for every latent."""


class Search:
    """One search among the ways to code a clip. What it finds depends on nothing that was asked before."""

    def __init__(self, ways: Ways) -> None:
        self.ways, self.columns = ways, ways.columns.copy()
        grids = len(self.columns.largest)
        self.known = np.zeros(grids, dtype=np.bool_)
        self.per_byte = np.zeros((2, grids))
        """Scratch and history of the grid, among the known ones of the same kind, whose history is nearest to each."""
        self.per_byte[1] = 1
        self.distance = np.full(grids, np.inf)
        self.scratch = np.zeros(grids, dtype=np.int64)
        """Of the largest tile of each known grid."""

    def best(
        self, fits: Fits, seconds: Seconds, first: Key | None = None, doubt: float = 1.0
    ) -> Coding | None:
        """The first by `first`, or else the fastest, of those that fit; both are told all ways and their VRAM.

        Guesses, times `doubt`, lead to it; what is returned is exact.
        """
        columns = self.columns
        while True:
            vram = self._vram(doubt)
            pool = np.flatnonzero(fits(columns, vram))
            if not pool.size:
                return None
            if first is not None:
                keys = first(columns, vram)[pool]
                pool = pool[keys == keys.min()]
            took = np.asarray(seconds(columns))[pool]
            pool = pool[took == took.min()]
            row = int(pool[columns.moved[pool].argmin()])  # moves may cost no time, but are better few
            if self.known[columns.grid[row]]:
                return self.ways.row(row)
            self._settle(row)

    def _vram(self, doubt: float) -> NDArray[np.int64]:
        """Of every way: as far as it is known, else with the scratch of a tile in proportion to its history, as of the grid
        of its kind with the nearest history that is known."""
        columns, (scratch, history) = self.columns, self.per_byte
        guessed = (doubt * columns.largest * scratch / history).astype(np.int64)
        tile = np.where(self.known, self.scratch, guessed)
        handed = columns.handed[columns.grid] * columns.visit
        found: NDArray[np.int64] = columns.slab + np.maximum(columns.least, tile[columns.grid]) + handed
        return found

    def _settle(self, row: int) -> None:
        """Put right what is known of the grid of a way, and guess the others by it."""
        columns = self.columns
        grid = columns.grid[row]
        history, scratch, columns.handed[grid] = self.ways.settled(row)
        self.known[grid], self.scratch[grid] = True, scratch
        for other in np.flatnonzero(columns.grid == grid).tolist():
            way = self.ways.row(other)
            columns.slab[other], columns.ram[other] = way.slab, way.ram
            columns.moved[other], columns.work[other] = way.moved, way.work
        distance = np.abs(np.log(history / columns.largest))
        nearer = (distance < self.distance) & (columns.banded == columns.banded[grid])
        self.distance[nearer] = distance[nearer]
        self.per_byte[:, nearer] = [[scratch], [history]]
