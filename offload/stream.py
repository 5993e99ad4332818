"""BlockStream: disk -> host ring -> device slots -> residents, for all visits of a job, known in advance.

Two threads. The *reader*, which has helpers (`lowvram.offload.reading`), works through `Traffic.loads` strictly in
order, filling ring buffers and RAM seats; it waits for a free buffer, for a seat's old block to be done, and for the
copy out of a buffer before it overwrites it. The *consumer*, the thread that iterates, queues copies to the device as
soon as data and a destination are there, ahead of the visit that needs them, and waits only for the reader. Order on
the device is kept by events alone.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Self

from torch import Tensor

from lowvram.errors import InternalError, LowvramError
from lowvram.offload.device import Buffer, Device, Event, Stall
from lowvram.offload.io import FileReader
from lowvram.offload.kept import KeptBytes
from lowvram.offload.placement import PIECE_BYTES, READERS, BlockId, Load, Placement, Traffic, plan_traffic
from lowvram.offload.reading import BlockReader
from lowvram.offload.slab import BlockLayout, as_bytes, carve

Views = dict[str, dict[str, Tensor]]
"""Tensor name -> part role -> typed view in device memory."""

_WAKE_SECONDS = 0.5
"""How long a wait may last at once: on Windows only a wait with an end lets Ctrl-C through."""


@dataclass(frozen=True, slots=True)
class BlockStats:
    """What moving one block has cost so far."""

    visits: int = 0
    disk_bytes: int = 0
    """Read from files."""
    device_bytes: int = 0
    """Copied host to device."""
    disk_stall: float = 0.0
    """Seconds the consumer waited for the reader."""
    copy_stall: float = 0.0
    """Seconds compute waited for copies."""
    compute: float = 0.0
    """Seconds from where a visit's work could begin to where it ended, on the device if that has a clock."""

    def __add__(self, other: BlockStats) -> BlockStats:
        return BlockStats(
            self.visits + other.visits,
            self.disk_bytes + other.disk_bytes,
            self.device_bytes + other.device_bytes,
            self.disk_stall + other.disk_stall,
            self.copy_stall + other.copy_stall,
            self.compute + other.compute,
        )


@dataclass(slots=True)
class _Place:
    """A buffer, and when it may be written again."""

    buffer: Buffer
    free_after: Event | None


