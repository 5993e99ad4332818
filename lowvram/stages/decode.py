"""Latent -> frames, as they are made."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lowvram.job import Job
from lowvram.model import Model
from lowvram.models import vae, vae_tiles
from lowvram.models.vae_layers import History
from lowvram.models.vae_tiles import Memory, Piece, Span, pack, packed_size
from lowvram.offload.device import Device
from lowvram.planner import decoder_group
from lowvram.stages.run import Run
from lowvram.stages.weights import Dense

Pixels = NDArray[np.uint8]


def decode(run: Run, model: Model, job: Job, latent: Tensor) -> Iterator[Pixels]:
    """Frames [1, H, W, 3] uint8 RGB in order, from a latent [C, F, H, W] float32 on the host.

    Values are clamped to -1..1 and truncated like upstream: floor(255 * (x + 1) / 2).
    """
    spec, tiling, dtype = model.spec.vae, run.plan.tiling, run.plan.dtype
    plane, tiles = (latent.shape[2], latent.shape[3]), tiling.rows * tiling.columns
    with run.stage("decode") as (stack, traffic):
        params = stack.enter_context(run.loaded("vae", decoder_group(model), traffic))
        memories = vae_tiles.decoder_memories(spec, tiling, plane)
        visits = -(-latent.shape[1] // tiling.visit)
        shelf = Shelf(run.device, memories, dtype, visits, kept=tiling.kept)
        stack.callback(shelf.close)
        pieces = vae_tiles.decode(
            spec, Dense(params, dtype), latent[None], tiling, shelf, run.device.torch_device, dtype
        )
        unfinished: dict[int, tuple[Pixels, int]] = {}
        for done, (number, rows, columns, pixels) in enumerate(_as_bytes(pieces), 1):
            if done % tiles == 0:
                run.listener.step(run.device.ledger.used)
            if tiles == 1:
                yield pixels
                continue
            if number not in unfinished:
                unfinished[number] = np.empty((1, job.height, job.width, 3), np.uint8), tiles
            frame, missing = unfinished.pop(number)
            frame[:, slice(*rows), slice(*columns)] = pixels
            if missing == 1:
                yield frame
            else:
                unfinished[number] = frame, missing - 1


def _as_bytes(pieces: Iterator[Piece]) -> Iterator[tuple[int, Span, Span, Pixels]]:
    while True:
        with torch.inference_mode():  # entered anew for every piece: it must not leak into who takes them
            piece = next(pieces, None)
            if piece is None:
                return
            number, rows, columns, frame = piece
            pixels = to_pixels(frame)
            del piece, frame  # or they would live through the making of the next
        yield number, rows, columns, pixels


def to_pixels(frame: Tensor) -> Pixels:
    """[1, 3, T, H, W] about -1..1 -> [T, H, W, 3] uint8 on the host."""
    return vae.to_uint8(frame).cpu().numpy()


class Shelf:
    """Where the histories of the middle block and of the tiles are between visits.

    All on the device (`kept`), or there in turn: then they are on the host from the first to the last visit.
    """

    def __init__(
        self,
        device: Device,
        memories: Sequence[Sequence[Memory]],
        dtype: torch.dtype,
        visits: int,
        *,
        kept: bool,
    ) -> None:
        sizes = [packed_size(found, dtype) for found in memories]
        starts = list(accumulate(sizes, initial=0))
        slab = torch.empty(starts[-1] if kept else max(sizes), dtype=torch.uint8, device=device.torch_device)
        offsets = starts if kept else [0] * len(sizes)
        self._slabs = [slab[a : a + size] for a, size in zip(offsets, sizes, strict=False)]
        self._histories = [pack(*of, dtype) for of in zip(memories, self._slabs, strict=True)]
        self._device, self._visits, self._seen = device, visits, [0] * len(sizes)
        self._host = None if kept or visits == 1 else device.host_alloc("ram histories", starts[-1])
        self._homes = [slice(a, a + size) for a, size in zip(starts, sizes, strict=False)]

    @contextmanager
    def visit(self, number: int) -> Iterator[History]:
        """The history of tile `number`, or of the middle block, 0, on the device."""
        if self._seen[number]:
            self._move(number, to_host=False)
        yield self._histories[number]
        self._seen[number] += 1
        if self._seen[number] < self._visits:
            self._move(number, to_host=True)

    def _move(self, number: int, *, to_host: bool) -> None:
        if self._host is None:
            return
        ends = self._host.tensor[self._homes[number]], self._slabs[number]
        target, source = ends if to_host else ends[::-1]
        event = self._device.copy_async(target, source, after=self._device.record_compute())
        self._device.wait(event)  # the next tile writes to the same place

    def close(self) -> None:
        """Give back the memory."""
        self._device.synchronize()
        self._histories, self._slabs = [], []
        if self._host is not None:
            self._host.free()
