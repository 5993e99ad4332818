"""Headers of .pth, .pt, .ckpt and .bin files: what torch.save writes, read where it lies and never run.

Such a file is a zip archive without compression (torch 1.6 and later): "NAME/data.pkl", a pickle that describes the
tensors (`lowvram.quant.files.pickled`), and a member "NAME/data/KEY" of plain numbers for each storage. So a contiguous
tensor is a run of bytes of the file, like one of a safetensors file. The zip format: PKWARE APPNOTE 4.3; the limits on
counts and lengths are ours.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from lowvram.errors import FileError
from lowvram.quant.files.header import Header, StoredTensor, shown
from lowvram.quant.files.pickled import PickledTensor, read_pickle
from lowvram.quant.files.safetensors import MAX_NAME_CHARACTERS, MAX_TENSORS
from lowvram.quant.files.sniff import HEAD_BYTES, recognise_content
from lowvram.quant.files.strict_json import Malformed
from lowvram.quant.refs import DTYPE_BITS, Reader, Shape, stored_bytes
from lowvram.quant.spec import numel

SUFFIXES = (".pth", ".pt", ".ckpt", ".bin")
MAX_PICKLE_BYTES = 8 << 20
MAX_DIRECTORY_BYTES = 8 << 20
_WRAPPERS = ("state_dict", "module", "model_state")
"""Members that hold the tensors where other things lie beside them (checkpoint-formats 0.1)."""
_FULL, _FULL16 = 0xFFFFFFFF, 0xFFFF
_AGAIN = "download the file again, or use the .safetensors version of the same model"


@dataclass(frozen=True, slots=True)
class Member:
    """A file in the archive, not compressed."""

    offset: int
    """Of its data, in the archive."""
    nbytes: int


def read_torch_header(reader: Reader) -> Header:
    """The tensors of a file of torch.save; FileError if it is anything else, not whole, or holds more than data.

    Reads the directory of the archive and the pickle, not one number. Every tensor of the result lies inside the file.
    """
    head = reader.read_at(0, min(HEAD_BYTES, reader.size))
    if not head.startswith(b"PK\x03\x04"):
        content = recognise_content(head)
        if content is not None and head.startswith(b"\x80"):
            advice = "save it anew in Python, torch.save(torch.load(FILE, weights_only=True), NEW), or use a .safetensors version"
            _refuse(reader, "a pickle in the form of torch before 1.6", "a zip archive", advice)
        found = content.found if content is not None else f"something that starts with {ascii(head[:4])[1:]}"
        _refuse(
            reader,
            f"not a file of torch.save but {found}",
            "a zip archive",
            content.advice if content else _AGAIN,
        )
    try:
        members = _members(reader)
        pickles = [name for name in members if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise Malformed(f"an archive with {len(pickles)} files called data.pkl", "what torch.save writes")
        root = pickles[0].removesuffix("data.pkl")
        order = members.get(f"{root}byteorder")
        if order is not None and _content(reader, order, 16) != b"little":
            raise Malformed("numbers of a big-endian machine", "a little-endian file")
        made = read_pickle(_content(reader, members[pickles[0]], MAX_PICKLE_BYTES))
        tensors = tuple(_stored(name, t, members, root) for name, t in _named(made).items())
    except Malformed as error:
        _refuse(reader, f"not a file of tensors: {error.found}", error.expected, _AGAIN)
    return Header(reader.path, reader.size, tuple(sorted(tensors, key=lambda t: (t.offset, t.name))), {})


def _named(made: object) -> dict[str, PickledTensor]:
    """The tensors of a state dict by name, whatever it is wrapped in."""
    for _ in range(3):
        if not isinstance(made, dict):
            break
        if any(isinstance(value, PickledTensor) for value in made.values()):
            found = {name: value for name, value in made.items() if isinstance(value, PickledTensor)}
            if len(found) > MAX_TENSORS:
                raise Malformed(f"{len(found):,} tensors", f"at most {MAX_TENSORS:,}")
            return found
        inner = [made[name] for name in _WRAPPERS if isinstance(made.get(name), dict)]
        dicts = inner or [value for value in made.values() if isinstance(value, dict)]
        if not inner and len(dicts) != 1:
            break
        made = dicts[0]
    raise Malformed("no dict of tensors in it", "a state dict")


def _stored(name: str, tensor: PickledTensor, members: Mapping[str, Member], root: str) -> StoredTensor:
    if len(name) > MAX_NAME_CHARACTERS:
        raise Malformed(f"a tensor name of {len(name):,} characters", f"at most {MAX_NAME_CHARACTERS}")
    member = members.get(f"{root}data/{tensor.storage.key}")
    size = DTYPE_BITS[tensor.dtype] // 8
    count = numel(tensor.shape)
    if member is None or member.nbytes != tensor.storage.count * size:
        raise Malformed(
            f"the numbers of tensor {shown(name)} are not there", "a member of the archive for them"
        )
    if tensor.offset + count > tensor.storage.count:
        raise Malformed(f"tensor {shown(name)} reaches beyond its numbers")
    if count and not _is_contiguous(tensor.shape, tensor.strides):
        found = (
            f"tensor {shown(name)} of {list(tensor.shape)} is stored with the strides {list(tensor.strides)}"
        )
        raise Malformed(found, "contiguous tensors")
    nbytes = stored_bytes(tensor.dtype, tensor.shape)
    return StoredTensor(name, tensor.dtype, tensor.shape, member.offset + tensor.offset * size, nbytes)


def _is_contiguous(shape: Shape, strides: Shape) -> bool:
    step = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != step:
            return False
        step *= size
    return True


def _content(reader: Reader, member: Member, limit: int) -> bytes:
    if member.nbytes > limit:
        raise Malformed(f"a description of {member.nbytes:,} bytes", f"at most {limit:,}")
    return reader.read_at(member.offset, member.nbytes)


# ---- the archive


def _members(reader: Reader) -> dict[str, Member]:
    """The files of the archive by name. None overlaps another, none is compressed, all lie before the directory."""
    count, start, nbytes = _directory(reader)
    if count > MAX_TENSORS + 64 or nbytes > MAX_DIRECTORY_BYTES:
        raise Malformed(f"{count:,} files in it", f"at most {MAX_TENSORS:,}")
    raw = reader.read_at(start, nbytes)
    members: dict[str, Member] = {}
    at = 0
    for _ in range(count):
        fields = _unpack("<4s6H3I5H2I", raw, at)
        flags, method, size, length = fields[3], fields[4], fields[9], fields[10:13]
        name_end = at + 46 + length[0]
        after = name_end + length[1] + length[2]
        if fields[0] != b"PK\x01\x02" or after > len(raw):
            raise Malformed(f"a broken directory at byte {start + at:,}")
        name = raw[at + 46 : name_end].decode("utf-8", "replace")
        packed, offset = fields[8], fields[16]
        size, packed, offset = _wide(raw[name_end : name_end + length[1]], size, packed, offset)
        if method or flags & 1 or size != packed:
            raise Malformed(f"the member {shown(name)} is compressed or encrypted", "plain numbers")
        if name in members:
            raise Malformed(f"two members are called {shown(name)}")
        members[name] = Member(_data_offset(reader, offset, length[0], start), size)
        at = after
    end = 0
    for member in sorted(members.values(), key=lambda m: m.offset):
        if member.offset < end:
            raise Malformed("members that overlap")
        end = member.offset + member.nbytes
    if end > start:
        raise Malformed("a member that reaches into the directory")
    return members


def _directory(reader: Reader) -> tuple[int, int, int]:
    """Number of members, start and length in bytes of the directory at the end of the archive."""
    size = min(reader.size, 22 + _FULL16)
    tail = reader.read_at(reader.size - size, size)
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or at + 22 > len(tail):
        raise Malformed("truncated: an archive without its directory", "a whole download")
    _, _, _, _, count, nbytes, start, _ = _unpack("<4s4H2IH", tail, at)
    if count == _FULL16 or _FULL in (nbytes, start):
        _, _, where, _ = _unpack("<4sIQI", tail, at - 20)
        if tail[at - 20 : at - 16] != b"PK\x06\x07" or where > reader.size - 56:
            raise Malformed("a broken directory")
        wide = reader.read_at(where, 56)
        fields = _unpack("<4sQ2H2I4Q", wide, 0)
        if fields[0] != b"PK\x06\x06":
            raise Malformed("a broken directory")
        count, nbytes, start = fields[7:10]
    if start + nbytes > reader.size:
        raise Malformed("a directory beyond the end of the file")
    return count, start, nbytes


def _wide(extra: bytes, size: int, packed: int, offset: int) -> tuple[int, int, int]:
    """Sizes and offset of a member, from its extra field where they have more than 32 bits."""
    if _FULL not in (size, packed, offset):
        return size, packed, offset
    at = 0
    while at + 4 <= len(extra):
        kind, length = _unpack("<2H", extra, at)
        if kind == 1:
            values = list(_unpack(f"<{length // 8}Q", extra, at + 4))
            found = [values.pop(0) if v == _FULL and values else v for v in (size, packed, offset)]
            return found[0], found[1], found[2]
        at += 4 + length
    raise Malformed("a member without its size")


def _data_offset(reader: Reader, offset: int, name_length: int, limit: int) -> int:
    """Where the data of a member begins whose own header is at `offset`."""
    if offset + 30 > limit:
        raise Malformed("a member that begins in the directory")
    fields = _unpack("<4s5H3I2H", reader.read_at(offset, 30), 0)
    if fields[0] != b"PK\x03\x04" or fields[3] or fields[9] != name_length:
        raise Malformed(f"a broken member at byte {offset:,}")
    return offset + 30 + int(fields[9] + fields[10])


def _unpack(form: str, data: bytes, at: int) -> tuple[Any, ...]:
    if at < 0 or at + struct.calcsize(form) > len(data):
        raise Malformed("a broken directory")
    return struct.unpack_from(form, data, at)


def _refuse(reader: Reader, found: str, expected: str, advice: str) -> NoReturn:
    raise FileError(found, where=str(reader.path), expected=expected, advice=advice)
