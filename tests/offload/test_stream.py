from __future__ import annotations

import itertools
import os
import sys
import threading
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowvram.errors import (
    DeviceLostError,
    FileError,
    InternalError,
    LowvramError,
    OutOfMemoryError,
    StorageError,
)
from lowvram.offload.budget import Ledger
from lowvram.offload.device import CpuDevice
from lowvram.offload.faults import FaultKind, FaultPlan, Faults
from lowvram.offload.io import FileReader, write_atomic
from lowvram.offload.placement import BlockId, Placement, Where, plan_traffic
from lowvram.offload.stream import BlockStream

NETWORKS = {"high": 6, "low": 5}
KINDS: list[Where] = ["resident", "ram", "disk"]


def reader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("block reader")]


def all_visits(steps: int) -> list[BlockId]:
    return [(net, n) for net, count in NETWORKS.items() for _ in range(steps) for n in range(count)]


def mixed(slots: int = 2, ring: int = 2) -> Placement:
    """Every kind of block in both networks that has room for it."""
    blocks = list(dict.fromkeys(all_visits(1)))
    return Placement({block: KINDS[n % 3] for n, block in enumerate(blocks)}, slots, ring)


def poison(views: dict[str, dict[str, torch.Tensor]]) -> None:
    for roles in views.values():
        for view in roles.values():
            view.view(torch.uint8).fill_(0xA5)


@pytest.fixture
def made(checkpoint: Callable[..., Any], tmp_path: Path) -> Any:
    return checkpoint(tmp_path, NETWORKS)


@settings(max_examples=150)
@given(
    order=st.lists(
        st.tuples(st.just("high"), st.integers(0, 5)) | st.tuples(st.just("low"), st.integers(0, 4)),
        max_size=30,
    )
    | st.integers(1, 4).map(all_visits),
    kinds=st.lists(st.sampled_from(KINDS), min_size=11, max_size=11),
    slots=st.integers(1, 3),
    ring=st.integers(1, 3),
    start=st.integers(0, 12),
    seed=st.integers(0, 3),
)
def test_placement_never_changes_bits(
    checkpoint: Callable[..., Any],
    tmp_path_factory: pytest.TempPathFactory,
    order: list[BlockId],
    kinds: list[Where],
    slots: int,
    ring: int,
    start: int,
    seed: int,
) -> None:
    made = checkpoint(tmp_path_factory.mktemp("stream"), NETWORKS, seed=seed, counts=(3, 70))
    where = dict(zip(made.layouts, kinds, strict=True))
    device = CpuDevice()
    seen = []
    with BlockStream(
        made.layouts, Placement(where, slots, ring), device, FileReader, order, start=start
    ) as stream:
        for block, views in stream:
            made.check(block, views)
            if where[block] != "resident":
                poison(views)
            seen.append(block)
            assert stream.position == start + len(seen) - 1
    assert seen == order[start:]
    assert (device.ledger.used, device.ram.used) == (0, 0)
    assert reader_threads() == []


@settings(max_examples=80)
@given(
    eager=st.sampled_from(["copies", "compute"]),
    kinds=st.lists(st.sampled_from(KINDS), min_size=11, max_size=11),
    slots=st.integers(1, 3),
    ring=st.integers(1, 3),
    steps=st.integers(1, 3),
)
def test_events_alone_keep_the_queues_of_a_device_in_order(
    checkpoint: Callable[..., Any],
    queued_device: Callable[..., Any],
    tmp_path_factory: pytest.TempPathFactory,
    eager: str,
    kinds: list[Where],
    slots: int,
    ring: int,
    steps: int,
) -> None:
    """Kernels and copies run as late, or as far ahead of each other, as the events let them."""
    made = checkpoint(tmp_path_factory.mktemp("queues"), NETWORKS, counts=(3, 70))
    where = dict(zip(made.layouts, kinds, strict=True))
    device = queued_device(eager)
    order, checked = all_visits(steps), []

    def kernel(block: BlockId, views: dict[str, dict[str, torch.Tensor]]) -> Callable[[], None]:
        def work() -> None:
            made.check(block, views)
            if where[block] != "resident":
                poison(views)
            checked.append(block)

        return work

    with BlockStream(made.layouts, Placement(where, slots, ring), device, FileReader, order) as stream:
        for block, views in stream:
            device.compute(kernel(block, views))
    assert checked == order
    assert device.ledger.used == 0


def test_new_buffers_are_not_written_before_earlier_work_on_their_memory(
    made: Any, queued_device: Callable[..., Any]
) -> None:
    """An allocator hands out memory that a kernel still in the queue may be using."""

    class Shared(queued_device):  # type: ignore[misc, valid-type]
        def copy_async(self, dst: torch.Tensor, src: torch.Tensor, *, after: Any = None) -> Any:
            event = super().copy_async(dst, src, after=after)
            self._push("copies", lambda: not done.append("copy"))  # type: ignore[func-returns-value]
            return event

    done: list[str] = []
    device = Shared("copies")
    device.compute(lambda: done.append("earlier work"))
    with BlockStream(made.layouts, mixed(), device, FileReader, all_visits(1)) as stream:
        for _ in stream:
            pass
    assert done[0] == "earlier work"
    assert "copy" in done


