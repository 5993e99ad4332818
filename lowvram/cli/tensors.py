"""Tensors in the folder of a job: written whole or not at all, and never taken for what was saved if they are damaged."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from safetensors.torch import load
from torch import Tensor

from lowvram.errors import FileError
from lowvram.offload.io import FileReader, write_atomic
from lowvram.offload.slab import as_bytes
from lowvram.quant.encodings.base import TORCH_DTYPES
from lowvram.quant.files.writing import Entry, safetensors_head

_CODES: Mapping[torch.dtype, str] = MappingProxyType({dtype: code for code, dtype in TORCH_DTYPES.items()})


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Replace the file by these, atomically, without a copy of them."""
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    whole["checksum"] = torch.tensor(_checksum(whole))
    head = safetensors_head([Entry(name, _CODES[t.dtype], tuple(t.shape)) for name, t in whole.items()], {})
    write_atomic(path, (head.data, *(_bytes(tensor) for tensor in whole.values() if tensor.numel())))


def load_tensors(path: Path) -> dict[str, Tensor] | None:
    """What `save_tensors` wrote; None if nothing is there. FileError if it is damaged."""
    if not path.exists():
        return None
    with FileReader(path) as reader:
        data = reader.read_at(0, reader.size)
    try:
        tensors = load(data)
    except Exception as problem:
        raise damaged(path) from problem
    checksum = tensors.pop("checksum", None)
    if checksum is None or checksum.numel() != 1 or checksum.item() != _checksum(tensors):
        raise damaged(path)
    return tensors


def _checksum(tensors: Mapping[str, Tensor]) -> int:
    """CRC-32 of the bytes of all tensors in the order of their names: a flipped bit would become a wrong video."""
    crc = 0
    for name in sorted(tensors):
        crc = zlib.crc32(_bytes(tensors[name]), zlib.crc32(name.encode(), crc))
    return crc


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the host."""
    return as_bytes(tensor.reshape(-1).view(torch.uint8))


def damaged(path: Path) -> FileError:
    """The error for a file of this job that does not hold what was saved."""
    return FileError(
        "not a saved state, or a damaged one",
        where=str(path),
        advice="start the job again with `lowvram generate`",
    )
