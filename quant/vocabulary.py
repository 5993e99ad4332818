"""The vocabulary that a GGUF text encoder carries -> the sentencepiece model it was made from.

llama.cpp spreads a unigram model over keys of the file (checkpoint-formats 4.4). Its pieces, scores and normalisation
table are all that sentencepiece needs to give the same ids, so they are put back into the message that sentencepiece
reads (`sentencepiece_model.proto`), written here by hand: three kinds of fields need no library.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from lowvram.errors import FileError
from lowvram.quant.files.header import STRINGS, Header, StoredTensor
from lowvram.quant.refs import Reader

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

_KEYS = "tokenizer.ggml."
_MODEL = "t5"
"""What llama.cpp calls a unigram model of sentencepiece."""
MAX_CHARSMAP_BYTES = 4 << 20
"""That of UMT5 has a quarter of a megabyte."""
_UNKNOWN, _BYTE = 2, 6
_KINDS = range(1, 7)
"""Normal, unknown, control, user-defined, unused, byte: the same numbers in both formats."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Where the pieces of a tokenizer lie in a file."""

    file: Path
    tokens: StoredTensor
    scores: StoredTensor
    kinds: StoredTensor
    charsmap: StoredTensor | None
    """How characters are normalised, in sentencepiece's own packed form; None if they are not."""
    space_in_front: bool
    fold_spaces: bool


def sentencepieces(model: bytes) -> SentencePieceProcessor | None:
    """The tokenizer that a sentencepiece model is; None if these bytes are none."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(model)
    except (RuntimeError, UnicodeDecodeError):  # its complaint may quote a piece that is no text
        return None
    return processor


def find_vocabulary(headers: Iterable[Header]) -> Vocabulary | None:
    """The vocabulary of a unigram model in these files; None if there is none, or one that is not whole."""
    for header in headers:
        arrays = {key.removeprefix(_KEYS): array for key, array in header.arrays.items()}
        try:
            tokens, scores, kinds = (arrays[name] for name in ("tokens", "scores", "token_type"))
        except KeyError:
            continue
        told = (tokens.dtype, scores.dtype, kinds.dtype)
        charsmap = arrays.get("precompiled_charsmap")
        if header.metadata.get(f"{_KEYS}model") != _MODEL or told != (STRINGS, "F32", "I32"):
            continue
        if not tokens.shape == scores.shape == kinds.shape or not tokens.shape[0]:
            continue
        if charsmap is not None and (
            charsmap.dtype not in ("U8", "I8") or charsmap.nbytes > MAX_CHARSMAP_BYTES
        ):
            continue
        return Vocabulary(
            header.path, tokens, scores, kinds, charsmap,
            _flag(header.metadata, "add_space_prefix", True), _flag(header.metadata, "remove_extra_whitespaces", True),
        )  # fmt: skip
    return None


def sentencepiece_model(vocabulary: Vocabulary, reader: Reader) -> bytes:
    """The vocabulary as a serialised sentencepiece model. FileError if it is none: texts or numbers out of bounds."""
    count = vocabulary.tokens.shape[0]
    scores = struct.unpack(f"<{count}f", _read(reader, vocabulary.scores))
    kinds = struct.unpack(f"<{count}i", _read(reader, vocabulary.kinds))
    if not all(map(math.isfinite, scores)) or not set(kinds) <= set(_KINDS) or kinds.count(_UNKNOWN) != 1:
        _refuse(reader)
    model = bytearray()
    for piece, score, kind in zip(_texts(reader, vocabulary.tokens), scores, kinds, strict=True):
        inner = _bytes(1, piece) + b"\x15" + struct.pack("<f", score) + _number(3, kind)
        model += _bytes(1, inner)
    charsmap = b"" if vocabulary.charsmap is None else _read(reader, vocabulary.charsmap)
    # Unigram, and whether what no piece covers is spelled in bytes.
    trainer = _number(3, 1) + _number(35, _BYTE in kinds)
    normalizer = (
        _bytes(1, b"user_defined" if charsmap else b"identity")
        + _bytes(2, charsmap)
        + _number(3, vocabulary.space_in_front)
        + _number(4, vocabulary.fold_spaces)
    )
    return bytes(model + _bytes(2, trainer) + _bytes(3, normalizer))


def _texts(reader: Reader, tokens: StoredTensor) -> list[bytes]:
    data, at, texts = _read(reader, tokens), 0, []
    for _ in range(tokens.shape[0]):
        start = at + 8
        at = start + int.from_bytes(data[at:start], "little")
        texts.append(data[start:at])
    if at != len(data) or not all(texts):
        _refuse(reader)
    return texts


def _read(reader: Reader, array: StoredTensor) -> bytes:
    data = reader.read_at(array.offset, array.nbytes)
    if len(data) != array.nbytes:
        _refuse(reader)
    return data


def _flag(metadata: Mapping[str, str], name: str, default: bool) -> bool:
    return metadata.get(_KEYS + name, str(default)) == "True"


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value


def _refuse(reader: Reader) -> NoReturn:
    raise FileError(
        "the vocabulary in its keys is not that of a sentencepiece model",
        where=str(reader.path),
        expected="pieces, finite scores and one unknown piece",
        advice="give a spiece.model with --tokenizer FILE, or download the text encoder again",
    )
