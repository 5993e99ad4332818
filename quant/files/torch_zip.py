"""The zip archive that torch.save writes (torch 1.6 and later): a pickle, and a member of plain numbers for each storage.

The zip format: PKWARE APPNOTE 4.3; the limits on counts and lengths are ours.
"""

from __future__ import annotations

import struct
from typing import Any

from lowvram.quant.files.header import shown
from lowvram.quant.files.pickled import MAX_PICKLE_BYTES, Run, Saved, read_pickle
from lowvram.quant.files.safetensors import MAX_TENSORS
from lowvram.quant.files.strict_json import Malformed
from lowvram.quant.refs import Reader

MAX_DIRECTORY_BYTES = 8 << 20
_FULL, _FULL16 = 0xFFFFFFFF, 0xFFFF


def read_archive(reader: Reader) -> Saved:
    """What is described in "NAME/data.pkl", and where the numbers of "NAME/data/KEY" lie. Malformed if it is not whole."""
    members = _members(reader)
    pickles = [name for name in members if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise Malformed(f"an archive with {len(pickles)} files called data.pkl", "what torch.save writes")
    root = pickles[0].removesuffix("data.pkl")
    order = members.get(f"{root}byteorder")
    if order is not None and _content(reader, order, 16) != b"little":
        raise Malformed("numbers of a big-endian machine", "a little-endian file")
    made = read_pickle(_content(reader, members[pickles[0]], MAX_PICKLE_BYTES))
    data = f"{root}data/"
    return Saved(made, {n.removeprefix(data): run for n, run in members.items() if n.startswith(data)})


def _content(reader: Reader, member: Run, limit: int) -> bytes:
    if member.nbytes > limit:
        raise Malformed(f"a description of {member.nbytes:,} bytes", f"at most {limit:,}")
    return reader.read_at(member.offset, member.nbytes)


def _members(reader: Reader) -> dict[str, Run]:
    """The files of the archive by name. None overlaps another, none is compressed, all lie before the directory."""
    count, start, nbytes = _directory(reader)
    if count > MAX_TENSORS + 64 or nbytes > MAX_DIRECTORY_BYTES:
        raise Malformed(f"{count:,} files in it", f"at most {MAX_TENSORS:,}")
    raw = reader.read_at(start, nbytes)
    members: dict[str, Run] = {}
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
        members[name] = Run(_data_offset(reader, offset, length[0], start), size)
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
