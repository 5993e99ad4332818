"""Files that never touch a disk, and headers without data: what the tests of files and checkpoints share."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import settings

from lowvram.quant.files.header import Header, StoredTensor
from lowvram.quant.refs import Reader, Shape, stored_bytes

settings.register_profile("same everywhere", deadline=None, derandomize=True, database=None)
settings.load_profile("same everywhere")


@pytest.fixture(autouse=True)
def nothing_of_ones_own(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees the model files of the person who runs it, what was remembered of them, or jobs, nor adds to these."""
    own = tmp_path_factory.mktemp("own")
    monkeypatch.setenv("LOWVRAM_MODELS", "")
    monkeypatch.setenv("LOWVRAM_CACHE", str(own / "cache"))
    monkeypatch.setenv("LOWVRAM_STATE", str(own / "jobs"))


Entries = Mapping[str, tuple[str, Shape]]
"""Dtype code and shape of each tensor."""


@dataclass(frozen=True)
class BytesReader:
    """A file in memory; `size` may claim more than is there."""

    data: bytes
    path: Path
    size: int

    def read_at(self, offset: int, nbytes: int) -> bytes:
        assert offset >= 0 and 0 <= nbytes <= self.size - offset, (
            "the parser asked for bytes outside the file"
        )
        return self.data[offset : offset + nbytes]


@pytest.fixture(scope="session")
def bytes_reader() -> Callable[..., BytesReader]:
    """(data, name, size): a Reader of bytes; a size beyond the data makes a large file of them."""

    def make(data: bytes, name: str = "model.safetensors", size: int | None = None) -> BytesReader:
        return BytesReader(data, Path(name), len(data) if size is None else size)

    return make


@pytest.fixture(scope="session")
def open_file() -> Callable[[Path], object]:
    """Opens a real file for `open_checkpoint_files`."""

    @contextmanager
    def opened(path: Path) -> Iterator[Reader]:
        data = path.read_bytes()
        yield BytesReader(data, path, len(data))

    return opened


@pytest.fixture(scope="session")
def pack() -> Callable[..., bytes]:
    """(entries, metadata): the bytes of a safetensors file of zeros, written independently of the product."""

    def make(entries: Entries, metadata: Mapping[str, str] | None = None) -> bytes:
        table: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
        end = 0
        for name, (dtype, shape) in entries.items():
            start, end = end, end + stored_bytes(dtype, shape)
            table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(table).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text + bytes(end)

    return make


@pytest.fixture(scope="session")
def header_of() -> Callable[..., Header]:
    """(entries, name, metadata): the header of a file that need not exist, whatever its size."""

    def make(
        entries: Entries, name: str = "folder/model.safetensors", metadata: Mapping[str, str] | None = None
    ) -> Header:
        tensors, end = [], 4096
        for tensor, (dtype, shape) in entries.items():
            tensors.append(StoredTensor(tensor, dtype, tuple(shape), end, stored_bytes(dtype, shape)))
            end += tensors[-1].nbytes
        return Header(Path(name), end, tuple(tensors), dict(metadata or {}))

    return make
