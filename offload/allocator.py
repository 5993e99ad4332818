"""What torch's CUDA allocator does to memory, with numbers in place of a card.

torch takes segments from the driver, cuts blocks off them, keeps what is freed and joins free neighbours. A segment goes
back to the driver only as a whole, and only when the limit (`torch.cuda.set_per_process_memory_fraction`) would be
passed. So memory that is free in pieces may not serve a request that is smaller than their sum, and what a stage has
alive at its peak is less than what it needs.

    CachingAllocator(limit)     the same, under a limit: whether a stage finds room in what its plan says
    CachingAllocator.endless()  one segment without end: how far a piece of work reaches into it, holes included

Source: c10/cuda/CUDACachingAllocator.cpp (malloc, get_free_block, should_split, get_allocation_size, alloc_block,
release_cached_blocks), for one stream and torch's default settings.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass, field
from typing import Self

from lowvram.errors import OutOfMemoryError
from lowvram.offload.budget import allocated_size, format_bytes, segment_size

ROOM = 128 << 20
"""Bytes that a plan sets aside for the allocator of a card, beside the reach of what it measured piece by piece: segments
that are used in part, and holes around what lives from one piece to the next. Whole stages at real size, run under
`CachingAllocator` in tests/lowvram/test_real_size.py, find room with it."""
SMALL = 1 << 20
"""Requests up to this size come from segments of their own kind."""
SMALL_SEGMENT = 2 << 20
LARGE_SEGMENT = 20 << 20
"""For requests above `SMALL` and below 10 MiB; larger ones get segments of their own size."""
ENDLESS = 1 << 60


@dataclass(slots=True, eq=False)
class Block:
    """A piece of a segment, between its neighbours there."""

    address: int
    nbytes: int
    small: bool
    taken: bool = False
    before: Block | None = field(default=None, repr=False)
    after: Block | None = field(default=None, repr=False)


class CachingAllocator:
    """limit: bytes that may be reserved; None for no limit."""

    def __init__(self, limit: int | None = None) -> None:
        self._limit = limit
        self._free: dict[bool, list[tuple[int, int, Block]]] = {True: [], False: []}
        """By kind, small or not: size, address and block, in order."""
        self._next = 0
        self._reach = {True: 0, False: 0}
        self.live = 0
        """Bytes of blocks in use."""
        self.reserved = 0
        """Bytes taken from the driver."""
        self.peak = 0
        """The most that was ever reserved."""
        self.emptied = 0
        """How often all that was unused went back to the driver because the limit was met; the device waits for it."""

    @classmethod
    def endless(cls) -> Self:
        """Of one segment of each kind, longer than any memory: what is free below its end is used first."""
        allocator = cls()
        for small in (True, False):
            allocator._keep(Block(0, ENDLESS, small))
        return allocator

    @property
    def reach(self) -> int:
        """Bytes up to the last that was ever in use, in both kinds of segments; of an endless one."""
        return sum(self._reach.values())

    def malloc(self, nbytes: int) -> Block:
        """A block for `nbytes`; OutOfMemoryError if none is free and the limit allows no more."""
        size = allocated_size(max(1, nbytes))
        small = size <= SMALL
        block = self._find(size, small) or self._segment(size, small)
        if block is None:
            self.emptied += 1
            self.empty_cache()
            block = self._segment(size, small)
        if block is None:
            raise OutOfMemoryError(
                f"{format_bytes(size)} find no room beside {format_bytes(self.live)} in use:"
                f" {format_bytes(self.reserved - self.live)} are free in pieces",
                where="torch's allocator",
                expected=f"at most {format_bytes(self._limit or 0)} reserved",
                advice="give a larger --vram",
            )
        self._cut(block, size)
        block.taken = True
        self.live += block.nbytes
        self._reach[small] = max(self._reach[small], block.address + block.nbytes)
        return block

    def free(self, block: Block) -> None:
        """Keep `block` for later, as one with its free neighbours."""
        block.taken = False
        self.live -= block.nbytes
        before, after = block.before, block.after
        if before is not None and not before.taken:
            self._forget(before)
            block.address, block.before = before.address, before.before
            block.nbytes += before.nbytes
            if block.before is not None:
                block.before.after = block
        if after is not None and not after.taken:
            self._forget(after)
            block.nbytes, block.after = block.nbytes + after.nbytes, after.after
            if block.after is not None:
                block.after.before = block
        self._keep(block)

    def empty_cache(self) -> None:
        """Give segments that nothing uses back to the driver."""
        for free in self._free.values():
            for _, _, block in [each for each in free if each[2].before is None and each[2].after is None]:
                self._forget(block)
                self.reserved -= block.nbytes

    def _find(self, size: int, small: bool) -> Block | None:
        """The smallest free block that is large enough; of those, the one at the lowest address."""
        free = self._free[small]
        place = bisect_left(free, (size, 0))
        return None if place == len(free) else free.pop(place)[2]

    def _keep(self, block: Block) -> None:
        insort(self._free[block.small], (block.nbytes, block.address, block))

    def _forget(self, block: Block) -> None:
        free = self._free[block.small]
        del free[bisect_left(free, (block.nbytes, block.address))]

    def _segment(self, size: int, small: bool) -> Block | None:
        """A new segment, if the limit allows one."""
        nbytes = (
            SMALL_SEGMENT if small else LARGE_SEGMENT if size < LARGE_SEGMENT // 2 else segment_size(size)
        )
        if self._limit is not None and self.reserved + nbytes > self._limit:
            return None
        self.reserved += nbytes
        self.peak = max(self.peak, self.reserved)
        self._next += nbytes
        return Block(self._next - nbytes, nbytes, small)

    def _cut(self, block: Block, size: int) -> None:
        """Leave `size` bytes of a block, if the rest is worth keeping."""
        rest = block.nbytes - size
        if rest < 512 if block.small else rest <= SMALL:
            return
        remaining = Block(block.address + size, rest, block.small, before=block, after=block.after)
        if block.after is not None:
            block.after.before = remaining
        block.nbytes, block.after = size, remaining
        self._keep(remaining)
