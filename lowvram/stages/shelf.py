"""Where the histories of an autoencoder's tiles are while it runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate

import torch

from lowvram.models.vae_history import Memory, pack, packed_size
from lowvram.models.vae_layers import History
from lowvram.offload.device import Device


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
