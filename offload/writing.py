"""Large files at the speed of their disk: past the system's cache, while the next bytes are made."""

from __future__ import annotations

import errno
import os
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from io import FileIO
from itertools import cycle
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lowvram.offload.direct import PAGE
from lowvram.offload.faults import Faults
from lowvram.offload.io import Buffer, replacing, write_all

WRITE_BYTES = 16 << 20
"""Bytes that go to the disk at once: more is not faster."""
_BUFFERS = 4
"""So many are filled ahead that the disk has work while this process waits for a processor."""


def write_large(path: Path, data: Iterable[Buffer], *, faults: Faults | None = None) -> None:
    """Write a file of many pieces, whole or not at all: as `write_atomic`, for what is larger than the cache.

    Pieces are gathered in buffers of 16 MiB, of which one is written while the next are filled. Where the file
    system allows it they go past the system's cache, which would copy every byte, push out what others keep there and
    write it back later. Takes pieces as they come, and lets go of each before it takes the next.
    """
    with replacing(path) as file, ThreadPoolExecutor(1, "lowvram-write") as writer:
        _past_cache(file, True)
        pending: deque[Future[None]] = deque()
        for piece in _gathered(data):
            pending.append(writer.submit(_write, file, piece, faults))
            if len(pending) == _BUFFERS:
                pending.popleft().result()
        for written in pending:
            written.result()


def _gathered(data: Iterable[Buffer]) -> Iterator[NDArray[np.uint8]]:
    """The bytes of `data` in pieces of WRITE_BYTES and a last one; each stays as it is while the _BUFFERS - 1 after it
    are made."""
    memory = np.empty(_BUFFERS * WRITE_BYTES + PAGE, np.uint8)
    start = -memory.ctypes.data % PAGE
    buffers = cycle(memory[start + n * WRITE_BYTES :][:WRITE_BYTES] for n in range(_BUFFERS))
    buffer, filled = next(buffers), 0
    for piece in data:
        left = np.frombuffer(piece, np.uint8)
        while left.size:
            # numpy and not a slice of memory: it copies without holding up the other thread
            count = min(left.size, WRITE_BYTES - filled)
            np.copyto(buffer[filled : filled + count], left[:count])
            left, filled = left[count:], filled + count
            if filled == WRITE_BYTES:
                yield buffer
                buffer, filled = next(buffers), 0
    if filled:
        yield buffer[:filled]


def _write(file: FileIO, piece: NDArray[np.uint8], faults: Faults | None) -> None:
    """Write `piece` where the file stands: whole pages as the file was opened, what is left of a page through the cache."""
    pages, start = piece.size // PAGE * PAGE, file.tell()
    try:
        write_all(file, piece[:pages].data, faults)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        # A file system that allows direct writes, and then wants them in larger pages.
        _past_cache(file, False)
        file.seek(start)
        write_all(file, piece[:pages].data, faults)
    if pages < piece.size:
        _past_cache(file, False)
        write_all(file, piece[pages:].data, faults)


def _past_cache(file: FileIO, wanted: bool) -> None:
    """Let writes go past the system's cache, or through it again; nothing where there is no such way."""
    if sys.platform == "linux":
        import fcntl

        flags = fcntl.fcntl(file, fcntl.F_GETFL)
        flags = flags | os.O_DIRECT if wanted else flags & ~os.O_DIRECT
        try:
            fcntl.fcntl(file, fcntl.F_SETFL, flags)
        except OSError:
            return
