"""Running an autoencoder in tiles: where their histories are, and what to do when memory runs out after all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import accumulate
from typing import Self, TypeVar

import torch

from lowvram.coding import Coding
from lowvram.errors import OutOfMemoryError
from lowvram.models.vae_history import Memory, pack, packed_size
from lowvram.models.vae_layers import History, Norm
from lowvram.models.vae_tiles import Tiling
from lowvram.offload.device import Device, Event, exhausted
from lowvram.stages.room import SqueezedError, without_frames
from lowvram.tiling import Codings
from lowvram.triton_kernels.vae_norm import rms_silu

Result = TypeVar("Result")

ENDLESS = 1 << 62
"""Bytes of host memory where nobody set a cap."""


class Shelf:
    """Holds the histories of the middle block and of the tiles between visits.

    kept    all of them stay on the device; otherwise each is there for its visit only, and in host memory between its
            first visit and its last
    ahead   two have room on the device: while one is computed with, the one before it is copied to the host and the one
            after it comes
    """

    def __init__(
        self,
        device: Device,
        memories: Sequence[Sequence[Memory]],
        dtype: torch.dtype,
        visits: int,
        *,
        kept: bool,
        ahead: bool = False,
        norm: Norm = rms_silu,
    ) -> None:
        self._sizes = [packed_size(found, dtype) for found in memories]
        starts = list(accumulate(self._sizes, initial=0))
        self._stride = max(self._sizes)
        places = 1 + (ahead and not kept and visits > 1)
        nbytes = starts[-1] if kept else places * self._stride
        self._slab = torch.empty(nbytes, dtype=torch.uint8, device=device.torch_device)
        offsets = starts if kept else [0] * len(memories)
        self._histories = [
            pack(found, self._slab[a : a + size], dtype)
            for found, a, size in zip(memories, offsets, self._sizes, strict=False)
        ]
        for history in self._histories:
            history.norm = norm
        self._device, self._visits, self._seen = device, visits, [0] * len(memories)
        self._host = None if kept or visits == 1 else device.host_alloc("ram histories", starts[-1])
        self._starts, self._at = starts, [0] * len(memories)
        self._here: int | None = None  # whose history is on the device, or on its way there
        self._place = 0  # where it is
        self._copied: list[Event | None] = [None] * places  # the last copy to or from each place
        self._used: list[Event | None] = [None] * places  # the last work with what is there

    @contextmanager
    def visit(self, number: int) -> Iterator[History]:
        """The history that has this number in `memories`, on the device."""
        if self._host is None:
            yield self._histories[number]
            return
        if self._here != number:
            self._fetch(number)
        place = self._place
        if (copied := self._copied[place]) is not None:
            self._device.wait(copied)
        if len(self._copied) > 1:
            self._fetch((number + 1) % len(self._histories))
        yield self._histories[number]
        self._seen[number] += 1
        self._used[place] = self._device.record_compute()
        if self._seen[number] < self._visits:
            self._copied[place] = self._copy(number, place, to_host=True)

    def _fetch(self, number: int) -> None:
        """Give the history a place on the device; what it was before comes there."""
        self._here, self._place = number, (self._place + 1) % len(self._copied)
        self._histories[number].shift((self._place - self._at[number]) * self._stride)
        self._at[number] = self._place
        if 0 < self._seen[number] < self._visits:
            self._copied[self._place] = self._copy(number, self._place, to_host=False)

    def _copy(self, number: int, place: int, *, to_host: bool) -> Event:
        assert self._host is not None
        start, size = self._starts[number], self._sizes[number]
        ends = self._host.tensor[start : start + size], self._slab[place * self._stride :][:size]
        target, source = ends if to_host else ends[::-1]
        # copies run one after the other: one that comes waits for the one that went from the same place
        return self._device.copy_async(target, source, after=self._used[place])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._device.synchronize()
        self._histories = []
        del self._slab
        if self._host is not None:
            self._host.free()


@contextmanager
def settled() -> Iterator[None]:
    """No gradients, and convolutions by the algorithm that cuDNN's heuristics put first.

    A program around this one may have asked torch to try all of them (`cudnn.benchmark`): that takes whatever workspace is
    free, which no plan knows of, and what wins depends on the moment, and with it the last bits.
    """
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.deterministic
    cudnn.benchmark, cudnn.deterministic = False, True
    try:
        with torch.inference_mode():
            yield
    finally:
        cudnn.benchmark, cudnn.deterministic = before


def in_tiles(
    device: Device,
    ways: Codings,
    tiling: Tiling,
    attempt: Callable[[Tiling, int], Iterator[Result]],
    tell: Callable[[int, Tiling, str], None],
) -> Iterator[Result]:
    """The results of `attempt(tiling, 0)`. If memory runs out, those of `attempt(smaller, n)` after the first n.

    attempt  gives the results from the nth on; histories begin with the clip, so what was given is computed again
    tell     is told n, the smaller tiling, and what happened

    Each time the tiling takes at most half of what the one before took on the device, or the least there is. What it
    needs more on the host is claimed. If the process was found to hold more RAM than its cap, the tiling takes as much
    less there, and on the device no more than the first. OutOfMemoryError if there is no smaller one.
    """
    given, planned = 0, None
    with ExitStack() as more:
        while True:
            try:
                for result in attempt(tiling, given):
                    yield result
                    del result
                    given += 1
                return
            except (torch.OutOfMemoryError, OutOfMemoryError) as error:
                problem = without_frames(error)
            last = ways.exactly(tiling)
            planned = planned or last
            more.close()
            room = ENDLESS if device.ram.room is None else device.ram.room
            if isinstance(problem, SqueezedError):
                vram, ram = planned.vram, min(room + planned.resting, last.ram - problem.excess)
                smaller = ways.choose(vram, ram, lambda coding: coding.work)
                enough = smaller.vram <= vram and smaller.ram <= ram
            else:
                smaller = ways.choose(last.vram // 2, room + planned.resting, lambda coding: coding.work)
                enough = smaller.vram < last.vram
            if not enough:
                raise _told(problem, device, last) from None
            tiling = smaller.tiling
            tell(given, tiling, problem.found if isinstance(problem, SqueezedError) else "memory ran out")
            more.enter_context(device.ram.claim("smaller tiles", max(0, smaller.resting - planned.resting)))


def _told(problem: Exception, device: Device, last: Coding) -> Exception:
    """What people are told when no tile is small enough."""
    if isinstance(problem, OutOfMemoryError):
        return problem
    return exhausted(device.ledger.what, "the smallest tile of the autoencoder", last.vram)
