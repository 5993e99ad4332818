"""Headers of files that are written: everything before the data, so that every tensor can go to its place at once."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from lowvram.quant.encodings.kquants import BLOCK_SIZES
from lowvram.quant.files.gguf import BLOCK_TYPES, PLAIN_TYPES
from lowvram.quant.refs import DTYPE_BITS, Shape, stored_bytes
from lowvram.quant.spec import numel

GGUF_ALIGNMENT = 32
_GGUF_TYPES: Mapping[str, int] = MappingProxyType(
    {dtype: kind for kind, (dtype, _) in PLAIN_TYPES.items()}
    | {name: kind for kind, name in BLOCK_TYPES.items()}
)
_UINT32, _STRING = 4, 8


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor of a file to be."""

    name: str
    dtype: str
    """safetensors dtype code, or the name of a GGUF block type."""
    shape: Shape
    """Logical, in torch's order."""

    @property
    def nbytes(self) -> int:
        if self.dtype in DTYPE_BITS:
            return stored_bytes(self.dtype, self.shape)
        elements, nbytes = BLOCK_SIZES[self.dtype]
        return numel(self.shape) // elements * nbytes


@dataclass(frozen=True, slots=True)
class Head:
    """The start of a file, and where the data of each of its tensors goes."""

    data: bytes
    offsets: Mapping[str, int]
    """Absolute, by name of the tensor."""
    nbytes: int
    """Of the whole file."""


def safetensors_head(entries: Sequence[Entry], metadata: Mapping[str, str]) -> Head:
    """Data in the order of `entries`, from a multiple of 256 bytes on, without holes."""
    table: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offsets: dict[str, int] = {}
    end = 0
    for entry in entries:
        start, end = end, end + entry.nbytes
        offsets[entry.name] = start
        table[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [start, end]}
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 256)
    start = 8 + len(text)
    head = len(text).to_bytes(8, "little") + text
    return Head(head, {name: start + offset for name, offset in offsets.items()}, start + end)


def gguf_head(entries: Sequence[Entry], keys: Mapping[str, str | int]) -> Head:
    """GGUF version 3 with texts and 32-bit numbers as keys."""
    head = bytearray(b"GGUF" + struct.pack("<IQQ", 3, len(entries), len(keys)))
    for key, value in keys.items():
        head += _text(key)
        if isinstance(value, str):
            head += struct.pack("<I", _STRING) + _text(value)
        else:
            head += struct.pack("<II", _UINT32, value)
    offsets: dict[str, int] = {}
    end = 0
    for entry in entries:
        sizes = tuple(reversed(entry.shape))
        head += _text(entry.name) + struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes)
        head += struct.pack("<IQ", _GGUF_TYPES[entry.dtype], end)
        offsets[entry.name] = end
        end += -(-entry.nbytes // GGUF_ALIGNMENT) * GGUF_ALIGNMENT
    head += bytes(-len(head) % GGUF_ALIGNMENT)
    start = len(head)
    return Head(bytes(head), {name: start + offset for name, offset in offsets.items()}, start + end)


def _text(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw
