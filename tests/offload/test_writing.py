"""Large files: the bytes that were given, whole or not at all, whatever the file system says to direct writes."""

from __future__ import annotations

import errno
import os
import random
import sys
from collections.abc import Iterator
from io import FileIO
from pathlib import Path

import pytest

from lowvram.errors import StorageError
from lowvram.offload import writing
from lowvram.offload.direct import PAGE
from lowvram.offload.faults import FaultPlan, Faults
from lowvram.offload.io import Buffer, write_all
from lowvram.offload.writing import write_large


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "WRITE_BYTES", 2 * PAGE)


@pytest.mark.parametrize("nbytes", [0, 1, PAGE, 2 * PAGE, 4 * PAGE, 5 * PAGE + 7, 60_000])
def test_a_file_is_what_its_pieces_are(nbytes: int, tmp_path: Path) -> None:
    rng = random.Random(nbytes)
    whole = rng.randbytes(nbytes)
    again = bytearray(3 * PAGE)  # one memory for every piece, as a generator may use it

    def pieces() -> Iterator[Buffer]:
        at = 0
        while at < nbytes:
            count = min(rng.choice((0, 1, 7, 1000, PAGE, 3 * PAGE)), nbytes - at)
            again[:count] = whole[at : at + count]
            yield memoryview(again)[:count]
            at += count

    write_large(tmp_path / "x", pieces())
    assert (tmp_path / "x").read_bytes() == whole
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("strike", [1, 2, 3])
def test_a_disk_that_fills_up_leaves_the_old_file(strike: int, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"old")
    with pytest.raises(StorageError, match="the disk is full"):
        write_large(tmp_path / "x", [bytes(5 * PAGE)], faults=Faults(FaultPlan("write", strike)))
    assert (tmp_path / "x").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_pieces_that_cannot_be_made_leave_the_old_file(tmp_path: Path) -> None:
    def pieces() -> Iterator[Buffer]:
        yield bytes(3 * PAGE)
        raise ValueError("no more")

    (tmp_path / "x").write_bytes(b"old")
    with pytest.raises(ValueError, match="no more"):
        write_large(tmp_path / "x", pieces())
    assert (tmp_path / "x").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="writes past the cache are Linux's")
@pytest.mark.parametrize("allowed", [True, False])
def test_whole_pages_go_past_the_cache_where_that_is_allowed(
    allowed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    asked: list[tuple[int, bool]] = []

    def write(file: FileIO, piece: Buffer, faults: Faults | None) -> None:
        direct = bool(fcntl.fcntl(file, fcntl.F_GETFL) & os.O_DIRECT)
        asked.append((memoryview(piece).nbytes, direct))
        if direct and not allowed:
            raise OSError(errno.EINVAL, "larger pages, please")
        write_all(file, piece, faults)

    monkeypatch.setattr(writing, "write_all", write)
    data = random.Random(1).randbytes(3 * PAGE + 5)
    write_large(tmp_path / "x", [data])
    assert (tmp_path / "x").read_bytes() == data
    if not any(direct for _, direct in asked):
        pytest.skip("no direct writes on this file system")
    if allowed:
        assert asked == [(2 * PAGE, True), (PAGE, True), (5, False)]
    else:  # refused once, then through the cache
        assert asked == [(2 * PAGE, True), (2 * PAGE, False), (PAGE, False), (5, False)]
