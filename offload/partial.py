"""PartialFile: a large file that is made over several lives of the process."""

from __future__ import annotations

import os
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Self

from lowvram.errors import BusyError
from lowvram.offload.faults import Faults
from lowvram.offload.io import Buffer, replace_file, storage_errors, sync_folder, write_all
from lowvram.offload.locks import open_locked, remove_locked

_SYNC_BYTES = 64 << 20
"""Bytes of a partial file that a power cut may cost."""


class PartialFile:
    """A file that is made piece by piece, over several lives of the process if need be.

    The pieces go to a hidden file beside `path`, which is as large as the whole from the beginning. Lines given to
    `note` come to a journal once all that was written before is on the disk, which is seen to every 64 MiB and by
    `close`; `commit` gives the file its name. A later PartialFile of the same path, size and `key` (a name for all
    that the content follows from) goes on where the journal ends; any other begins anew.

    Raises BusyError if another process makes the same file, StorageError if the disk is full or does not take it.
    """

    def __init__(self, path: Path, nbytes: int, key: str, *, faults: Faults | None = None) -> None:
        self._path, self._faults = path, faults
        self._target = Path(os.path.realpath(path))
        self._partial = self._target.with_name(f".{self._target.name}.partial")
        with storage_errors(path):
            self._target.parent.mkdir(parents=True, exist_ok=True)
            journal = open_locked(self._partial.with_suffix(".journal"))
            if journal is None:
                advice = "wait for it, or stop it first"
                raise BusyError("another process is making this file", where=str(path), advice=advice)
            self._journal = journal
            self.notes = self._read_notes(f"{key} {nbytes}")
            """Lines of the journal, oldest first."""
            self._file = FileIO(self._partial, "r+" if self._partial.exists() else "w+")
            self._file.truncate(nbytes)
        self._pending: list[str] = []
        self._unsynced = 0

    def _read_notes(self, first: str) -> list[str]:
        """The whole lines of a journal that begins with `first` and has its file beside it; else it begins anew."""
        self._journal.seek(0)
        text = self._journal.read()
        whole = text[: text.rfind(b"\n") + 1]
        begun, *notes = whole.decode("ascii", "replace").splitlines() or [""]
        if begun == first and self._partial.exists():
            self._journal.truncate(len(whole))
            return notes
        self._partial.unlink(missing_ok=True)
        self._journal.truncate(0)
        write_all(self._journal, f"{first}\n".encode("ascii"), self._faults)
        return []

    def write_at(self, offset: int, data: Buffer) -> None:
        with storage_errors(self._path):
            self._file.seek(offset)
            write_all(self._file, data, self._faults)
        self._unsynced += memoryview(data).nbytes

    def note(self, line: str) -> None:
        """An ASCII `line` that says what has been written so far."""
        self._pending.append(line)
        if self._unsynced >= _SYNC_BYTES:
            self._sync()

    def _sync(self) -> None:
        with storage_errors(self._path):
            os.fsync(self._file.fileno())
            write_all(
                self._journal, "".join(f"{line}\n" for line in self._pending).encode("ascii"), self._faults
            )
        self._pending, self._unsynced = [], 0

    def commit(self) -> None:
        """The file is whole: it takes its name."""
        with storage_errors(self._path):
            self._sync()
            self._file.close()
            replace_file(self._partial, self._target)
            sync_folder(self._target.parent)
            remove_locked(self._journal, self._partial.with_suffix(".journal"))

    def close(self) -> None:
        """Leave it for another time."""
        try:
            if self._pending and not self._file.closed:
                self._sync()
        finally:
            self._file.close()
            self._journal.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
