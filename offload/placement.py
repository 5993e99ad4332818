"""Where each block of a job lives, and the order in which files are read: pure, shared by plan and stream.

A *visit* is one use of one block; the order of all visits of a job is known before it starts. A block is

    resident  in device memory from its first visit to its last
    ram       in host memory from its first visit to its last, copied to a device slot at every visit
    disk      nowhere: read into a host ring buffer and copied to a device slot at every visit

Residents and RAM blocks have *seats*. A block that is done hands its seat on, so the second expert of a model
takes over the memory of the first while the first is still at work on its last step.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from lowvram.errors import InternalError
from lowvram.offload.budget import exact_size
from lowvram.offload.slab import BlockLayout

BlockId = tuple[str, int]
"""Network and depth, such as ("high", 0)."""
Where = Literal["resident", "ram", "disk"]


def block_name(block: BlockId) -> str:
    """("high", 3) -> "high.3"."""
    return f"{block[0]}.{block[1]}"


READERS = 4
"""Threads that read at once: a few large requests keep a drive busy."""
PIECE_BYTES = 8 << 20
"""Bytes per read: large enough for any disk, small enough that closing never waits long."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Where every block lives, and how many buffers carry those that move."""

    where: Mapping[BlockId, Where]
    slots: int = 2
    """Device buffers: one is computed with while the others are filled. 1 gives no overlap."""
    ring: int = 2
    """Host buffers between disk and device."""
    past_cache: bool = False
    """Whether files are read past the system's cache, if their file system allows it: for a scan that the cache could
    not hold."""

    def __post_init__(self) -> None:
        if self.slots < 1 or self.ring < 1:
            raise InternalError(f"{self.slots} slots and {self.ring} ring buffers", advice="report this")


