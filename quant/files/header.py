"""What a parsed model file looks like, whatever its container."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lowvram.quant.refs import Shape

STRINGS = "STRINGS"
"""Dtype of an array of texts, each behind its length in 8 bytes."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a file, under the name it has there."""

    name: str
    dtype: str
    """safetensors dtype code, or the name of a GGUF block type."""
    shape: Shape
    offset: int
    """Absolute byte offset in the file."""
    nbytes: int


@dataclass(frozen=True, slots=True)
class Header:
    """All tensors of a file, in file order, and its free-text metadata."""

    path: Path
    size: int
    """Bytes in the file."""
    tensors: tuple[StoredTensor, ...]
    metadata: Mapping[str, str]
    notes: Mapping[str, bytes] = field(default_factory=dict)
    """Bytes of the small JSON texts stored as tensors, by name of the tensor."""
    arrays: Mapping[str, StoredTensor] = field(default_factory=dict)
    """Arrays among the keys of a GGUF that make a vocabulary, by key."""


def shown(text: str, limit: int = 80) -> str:
    """Text from a file made fit for a terminal: quoted, ASCII, clipped to `limit` characters."""
    return ascii(text if len(text) <= limit else text[: limit - 3] + "...")


def few(names: Sequence[str]) -> str:
    """The first three of names from a file, made fit for a message."""
    text = ", ".join(shown(name) for name in names[:3])
    return text if len(names) <= 3 else f"{text}, ..."
