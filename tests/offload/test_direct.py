"""Reads past the system's cache, and reads by several threads: the same bytes, whatever the file system allows."""

from __future__ import annotations

import errno
import mmap
import os
import random
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from lowvram.errors import StorageError
from lowvram.offload import reading
from lowvram.offload.device import CpuDevice
from lowvram.offload.direct import PAGE, DirectFile
from lowvram.offload.faults import FaultKind, FaultPlan, Faults
from lowvram.offload.io import FileReader, write_atomic
from lowvram.offload.kept import KeptBytes
from lowvram.offload.placement import Placement, plan_traffic
from lowvram.offload.reading import BlockReader
from lowvram.offload.slab import read_runs
from lowvram.offload.stream import BlockStream

DATA = random.Random(1).randbytes(5 * PAGE + 123)
RANGES = ((0, len(DATA)), (1, 5), (PAGE, PAGE), (PAGE - 1, 2), (3 * PAGE + 7, 2 * PAGE + 116), (len(DATA), 0))

direct_here = pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="direct reads")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "model.bin"
    file.write_bytes(DATA)
    return file


def check(path: Path, faults: Faults | None = None, pages: int = 2) -> bool:
    """Whether reads went past the cache to the end."""
    with FileReader(path, faults=faults) as reader, mmap.mmap(-1, pages * PAGE) as memory:
        file = DirectFile(reader)
        for begin, count in RANGES:
            target = bytearray(count + 2)
            file.read_into(begin, memoryview(target)[1:-1], memoryview(memory))
            assert target == b"\0" + DATA[begin : begin + count] + b"\0"
        file.close()
        return file.direct


@pytest.mark.parametrize("pages", [1, 2, 64])
def test_any_range_is_read_as_through_the_cache(path: Path, pages: int) -> None:
    check(path, pages=pages)


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="a file system in memory")
def test_a_file_system_in_memory_is_read_too() -> None:
    path = Path(f"/dev/shm/lowvram-test-{os.getpid()}")
    try:
        path.write_bytes(DATA)
        check(path)
    finally:
        path.unlink(missing_ok=True)


@direct_here
@pytest.mark.parametrize("refused", ["when it is opened", "when it is read"])
def test_a_file_system_without_direct_reads_is_read_through_the_cache(
    path: Path, refused: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, read, direct = os.open, os.preadv, set()

    def open_(path: Any, flags: int, *rest: Any) -> int:
        if flags & os.O_DIRECT:
            if refused == "when it is opened":
                raise OSError(errno.EINVAL, "made to fail")
            number = opened(path, flags & ~os.O_DIRECT, *rest)
            direct.add(number)
            return number
        return opened(path, flags, *rest)

    def preadv(file: int, *rest: Any) -> int:
        if file in direct:
            raise OSError(errno.EINVAL, "made to fail")
        return read(file, *rest)

    monkeypatch.setattr(os, "open", open_)
    monkeypatch.setattr(os, "preadv", preadv)
    assert not check(path)


def test_where_there_are_no_direct_reads_nothing_is_different(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "O_DIRECT", raising=False)
    assert not check(path)


def test_short_reads_are_read_on(path: Path) -> None:
    check(path, Faults(FaultPlan("short_read", 1, persistent=True)), pages=4)


@pytest.mark.skipif(sys.platform == "win32", reason="an open file cannot be changed there")
@pytest.mark.parametrize("change", ["truncated", "replaced"])
def test_a_changed_file_is_noticed(path: Path, change: str) -> None:
    with FileReader(path) as reader, mmap.mmap(-1, 4 * PAGE) as pages:
        file = DirectFile(reader)
        if change == "truncated":
            os.truncate(path, PAGE + 1)
        else:
            write_atomic(path, DATA)
        with pytest.raises(StorageError, match="changed"):
            file.read_into(0, memoryview(bytearray(2 * PAGE)), memoryview(pages))
        file.close()


# ---- blocks in pieces


@pytest.fixture
def made(checkpoint: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Blocks of several pieces each."""
    monkeypatch.setattr(reading, "PIECE_BYTES", PAGE)
    return checkpoint(tmp_path, {"high": 4}, counts=(10, 9000, 333, 5000))


def placed(made: Any, past_cache: bool) -> Placement:
    return Placement(dict.fromkeys(made.layouts, "disk"), past_cache=past_cache)


@pytest.mark.parametrize("past_cache", [False, True])
def test_blocks_read_in_pieces_have_the_bytes_of_the_file(made: Any, past_cache: bool) -> None:
    order = list(made.layouts) * 3
    device = CpuDevice()
    with BlockStream(made.layouts, placed(made, past_cache), device, FileReader, order) as stream:
        claims = plan_traffic(made.layouts, placed(made, past_cache), order).host_claims()
        assert device.ram.claims == claims
        assert len([name for name in claims if name.startswith("ring reader")]) == 4 * past_cache
        for block, views in stream:
            made.check(block, views)
    assert (device.ledger.used, device.ram.used) == (0, 0)


@pytest.mark.parametrize("past_cache", [False, True])
def test_pieces_that_are_kept_are_not_read_again(made: Any, past_cache: bool) -> None:
    order = list(made.layouts) * 2
    whole = sum(run.nbytes for layout in made.layouts.values() for run in read_runs(layout))
    for capacity in (1 << 30, whole // 2):
        kept, moved = KeptBytes(capacity), []
        for _ in range(2):
            with BlockStream(
                made.layouts, placed(made, past_cache), CpuDevice(), FileReader, order, kept=kept
            ) as stream:
                for block, views in stream:
                    made.check(block, views)
                moved.append(sum(stats.disk_bytes for stats in stream.stats().values()))
            kept.next_job()
            assert 0 < kept.used <= capacity
        # what is not kept comes from the file at both visits
        assert moved == [2 * whole - kept.used, 2 * (whole - kept.used)]
        assert (kept.used == whole) == (capacity > whole)


@pytest.mark.parametrize("past_cache", [False, True])
@pytest.mark.parametrize("kind", ["read", "short_read"])
def test_a_piece_that_fails_is_an_error_and_a_short_one_is_not(
    made: Any, kind: FaultKind, past_cache: bool
) -> None:
    order = list(made.layouts)
    for nth in range(1, 400, 3):
        faults, device = Faults(FaultPlan(kind, nth)), CpuDevice()
        try:
            with BlockStream(
                made.layouts, placed(made, past_cache), device, partial(FileReader, faults=faults), order
            ) as stream:
                for block, views in stream:
                    made.check(block, views)
            assert kind == "short_read" or not faults.struck
        except StorageError:
            assert kind == "read" and faults.struck
        assert (device.ledger.used, device.ram.used) == (0, 0)
        if not faults.struck:
            break
    assert nth > 30 and not faults.struck


def test_what_nobody_wants_any_more_is_left(made: Any) -> None:
    wanted = True
    layout = next(iter(made.layouts.values()))
    with BlockReader(FileReader, 2, [], lambda: not wanted) as reader:
        assert reader.fill(layout, memoryview(bytearray(layout.nbytes)))
        wanted = False
        assert not reader.fill(layout, memoryview(bytearray(layout.nbytes)))
