"""GGUF headers, versions 2 and 3.

The format (checkpoint-formats 4.2): "GGUF", u32 version, u64 tensors, u64 keys; the keys (name, type, value); the
tensors (name, dimensions fastest first, type, offset); then, from the next multiple of the alignment, the data. All
little-endian. Strictness follows ggml's own reader (`ggml/src/gguf.cpp`), except that Wan files may have 5 dimensions
and names of 128 bytes; the limits on counts and lengths are ours.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NoReturn

from lowvram.errors import FileError
from lowvram.quant.encodings.kquants import BLOCK_SIZES
from lowvram.quant.files.header import STRINGS, Header, StoredTensor, shown
from lowvram.quant.files.safetensors import MAX_TENSORS
from lowvram.quant.files.sniff import HEAD_BYTES, recognise_content
from lowvram.quant.files.strict_json import Malformed
from lowvram.quant.refs import Reader, Shape
from lowvram.quant.spec import numel

MAGIC = b"GGUF"
MAX_HEADER_BYTES = 64 << 20
"""Ten times what a text encoder with its vocabulary has."""
MAX_KEYS = 4096
MAX_NAME_BYTES = 128
MAX_KEY_BYTES = 256
MAX_KEPT_BYTES = 4096
"""Bytes of a text that is kept as metadata; longer ones are passed over."""
MAX_STRINGS = 1 << 19
"""Strings in all arrays of a file: twice the vocabulary of UMT5."""
MAX_DIMS = 5
MAX_ALIGNMENT = 1 << 16

_ORIGINAL_SHAPE = "comfy.gguf.orig_shape."
PLAIN_TYPES: Mapping[int, tuple[str, int]] = MappingProxyType(
    {0: ("F32", 4), 1: ("F16", 2), 24: ("I8", 1), 25: ("I16", 2), 26: ("I32", 4), 27: ("I64", 8), 28: ("F64", 8),
     30: ("BF16", 2)}
)  # fmt: skip
"""Types without blocks: dtype code and bytes."""
BLOCK_TYPES: Mapping[int, str] = MappingProxyType(
    {2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K",
     14: "Q6_K", 20: "IQ4_NL", 23: "IQ4_XS"}
)  # fmt: skip
"""Types of blocks."""
_UNSUPPORTED: Mapping[int, str] = MappingProxyType(
    {9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 21: "IQ3_S", 22: "IQ2_S",
     29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4"}
)  # fmt: skip
_SCALARS: Mapping[int, str] = MappingProxyType(
    {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
)
"""struct formats of the types of keys."""
_UINT32, _INT32, _STRING, _ARRAY = 4, 5, 8, 9
_VOCABULARY = "tokenizer.ggml."
_ARRAYS: Mapping[int, str] = MappingProxyType({0: "U8", 1: "I8", 4: "U32", 5: "I32", 6: "F32", 8: STRINGS})
"""Dtype code of the elements of arrays that a vocabulary is made of."""

_AGAIN = "the file is damaged or was not made by a GGUF writer; download it again"
_TRUNCATED = "the download is not complete; download it again"


def read_gguf_header(reader: Reader) -> Header:
    """The checked header of a GGUF file; FileError if it is anything else, or not whole.

    Looks at no tensor data. Every tensor of the result lies inside the file. Shapes are in torch's order; the dtype of
    a block format is the name of its type. Of the keys, single values and short texts become metadata; of the arrays of
    a vocabulary the places are kept.
    """
    cursor = _Cursor(reader)
    try:
        return _parse(cursor)
    except Malformed as error:
        _refuse(reader, f"malformed GGUF header: {error.found}", error.expected, _AGAIN)


@dataclass(slots=True)
class _Keys:
    """What is kept of the keys of a file."""

    metadata: dict[str, str] = field(default_factory=dict)
    shapes: dict[str, Shape] = field(default_factory=dict)
    """Shapes that keys give for tensors, by name of the tensor."""
    arrays: dict[str, StoredTensor] = field(default_factory=dict)
    alignment: int = 32
    seen: set[str] = field(default_factory=set)


class _Cursor:
    """A position in a file that is read in pieces. Every method checks against the file before it reads or moves."""

    PIECE = 1 << 20

    def __init__(self, reader: Reader) -> None:
        self.reader, self.at, self.strings = reader, 0, 0
        self._piece, self._start = b"", 0

    def take(self, nbytes: int) -> bytes:
        """The next `nbytes` bytes."""
        self.need(nbytes)
        offset = self.at - self._start
        if offset + nbytes > len(self._piece):
            self._load(nbytes)
            offset = 0
        self.at += nbytes
        return self._piece[offset : offset + nbytes]

    def need(self, nbytes: int) -> None:
        """FileError or Malformed if the header cannot go on for `nbytes` bytes."""
        if nbytes > self.reader.size - self.at:
            found = f"truncated: byte {self.at:,} promises {nbytes:,} more bytes, the file has {self.reader.size:,}"
            _refuse(self.reader, found, "", _TRUNCATED)
        if self.at + nbytes > MAX_HEADER_BYTES:
            raise Malformed(
                f"a header of more than {self.at + nbytes:,} bytes", f"at most {MAX_HEADER_BYTES:,}"
            )

    def number(self, form: str) -> int:
        value = struct.unpack(form, self.take(struct.calcsize(form)))[0]
        assert isinstance(value, int)
        return value

    def text(self, limit: int, what: str) -> str:
        """A string of at most `limit` bytes."""
        length = self.number("<Q")
        if length > limit:
            raise Malformed(f"{what} of {length:,} bytes", f"at most {limit:,}")
        try:
            return self.take(length).decode("utf-8")
        except UnicodeDecodeError:
            raise Malformed(f"{what} at byte {self.at - length:,} that is not UTF-8 text") from None

    def skip(self, nbytes: int) -> None:
        self.need(nbytes)
        self.at += nbytes

    def skip_strings(self, count: int) -> None:
        """Past `count` strings, whose bytes are not looked at."""
        self.strings += count
        if self.strings > MAX_STRINGS:
            raise Malformed(f"{self.strings:,} strings in arrays", f"at most {MAX_STRINGS:,}")
        self.need(8 * count)
        length_at = struct.Struct("<Q").unpack_from
        while count:
            self.need(8)
            self._load(8)
            piece, at = self._piece, 0
            while count and at + 8 <= len(piece):
                length = length_at(piece, at)[0]
                if length > len(piece) - at - 8:
                    break
                at += 8 + length
                count -= 1
            self.at += at
            if at == 0:
                # A string longer than a piece.
                self.skip(self.number("<Q"))
                count -= 1

    def _load(self, nbytes: int) -> None:
        length = min(max(nbytes, self.PIECE), self.reader.size - self.at)
        self._piece, self._start = self.reader.read_at(self.at, length), self.at
        if len(self._piece) != length:
            _refuse(self.reader, "the file became shorter while it was read", "", _TRUNCATED)


def _parse(cursor: _Cursor) -> Header:
    reader = cursor.reader
    _check_magic(reader)
    cursor.skip(len(MAGIC))
    version = cursor.number("<I")
    if version not in (2, 3):
        if version & 0xFFFF == 0 and version:
            raise Malformed("a file for big-endian machines", "a little-endian one")
        raise Malformed(f"GGUF version {version}", "version 2 or 3")
    tensor_count, key_count = cursor.number("<Q"), cursor.number("<Q")
    if tensor_count > MAX_TENSORS:
        raise Malformed(f"{tensor_count:,} tensors", f"at most {MAX_TENSORS:,}")
    if key_count > MAX_KEYS:
        raise Malformed(f"{key_count:,} keys", f"at most {MAX_KEYS:,}")
    keys = _Keys()
    for _ in range(key_count):
        _read_key(cursor, keys)
    tensors: dict[str, StoredTensor] = {}
    end = 0
    for _ in range(tensor_count):
        tensor = _read_tensor(cursor, keys.shapes)
        if tensor.name in tensors:
            raise Malformed(f"two tensors are called {shown(tensor.name)}")
        if tensor.offset != end:
            found = f"the data of tensor {shown(tensor.name)} is at offset {tensor.offset:,}"
            raise Malformed(found, f"offset {end:,}, where the one before it ends")
        tensors[tensor.name] = tensor
        end = _aligned(end + tensor.nbytes, keys.alignment)
    start = _aligned(cursor.at, keys.alignment)
    _check_end(reader, list(tensors.values()), start, end)
    ordered = tuple(
        StoredTensor(t.name, t.dtype, t.shape, start + t.offset, t.nbytes) for t in tensors.values()
    )
    return Header(reader.path, reader.size, ordered, keys.metadata, arrays=keys.arrays)


def _check_magic(reader: Reader) -> None:
    head = reader.read_at(0, min(HEAD_BYTES, reader.size))
    if head.startswith(MAGIC):
        return
    content = recognise_content(head)
    if content is not None:
        _refuse(reader, f"not a GGUF file but {content.found}", "", content.advice)
    _refuse(reader, f"not a GGUF file: it starts with {ascii(head[:4])[1:]}", "'GGUF'", _AGAIN)


def _check_end(reader: Reader, tensors: list[StoredTensor], start: int, end: int) -> None:
    """The data must fill the file: the last tensor may lack its padding, nothing may follow."""
    if not tensors:
        return
    least = start + tensors[-1].offset + tensors[-1].nbytes
    if reader.size < least:
        found = f"truncated: the header describes {least:,} bytes, the file has {reader.size:,}"
        _refuse(reader, found, "", _TRUNCATED)
    if reader.size > start + end:
        raise Malformed(
            f"{reader.size - start - end:,} bytes follow the last tensor", "the file to end there"
        )


def _read_key(cursor: _Cursor, keys: _Keys) -> None:
    key = cursor.text(MAX_KEY_BYTES, "a key")
    if not key or key in keys.seen:
        raise Malformed(f"the key {shown(key)} twice" if key else "a key without a name")
    keys.seen.add(key)
    kind = cursor.number("<I")
    if key == "general.alignment":
        keys.alignment = _read_alignment(cursor, kind)
    elif kind == _ARRAY:
        if key.startswith(_ORIGINAL_SHAPE):
            keys.shapes[key.removeprefix(_ORIGINAL_SHAPE)] = _read_shape(cursor)
        else:
            array = _skip_array(cursor, key)
            if key.startswith(_VOCABULARY):
                keys.arrays[key] = array
    elif kind == _STRING:
        length = cursor.number("<Q")
        if length > MAX_KEPT_BYTES:
            cursor.skip(length)
        else:
            keys.metadata[key] = cursor.take(length).decode("utf-8", "replace")
    else:
        form = _scalar_form(kind, key)
        keys.metadata[key] = str(struct.unpack(form, cursor.take(struct.calcsize(form)))[0])


def _read_alignment(cursor: _Cursor, kind: int) -> int:
    if kind != _UINT32:
        raise Malformed(f"general.alignment of type {kind}", f"type {_UINT32}, a 32-bit number")
    alignment = cursor.number("<I")
    if alignment > MAX_ALIGNMENT or alignment.bit_count() != 1:
        raise Malformed(f"general.alignment {alignment:,}", f"a power of two up to {MAX_ALIGNMENT:,}")
    return alignment


def _read_shape(cursor: _Cursor) -> Shape:
    kind, count = cursor.number("<I"), cursor.number("<Q")
    if kind != _INT32 or count > MAX_DIMS:
        raise Malformed("an original shape that is none", f"up to {MAX_DIMS} 32-bit numbers")
    return tuple(cursor.number("<i") for _ in range(count))


def _skip_array(cursor: _Cursor, key: str) -> StoredTensor:
    """Past an array, whose bytes are not looked at: where they lie."""
    kind, count = cursor.number("<I"), cursor.number("<Q")
    start = cursor.at
    if kind == _STRING:
        cursor.skip_strings(count)
    else:
        cursor.skip(count * struct.calcsize(_scalar_form(kind, "an array")))
    return StoredTensor(key, _ARRAYS.get(kind, f"type {kind}"), (count,), start, cursor.at - start)


def _scalar_form(kind: int, what: str) -> str:
    if kind not in _SCALARS:
        found = f"an array in {shown(what)}" if kind == _ARRAY else f"{shown(what)} of type {kind}"
        raise Malformed(found, "a number, a truth value or a text")
    return _SCALARS[kind]


def _read_tensor(cursor: _Cursor, shapes: Mapping[str, Shape]) -> StoredTensor:
    """A tensor as the header describes it, its offset still relative to the data."""
    name = cursor.text(MAX_NAME_BYTES, "a tensor name")
    dims = cursor.number("<I")
    if not name or dims > MAX_DIMS:
        raise Malformed(f"tensor {shown(name)} with {dims:,} dimensions", f"a name and up to {MAX_DIMS}")
    sizes = [cursor.number("<Q") for _ in range(dims)]
    shape = tuple(reversed(sizes))
    kind, offset = cursor.number("<I"), cursor.number("<Q")
    if any(size >= 1 << 63 for size in sizes):
        raise Malformed(f"tensor {shown(name)} has the shape {list(shape)}", "sizes below 2^63")
    dtype, nbytes = _stored_as(name, kind, shape)
    original = shapes.get(name)
    if original is not None:
        if min(original, default=1) < 0 or numel(original) != numel(shape):
            raise Malformed(
                f"tensor {shown(name)} has an original shape {list(original)}", f"one like {list(shape)}"
            )
        if dtype in BLOCK_SIZES and original[-1:] != shape[-1:]:
            raise Malformed(
                f"tensor {shown(name)} has an original shape {list(original)}", "rows of whole blocks"
            )
    return StoredTensor(name, dtype, shape if original is None else original, offset, nbytes)


def _stored_as(name: str, kind: int, shape: Shape) -> tuple[str, int]:
    """Dtype code and bytes."""
    if kind in PLAIN_TYPES:
        dtype, size = PLAIN_TYPES[kind]
        return dtype, numel(shape) * size
    if kind not in BLOCK_TYPES:
        known = f" ({_UNSUPPORTED[kind]})" if kind in _UNSUPPORTED else ""
        raise Malformed(
            f"tensor {shown(name)} is of type {kind}{known}, not supported", ", ".join(BLOCK_TYPES.values())
        )
    elements, nbytes = BLOCK_SIZES[BLOCK_TYPES[kind]]
    row = shape[-1] if shape else 1
    if row % elements:
        raise Malformed(f"tensor {shown(name)} has rows of {row:,}", f"a multiple of {elements}")
    return BLOCK_TYPES[kind], numel(shape) // elements * nbytes


def _aligned(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment


def _refuse(reader: Reader, found: str, expected: str, advice: str) -> NoReturn:
    raise FileError(found, where=str(reader.path), expected=expected, advice=advice)