class BlockStream:
    """Iterator of (block id, views), one per visit; a context manager.

    layouts      of every block that is visited
    placement    where they live
    device       the memory, host and device, comes from its ledgers and is claimed here, all at once
    open_reader  path -> FileReader; each file is opened once, on first use, and closed by the stream
    order        block ids of all visits of the job
    start        how many of them a resumed job has behind it
    clock        seconds, for the stalls in `stats`
    kept         what earlier jobs read, if it is kept

    The views of a visit hold the block's stored bytes until the next visit is asked for; those of a resident
    block must not be written to. Work on them is queued on compute before that; the host need not wait for it.

    Raises OutOfMemoryError if the buffers do not fit, and from iteration StorageError, FileError or
    DeviceLostError as they were met. An error closes the stream.
    """

    def __init__(
        self,
        layouts: Mapping[BlockId, BlockLayout],
        placement: Placement,
        device: Device,
        open_reader: Callable[[Path], FileReader],
        order: Iterable[BlockId],
        *,
        start: int = 0,
        clock: Callable[[], float] = time.monotonic,
        kept: KeptBytes | None = None,
    ) -> None:
        self._kept = kept
        self._layouts, self._where, self._device = layouts, placement.where, device
        self._open_reader, self._clock, self._start = open_reader, clock, start
        self._traffic: Traffic = plan_traffic(layouts, placement, tuple(islice(order, start, None)))

        # The consumer's own: visits queued, visits queued that used slots, resident and RAM blocks at home.
        self._queued = 0
        self._slot_uses = 0
        self._slot_of: dict[int, int] = {}
        self._current: int | None = None
        self._arrivals: dict[int | BlockId, Event] = {}
        self._resident: set[BlockId] = set()
        self._timed: deque[tuple[BlockId, bool, Stall]] = deque()  # waits for copies, and work
        self._end_of_visit: Callable[[], Stall] | None = None

        # Shared with the reader, under _changed.
        self._changed = threading.Condition()
        self._over = 0
        self._ready: deque[tuple[Load, _Place]] = deque()
        self._ring: deque[_Place] = deque()
        self._in_ram: set[BlockId] = set()
        self._error: BaseException | None = None
        self._stopping = False
        self._stats: dict[BlockId, BlockStats] = {}

        with contextlib.ExitStack() as undo:
            self._slots, self._seats = self._allocate(undo)
            self._reader = threading.Thread(target=self._read_all, name="block reader", daemon=True)
            self._reader.start()
            self._buffers = undo.pop_all()

    def _allocate(self, undo: contextlib.ExitStack) -> tuple[list[_Place], dict[BlockId, _Place]]:
        traffic, device = self._traffic, self._device

        def on_device(name: str, nbytes: int) -> _Place:
            buffer = device.alloc(name, nbytes)
            undo.callback(buffer.free)
            # The memory may have been another tensor's, with work on it still queued on compute.
            return _Place(buffer, device.record_compute())

        def on_host(name: str, nbytes: int, *, pin: bool = True) -> _Place:
            buffer = device.host_alloc(name, nbytes, pin=pin)
            undo.callback(buffer.free)
            return _Place(buffer, None)

        slots = [on_device(f"slot {n}", traffic.slot_bytes) for n in range(traffic.slots)]
        seats: dict[BlockId, _Place] = {}
        for seat in traffic.residents:
            seats |= dict.fromkeys(seat.blocks, on_device(seat.name, seat.nbytes))
        self._ring.extend(on_host(f"ring {n}", traffic.ring_bytes) for n in range(traffic.ring))
        self._pages = [
            on_host(f"ring reader {n}", PIECE_BYTES, pin=False).buffer for n in range(traffic.readers)
        ]
        for seat in traffic.rams:
            seats |= dict.fromkeys(seat.blocks, on_host(seat.name, seat.nbytes))
        return slots, seats

    # The consumer

    @property
    def position(self) -> int:
        """Visits of the whole job that are over: the `start` of a stream that goes on from here."""
        return self._start + self._over

    def __iter__(self) -> Iterator[tuple[BlockId, Views]]:
        return self

    def __next__(self) -> tuple[BlockId, Views]:
        if self._stopping:
            raise InternalError("a closed stream was asked for a block", advice="report this")
        try:
            self._release()
            visit = self._over
            if visit == len(self._traffic.order):
                raise StopIteration
            block = self._traffic.order[visit]
            waited = self._bring(visit)
            place = (
                self._seats[block] if self._where[block] == "resident" else self._slots[self._slot_of[visit]]
            )
            arrival = self._arrivals.pop(block if self._where[block] == "resident" else visit, None)
            if arrival is not None:
                self._timed.append((block, True, self._device.wait(arrival)))
            self._count(block, BlockStats(visits=1, disk_stall=waited))
            self._current, self._end_of_visit = visit, self._device.time_compute(self._clock)
            return block, carve(self._layouts[block], place.buffer.tensor)
        except StopIteration:
            raise
        except BaseException:
            # What went wrong first is what is told.
            with contextlib.suppress(LowvramError):
                self.close()
            raise

    def _release(self) -> None:
        """The visit handed out last is over."""
        self._collect_times()
        if self._current is None:
            return
        self._end_timing()
        visit, self._current = self._current, None
        block = self._traffic.order[visit]
        resident = self._where[block] == "resident"
        place = self._seats[block] if resident else self._slots[self._slot_of.pop(visit)]
        place.free_after = self._device.record_compute()
        with self._changed:
            self._over = visit + 1
            self._changed.notify_all()

    def _bring(self, visit: int) -> float:
        """Queue copies until those for `visit` are; seconds waited for the reader."""
        waited = 0.0
        while True:
            self._queue_copies()
            if self._queued > visit:
                return waited
            began = self._clock()
            with self._changed:
                while not self._ready and not self._filled(visit):
                    if self._error is not None:
                        raise self._error
                    self._changed.wait(_WAKE_SECONDS)
            waited += self._clock() - began

    def _filled(self, visit: int) -> bool:
        return self._traffic.order[visit] in self._in_ram

    def _queue_copies(self) -> None:
        """Queue every copy whose data and destination are there, in reading order."""
        while True:
            with self._changed:
                head = self._ready[0] if self._ready else None
            if head is not None and head[0].to == "resident":
                self._copy_resident(*self._take())
            elif self._queued == len(self._traffic.order) or not self._queue_visit(head):
                return

    def _take(self) -> tuple[Load, _Place]:
        with self._changed:
            return self._ready.popleft()

    def _copy_resident(self, load: Load, ring: _Place) -> None:
        self._arrivals[load.block] = self._copy(load.block, ring, self._seats[load.block])
        self._resident.add(load.block)
        self._return(ring)

    def _queue_visit(self, head: tuple[Load, _Place] | None) -> bool:
        """Queue what the next visit needs; False if it has to wait."""
        visit = self._queued
        block = self._traffic.order[visit]
        where = self._where[block]
        if where == "resident":
            if block not in self._resident:
                return False
            self._queued += 1
            return True
        if len(self._slot_of) == len(self._slots):
            return False
        n_slot = self._slot_uses % len(self._slots)
        slot = self._slots[n_slot]
        if where == "ram":
            with self._changed:
                if block not in self._in_ram:
                    return False
            self._arrivals[visit] = self._copy(block, self._seats[block], slot)
        else:
            if head is None or head[0].visit != visit:
                return False
            _, ring = self._take()
            self._arrivals[visit] = self._copy(block, ring, slot)
            self._return(ring)
        self._slot_of[visit] = n_slot
        self._slot_uses += 1
        self._queued += 1
        return True

    def _copy(self, block: BlockId, source: _Place, target: _Place) -> Event:
        nbytes = self._layouts[block].nbytes
        began = self._clock()
        event = self._device.copy_async(
            target.buffer.tensor[:nbytes], source.buffer.tensor[:nbytes], after=target.free_after
        )
        source.free_after = event
        self._count(block, BlockStats(device_bytes=nbytes, copy_stall=self._clock() - began))
        return event

    def _return(self, ring: _Place) -> None:
        with self._changed:
            self._ring.append(ring)
            self._changed.notify_all()

    # The reader

    def _read_all(self) -> None:
        try:
            pages = [as_bytes(buffer.tensor) for buffer in self._pages]
            with BlockReader(self._open_reader, READERS, pages, lambda: self._stopping, self._kept) as reader:
                self._read_with(reader)
        except BaseException as error:  # noqa: BLE001 the consumer raises it
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _read_with(self, reader: BlockReader) -> None:
        for load in self._traffic.loads:
            place, layout = self._destination(load), self._layouts[load.block]
            nbytes = None if place is None else reader.fill(layout, as_bytes(place.buffer.tensor))
            if place is None or nbytes is None:
                return
            self._count(load.block, BlockStats(disk_bytes=nbytes))
            with self._changed:
                if load.to == "ram":
                    self._in_ram.add(load.block)
                else:
                    self._ready.append((load, place))
                self._changed.notify_all()

    def _destination(self, load: Load) -> _Place | None:
        """The host buffer for `load`, once it may be overwritten; None if the stream is closing."""
        with self._changed:
            while not self._stopping and (self._over <= load.after or (load.to != "ram" and not self._ring)):
                self._changed.wait(_WAKE_SECONDS)
            if self._stopping:
                return None
            place = self._seats[load.block] if load.to == "ram" else self._ring.popleft()
        if place.free_after is not None:
            place.free_after.synchronize()
        return place

    # Both

    def _count(self, block: BlockId, more: BlockStats) -> None:
        with self._changed:
            self._stats[block] = self._stats.get(block, BlockStats()) + more

    def _end_timing(self) -> None:
        """The work of the visit handed out last is queued."""
        if self._current is not None and self._end_of_visit is not None:
            self._timed.append((self._traffic.order[self._current], False, self._end_of_visit()))
            self._end_of_visit = None

    def _collect_times(self) -> None:
        while self._timed and self._timed[0][2].ready():
            block, waited, time = self._timed.popleft()
            took = time.seconds()
            self._count(block, BlockStats(copy_stall=took) if waited else BlockStats(compute=took))

    def stats(self) -> dict[BlockId, BlockStats]:
        """What each block has cost so far; times on the device are added once they are over, all when it is closed."""
        with self._changed:
            return dict(self._stats)

    def close(self) -> None:
        """Stop reading, let queued copies end, free everything. Calling it again does nothing.

        Raises DeviceLostError if the device failed meanwhile; the memory is given back all the same.
        """
        with self._changed:
            if self._stopping:
                return
            self._stopping = True
            self._changed.notify_all()
        self._reader.join()
        try:
            self._end_timing()
            self._device.synchronize()
            self._collect_times()
        finally:
            self._buffers.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # What went wrong inside the block is what is told.
        with contextlib.suppress(LowvramError) if error is not None else contextlib.nullcontext():
            self.close()
