"""BlockLayout: one transformer block as one contiguous slab; where each part lies in it and in its file."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lowvram.errors import FileError, InternalError
from lowvram.quant.encodings.base import TORCH_DTYPES
from lowvram.quant.refs import Part, Shape, TensorRef, stored_bytes

ALIGNMENT = 256
"""Bytes every part starts at a multiple of: what cudaMalloc itself promises, enough for any vector load."""


@dataclass(frozen=True, slots=True)
class SlabEntry:
    """One stored part of one tensor."""

    name: str
    """Of the tensor: the native Wan name."""
    role: str
    """Of the part in its encoding: "weight", "scale", ..."""
    offset: int
    """Bytes from the start of the slab."""
    nbytes: int
    dtype: str
    """safetensors dtype code."""
    shape: Shape
    file: Path
    file_offset: int


@dataclass(frozen=True, slots=True)
class BlockLayout:
    """All parts of one block, in the order in which they lie both in the slab and in their files."""

    entries: tuple[SlabEntry, ...]
    nbytes: int
    """Bytes of the slab, a multiple of ALIGNMENT."""

    @property
    def stored_bytes(self) -> int:
        """Bytes of the parts alone."""
        return sum(entry.nbytes for entry in self.entries)


@dataclass(frozen=True, slots=True)
class ReadRun:
    """One read: `nbytes` bytes at `file_offset` of `file` belong at `slab_offset` of the slab."""

    file: Path
    file_offset: int
    slab_offset: int
    nbytes: int


def build_layout(refs: Iterable[TensorRef]) -> BlockLayout:
    """The layout of the tensors `refs`: file order, each part at a multiple of 256 bytes.

    Raises FileError if a part is in a dtype that torch cannot view, InternalError if its size is not that of
    its shape or a tensor appears twice.
    """
    parts = sorted(
        ((part, ref.name) for ref in refs for part in ref.parts),
        key=lambda pair: (str(pair[0].file), pair[0].offset, pair[1], pair[0].role),
    )
    entries: list[SlabEntry] = []
    seen: set[tuple[str, str]] = set()
    end = 0
    for part, name in parts:
        if part.dtype not in TORCH_DTYPES:
            raise FileError(
                f"stored as {part.dtype}",
                where=_where(part, name),
                expected="one of " + ", ".join(TORCH_DTYPES),
                advice="use a file in another format",
            )
        if part.nbytes != stored_bytes(part.dtype, part.shape):
            raise InternalError("size and shape disagree", where=_where(part, name), advice="report this")
        if (name, part.role) in seen:
            raise InternalError("appears twice in one block", where=_where(part, name), advice="report this")
        seen.add((name, part.role))
        start = _aligned(end)
        end = start + part.nbytes
        entries.append(
            SlabEntry(
                name, part.role, start, part.nbytes, part.dtype, tuple(part.shape), part.file, part.offset
            )
        )
    return BlockLayout(tuple(entries), _aligned(end))


def _where(part: Part, name: str) -> str:
    return f"{part.file}, {name} {part.role}"


def read_runs(layout: BlockLayout) -> tuple[ReadRun, ...]:
    """The fewest reads that fill a slab of `layout`, in slab order.

    Neighbours whose distance is the same in file and slab become one read; what lies between them in the file
    (less than 256 bytes) lands in the padding between them.
    """
    runs: list[ReadRun] = []
    for entry in layout.entries:
        if entry.nbytes == 0:
            continue
        last = runs[-1] if runs else None
        shift = entry.file_offset - entry.offset
        if last is not None and last.file == entry.file and last.file_offset - last.slab_offset == shift:
            nbytes = entry.offset + entry.nbytes - last.slab_offset
            runs[-1] = ReadRun(last.file, last.file_offset, last.slab_offset, nbytes)
        else:
            runs.append(ReadRun(entry.file, entry.file_offset, entry.offset, entry.nbytes))
    return tuple(runs)


def carve(layout: BlockLayout, slab: Tensor) -> dict[str, dict[str, Tensor]]:
    """Tensor name -> part role -> typed view of `slab` (uint8, 1-D, contiguous, at least `layout.nbytes`).

    Nothing is copied; the views have the stored dtype and shape and live as long as the slab keeps its bytes.
    """
    views: dict[str, dict[str, Tensor]] = {}
    for entry in layout.entries:
        raw = slab[entry.offset : entry.offset + entry.nbytes]
        views.setdefault(entry.name, {})[entry.role] = raw.view(TORCH_DTYPES[entry.dtype]).view(entry.shape)
    return views


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def as_bytes(slab: Tensor) -> memoryview:
    """The memory of a uint8 host slab, to be read into."""
    if slab.dtype != torch.uint8 or slab.device.type != "cpu":
        raise InternalError("a slab that files cannot be read into", advice="report this")
    return slab.numpy().data
