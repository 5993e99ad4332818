"""The measurement of the disk runs, and reads what it says it reads."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lowvram.bench import disk


@pytest.mark.skipif(sys.platform == "win32", reason="the cache there cannot be told to forget")
def test_every_way_reads_the_whole_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "BLOCK", 1 << 20)
    path = tmp_path / "bytes"
    path.write_bytes(bytes(5 << 19))
    assert sum(layout.nbytes for layout in disk.blocks(path, 5 << 19)) == (5 << 19) - 1000
    for past, threads in disk.WAYS:
        clock, _ = disk.seconds(path, 5 << 19, past, threads)
        assert clock > 0
