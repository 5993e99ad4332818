"""Text features on disk, so that a prompt that was encoded before needs no text encoder.

A file is named after everything that its numbers follow from: the encoder's files as they are now, the token ids, the
dtype and what computed them. It holds a sha256 and plain numbers, whose size is known before it is opened: nothing in it
is parsed. The prompt is not stored. A cache that cannot be read or written costs time and nothing else.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor

from lowvram import __version__
from lowvram.errors import LowvramError
from lowvram.folders import cache_folder
from lowvram.machine import Machine
from lowvram.model import Model
from lowvram.offload.io import FileReader, write_atomic

MAX_BYTES = 256 << 20
"""Of all files: some sixty of the longest prompts."""
_DIGEST = 32


@dataclass(frozen=True, slots=True)
class TextCache:
    """Features by key, in a folder that is made when it is first written to."""

    folder: Path

    def load(self, key: str, shape: tuple[int, int], dtype: torch.dtype) -> Tensor | None:
        """What was stored under `key`, on the host; None if nothing was, or not that."""
        path = self.folder / key
        nbytes = shape[0] * shape[1] * dtype.itemsize
        try:
            with FileReader(path) as reader:
                if reader.size != _DIGEST + nbytes:
                    return None
                data = reader.read_at(0, reader.size)
        except (LowvramError, OSError):
            return None
        if data[:_DIGEST] != _digest(key, data[_DIGEST:]):
            return None
        with suppress(OSError):
            os.utime(path)  # what was used last is dropped last
        return torch.frombuffer(bytearray(data[_DIGEST:]), dtype=dtype).view(shape)

    def store(self, key: str, features: Tensor) -> None:
        """Keep [n, text_dim] under `key`, and as many of the others, the last used, as there is room for."""
        data = features.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
        with suppress(LowvramError, OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomic(self.folder / key, (_digest(key, data), data))
            found = [(path.stat(), path) for path in self.folder.iterdir() if path.is_file()]
            total = 0
            for status, path in sorted(found, key=lambda pair: -pair[0].st_mtime_ns):
                total += status.st_size
                if total > MAX_BYTES:
                    path.unlink(missing_ok=True)


def text_cache() -> TextCache:
    """The cache of this user."""
    return TextCache(cache_folder() / "texts")


def text_key(model: Model, ids: Sequence[int], dtype: torch.dtype, machine: Machine) -> str:
    """What the features of `ids` follow from, as a file name. StorageError or FileError if a file is not there."""
    made = sha256(f"{__version__} {torch.__version__} {machine.kind} {machine.arch} {dtype}".encode())
    files = {part.file for ref in model.text.values() for part in ref.parts}
    order = {file: n for n, file in enumerate(sorted(files))}
    for file in order:
        with FileReader(file) as reader:
            made.update(repr(reader.identity).encode())
    for name, ref in sorted(model.text.items()):
        parts = [(p.role, order[p.file], p.offset, p.nbytes) for p in ref.parts]
        made.update(repr((name, ref.shape, ref.encoding, parts)).encode())
    made.update(repr(list(ids)).encode())
    return made.hexdigest()


def _digest(key: str, data: bytes) -> bytes:
    return sha256(key.encode() + data).digest()
