"""The only place that reads or writes files. Files are never mapped: such pages are memory that no ledger sees."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import stat
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Self

from lowvram.errors import FileError, StorageError
from lowvram.offload.faults import Faults

_SYSCALL_BYTES = 1 << 30
"""The most asked of the system at once: Linux stops at 2^31 - 4096, Windows at 2^31 - 1."""
_KERNEL_BYTES = 1 << 20
_FULL = frozenset({errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)})
_NO_FOLDER_SYNC = frozenset(
    {errno.EINVAL, errno.EBADF, errno.EACCES, errno.EPERM, errno.ENOTSUP, errno.ENOSYS}
)
"""What file systems answer that open no folder, or sync none. The file is in its place all the same."""
_REPLACE_WAITS = (0.05, 0.1, 0.2, 0.4, 0.8)
"""Seconds between attempts to replace a file that a scanner or viewer holds open (Windows)."""


@dataclass(frozen=True, slots=True)
class FileIdentity:
    """What tells a file from a changed or replaced one."""

    size: int
    mtime_ns: int
    device: int
    inode: int


def _identity(status: os.stat_result) -> FileIdentity:
    return FileIdentity(status.st_size, status.st_mtime_ns, status.st_dev, status.st_ino)


class FileReader:
    """A regular file, open for positioned reads from any thread; a `lowvram.quant.refs.Reader`.

    Raises FileError if `path` is missing, may not be read or is not a regular file (links are followed), and
    StorageError if it is not the file `expected` (an `identity` seen earlier). Closed by `close` or `with`.
    """

    def __init__(
        self, path: Path, *, expected: FileIdentity | None = None, faults: Faults | None = None
    ) -> None:
        self._path, self._faults = path, faults
        self._lock = threading.Lock()
        self._bytes_read = 0
        self._file = _open_regular(path)
        self.identity = _identity(os.fstat(self._file.fileno()))
        if expected is not None and expected != self.identity:
            self._file.close()
            raise self._changed("it is not the file whose header was read")

    @property
    def path(self) -> Path:
        """As given."""
        return self._path

    @property
    def size(self) -> int:
        """Bytes in the file when it was opened."""
        return self.identity.size

    @property
    def bytes_read(self) -> int:
        """Bytes that came from the file so far."""
        return self._bytes_read

    def fileno(self) -> int:
        """The system's number of the open file."""
        return self._file.fileno()

    def read_at(self, offset: int, nbytes: int) -> bytes:
        """`nbytes` bytes from `offset`; fewer only where the file ends. Errors as `read_into`."""
        data = bytearray(max(0, min(nbytes, self.size - offset)))
        self.read_into(offset, memoryview(data))
        return bytes(data)

    def read_into(self, offset: int, target: memoryview) -> None:
        """Fill `target` (bytes, writable, contiguous) from `offset`.

        Raises StorageError if the file ends before, was truncated, rewritten or replaced since it was opened,
        or cannot be read.
        """
        done = 0
        try:
            while done < target.nbytes:
                count = self.read_some(offset + done, target[done : done + _SYSCALL_BYTES])
                if count == 0:
                    raise self._changed(f"it ends before byte {offset + target.nbytes:,}")
                done += count
            self.check_unchanged()
        except OSError as error:
            raise failed_reading(self._path, error) from error

    def read_some(self, offset: int, target: memoryview, opened: FileIO | None = None) -> int:
        """Bytes read into `target`, perhaps fewer than it holds; 0 at the end. OSError as the system gives it.

        opened: the same file, opened otherwise. Interrupted calls are repeated by Python itself (PEP 475).
        """
        file = opened or self._file
        if self._faults is not None:
            if self._faults.strikes("read"):
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            if self._faults.strikes("short_read"):
                target = target[: (target.nbytes + 1) // 2]
        if hasattr(os, "preadv"):
            count = os.preadv(file.fileno(), [target], offset)
        else:
            count = seek_and_read(file, self._lock, offset, target)
        with self._lock:
            self._bytes_read += count
        return count

    def check_unchanged(self) -> None:
        """StorageError if the file was written to or replaced since it was opened."""
        if _identity(os.fstat(self._file.fileno())) != self.identity:
            raise self._changed("it was written to")
        if os.name == "nt":
            return  # an open file cannot be renamed or replaced there
        try:
            there = os.stat(self._path)
        except FileNotFoundError:
            return  # moved or deleted: the open file still holds the same bytes
        if (there.st_dev, there.st_ino) != (self.identity.device, self.identity.inode):
            raise self._changed("another file took its place")

    def _changed(self, how: str) -> StorageError:
        return StorageError(
            f"changed while it was being used: {how}",
            where=str(self._path),
            expected="the same bytes from the beginning of a job to its end",
            advice="wait until downloads and copies have finished, then load the model again, run again or resume",
        )

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Opener:
    """Opens files for reading. StorageError for one that is no longer what it was when it was opened first: what is known
    of its contents would not be true of it."""

    def __init__(self, known: Mapping[Path, FileIdentity] = MappingProxyType({})) -> None:
        self._known = dict(known)

    def __call__(self, path: Path) -> FileReader:
        reader = FileReader(path, expected=self._known.get(path))
        self._known[path] = reader.identity
        return reader

    def copy(self) -> Opener:
        """One that knows the same files, and may come to know others."""
        return Opener(self._known)


def seek_and_read(file: FileIO, lock: threading.Lock, offset: int, target: memoryview) -> int:
    """A positioned read for systems without one (Windows): bytes read into `target`."""
    with lock:
        file.seek(offset)
        return file.readinto(target) or 0


def _open_regular(path: Path) -> FileIO:
    advice = "give the path of a model, LoRA or media file that you may read"
    try:
        # Looked at before it is opened: opening a device can have effects, opening a FIFO can wait forever.
        mode = os.stat(path).st_mode
        if stat.S_ISREG(mode):
            flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
            file = FileIO(os.open(path, flags | getattr(os, "O_NONBLOCK", 0)))
            mode = os.fstat(file.fileno()).st_mode
            if stat.S_ISREG(mode):
                return file
            file.close()
    except (OSError, ValueError) as error:
        found = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise FileError(found, where=str(path), expected="a readable file", advice=advice) from error
    raise FileError(f"this is {_kind(mode)}", where=str(path), expected="a regular file", advice=advice)


def _kind(mode: int) -> str:
    if stat.S_ISDIR(mode):
        return "a folder"
    if stat.S_ISFIFO(mode):
        return "a named pipe"
    if stat.S_ISSOCK(mode):
        return "a socket"
    return "a device"


def read_small_text(path: Path, limit: int) -> str:
    """The UTF-8 text of a file of at most `limit` bytes; FileError if it is larger or not UTF-8."""
    with FileReader(path) as reader:
        if reader.size > limit:
            raise FileError(
                f"{reader.size:,} bytes long",
                where=str(path),
                expected=f"a text of at most {limit:,} bytes",
                advice="check that this is the file you meant",
            )
        data = reader.read_at(0, reader.size)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise FileError(
            f"byte {error.start:,} is not UTF-8",
            where=str(path),
            expected="a UTF-8 text",
            advice="check that this is the file you meant, or save it as UTF-8",
        ) from error


def read_kernel_text(path: Path) -> str | None:
    """The text of a file that the kernel makes when it is read (`/proc`, `/sys`); None if it is not there."""
    try:
        with open(path, "rb", buffering=0) as file:
            return file.read(_KERNEL_BYTES).decode("utf-8", "replace")
    except OSError:
        return None


def failed_reading(path: Path, error: OSError) -> StorageError:
    """The error for a file of which the system says so."""
    return StorageError(
        f"reading failed: {error.strerror or error}",
        where=str(path),
        advice="check that the disk or network share is still there, then run again or resume",
    )


Buffer = bytes | bytearray | memoryview


def write_atomic(path: Path, data: Buffer | Iterable[Buffer], *, faults: Faults | None = None) -> None:
    """Write a file so that at every moment, power cuts included, `path` is the old file or the whole new one.

    The bytes go to a temporary file in the same folder, reach the disk, then take the name. A link is
    followed. Raises StorageError, with the old file untouched and the temporary one removed, if that fails.
    """
    with replacing(path) as file:
        for piece in (data,) if isinstance(data, Buffer) else data:
            write_all(file, piece, faults)


@contextmanager
def replacing(path: Path) -> Iterator[FileIO]:
    """A new file that takes the place of `path` when the block ends, and is removed if it ends with an error.

    StorageError as `write_atomic`.
    """
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    with storage_errors(path):
        try:
            with FileIO(temporary, "x") as file:
                yield file
                os.fsync(file.fileno())
            replace_file(temporary, target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(target.parent)


def user_path(path: str | Path) -> Path:
    """The path with the user's home for "~". A file may also be called "~name" without there being such a user."""
    return Path(os.path.expanduser(path))


def free_bytes(path: Path) -> int:
    """Bytes that can still be written where `path` is to be. StorageError if there is no such drive (Windows)."""
    whole = Path(os.path.realpath(path))
    folder = next((each for each in (whole, *whole.parents) if each.exists()), None)
    if folder is None:
        raise StorageError(
            "no such drive", where=str(path), advice="choose a folder on a drive that is there"
        )
    return shutil.disk_usage(folder).free


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Errors of the system while `path` is written, as StorageError."""
    try:
        yield
    except OSError as error:
        full = error.errno in _FULL
        raise StorageError(
            "the disk is full" if full else f"writing failed: {error.strerror or error}",
            where=str(path),
            advice="free space there and resume" if full else "check the folder and its permissions",
        ) from error


def write_all(file: FileIO, piece: Buffer, faults: Faults | None) -> None:
    """Write the whole of `piece` where the file stands; OSError if that fails."""
    left = memoryview(piece).cast("B")
    while left.nbytes:
        if faults is not None and faults.strikes("write"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        left = left[file.write(left[:_SYSCALL_BYTES]) :]


def replace_file(temporary: Path, target: Path) -> None:
    """Give a file the name of another, which is waited for if it is held open (Windows)."""
    for wait in _REPLACE_WAITS:
        try:
            os.replace(temporary, target)
            return
        except PermissionError:
            time.sleep(wait)
    os.replace(temporary, target)


def sync_folder(folder: Path) -> None:
    """Make a rename durable, where the file system can: Windows and some network file systems cannot, and need not."""
    if os.name == "nt":
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
