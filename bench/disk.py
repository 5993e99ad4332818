"""How fast blocks come from disk: through the system's cache and past it, by one thread and by several.

    python bench/disk.py [--folder FOLDER] [--size 2GB] [--rounds 3]

A file of random bytes is written, and forgotten by the cache before it is read, so every byte comes from the disk. The
ways take turns; each is told as a multiple of the first, from the best of its rounds, with the processor time it took.
"""

from __future__ import annotations

import argparse
import mmap
import os
import secrets
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from lowvram.offload.budget import parse_bytes
from lowvram.offload.io import FileReader
from lowvram.offload.placement import PIECE_BYTES, READERS
from lowvram.offload.reading import BlockReader
from lowvram.offload.slab import BlockLayout, SlabEntry

BLOCK = 350 << 20
"""Bytes read into the same memory, one after the other: about a block of a 14B model in 8 bits."""
WAYS = tuple((past, threads) for past in (False, True) for threads in (1, READERS))


def blocks(path: Path, nbytes: int) -> Iterator[BlockLayout]:
    """The file in blocks, from an offset that no disk likes."""
    for begin in range(1000, nbytes, BLOCK):
        n = min(BLOCK, nbytes - begin)
        yield BlockLayout((SlabEntry("bytes", "weight", 0, n, "U8", (n,), path, begin),), n)


def forget(path: Path) -> None:
    """Drop what the cache holds of a file that is on the disk. Windows knows no way."""
    if not hasattr(os, "posix_fadvise"):
        return
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
        os.posix_fadvise(number, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(number)


def remember(path: Path) -> None:
    """Read a file through the cache, which keeps as much of it as it has room for."""
    with FileReader(path) as reader:
        memory = memoryview(bytearray(PIECE_BYTES))
        for begin in range(0, reader.size, len(memory)):
            reader.read_into(begin, memory[: reader.size - begin])


def seconds(path: Path, nbytes: int, past: bool, threads: int) -> tuple[float, float]:
    """Of the clock and of the processor, to read the whole file once."""
    forget(path)
    with mmap.mmap(-1, BLOCK) as memory, mmap.mmap(-1, threads * PIECE_BYTES) as own:
        target = memoryview(memory)
        pages = [memoryview(own)[n * PIECE_BYTES : (n + 1) * PIECE_BYTES] for n in range(threads)]
        with BlockReader(FileReader, threads, pages if past else [], lambda: False) as reader:
            began, cpu = time.perf_counter(), time.process_time()
            for layout in blocks(path, nbytes):
                reader.fill(layout, target[: layout.nbytes])
            took = time.perf_counter() - began, time.process_time() - cpu
        target.release()
        for page in pages:
            page.release()
    return took


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--size", type=lambda text: parse_bytes(text, flag="--size"), default=2 * 10**9)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    with tempfile.NamedTemporaryFile(dir=asked.folder, prefix="lowvram-disk-") as file:
        piece = secrets.token_bytes(1 << 24)
        for _ in range(-(-asked.size // len(piece))):
            file.write(piece)
        file.flush()
        path = Path(file.name)
        best = {way: min(times) for way, times in _rounds(path, asked.size, asked.rounds).items()}
    first, _ = best[WAYS[0]]
    for (past, threads), (clock, cpu) in best.items():
        way = f"{'past' if past else 'through'} the cache, {threads} thread{'s' * (threads > 1)}"
        print(
            f"{way:30}  {first / clock:5.2f}x  {cpu / clock:4.2f} cores  {asked.size / clock / 1e9:.2f} GB/s"
        )


def _rounds(path: Path, nbytes: int, rounds: int) -> dict[tuple[bool, int], list[tuple[float, float]]]:
    found: dict[tuple[bool, int], list[tuple[float, float]]] = {way: [] for way in WAYS}
    for _ in range(rounds):
        for past, threads in WAYS:
            found[past, threads].append(seconds(path, nbytes, past, threads))
    return found


if __name__ == "__main__":
    main()
