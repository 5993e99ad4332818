"""A few rows of a stored table: what a vocabulary is read by, without ever holding the table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor

from lowvram.errors import FileError
from lowvram.quant.encodings.base import TORCH_DTYPES
from lowvram.quant.refs import Part, Reader, TensorRef


def gather_rows(
    table: TensorRef,
    rows: Sequence[int],
    open_reader: Callable[[Path], AbstractContextManager[Reader]],
    dtype: torch.dtype,
) -> Tensor:
    """Rows of a table [vocab, dim], read one by one and decoded on the host: [n, dim] in `dtype`.

    The numbers are those of the whole table decoded. FileError if the table is stored in an encoding whose rows do
    not lie apart (4-bit formats with groups across rows).
    """
    vocab, dim = table.shape
    if not table.encoding.by_rows:
        raise FileError(
            f"{table.name} is stored as {table.encoding.name}",
            where=str(table.parts[0].file),
            expected="a format whose rows can be read one by one (bf16, fp8, int8, GGUF)",
            advice="use a text encoder whose embedding is stored in one of those",
        )
    parts = {part.role: _read(part, vocab, rows, open_reader) for part in table.parts}
    return table.encoding.decode(parts, (len(rows), dim), dtype)


def _read(
    part: Part, vocab: int, rows: Sequence[int], open_reader: Callable[[Path], AbstractContextManager[Reader]]
) -> Tensor:
    """The wanted rows of a part that has a row for each of the table; the whole of any other, such as one scale for all."""
    per_row = bool(part.shape) and part.shape[0] == vocab
    size = part.nbytes // vocab if per_row else part.nbytes
    wanted = [part.offset + row * size for row in rows] if per_row else [part.offset]
    with open_reader(part.file) as reader:
        data = b"".join(reader.read_at(offset, size) for offset in wanted)
    shape = (len(rows), *part.shape[1:]) if per_row else part.shape
    return torch.frombuffer(bytearray(data), dtype=TORCH_DTYPES[part.dtype]).view(shape)
