"""safetensors headers.

The format: a little-endian u64 N, then N bytes of UTF-8 JSON, then the data. The JSON is one object: a tensor
name -> {"dtype", "shape", "data_offsets"} for each tensor, and optionally "__metadata__" -> strings. Offsets
count from the end of the header; sorted, they leave no hole, no overlap and no rest (huggingface/safetensors
README and `safetensors/src/tensor.rs`; the limits on counts and lengths are ours).
"""

from __future__ import annotations

from typing import NoReturn

from lowvram.errors import FileError
from lowvram.quant.files.header import Header, StoredTensor, shown
from lowvram.quant.files.sniff import HEAD_BYTES, recognise_content
from lowvram.quant.files.strict_json import Malformed, Scanner
from lowvram.quant.refs import DTYPE_BITS, Reader, Shape

MAX_HEADER_BYTES = 100_000_000
"""What the format allows."""
SMALL_FILE_HEADER_BYTES = 16 << 20
"""Any file may have this much header; a larger header must be less than 1/16 of its file."""
MAX_TENSORS = 16_384
"""Several times what the largest Wan file has; also what keeps a hostile header cheap to refuse."""
MAX_METADATA_ENTRIES = 4096
MAX_NAME_CHARACTERS = 512
MAX_ENTRY_CHARACTERS = 1024
MAX_DIMS = 8
MAX_NUMBER = 2**63 - 1

_AGAIN = "the file is damaged or was not made by a safetensors writer; download it again"
_TRUNCATED = "the download is not complete; download it again"


def read_header(reader: Reader) -> Header:
    """The checked header of a safetensors file; FileError if it is anything else, or not whole.

    Reads the header and not one byte of tensor data. Every tensor of the result lies inside the file.
    """
    length = _header_length(reader)
    raw = reader.read_at(8, length)
    if len(raw) != length:
        _refuse(reader, "the file became shorter while it was read", "", _TRUNCATED)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        _refuse(reader, f"the header is not UTF-8 text (byte {8 + error.start})", "", _AGAIN)
    del raw
    try:
        tensors, metadata = _parse(text)
        ordered = _check_data(tensors, 8 + length, reader)
    except Malformed as error:
        _refuse(reader, f"malformed safetensors header: {error.found}", error.expected, _AGAIN)
    return Header(reader.path, reader.size, ordered, metadata)