def test_claims_are_exactly_those_of_the_plan(made: Any) -> None:
    device = CpuDevice()
    order = all_visits(3)
    traffic = plan_traffic(made.layouts, mixed(), order)
    with BlockStream(made.layouts, mixed(), device, FileReader, order) as stream:
        assert device.ledger.claims == traffic.device_claims()
        assert device.ram.claims == traffic.host_claims()
        assert {"slot 0", "slot 1", "resident high.0, low.0"} <= set(device.ledger.claims)
        assert set(device.ram.claims) == {"ring 0", "ring 1", "ram high.1, low.1", "ram high.4, low.4"}
        for _ in stream:
            pass
    assert device.ledger.peak == sum(traffic.device_claims().values())
    assert device.ram.peak == sum(traffic.host_claims().values())


def test_every_byte_read_and_copied_is_counted(made: Any) -> None:
    order = all_visits(3)
    device = CpuDevice()
    opened: list[FileReader] = []

    def open_reader(path: Path) -> FileReader:
        opened.append(FileReader(path))
        return opened[-1]

    ticks = itertools.count()
    with BlockStream(
        made.layouts, mixed(), device, open_reader, order, clock=lambda: float(next(ticks))
    ) as stream:
        for _ in stream:
            pass
        stats = stream.stats()
    assert len(opened) == 2
    assert sum(s.disk_bytes for s in stats.values()) == sum(reader.bytes_read for reader in opened)
    for block, cost in stats.items():
        nbytes = made.layouts[block].nbytes
        kind = mixed().where[block]
        assert cost.visits == 3
        assert cost.device_bytes == nbytes * (1 if kind == "resident" else 3)
        reads, rest = divmod(cost.disk_bytes, 3 if kind == "disk" else 1)
        assert rest == 0
        assert made.layouts[block].stored_bytes <= reads <= nbytes
        assert cost.copy_stall >= cost.device_bytes // nbytes


def test_a_stream_left_early_stops_reading_and_frees_everything(made: Any) -> None:
    device = CpuDevice()
    with BlockStream(made.layouts, mixed(), device, FileReader, all_visits(50)) as stream:
        for n, _ in enumerate(stream):
            if n == 4:
                break
    assert (device.ledger.used, device.ram.used, reader_threads()) == (0, 0, [])
    # Five visits, and what slots and ring may hold ahead of them (residents and RAM blocks lie between).
    largest = max(layout.nbytes for layout in made.layouts.values())
    assert sum(cost.disk_bytes for cost in stream.stats().values()) <= (5 + 3 * (2 + 2)) * largest
    stream.close()
    with pytest.raises(InternalError, match="closed"):
        next(stream)


def test_a_stream_that_is_never_asked_can_be_closed(made: Any) -> None:
    device = CpuDevice()
    stream = BlockStream(made.layouts, mixed(ring=1), device, FileReader, all_visits(50))
    stream.close()
    assert (device.ledger.used, device.ram.used, reader_threads()) == (0, 0, [])


def test_a_loop_can_be_left_and_taken_up_again(made: Any) -> None:
    order = all_visits(2)
    with BlockStream(made.layouts, mixed(), CpuDevice(), FileReader, order) as stream:
        first = [block for block, _ in itertools.islice(stream, 4)]
        assert first + [block for block, _ in stream] == order
        assert stream.position == len(order)
        with pytest.raises(StopIteration):
            next(stream)


def test_a_resumed_job_reads_only_what_it_still_needs(made: Any) -> None:
    opened: list[Path] = []

    def open_reader(path: Path) -> FileReader:
        opened.append(path)
        return FileReader(path)

    order = all_visits(2)
    with BlockStream(made.layouts, mixed(), CpuDevice(), open_reader, order, start=12) as stream:
        assert [block for block, _ in stream] == order[12:]
    assert [path.name for path in opened] == ["low.bin"]


def test_an_error_of_the_consumer_is_what_is_told(made: Any) -> None:
    device = CpuDevice()
    with (
        pytest.raises(ZeroDivisionError),
        BlockStream(made.layouts, mixed(), device, FileReader, all_visits(3)) as stream,
    ):
        for n, _ in enumerate(stream):
            _ = 1 // (3 - n)
    assert (device.ledger.used, device.ram.used, reader_threads()) == (0, 0, [])


EXPECTED: dict[FaultKind, type[LowvramError] | None] = {
    "read": StorageError,
    "copy": DeviceLostError,
    "alloc": OutOfMemoryError,
    "host_alloc": OutOfMemoryError,
    "pin": None,
    "short_read": None,
}


