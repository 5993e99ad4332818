"""Reads past the system's cache: a scan that is longer than the cache finds nothing in it, and pushes out what others
keep there."""

from __future__ import annotations

import errno
import mmap
import os
from io import FileIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lowvram.offload.io import FileReader, failed_reading

PAGE = 4096
"""What direct reads begin at, end at and are written to at multiples of: no disk asks for more."""
_TIMED_BYTES = 16 << 20
"""Bytes per read where the disk's rate is measured: more is not faster."""
_IMPOSSIBLE = frozenset({errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP})
"""What a file system without direct reads answers, when a file is opened or when it is read."""


class DirectFile:
    """An open file, read past the cache where its file system allows it, and as the reader does where not.

    Safe to use from several threads. `close` leaves the reader open.
    """

    def __init__(self, reader: FileReader) -> None:
        self._reader, self._file = reader, _opened_again(reader)
        self.direct = self._file is not None
        """Whether reads go past the cache, as far as is known."""

    def read_into(self, offset: int, target: memoryview, pages: memoryview) -> None:
        """Fill `target` from `offset` by way of `pages`, host memory of whole pages that nobody else uses meanwhile.

        The disk writes whole pages, `target` begins and ends anywhere. Errors as `FileReader.read_into`.
        """
        done = 0
        while self.direct and done < target.nbytes:
            start = (offset + done) // PAGE * PAGE
            skip = offset + done - start
            wanted = min(pages.nbytes, -(-(offset + target.nbytes - start) // PAGE) * PAGE)
            count = self._read_pages(start, pages[:wanted])
            use = max(0, min(count - skip, target.nbytes - done))
            if use:  # numpy and not a slice of `target`: it copies without holding up the other threads
                np.copyto(_bytes(target[done : done + use]), _bytes(pages[skip : skip + use]))
            done += use
            if count < wanted:
                break
        # The end of a file is no whole page, and a short read may end inside of one.
        self._reader.read_into(offset + done, target[done:])

    def _read_pages(self, start: int, pages: memoryview) -> int:
        try:
            return self._reader.read_some(start, pages, self._file)
        except OSError as error:
            if error.errno not in _IMPOSSIBLE:
                raise failed_reading(self._reader.path, error) from error
            self.direct = False
            return 0

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def _bytes(memory: memoryview) -> NDArray[np.uint8]:
    return np.frombuffer(memory, np.uint8)


def _opened_again(reader: FileReader) -> FileIO | None:
    """The same file for direct reads; None where there are none (Windows, some file systems)."""
    flag = getattr(os, "O_DIRECT", 0)
    if not flag:
        return None
    try:
        # By its number: its name may be another file's by now.
        number = os.open(f"/proc/self/fd/{reader.fileno()}", os.O_RDONLY | os.O_CLOEXEC | flag)
    except OSError:
        return None
    return FileIO(number)


def read_past_cache(path: Path, limit: int, *, direct: bool) -> int:
    """Read up to `limit` bytes from the start of a file off the disk itself, to time it; how many came.

    direct: without the system's cache (0 where the file system has no such way). Otherwise through the cache,
    which first forgets the file; where it cannot be told to (Windows), what it holds is not read from disk.
    StorageError if reading fails.
    """
    flags = getattr(os, "O_DIRECT", 0)
    if direct and not flags:
        return 0
    done = 0
    try:
        file = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | (flags if direct else 0))
    except OSError as error:
        if direct and error.errno == errno.EINVAL:
            return 0
        raise failed_reading(path, error) from error
    try:
        if not direct and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        # Anonymous pages are aligned as direct reads want their target to be.
        with mmap.mmap(-1, _TIMED_BYTES) as pages, open(file, "rb", buffering=0, closefd=False) as raw:
            count = _TIMED_BYTES
            while done < limit and count == _TIMED_BYTES:
                count = raw.readinto(pages) or 0
                done += count
    except OSError as error:
        raise failed_reading(path, error) from error
    finally:
        os.close(file)
    return done
