"""The autoencoders in tiles whose result is that of the whole plane: no blending, no seams.

What looks at the whole plane (the middle block's attention) runs on the whole plane. The rest is convolutions:
what a rectangle of output depends on is a larger rectangle of input, known layer by layer. A tile is a network
that is given that larger rectangle and crops after every layer to what the next one needs. Zeros are padded at
cuts as at borders, but a cut lies where they cannot reach what is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NamedTuple

from torch import Tensor

from lowvram.models.vae import Attention, Layer
from lowvram.models.vae_layers import Conv, Crop, Double, Down, Head, Residual, Stage, Up

_EVERYTHING = 1 << 40
"""More cells than any plane has on a side."""


class Span(NamedTuple):
    """Cells start <= i < stop of one axis."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start

    def scaled(self, factor: int) -> Span:
        """The same part of an axis with `factor` times as many cells."""
        return Span(self.start * factor, self.stop * factor)


# ---- what depends on what, along one axis


def reach(layer: Layer, span: Span) -> Span:
    """The input cells that decide the output cells `span` on a plane without borders."""
    a, b = span
    match layer:
        case Conv(radius=r):
            return Span(a - r, b + r)
        case Head():
            return Span(a - 1, b + 1)
        case Residual():
            return Span(a - 2, b + 2)
        case Double() | Crop():
            return span
        case Up():  # one more on each side after widening
            return Span((a - 1) // 2, b // 2 + 1)
        case Down():  # output i is made of 2i, 2i + 1 and 2i + 2
            return Span(2 * a, 2 * b + 1)
        case Stage(layers=inner, up=up, space=space):
            shortcut = Span(a // space, -(-b // space)) if up else Span(space * a, space * b)
            around = field_of(inner, span)
            return Span(min(around.start, shortcut.start), max(around.stop, shortcut.stop))
        case Attention():
            return Span(-_EVERYTHING, _EVERYTHING)


def field_of(layers: Sequence[Layer], span: Span) -> Span:
    """`reach` through a row of layers: their receptive field."""
    for layer in reversed(layers):
        span = reach(layer, span)
    return span


def extent(layer: Layer, size: int) -> int:
    """Output cells for `size` input cells."""
    match layer:
        case Up():
            return 2 * size
        case Down():
            return size // 2
        case Stage(space=space, up=up):
            return size * space if up else size // space
        case _:
            return size


def extents(layers: Sequence[Layer], size: int) -> list[int]:
    """Cells that each layer is given of `size`, and those that leave the last."""
    return list(accumulate(layers, lambda n, layer: extent(layer, n), initial=size))


def windows(layers: Sequence[Layer], span: Span, size: int) -> list[Span]:
    """What each layer must be given, and `span` at the end, for output cells `span` that are those of the whole.

    size: cells of the whole input. Clipped where the plane ends; whole blocks for a stage that folds blocks.
    """
    needed = [span]
    for layer, n in zip(reversed(layers), reversed(extents(layers, size)[:-1]), strict=True):
        start, stop = reach(layer, needed[-1])
        block = layer.space if isinstance(layer, Stage) and not layer.up else 1
        needed.append(Span(max(start // block * block, 0), min(-(-stop // block) * block, n)))
    return needed[::-1]


def split(size: int, count: int) -> list[Span]:
    """`size` cells in `count` spans that differ by one cell at most."""
    edges = [size * i // count for i in range(count + 1)]
    return [Span(*ends) for ends in pairwise(edges)]


# ---- tiles


@dataclass(frozen=True, slots=True)
class Tile:
    """A rectangle of a network's output and the network that makes it."""

    rows: Span
    columns: Span
    """Output cells."""
    window: tuple[Span, Span]
    """Rows and columns of input cells that `layers` is given."""
    layers: tuple[Layer, ...]

    def cut(self, x: Tensor) -> Tensor:
        """The window of a whole input [..., H, W]."""
        rows, columns = self.window
        return x[..., slice(*rows), slice(*columns)]


def make_tile(layers: Sequence[Layer], plane: tuple[int, int], rows: Span, columns: Span) -> Tile:
    """The tile that gives the output cells `rows` x `columns` of `layers` on a `plane` of input cells."""
    down, across = (windows(layers, span, size) for span, size in zip((rows, columns), plane, strict=True))
    cropped: list[Layer] = []
    for layer, vertical, horizontal in zip(layers, pairwise(down), pairwise(across), strict=True):
        cropped.append(layer)
        crop = Crop(_crop(layer, *vertical), _crop(layer, *horizontal))
        if crop != Crop(slice(None), slice(None)):
            cropped.append(crop)
    return Tile(rows, columns, (down[0], across[0]), tuple(cropped))


def _crop(layer: Layer, given: Span, kept: Span) -> slice:
    """The cells `kept` of what `layer` makes of its input cells `given`."""
    first = extent(layer, given.start)
    if kept == (first, first + extent(layer, given.size)):
        return slice(None)
    return slice(kept.start - first, kept.stop - first)


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a plane is cut, and how its tiles are visited. Results do not depend on it."""

    rows: int = 1
    columns: int = 1
    """Tiles in each direction."""
    visit: int = 1
    """Latents that pass a tile before the next tile has its turn."""
    kept: bool = True
    """Whether all histories stay on the device."""

    @property
    def grid(self) -> tuple[int, int]:
        return self.rows, self.columns

    def spans(self, layers: Sequence[Layer], plane: tuple[int, int]) -> tuple[list[Span], list[Span]]:
        """Rows and columns of output cells of the tiles; cut between latents, evenly."""
        axes = []
        for size, tiles in zip(plane, (self.rows, self.columns), strict=True):
            made = extents(layers, size)[-1]
            latents = min(size, made)
            axes.append([Span(a * made // latents, b * made // latents) for a, b in split(latents, tiles)])
        return axes[0], axes[1]

    def tiles(self, layers: Sequence[Layer], plane: tuple[int, int]) -> list[Tile]:
        """The tiles of `layers` on a `plane` of input cells, row by row."""
        down, across = self.spans(layers, plane)
        return [make_tile(layers, plane, rows, columns) for rows in down for columns in across]
