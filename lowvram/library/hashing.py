"""Reading whole files: their sha256."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from lowvram.offload.io import FileReader

_PIECE = 8 << 20


def file_sha256(path: Path, progress: Callable[[int, int], None] = lambda done, size: None) -> str:
    """The sha256 of a file, as 64 lower-case hexadecimal digits. `progress` is told bytes that are done, and the size.

    FileError if it cannot be opened, StorageError if it changes while it is read.
    """
    digest, buffer = hashlib.sha256(), bytearray(_PIECE)
    with FileReader(path) as reader:
        for offset in range(0, reader.size, _PIECE):
            piece = memoryview(buffer)[: min(_PIECE, reader.size - offset)]
            reader.read_into(offset, piece)
            digest.update(piece)
            progress(offset + len(piece), reader.size)
    return digest.hexdigest()
