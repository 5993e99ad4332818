"""torch's CUDA allocator in numbers: what it reserves, where it puts things, and when it has no room."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowvram.errors import OutOfMemoryError
from lowvram.offload.allocator import CachingAllocator

MIB = 1 << 20


def test_segments_are_of_torchs_sizes() -> None:
    for nbytes, reserved in [(1, 2), (1 * MIB, 2), (3 * MIB, 20), (10 * MIB, 10), (11 * MIB + 1, 12)]:
        allocator = CachingAllocator()
        allocator.malloc(nbytes)
        assert allocator.reserved == reserved * MIB, nbytes


def test_what_is_freed_serves_the_next_and_its_rest_the_one_after() -> None:
    allocator = CachingAllocator()
    allocator.free(allocator.malloc(100 * MIB))
    first, second = allocator.malloc(60 * MIB), allocator.malloc(40 * MIB)
    assert allocator.reserved == 100 * MIB == second.address + second.nbytes - first.address
    allocator.free(first)
    allocator.free(second)
    allocator.malloc(100 * MIB)  # neighbours are one again
    assert allocator.reserved == 100 * MIB


def test_memory_that_is_free_in_pieces_serves_nothing_larger() -> None:
    """What a plan that adds up what is alive would not see."""
    allocator = CachingAllocator(100 * MIB)
    allocator.free(allocator.malloc(100 * MIB))
    blocks = [allocator.malloc(25 * MIB) for _ in range(4)]
    allocator.free(blocks[0])
    allocator.free(blocks[2])
    assert allocator.live == 50 * MIB
    with pytest.raises(
        OutOfMemoryError, match=r"31\.5 MB find no room beside 52\.4 MB in use: 52\.4 MB are free in pieces"
    ):
        allocator.malloc(30 * MIB)


def test_segments_that_nothing_uses_go_back_when_the_limit_is_met() -> None:
    allocator = CachingAllocator(100 * MIB)
    allocator.free(allocator.malloc(60 * MIB))
    allocator.malloc(80 * MIB)
    assert (allocator.emptied, allocator.reserved, allocator.peak) == (1, 80 * MIB, 80 * MIB)


def test_reach_counts_the_holes() -> None:
    """A result made after the weight it outlives lies behind it, and the next weight behind both."""
    weight, result = 140 * MIB, 30 * MIB
    allocator = CachingAllocator.endless()
    first = allocator.malloc(weight)
    allocator.malloc(result)
    allocator.free(first)
    allocator.malloc(weight + 20 * MIB)
    assert allocator.reach == weight + result + weight + 20 * MIB
    allocator = CachingAllocator.endless()
    allocator.malloc(result)
    allocator.free(allocator.malloc(weight))
    allocator.malloc(weight + 20 * MIB)
    assert allocator.reach == result + weight + 20 * MIB


@settings(max_examples=60)
@given(seed=st.integers(0, 2**32), limit=st.sampled_from([None, 300 * MIB]), endless=st.booleans())
def test_blocks_never_overlap_and_nothing_is_lost(seed: int, limit: int | None, endless: bool) -> None:
    draw = random.Random(seed)
    allocator = CachingAllocator.endless() if endless else CachingAllocator(limit)
    held, most = [], 0
    for _ in range(200):
        if held and draw.random() < 0.5:
            allocator.free(held.pop(draw.randrange(len(held))))
            continue
        try:
            held.append(
                allocator.malloc(draw.choice([0, 700, MIB, 3 * MIB, 9 * MIB, 30 * MIB]) + draw.randrange(999))
            )
        except OutOfMemoryError:
            assert limit is not None and not endless
        ends = sorted((b.small and endless, b.address, b.address + b.nbytes) for b in held)
        assert all(a[0] != b[0] or a[2] <= b[1] for a, b in pairwise(ends))
        most = max(most, allocator.live)
        assert allocator.live == sum(b.nbytes for b in held)
    assert endless or allocator.live <= allocator.reserved <= (limit or allocator.reserved)
    assert allocator.reach >= most
    for block in held:
        allocator.free(block)
    allocator.empty_cache()
    assert allocator.live == 0 and (endless or allocator.reserved == 0)