def _header_length(reader: Reader) -> int:
    """Length of the JSON in bytes, compared with the file before anything of that size is read."""
    head = reader.read_at(0, min(HEAD_BYTES, reader.size))
    length = int.from_bytes(head[:8], "little")
    limit = min(MAX_HEADER_BYTES, max(SMALL_FILE_HEADER_BYTES, reader.size // 16))
    if len(head) >= 10 and 2 <= length <= limit and head[8:9] == b"{":
        if 8 + length > reader.size:
            found = f"truncated: the header alone needs {8 + length:,} bytes, the file has {reader.size:,}"
            _refuse(reader, found, "", _TRUNCATED)
        return length
    content = recognise_content(head)
    if content is not None:
        _refuse(reader, f"not a safetensors file but {content.found}", "", content.advice)
    if len(head) < 10:
        _refuse(reader, f"truncated: the file has only {len(head)} bytes", "", _TRUNCATED)
    if not 2 <= length <= limit:
        found = f"not a safetensors file: its first 8 bytes give a header of {length:,} bytes"
        _refuse(reader, found, f"2 to {limit:,} bytes for a file of {reader.size:,}", _AGAIN)
    _refuse(reader, f"not a safetensors file: byte 8 is {ascii(head[8:9])[1:]}", "'{', a JSON object", _AGAIN)


def _parse(text: str) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors by name, with offsets still relative to the data, and the metadata."""
    scan = Scanner(text)
    tensors: dict[str, StoredTensor] = {}
    metadata: dict[str, str] | None = None
    for name in scan.members():
        if name == "__metadata__":
            if metadata is not None:
                raise Malformed("__metadata__ comes twice")
            metadata = _parse_metadata(scan)
            continue
        if name in tensors:
            raise Malformed(f"two tensors are called {shown(name)}")
        if len(tensors) == MAX_TENSORS:
            raise Malformed("too many tensors", f"at most {MAX_TENSORS:,}")
        if len(name) > MAX_NAME_CHARACTERS:
            raise Malformed(f"a tensor name of {len(name):,} characters", f"at most {MAX_NAME_CHARACTERS}")
        tensors[name] = _parse_tensor(name, scan.small_value(MAX_ENTRY_CHARACTERS))
    scan.end()
    return tensors, metadata or {}


def _parse_metadata(scan: Scanner) -> dict[str, str]:
    metadata: dict[str, str] = {}
    for key in scan.members():
        if key in metadata:
            raise Malformed(f"__metadata__ names {shown(key)} twice")
        if len(metadata) == MAX_METADATA_ENTRIES:
            raise Malformed("too many entries in __metadata__", f"at most {MAX_METADATA_ENTRIES:,}")
        metadata[key] = scan.string()
    return metadata


def _parse_tensor(name: str, entry: object) -> StoredTensor:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise Malformed(f"the entry of tensor {shown(name)}", "an object of dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], _numbers(entry["shape"]), _numbers(entry["data_offsets"])
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise Malformed(f"tensor {shown(name)} has the dtype {shown(str(dtype), 40)}", ", ".join(DTYPE_BITS))
    if shape is None or len(shape) > MAX_DIMS:
        raise Malformed(f"the shape of tensor {shown(name)}", f"up to {MAX_DIMS} whole numbers")
    if offsets is None or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise Malformed(f"the data_offsets of tensor {shown(name)}", "two whole numbers in rising order")
    bits = DTYPE_BITS[dtype]
    for size in shape:
        bits *= size
    nbytes = offsets[1] - offsets[0]
    if bits != 8 * nbytes:
        found = f"tensor {shown(name)} of {dtype} {list(shape)} is stored in {nbytes:,} bytes"
        raise Malformed(found, f"{bits // 8:,} bytes" if bits % 8 == 0 else "a whole number of bytes")
    return StoredTensor(name, dtype, shape, offsets[0], nbytes)


def _numbers(value: object) -> Shape | None:
    """A list of whole numbers from 0 to 2^63 - 1 as a tuple; None if it is anything else (true is no number)."""
    if not isinstance(value, list) or any(type(n) is not int or not 0 <= n <= MAX_NUMBER for n in value):
        return None
    return tuple(value)


def _check_data(tensors: dict[str, StoredTensor], start: int, reader: Reader) -> tuple[StoredTensor, ...]:
    """The tensors in file order with absolute offsets, once they are known to tile the data exactly."""
    ordered = sorted(tensors.values(), key=lambda t: (t.offset, t.nbytes))
    end = 0
    for tensor in ordered:
        if tensor.offset != end:
            kind = "overlaps the one before it" if tensor.offset < end else "leaves a hole before it"
            found = f"the data of tensor {shown(tensor.name)} {kind}"
            raise Malformed(found, f"its data at offset {end:,}, not {tensor.offset:,}")
        end += tensor.nbytes
    if start + end > reader.size:
        found = f"truncated: the header describes {start + end:,} bytes, the file has {reader.size:,}"
        _refuse(reader, found, "", _TRUNCATED)
    if start + end < reader.size:
        raise Malformed(
            f"{reader.size - start - end:,} bytes follow the last tensor", "the file to end there"
        )
    return tuple(StoredTensor(t.name, t.dtype, t.shape, start + t.offset, t.nbytes) for t in ordered)


def _refuse(reader: Reader, found: str, expected: str, advice: str) -> NoReturn:
    raise FileError(found, where=str(reader.path), expected=expected, advice=advice)
