"""The autoencoders in tiles whose result is that of the whole plane: no blending, no seams.

What looks at the whole plane (the middle block's attention) runs on the whole plane. The rest is convolutions:
what a rectangle of output depends on is a larger rectangle of input, known layer by layer. A tile is a network
that is given that larger rectangle and crops after every layer to what the next one needs. Zeros are padded at
cuts as at borders, but a cut lies where they cannot reach what is kept.

A tile's history is its own and is carried over the whole clip. Tiles are visited in turn, each for some latents
at a time, so that a history kept elsewhere is moved seldom, and frames leave in order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from math import prod
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lowvram.models import vae
from lowvram.models.vae import Layer
from lowvram.models.vae_layers import Conv, Crop, Double, Down, Head, History, Residual, Stage, Up, Weights
from lowvram.quant.spec import Shape, VaeSpec

_EVERYTHING = 1 << 40
"""More cells than any plane has on a side."""
_ALIGNMENT = 512


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
        case vae.Attention():
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

    def memories(self, shapes: Mapping[str, Shape]) -> list[Memory]:
        """What the tile remembers; `shapes` of the weights, by name."""
        return memories(self.layers, (self.window[0].size, self.window[1].size), shapes)


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

    def tiles(self, layers: Sequence[Layer], plane: tuple[int, int]) -> list[Tile]:
        """The tiles of `layers` on a `plane` of input cells, row by row; cut between latents, evenly."""
        axes = []
        for size, tiles in zip(plane, (self.rows, self.columns), strict=True):
            made = extents(layers, size)[-1]
            latents = min(size, made)
            axes.append([Span(a * made // latents, b * made // latents) for a, b in split(latents, tiles)])
        return [make_tile(layers, plane, rows, columns) for rows in axes[0] for columns in axes[1]]


# ---- what a tile remembers


@dataclass(frozen=True, slots=True)
class Memory:
    """What one convolution remembers."""

    name: str
    frames: int
    shape: tuple[int, int, int]
    """Channels, rows, columns."""


def memories(layers: Sequence[Layer], plane: tuple[int, int], shapes: Mapping[str, Shape]) -> list[Memory]:
    """All that `layers` remember when they are given a `plane` of cells. shapes: of the weights, by name."""
    found: list[Memory] = []
    rows, columns = plane
    for layer in layers:
        names: tuple[str, ...] = ()
        match layer:
            case Conv(name=name, radius=radius) if radius:
                names = (name,)
            case Residual(name=name):
                names = (f"{name}.residual.2", f"{name}.residual.6")
            case Head(name=name):
                names = (f"{name}.2",)
            case Double(name=name) | Up(name=name, time=True):
                names = (f"{name}.time_conv",)
            case Down(name=name, time=True):
                found.append(
                    Memory(
                        f"{name}.time_conv",
                        1,
                        (shapes[f"{name}.time_conv.weight"][1], rows // 2, columns // 2),
                    )
                )
            case Stage(layers=inner):
                found += memories(inner, (rows, columns), shapes)
            case Crop(rows=kept_rows, columns=kept_columns):
                rows, columns = len(range(rows)[kept_rows]), len(range(columns)[kept_columns])
        found += [Memory(name, 2, (shapes[f"{name}.weight"][1], rows, columns)) for name in names]
        rows, columns = extent(layer, rows), extent(layer, columns)
    return found


def decoder_memories(spec: VaeSpec, tiling: Tiling, plane: tuple[int, int]) -> list[list[Memory]]:
    """What the middle block and then each tile of the decoder remembers; `plane` in latents."""
    shapes, tiles = spec.shapes(), tiling.tiles(vae.decoder_upsampling(spec), plane)
    return [memories(vae.decoder_middle(spec), plane, shapes), *(tile.memories(shapes) for tile in tiles)]


@dataclass(slots=True)
class PackedHistory(History):
    """A history inside one piece of memory, so that it is moved at once and never grows."""

    places: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)
    """By layer name, a place per frame; oldest first, those not used yet before them."""

    def keep(self, name: str, x: Tensor, count: int) -> None:
        fresh = min(x.shape[2], count)
        places = self.places[name][fresh:] + self.places[name][:fresh]
        for place, frame in zip(places[-fresh:], x[:, :, -fresh:].split(1, dim=2), strict=True):
            place.copy_(frame)
        known = min(count, len(self.frames.get(name, ())) + fresh)
        self.places[name], self.frames[name] = places, places[-known:]


def packed_size(found: Sequence[Memory], dtype: torch.dtype) -> int:
    """Bytes of a `PackedHistory`."""
    return sum(memory.frames * _frame_size(memory, dtype) for memory in found)


def pack(found: Sequence[Memory], slab: Tensor, dtype: torch.dtype) -> PackedHistory:
    """An empty history inside the first `packed_size` bytes of `slab` (uint8), whose contents do not matter."""
    history, offset = PackedHistory(), 0
    for memory in found:
        places = []
        for _ in range(memory.frames):
            nbytes = prod(memory.shape) * dtype.itemsize
            channels, rows, columns = memory.shape
            places.append(slab[offset : offset + nbytes].view(dtype).view(1, channels, 1, rows, columns))
            offset += _frame_size(memory, dtype)
        history.places[memory.name] = tuple(places)
    return history


def _frame_size(memory: Memory, dtype: torch.dtype) -> int:
    return -(-prod(memory.shape) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT


class Shelf(Protocol):
    """Where histories are between visits."""

    def visit(self, number: int) -> AbstractContextManager[History]:
        """The history of tile `number`, counted from 1, or of the middle block, 0, for as long as the block lasts."""


@dataclass(slots=True)
class Kept:
    """A shelf that keeps every history where it was made."""

    histories: dict[int, History] = field(default_factory=dict)

    def visit(self, number: int) -> AbstractContextManager[History]:
        return nullcontext(self.histories.setdefault(number, History()))


# ---- whole clips


class Piece(NamedTuple):
    """A rectangle of a decoded frame."""

    frame: int
    rows: Span
    columns: Span
    """Pixels."""
    pixels: Tensor
    """[1, 3, 1, rows, columns] about -1..1, not clamped."""


def decode(
    spec: VaeSpec,
    w: Weights,
    latent: Tensor,
    tiling: Tiling,
    shelf: Shelf,
    device: torch.device,
    dtype: torch.dtype,
) -> Iterator[Piece]:
    """`vae.decode` of latent [1, z, F, h, w] in pieces: visit by visit, tile by tile, frame by frame.

    Computed on `device` in `dtype`; what waits for its tile rests where the latent is.
    """
    middle = vae.decoder_middle(spec)
    tiles = tiling.tiles(vae.decoder_upsampling(spec), (latent.shape[3], latent.shape[4]))
    mean, std = vae.statistics(spec, torch.empty((), device=device, dtype=dtype))
    for start in range(0, latent.shape[2], tiling.visit):
        with shelf.visit(0) as history:
            visitors = latent[:, :, start : start + tiling.visit].split(1, dim=2)
            planes = [
                vae.run(middle, z.to(device, dtype) * std + mean, w, history).to(latent.device)
                for z in visitors
            ]
        for number, tile in enumerate(tiles, 1):
            with shelf.visit(number) as history:
                windows = (tile.cut(plane).to(device) for plane in planes)
                yield from _pieces(spec, w, tile, windows, history, first=max(0, 4 * start - 3))


def _pieces(
    spec: VaeSpec, w: Weights, tile: Tile, windows: Iterator[Tensor], history: History, first: int
) -> Iterator[Piece]:
    """The frames of one visit, the first of which has the number `first`."""
    rows, columns = tile.rows.scaled(spec.patch), tile.columns.scaled(spec.patch)
    for window in windows:
        for y in vae.run_framewise(tile.layers, window, w, history):
            yield Piece(first, rows, columns, vae.unpatchify(y, spec.patch))
            del y  # or it would live through the making of the next
            first += 1


def encode(
    spec: VaeSpec,
    w: Weights,
    video: Tensor,
    tiling: Tiling,
    shelf: Shelf,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    """`vae.encode` of video [1, 3, 1+4k, H, W] -> latent [1, z, 1+k, h, w] in `dtype`, where the video is.

    Computed on `device` in `dtype`.
    """
    layers, middle, patch = vae.encoder_downsampling(spec), vae.encoder_middle(spec), spec.patch
    height, width = video.shape[3], video.shape[4]
    tiles = tiling.tiles(layers, (height // patch, width // patch))
    chunks = [video[:, :, :1], *video[:, :, 1:].split(4, dim=2)]
    channels = spec.base * vae.MULTIPLIERS[-1]
    moments = []
    for start in range(0, len(chunks), tiling.visit):
        visited = chunks[start : start + tiling.visit]
        shape = (1, channels, 1, height // spec.stride[1], width // spec.stride[2])
        planes = [video.new_empty(shape, dtype=dtype) for _ in visited]
        for number, tile in enumerate(tiles, 1):
            rows, columns = (slice(*span.scaled(patch)) for span in tile.window)
            with shelf.visit(number) as history:
                for chunk, plane in zip(visited, planes, strict=True):
                    x = vae.patchify(chunk[..., rows, columns].to(device, dtype), patch)
                    y = vae.run_pairwise(tile.layers, x, w, history)
                    plane[..., slice(*tile.rows), slice(*tile.columns)] = y
        with shelf.visit(0) as history:
            moments += [vae.run(middle, plane.to(device), w, history)[:, : spec.z] for plane in planes]
    mean, std = vae.statistics(spec, moments[0])
    return ((torch.cat(moments, dim=2) - mean) / std).to(video.device)
