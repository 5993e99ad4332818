"""Locks between processes. The system's own: each ends with its process, however that ends, so none is ever left behind."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import BinaryIO

from lowvram.errors import BusyError
from lowvram.offload.io import storage_errors, write_all

_NO_LOCKS = frozenset({errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK})
_LOCKED_BYTE = 1 << 30
"""Windows locks bytes, and what it locks nobody can read: one far behind the process number in a lock file."""


def try_lock(file: BinaryIO | FileIO) -> bool:
    """Lock an open file for this process; False if another has locked it. Closing it unlocks.

    True also where the file system has no locks (some network ones).
    """
    try:
        if sys.platform == "win32":
            import msvcrt

            file.seek(_LOCKED_BYTE)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in _NO_LOCKS
    return True


@contextmanager
def holding(path: Path, doing: str, *, where: str, advice: str) -> Iterator[None]:
    """Hold the lock file `path` until the block ends; it is made for that, and removed in the end.

    BusyError at once if somebody holds it: a process that is `doing` something, which it names. StorageError if no file
    can be made there.
    """
    with storage_errors(path):
        file = _locked(path, doing, where, advice)
    try:
        with storage_errors(path):
            file.truncate(0)
            write_all(file, str(os.getpid()).encode(), None)
        yield
    finally:
        _remove(file, path)


def is_held(path: Path) -> bool:
    """Whether another process holds the lock file `path`, or this one in another place."""
    try:
        with FileIO(path, "r+") as file:
            return not try_lock(file)
    except OSError:
        return False


def _locked(path: Path, doing: str, where: str, advice: str) -> FileIO:
    """The lock file, open and locked. One that its holder removed before it was locked here is nobody's: it is made anew."""
    while True:
        file = FileIO(path, "a+")
        if not try_lock(file):
            file.seek(0)
            owner = file.read(20).decode("ascii", "replace")
            file.close()
            who = f"process {owner}" if owner else "another process"
            raise BusyError(f"{who} is {doing}", where=where, advice=advice)
        if os.name == "nt":
            return file  # an open file cannot be removed there
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return file
        file.close()


def _remove(file: FileIO, path: Path) -> None:
    """End the lock, and its file: before anybody else can lock it, except on Windows, where it has to be closed first and
    stays if it is open elsewhere."""
    with suppress(OSError):
        if os.name != "nt":
            path.unlink()
    file.close()
    with suppress(OSError):
        if os.name == "nt":
            path.unlink()
