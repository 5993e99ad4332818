"""What the autoencoders allocate while they run: the product's own code on meta tensors, at the real geometry.

Every function returns bytes above what its inputs take; histories are planned apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from math import prod
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lowvram.footprint import META, lost_between_visits, meta_params, peak
from lowvram.model import Group
from lowvram.models import vae, vae_clip
from lowvram.models.vae_attention import QUERIES, attend
from lowvram.models.vae_bands import Borders
from lowvram.models.vae_clip import Half
from lowvram.models.vae_handed import handed_on
from lowvram.models.vae_history import Memory, PackedHistory, memories, tile_memories
from lowvram.models.vae_layers import History, Weights
from lowvram.models.vae_middle import Middle
from lowvram.models.vae_tiles import Span, Tile, field_of, make_bands, make_tile, split
from lowvram.offload.budget import allocated_size
from lowvram.quant.spec import VaeSpec
from lowvram.stages.weights import Dense


class _UnderWay(PackedHistory):
    """A history of a clip that has begun: every layer is past its first frames."""

    def first(self, name: str) -> bool:
        return False


def _under_way(found: Sequence[Memory], dtype: torch.dtype) -> _UnderWay:
    places = {
        m.name: tuple(_channels_last((m.shape[0], 1, *m.shape[1:]), dtype) for _ in range(m.frames))
        for m in found
    }
    return _UnderWay(frames=dict(places), places=places)


def _channels_last(shape: tuple[int, int, int, int], dtype: torch.dtype) -> Tensor:
    """[1, C, T, H, W], as layers leave their results."""
    channels, *others = shape
    return torch.empty(1, *others, channels, dtype=dtype).permute(0, 4, 1, 2, 3)


# ---- the middle block

PLANE = 64 * 64
"""Latents of the largest plane that is imitated in full; what convolutions take on a larger one is in proportion."""

Enter = Callable[[Tensor, tuple[int, int]], Tensor]
Ends = tuple[Enter, Callable[[Tensor, Tensor], object]]
"""What a middle block is given of a plane, or of a strip, of some size; and what becomes of its result. Both are told
device and dtype by a tensor."""


class InStrips(NamedTuple):
    """What a middle block takes in strips."""

    convolved: int
    """Transient bytes of convolutions, beside what is handed on."""
    attended: int
    """Transient bytes of attention, beside keys and values."""
    handed: int
    """Bytes that strips hand on, for every plane of a visit."""


def decoder_ends(spec: VaeSpec) -> Ends:
    def enter(like: Tensor, size: tuple[int, int]) -> Tensor:
        mean, std = vae.statistics(spec, like)
        return like.new_empty(1, spec.z, 1, *size) * std + mean

    return enter, lambda like, made: None


def encoder_ends(spec: VaeSpec) -> Ends:
    channels = vae_clip.encoder(spec).middle.channels

    def leave(like: Tensor, moments: Tensor) -> object:
        mean, std = vae.statistics(spec, like)
        return (moments[:, : spec.z] - mean).div_(std)

    return lambda like, size: like.new_empty(1, channels, 1, *size), leave


def middle_scratch(
    middle: Middle, ends: Ends, spec: VaeSpec, weights: Group, plane: tuple[int, int], dtype: torch.dtype
) -> int:
    """Transient bytes of a middle block on one whole latent frame of `plane`, its result included."""
    excess = max(1.0, prod(plane) / PLANE)
    size = round(plane[0] / excess), plane[1]
    enter, leave = ends
    with META:
        w, like = Dense(meta_params(weights), dtype), torch.empty((), dtype=dtype)
        history = _under_way(memories(middle.layers, size, spec.shapes()), dtype)

    def before(like: Tensor) -> None:
        held = vae.statistics(spec, like)
        vae.run(middle.before, enter(like, size), w, history)
        del held

    def after(like: Tensor) -> None:
        held = vae.statistics(spec, like)
        leave(like, vae.run(middle.after, like.new_empty(1, middle.channels, 1, *size), w, history))
        del held

    with torch.no_grad():
        convolved = int(max(peak(before, like), peak(after, like)) * excess)
    whole = 4 * allocated_size(prod(plane) * middle.channels * dtype.itemsize)  # x, result, keys, values
    return max(allocated_size(convolved), whole + _attend_scratch(middle, spec, w, plane, dtype))


def strips_scratch(
    middle: Middle,
    ends: Ends,
    count: int,
    spec: VaeSpec,
    weights: Group,
    plane: tuple[int, int],
    dtype: torch.dtype,
) -> InStrips:
    """What a middle block takes in `count` strips of a `plane` of latents."""
    with META:
        w, like = Dense(meta_params(weights), dtype), torch.empty((), dtype=dtype)

    def inner(like: Tensor, size: tuple[int, int]) -> Tensor:
        return like.new_empty(1, middle.channels, 1, *size)

    scratch, handed = 0, 0
    with torch.no_grad():
        for strips, enter in zip(middle.strips(count, plane), (ends[0], inner), strict=True):

            def run(like: Tensor, strip: Tile, history: History, enter: Enter = enter) -> None:
                held = vae.statistics(spec, like)
                rows, columns = strip.window
                vae.run(strip.layers, enter(like, (rows.size, columns.size)), w, history)
                del held

            cells = [strip.window[0].size * strip.window[1].size for strip in strips]
            largest = max(range(1, count - 1), key=lambda n: cells[n], default=0)
            for n in {0, largest, count - 1}:
                history = _visited(spec, strips[n], strips[n - 1] if n else None, dtype)
                scratch = max(scratch, peak(partial(run, strip=strips[n], history=history), like))
            handed = max(handed, handed_bytes(strips[0], spec, dtype, 1))
    rows = min(prod(plane), QUERIES) * middle.channels * dtype.itemsize
    attended = _attend_scratch(middle, spec, w, plane, dtype) + allocated_size(rows)
    return InStrips(scratch, attended, handed)


def _attend_scratch(
    middle: Middle, spec: VaeSpec, w: Weights, plane: tuple[int, int], dtype: torch.dtype
) -> int:
    """Transient bytes of attention beside the plane, its result, keys and values. They are those of any larger plane
    as soon as there are more queries than attend at once."""
    with META:
        rows = torch.empty(min(prod(plane), 2 * QUERIES), middle.channels, dtype=dtype)
        others = [torch.empty_like(rows) for _ in range(3)]
    with torch.no_grad():
        return peak(lambda rows: attend(middle.attention.name, w, rows, *others), rows)


# ---- tiles


def decode_scratch(
    spec: VaeSpec, weights: Group, tile: Tile, dtype: torch.dtype, before: Tile | None = None
) -> int:
    """Transient bytes of one visit of a decoder tile, its window and the conversion of frames to bytes included.

    The first frame tells: what waits for the frames after it is already there. before: the band that hands on to it, if any.
    """

    def run(tile: Tile, like: Tensor, w: Weights, history: History) -> None:
        statistics = vae.statistics(spec, like)  # held meanwhile
        next(_decoded(spec, tile, like, w, history))
        del statistics

    return _tile_scratch(run, spec, weights, tile, dtype, before, frames=1)


def _decoded(spec: VaeSpec, tile: Tile, like: Tensor, w: Weights, history: History) -> Iterator[None]:
    """A latent through a tile: at every frame that it gives, as bytes."""
    window = like.new_empty(1, 4 * spec.decoder_base, 1, *(span.size for span in tile.window))
    for frame in vae.run_framewise(tile.layers, window, w, history):
        vae.to_uint8(vae.unpatchify(frame, spec.patch))
        yield


def encode_scratch(
    spec: VaeSpec, weights: Group, tile: Tile, dtype: torch.dtype, before: Tile | None = None
) -> int:
    """Transient bytes of one visit of an encoder tile: four frames, its window of them and the result included.

    before: the band that hands on to it, if any.
    """
    run = partial(_encoded, spec)
    return _tile_scratch(run, spec, weights, tile, dtype, before, vae_clip.FRAMES)


def _encoded(spec: VaeSpec, tile: Tile, like: Tensor, w: Weights, history: History) -> None:
    """Four frames through a tile."""
    size = [span.stop * spec.patch for span in tile.window]
    statistics = vae.statistics(spec, like)  # held meanwhile
    frames = [like.new_empty(()).expand(3, *size)] * vae_clip.FRAMES
    window = vae_clip.patches(spec, tile, frames, like.device, like.dtype)
    vae.run_pairwise(tile.layers, window, w, history)
    del statistics


Visit = Callable[[Tile, Tensor, Weights, History], None]
"""Brings something through a tile; the tensor says the device and the dtype."""


def _tile_scratch(
    run: Visit,
    spec: VaeSpec,
    weights: Group,
    tile: Tile,
    dtype: torch.dtype,
    before: Tile | None,
    frames: int,
) -> int:
    """frames: that enter the tile for a latent."""
    with META:
        w = Dense(meta_params(weights), dtype)
        like = torch.empty((), dtype=dtype)
    history = _visited(spec, tile, before, dtype, frames)
    with torch.no_grad():
        scratch = peak(lambda like: run(tile, like, w, history), like)
    return scratch + lost_between_visits(scratch)


def _visited(
    spec: VaeSpec, tile: Tile, before: Tile | None, dtype: torch.dtype, frames: int = 1
) -> _UnderWay:
    """The history of a tile that is visited again. What is handed on has its place already, planned apart: a band finds
    what the one `before` left for it, and leaves as much."""
    borders = Borders()
    with META:
        history = _under_way(tile_memories(tile, spec.shapes()), dtype)
        for left in handed_on(before or tile, spec.shapes(), frames) if tile.flow else ():
            borders[left.name] = [_channels_last(left.shape, dtype) for _ in range(left.times)]
    history.band = tile.band(borders)
    return history


def handed_bytes(band: Tile, spec: VaeSpec, dtype: torch.dtype, frames: int) -> int:
    """What a band hands on for every latent, of which so many frames enter it."""
    return sum(
        left.times * allocated_size(prod(left.shape) * dtype.itemsize)
        for left in handed_on(band, spec.shapes(), frames)
    )


def remembered_cells(half: Half, spec: VaeSpec, size: int, count: int, banded: bool) -> NDArray[np.int64]:
    """Cells [tile, memory] that each of `count` tiles, or bands, along an axis of `size` latents remembers."""
    given, shapes = size * half.cells, spec.shapes()
    if banded:
        bands = make_bands(half.tiled, (given, given), 3, count, half.cells)
        return np.array([[m.shape[1] for m in tile_memories(band, shapes)] for band in bands])
    around = max(-field_of(half.tiled, Span(0, half.made)).start // half.cells, 0) + 2
    alike: dict[tuple[int, int, int], list[int]] = {}
    found = []
    for span in split(size, count):
        # tiles of a size differ only by the ends of the plane, where they are near enough to see them
        what = span.size, min(span.start, around), min(size - span.stop, around)
        if what not in alike:
            cells = span.scaled(half.made)
            tile = make_tile(half.tiled, (given, given), cells, cells)
            alike[what] = [m.shape[1] for m in tile_memories(tile, shapes)]
        found.append(alike[what])
    return np.array(found)
