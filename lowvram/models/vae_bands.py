"""Bands: tiles side by side along one axis, each of which goes on where the one before it had to stop.

A convolution makes the cells that it knows all neighbours of. The last cells that it was given are handed to the next
band, which is given them before its own; so every cell is computed once. The further inside a network, the further
a band lags behind its input; the last band catches up.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

Borders = dict[str, list[Tensor]]
"""What the band before handed on, by layer: a tensor for each time that the layer was called during the visit."""


@dataclass(slots=True)
class Band:
    """One band during one visit. Tensors are [B, C, T, H, W]."""

    axis: int
    """Along which bands lie: 3 for rows, 4 for columns."""
    first: bool
    last: bool
    borders: Borders
    """Handed from band to band: each finds what was left for it and leaves its own in the same place."""
    rest: torch.device | None = None
    """Where it lies meanwhile; None: where it was made."""
    turns: Counter[str] = field(default_factory=Counter)
    """Calls so far, by layer."""

    @property
    def padding(self) -> tuple[int, int]:
        """Rows and columns of zeros that a convolution of what is `given` needs."""
        return (0, 1) if self.axis == 3 else (1, 0)

    def given(
        self,
        name: str,
        x: Tensor,
        place: Tensor | None = None,
        fill: Callable[[Tensor, Tensor], object] | None = None,
        step: int = 1,
    ) -> Tensor:
        """What a convolution of three taps takes: `x` behind what was handed on, zeros at the plane's ends.

        place  where it has to lie, if not anywhere
        fill   writes to its second argument what is made of the first: by default a copy
        step   of the convolution; with a step of two there are no zeros before the first cell
        """
        handed = self._handed(name, x)
        zeros = int(self.first and step == 1)
        before = zeros if handed is None else handed.shape[self.axis]
        size = before + x.shape[self.axis] + self.last
        if place is None:
            b, c, t, height, width = x.shape
            rows, columns = (size, width) if self.axis == 3 else (height, size)
            place = x.new_empty(b, t, rows, columns, c).permute(0, 4, 1, 2, 3)
        if handed is not None:
            place.narrow(self.axis, 0, before).copy_(handed)
        elif zeros:
            place.narrow(self.axis, 0, 1).zero_()
        (fill or _copy)(x, place.narrow(self.axis, before, x.shape[self.axis]))
        if self.last:
            place.narrow(self.axis, size - 1, 1).zero_()
        made = (size - 3) // step + 1
        self._hand_on(name, place.narrow(self.axis, step * made, size - step * made))
        return place

    def add(self, name: str, fresh: Tensor, x: Tensor) -> Tensor:
        """fresh + x where x is ahead of it: what of x is too early is added by the next band. Writes to `fresh`."""
        handed, count = self._handed(name, x), fresh.shape[self.axis]
        late = 0 if handed is None else handed.shape[self.axis]
        if handed is not None:
            fresh.narrow(self.axis, 0, late).add_(handed)
        fresh.narrow(self.axis, late, count - late).add_(x.narrow(self.axis, 0, count - late))
        self._hand_on(name, x.narrow(self.axis, count - late, x.shape[self.axis] - count + late))
        return fresh

    def late(self, name: str, x: Tensor, count: int) -> Tensor:
        """The first `count` cells of what was handed on and x; the others are for the next band."""
        handed = self._handed(name, x)
        if handed is not None:
            x = torch.cat([handed, x], dim=self.axis)
        self._hand_on(name, x.narrow(self.axis, count, x.shape[self.axis] - count))
        return x.narrow(self.axis, 0, count)

    def _handed(self, name: str, x: Tensor) -> Tensor | None:
        """Where x is."""
        return None if self.first else self.borders[name][self.turns[name]].to(x.device)

    def _hand_on(self, name: str, cells: Tensor) -> None:
        turn, left = self.turns[name], self.borders.setdefault(name, [])
        self.turns[name] += 1
        if self.last:
            return
        if turn == len(left):
            left.append(cells.to(self.rest or cells.device, copy=True))
        elif left[turn].shape == cells.shape:
            left[turn].copy_(cells)
        else:
            left[turn] = cells.to(self.rest or cells.device, copy=True)


def _copy(x: Tensor, place: Tensor) -> None:
    place.copy_(x)
