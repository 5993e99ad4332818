"""What the layers of an autoencoder remember between chunks: how much it is, and where it lies.

Each tile has a history of its own, carried over the whole clip. Tiles are visited in turn, each for some latents at
a time, so that a history kept elsewhere is moved seldom, and frames leave in order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor

from lowvram.models.vae import Layer
from lowvram.models.vae_layers import Conv, Crop, Double, Down, Head, History, Residual, Stage, Up
from lowvram.models.vae_tiles import Flow, Tile, extent
from lowvram.quant.spec import Shape

_ALIGNMENT = 512


@dataclass(frozen=True, slots=True)
class Memory:
    """What one convolution remembers."""

    name: str
    frames: int
    shape: tuple[int, int, int]
    """Channels, rows, columns."""


def memories(
    layers: Sequence[Layer],
    plane: tuple[int, int],
    shapes: Mapping[str, Shape],
    flow: Flow | None = None,
) -> list[Memory]:
    """All that `layers` remember when they are given a `plane` of cells, or a band of it. shapes: of the weights, by
    name."""
    found: list[Memory] = []
    rows, columns = plane

    def remember(name: str, frames: int, *, window: bool) -> None:
        height, width = rows, columns
        if flow is not None:
            cells = flow.window if window else flow.size
            height, width = (cells, columns) if flow.axis == 3 else (rows, cells)
        found.append(Memory(name, frames, (shapes[f"{name}.weight"][1], height, width)))

    for layer in layers:
        match layer:
            case Conv(name=name, radius=radius) if radius:
                remember(name, 2, window=True)
            case Residual(name=name):
                remember(f"{name}.residual.2", 2, window=True)
                flow = flow and flow.through(Conv(name))
                remember(f"{name}.residual.6", 2, window=True)
                flow = flow and flow.through(Conv(name))
            case Head(name=name):
                remember(f"{name}.2", 2, window=True)
            case Double(name=name) | Up(name=name, time=True):
                remember(f"{name}.time_conv", 2, window=False)
            case Stage(layers=inner):
                found += memories(inner, (rows, columns), shapes, flow)
            case Crop(rows=kept_rows, columns=kept_columns):
                rows, columns = len(range(rows)[kept_rows]), len(range(columns)[kept_columns])
        rows, columns = extent(layer, rows), extent(layer, columns)
        if flow is not None and not isinstance(layer, Residual):
            flow = flow.through(layer)
        if isinstance(layer, Down) and layer.time:
            remember(f"{layer.name}.time_conv", 1, window=False)
    return found


def tile_memories(tile: Tile, shapes: Mapping[str, Shape]) -> list[Memory]:
    """All that a tile remembers. shapes: of the weights, by name."""
    rows, columns = tile.window
    return memories(tile.layers, (rows.size, columns.size), shapes, tile.flow)


@dataclass(slots=True)
class PackedHistory(History):
    """A history inside one piece of memory, so that it is moved at once and never grows."""

    places: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)
    """By layer name, a place per frame; oldest first, those not used yet before them."""

    def place(self, name: str) -> Tensor:
        return self.places[name][0]

    def push(self, name: str, frame: Tensor, count: int) -> None:
        History.push(self, name, frame, count)
        oldest, *others = self.places[name]
        self.places[name] = (*others, oldest)

    def shift(self, nbytes: int) -> None:
        """Lie so much further in the same storage from now on; what is remembered has to be copied there."""
        if nbytes == 0:
            return
        self.places = {
            name: tuple(
                v.as_strided(v.shape, v.stride(), v.storage_offset() + nbytes // v.element_size())
                for v in places
            )
            for name, places in self.places.items()
        }
        self.frames = {name: self.places[name][-len(frames) :] for name, frames in self.frames.items()}


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
            place = slab[offset : offset + nbytes].view(dtype).view(1, 1, rows, columns, channels)
            places.append(place.permute(0, 4, 1, 2, 3))
            offset += _frame_size(memory, dtype)
        history.places[memory.name] = tuple(places)
    return history


def _frame_size(memory: Memory, dtype: torch.dtype) -> int:
    return packed(prod(memory.shape) * dtype.itemsize)


def packed(nbytes: Any) -> Any:
    """Bytes that a frame of `nbytes` takes in a `PackedHistory`; of an int or an array of them."""
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


class Shelf(Protocol):
    """Where histories are between visits."""

    def visit(self, number: int) -> AbstractContextManager[History]:
        """The history that has this number in `vae_clip.Half.memories`, for as long as the block lasts."""


@dataclass(slots=True)
class Kept:
    """A shelf that keeps every history where it was made."""

    histories: dict[int, History] = field(default_factory=dict)

    def visit(self, number: int) -> AbstractContextManager[History]:
        return nullcontext(self.histories.setdefault(number, History()))
