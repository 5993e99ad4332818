"""Where stored tensors lie: what the file parsers make, and the identifier, the slabs and the planner use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from lowvram.quant.encodings.base import Encoding

Shape = tuple[int, ...]

DTYPE_BITS: Mapping[str, int] = MappingProxyType(
    {
        "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
        "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
        "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
        "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
    }
)  # fmt: skip
"""Bits per element of every dtype code a safetensors file may use."""


class Reader(Protocol):
    """An opened file, as the parsers see it."""

    @property
    def path(self) -> Path: ...

    @property
    def size(self) -> int:
        """Bytes in the file."""
        ...

    def read_at(self, offset: int, nbytes: int) -> bytes:
        """`nbytes` bytes from `offset`; fewer only where the file ends."""
        ...


@dataclass(frozen=True, slots=True)
class Part:
    """A stored piece of a tensor: a run of bytes in a file."""

    role: str
    """What the encoding uses it for: "weight", "scale", ..."""
    file: Path
    offset: int
    """Absolute byte offset in the file."""
    nbytes: int
    dtype: str
    """safetensors dtype code: "F32", "BF16", "F8_E4M3", ..."""
    shape: Shape
    """As its encoding lays it out; may differ from the logical shape of the tensor it belongs to."""


@dataclass(frozen=True, slots=True)
class TensorRef:
    """A logical tensor under its native name, and the parts it is stored in."""

    name: str
    shape: Shape
    """Logical shape."""
    encoding: Encoding
    parts: tuple[Part, ...]

    @property
    def nbytes(self) -> int:
        """Stored bytes of all parts."""
        return sum(part.nbytes for part in self.parts)


def stored_bytes(dtype: str, shape: Shape) -> int:
    """Bytes of a tensor of `shape` in the dtype code `dtype`; a partly filled last byte counts whole."""
    bits = DTYPE_BITS[dtype]
    for size in shape:
        bits *= size
    return -(-bits // 8)
