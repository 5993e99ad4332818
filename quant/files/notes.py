"""Small JSON texts that files store as tensors of bytes: the only tensor data read before a plan exists."""

from __future__ import annotations

from dataclasses import replace

from lowvram.errors import FileError
from lowvram.quant.files.header import Header, shown
from lowvram.quant.names import NOTE_ROLES, split_side
from lowvram.quant.refs import Reader

MAX_NOTE_BYTES = 4096
"""Bytes of one note; those of real files have about a hundred."""
MAX_ALL_NOTES = 8 << 20
"""Bytes of all notes of a file."""


def with_notes(reader: Reader, header: Header) -> Header:
    """`header` with the bytes of the notes in its file. FileError for a note that is not a short run of bytes."""
    notes: dict[str, bytes] = {}
    total = 0
    for tensor in header.tensors:
        if split_side(tensor.name)[1] not in NOTE_ROLES:
            continue
        total += tensor.nbytes
        if tensor.dtype != "U8" or tensor.nbytes > MAX_NOTE_BYTES or total > MAX_ALL_NOTES:
            raise FileError(
                f"{shown(tensor.name)} is {tensor.dtype} of {tensor.nbytes:,} bytes",
                where=str(reader.path),
                expected=f"a JSON text of at most {MAX_NOTE_BYTES:,} bytes",
                advice="download the file again, or use another version of the model",
            )
        notes[tensor.name] = reader.read_at(tensor.offset, tensor.nbytes)
    return replace(header, notes=notes) if notes else header
