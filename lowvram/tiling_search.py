"""The search for a tiling: all ways at once as columns of numbers, and a run on meta tensors only of those that matter.

All but what the largest tile of a grid allocates is known in closed form. A grid that was not run takes its floor: less
than that no run says. So what looks best is run; if it still looks best, it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lowvram.models.vae_tiles import Tiling


@dataclass(frozen=True, slots=True)
class Columns:
    """The ways to code a clip, an entry for each. Bytes."""

    tiling: Sequence[Tiling]
    grid: NDArray[np.int64]
    """The number of its grid."""
    late: NDArray[np.bool_]
    least: NDArray[np.int64]
    """Scratch, if a tile took none."""
    beside: NDArray[np.int64]
    """Device memory beside the scratch."""
    ram: NDArray[np.int64]
    moved: NDArray[np.int64]
    passed: NDArray[np.int64]
    ahead: NDArray[np.bool_]
    work: NDArray[np.float64]


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


class Search:
    """Searches among the ways to code a clip. What one finds does not depend on those before: they only spare it runs."""

    def __init__(self, columns: Columns, floors: NDArray[np.int64], run: Callable[[int], int]) -> None:
        """floors: scratch of the largest tile of each grid, at least. run: what it is, by number of the grid."""
        self.columns, self._run = columns, run
        self._scratch, self._known = floors.copy(), np.zeros(len(floors), dtype=np.bool_)

    def best(self, fits: Fits, seconds: Seconds, first: Key | None = None) -> Tiling | None:
        """The first by `first`, or else the fastest, of those that fit; both are told all ways and their VRAM.
        None if none fits."""
        columns = self.columns
        took = np.asarray(seconds(columns))
        while True:
            vram = columns.beside + np.maximum(columns.least, self._scratch[columns.grid])
            pool = np.flatnonzero(fits(columns, vram))
            if not pool.size:
                return None
            if first is not None:
                keys = first(columns, vram)[pool]
                pool = pool[keys == keys.min()]
            pool = pool[took[pool] == took[pool].min()]
            row = int(pool[columns.moved[pool].argmin()])  # moves may cost no time, but are better few
            grid = columns.grid[row]
            if self._known[grid]:
                return columns.tiling[row]
            self._scratch[grid], self._known[grid] = self._run(int(grid)), True
