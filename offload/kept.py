"""KeptBytes: weights that one job has read, kept in host memory for the next job."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch
from torch import Tensor

from lowvram.offload.io import FileIdentity, FileReader

_Key = tuple[FileIdentity, int, int]
"""A file as it was, the first byte, and how many."""


@dataclass(slots=True)
class _Piece:
    data: Tensor
    """uint8"""
    job: int
    """The last that used it."""


class KeptBytes:
    """Pieces of files in host memory, `capacity` bytes of them at most. Used by several threads at once.

    A job visits its blocks in a cycle, so the first that were read stay and nothing makes room for others while it
    runs; `next_job` drops what the last one did not use. A file that changed is another file.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._used = 0
        self._job = 0
        self._pieces: dict[_Key, _Piece] = {}
        self._lock = threading.Lock()

    @property
    def used(self) -> int:
        """Bytes that are held now."""
        return self._used

    def fetch(self, reader: FileReader, offset: int, target: memoryview) -> bool:
        """Fill `target` with what was kept of the file at `offset`; False if that is not here.

        StorageError if the file was changed since it was opened, as reading it would raise.
        """
        with self._lock:
            piece = self._pieces.get((reader.identity, offset, target.nbytes))
            if piece is None:
                return False
            piece.job = self._job
        reader.check_unchanged()
        torch.frombuffer(target, dtype=torch.uint8).copy_(piece.data)
        return True

    def keep(self, reader: FileReader, offset: int, source: memoryview) -> None:
        """Hold a copy of what was read, if there is room."""
        key = (reader.identity, offset, source.nbytes)
        with self._lock:
            if not source.nbytes or key in self._pieces or self._used + source.nbytes > self.capacity:
                return
            self._used += source.nbytes
        try:
            data = torch.frombuffer(source, dtype=torch.uint8).clone()
        except BaseException:
            with self._lock:
                self._used -= source.nbytes
            raise
        with self._lock:
            self._pieces[key] = _Piece(data, self._job)

    def next_job(self) -> None:
        """The job is over: what it did not use goes."""
        with self._lock:
            self._pieces = {key: piece for key, piece in self._pieces.items() if piece.job == self._job}
            self._used = sum(nbytes for _, _, nbytes in self._pieces)
            self._job += 1
