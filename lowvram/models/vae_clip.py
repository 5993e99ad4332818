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
from lowvram.models.vae_history import Memory, Shelf, memories, tile_memories
from lowvram.models.vae_layers import History, Weights
from lowvram.models.vae_tiles import Span, Tile, Tiling
from lowvram.quant.spec import Shape, VaeSpec

FRAMES = 4
"""Frames that become one latent; the first frame becomes one alone."""


@dataclass(frozen=True, slots=True)
class Half:
    """One direction of an autoencoder: the layers that run in tiles, and those that see the whole latent plane."""

    tiled: tuple[Layer, ...]
    middle: tuple[Layer, ...]
    channels: int
    """Of the plane that goes from one to the other."""
    cells: int
    """Cells on the side of a latent that `tiled` is given."""
    made: int
    """Cells on the side of a latent that `tiled` gives."""

    def tiles(self, tiling: Tiling, plane: tuple[int, int]) -> list[Tile]:
        """The tiles on a `plane` of latents, row by row."""
        return tiling.tiles(self.tiled, (plane[0] * self.cells, plane[1] * self.cells), self.cells)

    def memories(
        self, tiling: Tiling, plane: tuple[int, int], shapes: Mapping[str, Shape]
    ) -> list[list[Memory]]:
        """What the middle block and then each tile remembers. shapes: of the weights, by name."""
        of_tiles = (tile_memories(tile, shapes) for tile in self.tiles(tiling, plane))
        return [memories(self.middle, plane, shapes), *of_tiles]


def decoder(spec: VaeSpec) -> Half:
    """The middle block first, then upsampling in tiles."""
    top = spec.decoder_base * vae.MULTIPLIERS[-1]
    return Half(
        vae.decoder_upsampling(spec),
        vae.decoder_middle(spec),
        top,
        cells=1,
        made=spec.stride[1] // spec.patch,
    )


def encoder(spec: VaeSpec) -> Half:
    """Downsampling in tiles first, then the middle block."""
    cells = spec.stride[1] // spec.patch
    top = spec.base * vae.MULTIPLIERS[-1]
    return Half(vae.encoder_downsampling(spec), vae.encoder_middle(spec), top, cells, made=1)


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
    half = decoder(spec)
    tiles = half.tiles(tiling, (latent.shape[3], latent.shape[4]))
    mean, std = vae.statistics(spec, torch.empty((), device=device, dtype=dtype))
    borders = Borders()
    for start in range(0, latent.shape[2], tiling.visit):
        with shelf.visit(0) as history:
            visitors = latent[:, :, start : start + tiling.visit].split(1, dim=2)
            planes = [
                vae.run(half.middle, z.to(device, dtype) * std + mean, w, history).to(latent.device)
                for z in visitors
            ]
        for number, tile in enumerate(tiles, 1):
            with shelf.visit(number) as history:
                history.band = tile.band(borders)
                windows = (tile.cut(plane).to(device) for plane in planes)
                yield from _pieces(spec, w, tile, windows, history, first=max(0, FRAMES * (start - 1) + 1))


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
        planes = [torch.empty(1, half.channels, 1, *plane, dtype=dtype) for _ in visitors]
        for number, tile in enumerate(tiles, 1):
            with shelf.visit(number) as history:
                history.band = tile.band(borders)
                for chunk, whole in zip(visitors, planes, strict=True):
                    y = vae.run_pairwise(tile.layers, patches(spec, tile, chunk, device, dtype), w, history)
                    whole[..., slice(*tile.rows), slice(*tile.columns)] = y
                    del y
        del visitors, chunk
        with shelf.visit(0) as history:
            for whole in planes:
                moments = vae.run(half.middle, whole.to(device), w, history)
                yield (moments[:, : spec.z] - mean).div_(std)
                del moments


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
