from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowvram.errors import InternalError
from lowvram.offload.placement import BlockId, Placement, Where, plan_traffic, spread
from lowvram.offload.slab import BlockLayout, build_layout
from lowvram.quant.encodings.plain import Plain
from lowvram.quant.refs import Part, TensorRef


def layout(nbytes: int) -> BlockLayout:
    return build_layout(
        [TensorRef("w", (nbytes,), Plain("F32"), (Part("weight", Path("f"), 0, nbytes, "U8", (nbytes,)),))]
    )


def two_experts(n_blocks: int, steps: int) -> list[BlockId]:
    return [(net, n) for net in ("high", "low") for _ in range(steps) for n in range(n_blocks)]


def test_a_placement_has_at_least_one_slot_and_one_ring_buffer() -> None:
    with pytest.raises(InternalError):
        Placement({}, slots=0)
    with pytest.raises(InternalError):
        Placement({}, ring=0)


@given(st.integers(1, 60), st.data())
def test_residents_are_spread_evenly_around_the_cycle(n_blocks: int, data: st.DataObject) -> None:
    n_resident = data.draw(st.integers(0, n_blocks))
    depths = sorted(spread(n_blocks, n_resident))
    assert len(depths) == n_resident
    assert all(0 <= depth < n_blocks for depth in depths)
    if depths:
        runs = [(b - a - 1) % n_blocks for a, b in zip(depths, [*depths[1:], depths[0]], strict=True)]
        assert n_resident == 1 or max(runs) - min(runs) <= 1


def test_the_second_expert_takes_over_the_memory_of_the_first() -> None:
    order = two_experts(40, 4)
    where: dict[BlockId, Where] = {}
    for network in ("high", "low"):
        for depth in range(40):
            where[network, depth] = "resident" if depth in spread(40, 10) else "ram" if depth % 2 else "disk"
    traffic = plan_traffic({b: layout(1000) for b in where}, Placement(where), order)
    assert len(traffic.residents) == 10
    assert traffic.residents[0].name == "resident high.2, low.2"
    n_ram = sum(kind == "ram" for kind in where.values())
    assert len(traffic.rams) == n_ram // 2
    assert sum(traffic.device_claims().values()) == (10 + 2) * 1024
    assert sum(traffic.host_claims().values()) == (n_ram // 2 + 2) * 1024


def test_the_second_expert_flows_in_during_the_last_step_of_the_first() -> None:
    order = two_experts(40, 4)
    where: dict[BlockId, Where] = {
        block: "resident" if block[1] in spread(40, 10) else "disk" for block in dict.fromkeys(order)
    }
    traffic = plan_traffic({b: layout(1000) for b in where}, Placement(where), order)
    handed_on = [load for load in traffic.loads if load.after >= 0]
    assert len(handed_on) == 10
    for load in handed_on:
        before = [other.visit for other in traffic.loads[: traffic.loads.index(load)] if other.to == "disk"]
        # Read some visits after its seat is free, and most of a step before it is needed.
        assert max(before) <= load.after + 8
        assert load.visit - max(before) >= 30


def test_blocks_visited_once_share_seats_but_leave_room_to_read_ahead() -> None:
    order: list[BlockId] = [("text", n) for n in range(24)]
    placement = Placement(dict.fromkeys(order, "ram"), slots=2, ring=2)
    traffic = plan_traffic({b: layout(10) for b in order}, placement, order)
    assert len(traffic.rams) == 5
    assert {block for seat in traffic.rams for block in seat.blocks} == set(order)


def test_nothing_is_allocated_that_no_visit_needs() -> None:
    order: list[BlockId] = [("n", 0), ("n", 1)] * 3
    layouts = {("n", n): layout(1000 * (n + 1)) for n in range(3)}
    where: dict[BlockId, Where] = {("n", 0): "resident", ("n", 1): "resident", ("n", 2): "disk"}
    traffic = plan_traffic(layouts, Placement(where, slots=3, ring=3), order)
    assert traffic.device_claims() == {"resident n.0": 1024, "resident n.1": 2048}
    assert traffic.host_claims() == {"ring 0": 2048, "ring 1": 2048}
    assert plan_traffic(layouts, Placement(where), []).device_claims() == {}


def test_claims_are_rounded_as_the_device_rounds() -> None:
    order: list[BlockId] = [("n", 0)]
    traffic = plan_traffic({order[0]: layout(300)}, Placement({order[0]: "disk"}), order)
    assert traffic.device_claims(lambda nbytes: nbytes + 7) == {"slot 0": 519}


orders = st.lists(st.tuples(st.sampled_from(["high", "low"]), st.integers(0, 3)), max_size=40)


@settings(max_examples=200)
@given(orders, st.data())
def test_reading_in_order_never_waits_for_a_later_read(order: list[BlockId], data: st.DataObject) -> None:
    """Replays the two sides of a stream in the worst case: the reader as far ahead as its buffers let it be,
    the consumer only as far as it must go."""
    blocks = sorted(set(order))
    kinds: list[Where] = ["resident", "ram", "disk"]
    where = {block: data.draw(st.sampled_from(kinds)) for block in blocks}
    slots, ring = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    layouts = {block: layout(data.draw(st.integers(1, 600))) for block in blocks}
    traffic = plan_traffic(layouts, Placement(where, slots, ring), order)
    seats = {block: seat for seat in (*traffic.residents, *traffic.rams) for block in seat.blocks}
    assert all(seats[block].nbytes >= layouts[block].nbytes for block in seats)

    holds: dict[str, BlockId] = {}
    in_ring: set[tuple[BlockId, int]] = set()
    over, loads = 0, list(traffic.loads)

    def read_ahead() -> None:
        while loads and loads[0].after < over and (loads[0].to == "ram" or len(in_ring) < traffic.ring):
            load = loads.pop(0)
            if load.to == "disk":
                in_ring.add((load.block, load.visit))
            else:
                holds[seats[load.block].name] = load.block

    for visit, block in enumerate(order):
        read_ahead()
        if where[block] == "disk":
            assert (block, visit) in in_ring
            in_ring.remove((block, visit))
        else:
            assert holds[seats[block].name] == block
        over = visit + 1
    assert loads == []