@pytest.mark.parametrize("kind", EXPECTED)
def test_whatever_fails_surfaces_and_leaves_nothing_behind(made: Any, kind: FaultKind) -> None:
    order = all_visits(2)
    for nth in itertools.count(1):
        faults = Faults(FaultPlan(kind, nth))
        device = CpuDevice(faults=faults)
        error: LowvramError | None = None
        seen = []
        try:
            with BlockStream(
                made.layouts,
                mixed(),
                device,
                partial(FileReader, faults=faults),
                order,
            ) as stream:
                for block, views in stream:
                    made.check(block, views)
                    seen.append(block)
        except LowvramError as caught:
            error = caught
        assert (device.ledger.used, device.ram.used, reader_threads()) == (0, 0, [])
        if not faults.struck:
            break
        if EXPECTED[kind] is None:
            assert error is None
        else:
            assert type(error) is EXPECTED[kind]
        assert seen == order[: len(seen)]
    assert seen == order
    assert nth > 2


def test_a_reader_that_keeps_failing_does_not_hang_the_stream(made: Any) -> None:
    faults = Faults(FaultPlan("read", 5, persistent=True))
    device = CpuDevice()
    with (
        pytest.raises(StorageError, match=r"high\.bin"),
        BlockStream(
            made.layouts, mixed(ring=1), device, lambda path: FileReader(path, faults=faults), all_visits(3)
        ) as stream,
    ):
        for block, views in stream:
            made.check(block, views)
    assert (device.ledger.used, device.ram.used, reader_threads()) == (0, 0, [])


def test_an_error_ahead_is_told_only_when_its_block_is_asked_for(made: Any) -> None:
    order = all_visits(1)

    def open_reader(path: Path) -> FileReader:
        if path.name == "low.bin":
            raise FileError("broken", where=str(path), advice="mend it")
        return FileReader(path)

    device = CpuDevice()
    seen = []
    stream = BlockStream(made.layouts, mixed(), device, open_reader, order)
    with pytest.raises(FileError, match="broken"):
        for block, _ in stream:
            seen.append(block)
    assert seen == order[:6]
    assert (device.ledger.used, device.ram.used, reader_threads()) == (0, 0, [])


@pytest.mark.parametrize("cap", ["vram", "ram"])
def test_buffers_that_do_not_fit_are_refused_before_anything_is_read(made: Any, cap: str) -> None:
    claims = plan_traffic(made.layouts, mixed(), all_visits(2))
    vram, ram = sum(claims.device_claims().values()), sum(claims.host_claims().values())
    device = CpuDevice(vram - (cap == "vram"), ram=Ledger(ram - (cap == "ram"), "RAM"))
    with pytest.raises(OutOfMemoryError):
        BlockStream(made.layouts, mixed(), device, FileReader, all_visits(2))
    assert (device.ledger.used, device.ram.used, reader_threads()) == (0, 0, [])


@pytest.mark.skipif(sys.platform == "win32", reason="an open file cannot be changed there")
@pytest.mark.parametrize("change", ["truncated", "replaced"])
def test_a_file_changed_under_way_is_a_storage_error(made: Any, change: str) -> None:
    device = CpuDevice()
    with (
        pytest.raises(StorageError, match="changed"),
        BlockStream(made.layouts, mixed(), device, FileReader, all_visits(50)) as stream,
    ):
        for n, (block, views) in enumerate(stream):
            made.check(block, views)
            if n == 3 and change == "truncated":
                os.truncate(made.files[0], made.files[0].stat().st_size // 2)
            elif n == 3:
                write_atomic(made.files[0], bytes(made.files[0].stat().st_size))
    assert (device.ledger.used, device.ram.used, reader_threads()) == (0, 0, [])


def test_the_memory_itself_is_given_back(made: Any) -> None:
    stores: list[weakref.ref[torch.UntypedStorage]] = []

    class Watched(CpuDevice):
        def _allocate(self, name: str, nbytes: int) -> torch.Tensor:
            tensor = super()._allocate(name, nbytes)
            stores.append(weakref.ref(tensor.untyped_storage()))
            return tensor

        def _pin(self, pages: torch.Tensor) -> str:
            stores.append(weakref.ref(pages.untyped_storage()))
            return ""

    device = Watched()
    with BlockStream(made.layouts, mixed(), device, FileReader, all_visits(2)) as stream:
        for _, views in stream:
            assert views
    assert len(stores) == len(device.ledger.peak_claims) + len(device.ram.peak_claims)
    del views
    assert [ref() for ref in stores] == [None] * len(stores)


def test_waiting_for_the_disk_is_counted(made: Any) -> None:
    """By the clock that is given: it is first asked when the consumer begins to wait, and the first read takes 3 s."""
    now, waiting = 0.0, threading.Event()

    def clock() -> float:
        waiting.set()
        return now

    class Slow(FileReader):
        def read_into(self, offset: int, target: memoryview) -> None:
            nonlocal now
            if not now:
                waiting.wait()
                now = 3.0
            super().read_into(offset, target)

    with BlockStream(made.layouts, mixed(), CpuDevice(), Slow, all_visits(1), clock=clock) as stream:
        for _ in stream:
            pass
        assert sum(cost.disk_stall for cost in stream.stats().values()) == 3.0
