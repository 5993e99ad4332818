"""The middle block of an autoencoder, whole or in strips.

In strips its convolutions see a few columns (or rows) of the latent plane at a time, as bands do, and its attention a few pixels;
planes rest elsewhere meanwhile. Results are those of the whole plane.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from lowvram.models import vae
from lowvram.models.vae import Layer
from lowvram.models.vae_attention import Attention, attend
from lowvram.models.vae_bands import Borders
from lowvram.models.vae_history import Memory, Shelf, memories, tile_memories
from lowvram.models.vae_layers import Weights
from lowvram.models.vae_tiles import Tile, Tiling, band_edges, long_axis, make_bands
from lowvram.quant.spec import Shape

WIDTH = 8
"""Latents across a strip, at least: fewer would mostly be borders."""


@dataclass(frozen=True, slots=True)
class Middle:
    """Convolutions, attention, convolutions."""

    before: tuple[Layer, ...]
    attention: Attention
    after: tuple[Layer, ...]
    channels: int
    """Of the plane that attention sees."""

    @property
    def layers(self) -> tuple[Layer, ...]:
        return (*self.before, self.attention, *self.after)

    def strips(self, count: int, plane: tuple[int, int]) -> list[list[Tile]]:
        """`count` strips of a `plane` of latents: those before and those after attention."""
        axis = long_axis(plane)
        return [make_bands(layers, plane, axis, count, 1) for layers in (self.before, self.after)]

    def memories(self, count: int, plane: tuple[int, int], shapes: Mapping[str, Shape]) -> list[list[Memory]]:
        """What the block remembers, or each of `count` strips in the order they are visited. shapes: of the weights."""
        if count == 1:
            return [memories(self.layers, plane, shapes)]
        return [tile_memories(strip, shapes) for part in self.strips(count, plane) for strip in part]


def split(layers: Sequence[Layer], channels: int) -> Middle:
    """The layers of a middle block around its attention."""
    ((at, attention),) = ((n, layer) for n, layer in enumerate(layers) if isinstance(layer, Attention))
    return Middle(tuple(layers[:at]), attention, tuple(layers[at + 1 :]), channels)


def most_strips(middle: Middle, plane: tuple[int, int]) -> int:
    """Strips of WIDTH latents; 1 if the plane has too few."""
    size = max(plane)
    count = size // WIDTH
    enough = all(band_edges(layers, size, count, 1) for layers in (middle.before, middle.after) if count)
    return count if enough and count > 1 else 1


def empty_plane(channels: int, plane: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """[1, C, 1, h, w] on the host, channels last: what attention sees as rows without a copy."""
    return torch.empty(1, 1, *plane, channels, dtype=dtype).permute(0, 4, 1, 2, 3)


def in_strips(
    middle: Middle,
    tiling: Tiling,
    w: Weights,
    shelf: Shelf,
    device: torch.device,
    taken: Sequence[Callable[[Tile], Tensor]],
    planes: Sequence[Tensor],
    made: Sequence[Tensor],
) -> None:
    """Bring the planes of a visit through the block in the strips of `tiling`; histories are the first on the shelf.

    taken   for each, what a strip is given of it, on `device`
    planes  where each rests meanwhile; of `empty_plane`
    made    where its results go; may be `planes`
    """
    size = planes[0].shape[3], planes[0].shape[4]
    before, after = middle.strips(tiling.strips, size)
    rest = device if tiling.resident else planes[0].device
    _convolved(before, w, shelf, 0, taken, planes, rest)
    keys, values = (
        torch.empty(prod(size), middle.channels, dtype=planes[0].dtype, device=rest) for _ in "kv"
    )
    for plane in planes:
        rows = plane.permute(0, 2, 3, 4, 1).view(-1, middle.channels)
        attend(middle.attention.name, w, rows, rows, keys, values)
    del keys, values
    again = [lambda strip, plane=plane: strip.cut(plane).to(device) for plane in planes]
    _convolved(after, w, shelf, tiling.strips, again, made, rest)


def _convolved(
    strips: Sequence[Tile],
    w: Weights,
    shelf: Shelf,
    first: int,
    taken: Sequence[Callable[[Tile], Tensor]],
    made: Sequence[Tensor],
    rest: torch.device,
) -> None:
    """Each strip in its turn. What it makes lies behind what it was given, so a plane may be written over."""
    borders = Borders()
    for number, strip in enumerate(strips, first):
        with shelf.visit(number) as history:
            history.band = strip.band(borders, rest)
            for take, plane in zip(taken, made, strict=True):
                plane[..., slice(*strip.rows), slice(*strip.columns)] = vae.run(
                    strip.layers, take(strip), w, history
                )
            history.band = None  # it holds what was handed on
