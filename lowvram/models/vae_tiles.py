"""The autoencoders in tiles whose result is that of the whole plane: no blending, no seams.

What looks at the whole plane (the middle block's attention) runs on the whole plane. The rest is convolutions:
what a rectangle of output depends on is a larger rectangle of input, known layer by layer. A tile is a network
that is given that larger rectangle and crops after every layer to what the next one needs. Zeros are padded at
cuts as at borders, but a cut lies where they cannot reach what is kept.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from lowvram.models.vae import Layer
from lowvram.models.vae_attention import Attention
from lowvram.models.vae_bands import Band, Borders
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
    if isinstance(layer, Stage):
        return size * layer.space if layer.up else size // layer.space
    return 2 * size if isinstance(layer, Up) else size // 2 if isinstance(layer, Down) else size


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


# ---- bands


class Flow(NamedTuple):
    """Cells start <= i < stop, of an axis of `end` cells, that a band is given: the bands before it had the others."""

    axis: int
    """Of a tensor [B, C, T, H, W]."""
    start: int
    stop: int
    end: int

    @property
    def size(self) -> int:
        return self.stop - self.start

    @property
    def window(self) -> int:
        """Cells that a convolution of three taps takes: two that were handed on, or the zeros at an end, among them."""
        return self.size + (1 if self.start == 0 else 2) + (self.stop == self.end)

    def through(self, layer: Layer) -> Flow:
        """The cells that `layer` makes of these. What is cropped is cropped across bands."""
        if isinstance(layer, Crop):
            return self
        start, stop = (made(layer, cells, self.end) for cells in (self.start, self.stop))
        return Flow(self.axis, start, stop, extent(layer, self.end))


def made(layer: Layer, stop: int, end: int) -> int:
    """Output cells that a layer can make as long as it knows `stop` of its `end` input cells."""
    if stop in (0, end):
        return extent(layer, stop)
    match layer:
        case Conv(radius=radius):
            cells = stop - radius
        case Head():
            cells = stop - 1
        case Residual():
            cells = stop - 2
        case Up():
            cells = 2 * (stop - 1)
        case Down():
            cells = (stop - 1) // 2
        case Stage(layers=inner):
            cells = stop
            for part in inner:
                cells, end = made(part, cells, end), extent(part, end)
        case Double():
            cells = stop
        case Attention() | Crop():
            raise ValueError(f"{layer} along a band")
    return max(cells, 0)


def long_axis(plane: tuple[int, int]) -> int:
    """Along which bands lie, 3 for rows and 4 for columns: those along the longer axis have the shorter borders."""
    return 4 if plane[1] >= plane[0] else 3


def lag(layers: Sequence[Layer]) -> int:
    """Input cells that must be known before the first output cell can be made."""

    def enough(stop: int) -> bool:
        return reduce(lambda cells, layer: made(layer, cells, _EVERYTHING), layers, stop) > 0

    high = 1
    while not enough(high):
        high *= 2
    return bisect_left(range(high + 1), True, key=enough)


def band_edges(layers: Sequence[Layer], size: int, bands: int, cell: int) -> list[int]:
    """Where an axis of `size` latents, each of `cell` input cells, is cut into `bands`, ends included; empty if it
    is too short.

    The first is wider and the last narrower, so that deep inside, where memory goes, they are about even.
    """
    late = -(-lag(layers) // cell)
    ahead = min(3 * late // 5, size // bands // 2)
    edges = [0, *(max(size * i // bands + ahead, late) for i in range(1, bands)), size]
    return edges if all(a < b for a, b in pairwise(edges)) else []


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
    flow: Flow | None = None
    """What it is given, if it is a band."""

    def band(self, borders: Borders, rest: torch.device | None = None) -> Band | None:
        """Its part in a visit, if it is a band; `borders` pass from each band to the next and lie on `rest` meanwhile, by
        default where they were made."""
        if self.flow is None:
            return None
        return Band(self.flow.axis, self.flow.start == 0, self.flow.stop == self.flow.end, borders, rest)

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


def make_bands(
    layers: Sequence[Layer],
    plane: tuple[int, int],
    axis: int,
    bands: int,
    cell: int,
    across: Span | None = None,
) -> list[Tile]:
    """The `plane` of input cells in bands along `axis`, 3 for rows and 4 for columns; cut between latents.

    across: the output cells of the other axis; the bands are then a tile's, with what lies around it there.
    """
    edges = band_edges(layers, plane[axis - 3] // cell, bands, cell)
    if not edges:
        raise ValueError(f"{plane} cells are too few for {bands} bands")
    along, other = (Span(0, extents(layers, size)[-1]) for size in (plane[axis - 3], plane[4 - axis]))
    across = across or other
    whole = make_tile(layers, plane, *((across, along) if axis == 4 else (along, across)))
    around, tiles = whole.window[4 - axis], []
    for start, stop in pairwise(edges):
        flow = given = Flow(axis, start * cell, stop * cell, plane[axis - 3])
        for layer in whole.layers:
            flow = flow.through(layer)
        spans, window = (Span(flow.start, flow.stop), across), (Span(given.start, given.stop), around)
        if axis == 4:
            spans, window = spans[::-1], window[::-1]
        tiles.append(Tile(*spans, window, whole.layers, given))
    return tiles


def joined(bands: Sequence[Tile]) -> Tile:
    """One band in place of several side by side. What a band hands on depends only on where it ends."""
    first, last = bands[0], bands[-1]
    assert first.flow is not None and last.flow is not None
    return Tile(
        _hull(first.rows, last.rows),
        _hull(first.columns, last.columns),
        (_hull(first.window[0], last.window[0]), _hull(first.window[1], last.window[1])),
        first.layers,
        first.flow._replace(stop=last.flow.stop),
    )


def _hull(first: Span, last: Span) -> Span:
    return Span(first.start, last.stop)


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
    banded: bool = False
    """Whether tiles are bands along the longer axis, and hand on what lies at their borders, so that nothing is computed
    twice along it. Across it, tiles that overlap have bands each."""
    strips: int = 1
    """Bands along the longer axis in which the middle block's convolutions see its plane; 1 if whole."""
    resident: bool = True
    """Whether keys and values of attention, and what strips hand on, stay on the device, if the middle block is in strips.
    Otherwise keys and values pass by for each few queries."""
    ahead: bool = False
    """Whether the history of the next tile comes, and that of the last one goes, while a tile is computed; if not kept."""

    @property
    def first(self) -> int:
        """The number of the first tile: those before it are of the middle block, or of its strips before attention
        and after it."""
        return 1 if self.strips == 1 else 2 * self.strips

    @property
    def words(self) -> str:
        """How the plane is cut, in words."""
        if self.count == 1:
            return "whole frames"
        if not self.banded:
            return f"{self.rows} x {self.columns} tiles"
        one_line = 1 in (self.rows, self.columns)
        return f"{self.count} bands" if one_line else f"{self.rows} x {self.columns} bands"

    @property
    def grid(self) -> tuple[int, int, bool]:
        """How the plane is cut."""
        return self.rows, self.columns, self.banded

    @property
    def count(self) -> int:
        """Tiles."""
        return self.rows * self.columns

    def spans(self, layers: Sequence[Layer], plane: tuple[int, int]) -> tuple[list[Span], list[Span]]:
        """Rows and columns of output cells of the tiles; cut between latents, evenly."""
        axes = []
        for size, tiles in zip(plane, (self.rows, self.columns), strict=True):
            made = extents(layers, size)[-1]
            latents = min(size, made)
            axes.append([Span(a * made // latents, b * made // latents) for a, b in split(latents, tiles)])
        return axes[0], axes[1]

    def tiles(self, layers: Sequence[Layer], plane: tuple[int, int], cell: int = 1) -> list[Tile]:
        """The tiles of `layers` on a `plane` of input cells, `cell` of them on a latent's side: row by row, or line by
        line."""
        if self.banded:
            return [band for line in self.lines(layers, plane, cell) for band in line]
        down, across = self.spans(layers, plane)
        return [make_tile(layers, plane, rows, columns) for rows in down for columns in across]

    def lines(self, layers: Sequence[Layer], plane: tuple[int, int], cell: int = 1) -> list[list[Tile]]:
        """The bands of every tile across them; a tile's hand on to each other."""
        axis = long_axis(plane)
        bands, spans = (self.rows, self.columns)[axis - 3], self.spans(layers, plane)[4 - axis]
        return [make_bands(layers, plane, axis, bands, cell, across) for across in spans]
