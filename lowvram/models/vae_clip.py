"""Whole clips through an autoencoder in tiles, visit by visit: the numbers of `vae.decode` and `vae.encode`.

Frames come and go one by one on the host, so memory does not depend on the length of the clip.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from lowvram.models import vae
from lowvram.models.vae import Layer
from lowvram.models.vae_bands import Borders
from lowvram.models.vae_history import Memory, Shelf, tile_memories
from lowvram.models.vae_layers import History, Weights
from lowvram.models.vae_middle import Middle, empty_plane, in_strips, split
from lowvram.models.vae_tiles import Span, Tile, Tiling
from lowvram.quant.spec import Shape, VaeSpec

FRAMES = 4
"""Frames that become one latent; the first frame becomes one alone."""


@dataclass(frozen=True, slots=True)
class Half:
    """One direction of an autoencoder: the layers that run in tiles, and those that see the whole latent plane."""

    tiled: tuple[Layer, ...]
    middle: Middle
    cells: int
    """Cells on the side of a latent that `tiled` is given."""
    made: int
    """Cells on the side of a latent that `tiled` gives."""
    frames: int
    """That enter `tiled` for a latent."""

    def tiles(self, tiling: Tiling, plane: tuple[int, int]) -> list[Tile]:
        """The tiles on a `plane` of latents, row by row."""
        return tiling.tiles(self.tiled, (plane[0] * self.cells, plane[1] * self.cells), self.cells)

    def memories(
        self, tiling: Tiling, plane: tuple[int, int], shapes: Mapping[str, Shape]
    ) -> list[list[Memory]]:
        """What the middle block, or its strips, and then each tile remembers. shapes: of the weights, by name."""
        of_tiles = (tile_memories(tile, shapes) for tile in self.tiles(tiling, plane))
        return [*self.middle.memories(tiling.strips, plane, shapes), *of_tiles]


def decoder(spec: VaeSpec) -> Half:
    """The middle block first, then upsampling in tiles."""
    top = spec.decoder_base * vae.MULTIPLIERS[-1]
    middle = split(vae.decoder_middle(spec), top)
    return Half(vae.decoder_upsampling(spec), middle, cells=1, made=spec.stride[1] // spec.patch, frames=1)


def encoder(spec: VaeSpec) -> Half:
    """Downsampling in tiles first, then the middle block."""
    cells = spec.stride[1] // spec.patch
    top = spec.base * vae.MULTIPLIERS[-1]
    return Half(
        vae.encoder_downsampling(spec), split(vae.encoder_middle(spec), top), cells, made=1, frames=FRAMES
    )


# ---- decode


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
    half, plane = decoder(spec), (latent.shape[3], latent.shape[4])
    tiles = half.tiles(tiling, plane)
    mean, std = vae.statistics(spec, torch.empty((), device=device, dtype=dtype))
    borders = Borders()

    def scaled(z: Tensor) -> Tensor:
        return z.to(device, dtype) * std + mean

    for start in range(0, latent.shape[2], tiling.visit):
        visitors = latent[:, :, start : start + tiling.visit].split(1, dim=2)
        if tiling.strips == 1:
            with shelf.visit(0) as history:
                planes = [
                    vae.run(half.middle.layers, scaled(z), w, history).to(latent.device) for z in visitors
                ]
        else:
            planes = [empty_plane(half.middle.channels, plane, dtype) for _ in visitors]
            taken = [lambda strip, z=z: scaled(strip.cut(z)) for z in visitors]
            in_strips(half.middle, tiling, w, shelf, device, taken, planes, planes)
        for number, tile in enumerate(tiles, tiling.first):
            with shelf.visit(number) as history:
                history.band = tile.band(borders)
                windows = (tile.cut(plane).to(device) for plane in planes)
                yield from _pieces(spec, w, tile, windows, history, first=max(0, FRAMES * (start - 1) + 1))
        del planes, windows  # or they would live through the making of the next


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


# ---- encode


def encode(
    spec: VaeSpec,
    w: Weights,
    frames: Iterable[Tensor],
    plane: tuple[int, int],
    tiling: Tiling,
    shelf: Shelf,
    device: torch.device,
    dtype: torch.dtype,
) -> Iterator[Tensor]:
    """`vae.encode` of frames [3, H, W] in -1..1, latent by latent: each [1, z, 1, h, w] in `dtype` on `device`.

    plane: latents (h, w) of a frame. The first frame gives a latent, then every four; frames of a latent that is not
    whole must not come. Computed on `device` in `dtype`; frames wait for their tile where they are.
    """
    half = encoder(spec)
    tiles = half.tiles(tiling, plane)
    mean, std = vae.statistics(spec, torch.empty((), device=device, dtype=dtype))
    chunks, borders = _chunks(iter(frames)), Borders()
    while visitors := list(islice(chunks, tiling.visit)):
        planes = [empty_plane(half.middle.channels, plane, dtype) for _ in visitors]
        for number, tile in enumerate(tiles, tiling.first):
            with shelf.visit(number) as history:
                history.band = tile.band(borders)
                for chunk, whole in zip(visitors, planes, strict=True):
                    y = vae.run_pairwise(tile.layers, patches(spec, tile, chunk, device, dtype), w, history)
                    whole[..., slice(*tile.rows), slice(*tile.columns)] = y
                    del y
        del visitors, chunk
        for moments in _moments(spec, tiling, w, planes, shelf, device):
            yield (moments[:, : spec.z].to(device) - mean).div_(std)
            del moments
        del planes, whole


def _moments(
    spec: VaeSpec, tiling: Tiling, w: Weights, planes: list[Tensor], shelf: Shelf, device: torch.device
) -> Iterator[Tensor]:
    """What the middle block makes of every plane [1, C, 1, h, w] of a visit."""
    middle = encoder(spec).middle
    if tiling.strips == 1:
        with shelf.visit(0) as history:
            for whole in planes:
                yield vae.run(middle.layers, whole.to(device), w, history)
        return
    made = [empty_plane(2 * spec.z, (p.shape[3], p.shape[4]), p.dtype) for p in planes]
    taken = [lambda strip, whole=whole: strip.cut(whole).to(device) for whole in planes]
    in_strips(middle, tiling, w, shelf, device, taken, planes, made)
    yield from made


def _chunks(frames: Iterator[Tensor]) -> Iterator[list[Tensor]]:
    """The frames of every latent."""
    count = 1
    while chunk := list(islice(frames, count)):
        yield chunk
        count = FRAMES


def patches(
    spec: VaeSpec, tile: Tile, chunk: list[Tensor], device: torch.device, dtype: torch.dtype
) -> Tensor:
    """What an encoder tile is given of a chunk of frames [3, H, W]: [1, C, T, rows, columns], patchified."""
    rows, columns = (span.scaled(spec.patch) for span in tile.window)
    x = torch.empty(1, 3, len(chunk), rows.size, columns.size, device=device, dtype=dtype)
    for n, frame in enumerate(chunk):
        x[0, :, n].copy_(frame[:, slice(*rows), slice(*columns)])
    return vae.patchify(x, spec.patch)
