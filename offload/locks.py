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
        file = open_locked(path)
    if file is None:
        raise BusyError(f"{_holder(path)} is {doing}", where=where, advice=advice)
    try:
        with storage_errors(path):
            file.truncate(0)
            write_all(file, str(os.getpid()).encode(), None)
        yield
    finally:
        with suppress(OSError):
            remove_locked(file, path)


def is_held(path: Path) -> bool:
    """Whether another process holds the lock file `path`, or this one in another place."""
    try:
        with FileIO(path, "r+") as file:
            return not try_lock(file)
    except OSError:
        return False


def open_locked(path: Path) -> FileIO | None:
    """The file, made if it is not there, for reading and appending, locked; None if somebody else has locked it.

    What its holder removed after it was opened here is nobody's file any more, whatever lock it has: it is opened anew.
    """
    while True:
        file = FileIO(path, "a+")
        if not try_lock(file):
            file.close()
            return None
        if os.name == "nt":
            return file  # an open file cannot be removed there
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return file
        file.close()


def remove_locked(file: FileIO, path: Path) -> None:
    """Remove a file that is open and locked, and end the lock: before anybody else can have it, except on Windows, where
    the file has to be closed first, and stays if it is open elsewhere."""
    try:
        if os.name != "nt":
            path.unlink(missing_ok=True)
    finally:
        file.close()
    if os.name == "nt":
        with suppress(PermissionError):
            path.unlink(missing_ok=True)


def _holder(path: Path) -> str:
    """Who holds a lock file, for people."""
    owner = b""
    with suppress(OSError), FileIO(path) as file:
        owner = file.read(20) or b""
    return f"process {owner.decode('ascii', 'replace')}" if owner else "another process"