def spread(n_blocks: int, n_resident: int) -> set[int]:
    """`n_resident` of `n_blocks` depths, as evenly as possible: the runs between them, counted around the
    cycle that the steps of a job make, differ in length by one at most."""
    return {(2 * i + 1) * n_blocks // (2 * n_resident) for i in range(n_resident)}


@dataclass(frozen=True, slots=True)
class Seat:
    """Memory of one block at a time."""

    name: str
    """Of the claim: "resident high.3", "ram low.7", or with several names if it is handed on."""
    nbytes: int
    blocks: tuple[BlockId, ...]
    """Its blocks, one after another."""


@dataclass(frozen=True, slots=True)
class Load:
    """One read of one block from disk."""

    block: BlockId
    visit: int
    """The visit that needs it."""
    to: Where
    """"disk": a ring buffer, then a slot; "resident": a ring buffer, then its seat; "ram": its seat."""
    after: int
    """The visit that must be over before its seat is free; -1 if none."""


@dataclass(frozen=True, slots=True)
class Buffers:
    """Everything a stream allocates."""

    residents: tuple[Seat, ...]
    rams: tuple[Seat, ...]
    slots: int
    slot_bytes: int
    ring: int
    ring_bytes: int
    readers: int
    """Threads with memory of their own for reads past the system's cache; 0 if reads go through it."""

    def device_claims(self, footprint: Callable[[int], int] = exact_size) -> dict[str, int]:
        """Claim name -> bytes on the device; `footprint` is the device's rounding."""
        claims = {f"slot {n}": footprint(self.slot_bytes) for n in range(self.slots)}
        return claims | {seat.name: footprint(seat.nbytes) for seat in self.residents}

    def host_claims(self) -> dict[str, int]:
        """Claim name -> bytes of host memory."""
        claims = {f"ring {n}": self.ring_bytes for n in range(self.ring)}
        claims |= {f"ring reader {n}": PIECE_BYTES for n in range(self.readers)}
        return claims | {seat.name: seat.nbytes for seat in self.rams}


@dataclass(frozen=True, slots=True)
class Traffic(Buffers):
    """Everything a stream allocates and reads for one order of visits."""

    order: tuple[BlockId, ...]
    loads: tuple[Load, ...]
    """In the order in which they are read."""


def visits_of(order: Sequence[BlockId]) -> dict[BlockId, list[int]]:
    """When each block is visited."""
    visits: dict[BlockId, list[int]] = {}
    for visit, block in enumerate(order):
        visits.setdefault(block, []).append(visit)
    return visits


def plan_buffers(
    layouts: Mapping[BlockId, BlockLayout], placement: Placement, visits: Mapping[BlockId, Sequence[int]]
) -> Buffers:
    """What a stream allocates for visits known by block."""
    where = {block: placement.where[block] for block in visits}
    spans = {block: (at[0], at[-1]) for block, at in visits.items()}
    # A seat is handed on only if enough visits lie between its blocks to refill it without a stall.
    gap = placement.slots + placement.ring
    moving = [layouts[block].nbytes for block in visits if where[block] != "resident"]
    by_ring = [layouts[block].nbytes for block in visits if where[block] != "ram"]
    n_by_ring = sum(
        len(at) if where[block] == "disk" else where[block] == "resident" for block, at in visits.items()
    )
    return Buffers(
        residents=_seats("resident", spans, where, layouts, gap),
        rams=_seats("ram", spans, where, layouts, gap),
        slots=min(
            placement.slots, sum(len(at) for block, at in visits.items() if where[block] != "resident")
        ),
        slot_bytes=max(moving, default=0),
        ring=min(placement.ring, n_by_ring),
        ring_bytes=max(by_ring, default=0),
        readers=READERS if placement.past_cache and visits else 0,
    )


def plan_traffic(
    layouts: Mapping[BlockId, BlockLayout], placement: Placement, order: Sequence[BlockId]
) -> Traffic:
    """What a stream over the visits `order` allocates, and the order in which it reads.

    Reads go by the visit that needs them, except that a seat handed on is refilled earlier: as soon as reading
    that far ahead cannot find the seat still occupied. Reading strictly in the order of `loads` never
    deadlocks: whatever has to happen before a read needs only reads before it.
    """
    visits = visits_of(order)
    made = plan_buffers(layouts, placement, visits)
    loads = _loads(
        visits, placement.where, (*made.residents, *made.rams), ahead=placement.slots + placement.ring
    )
    return Traffic(
        made.residents,
        made.rams,
        made.slots,
        made.slot_bytes,
        made.ring,
        made.ring_bytes,
        made.readers,
        order=tuple(order),
        loads=loads,
    )


def _seats(
    kind: Where,
    spans: Mapping[BlockId, tuple[int, int]],
    where: Mapping[BlockId, Where],
    layouts: Mapping[BlockId, BlockLayout],
    gap: int,
) -> tuple[Seat, ...]:
    """Seats for all blocks of `kind`, as few as their spans (first and last visit) allow."""
    rows: list[list[BlockId]] = []
    sizes: list[int] = []
    for block in sorted((b for b in spans if where[b] == kind), key=lambda b: spans[b]):
        nbytes = layouts[block].nbytes
        free = [n for n, row in enumerate(rows) if spans[row[-1]][1] + gap < spans[block][0]]
        if free:
            best = min(free, key=lambda n: (abs(sizes[n] - nbytes), n))
            rows[best].append(block)
            sizes[best] = max(sizes[best], nbytes)
        else:
            rows.append([block])
            sizes.append(nbytes)
    return tuple(
        Seat(f"{kind} " + ", ".join(map(block_name, row)), nbytes, tuple(row))
        for row, nbytes in zip(rows, sizes, strict=True)
    )


def _loads(
    visits: Mapping[BlockId, Sequence[int]],
    where: Mapping[BlockId, Where],
    seats: Sequence[Seat],
    ahead: int,
) -> tuple[Load, ...]:
    """Every read of the job, in reading order.

    ahead  reads that may be done but not yet used, ring and slots together: so many reads after the last visit
           of a seat's old block, that visit is over
    """
    from_disk = sorted(visit for block, at in visits.items() if where[block] == "disk" for visit in at)
    keyed = [
        ((visit, 0, 0), Load(block, visit, "disk", -1))
        for block, at in visits.items()
        if where[block] == "disk"
        for visit in at
    ]
    for seat in seats:
        old: BlockId | None = None
        for block in seat.blocks:
            first = visits[block][0]
            key = (first, 0, 0)
            after = -1
            if old is not None:
                after = visits[old][-1]
                begin, end = bisect_right(from_disk, after), bisect_left(from_disk, first)
                key = (from_disk[min(begin + ahead, end) - 1] if end > begin else after, 1, first)
            keyed.append((key, Load(block, first, where[block], after)))
            old = block
    return tuple(load for _, load in sorted(keyed, key=lambda pair: pair[0]))
