"""A checkpoint in one file (safetensors, GGUF or .pth), in shards with an index, or in a folder of either."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NoReturn

from lowvram.errors import FileError
from lowvram.quant.files.gguf import MAGIC, read_gguf_header
from lowvram.quant.files.header import Header, few, shown
from lowvram.quant.files.notes import with_notes
from lowvram.quant.files.safetensors import MAX_TENSORS, read_header
from lowvram.quant.files.sniff import HEAD_BYTES, recognise_content
from lowvram.quant.files.strict_json import Malformed, Scanner
from lowvram.quant.files.torch_saved import SUFFIXES, read_torch_header
from lowvram.quant.refs import Reader

OpenReader = Callable[[Path], AbstractContextManager[Reader]]
"""Opens a file for reading headers; leaving the context closes it."""

INDEX_SUFFIX = ".safetensors.index.json"
MAX_INDEX_BYTES = 4 << 20
MAX_SHARDS = 1024
MAX_OTHER_VALUE = 65_536
"""Characters of an index member that is not the weight_map."""

_SUFFIXES = (".safetensors", ".sft")
_GGUF_SUFFIX = ".gguf"
_SHARD_NAME = re.compile(
    r"(?P<stem>.+)-(?P<number>\d{3,6})-of-(?P<count>\d{3,6})\.(safetensors|sft|gguf)", re.ASCII
)
_DEVICE_NAME = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.ASCII | re.IGNORECASE)
_AGAIN = "download the index and its files again"


def open_checkpoint_files(path: Path, open_reader: OpenReader) -> list[Header]:
    """The headers of all files of the checkpoint at `path`: a file, an index, or a folder with one checkpoint.

    No tensor is in two of them. FileError if a file is missing, damaged or not what the index says.
    """
    try:
        return _open(path, open_reader)
    except OSError as error:
        found = error.strerror or str(error)
        raise FileError(found, where=str(path), advice="check the path and its permissions") from error


def _open(path: Path, open_reader: OpenReader) -> list[Header]:
    if path.is_dir():
        return _open_folder(path, open_reader)
    if not path.is_file():
        _refuse(path, "there is no such file or folder", "", "check the path")
    if path.name.endswith(INDEX_SUFFIX):
        return _open_index(path, open_reader)
    numbered = _SHARD_NAME.fullmatch(path.name)
    if numbered and int(numbered["count"]) > 1:
        found = f"shard {int(numbered['number'])} of {int(numbered['count'])}: only a part of a checkpoint"
        _refuse(path, found, "", f"give the folder {path.parent} or the index file in it")
    return [_read(path, open_reader)]


def read_index(reader: Reader) -> dict[str, str]:
    """The weight_map of an index file: tensor name -> file name, every one a plain name in the same folder."""
    if reader.size > MAX_INDEX_BYTES:
        _refuse(reader.path, f"an index of {reader.size:,} bytes", f"at most {MAX_INDEX_BYTES:,}", _AGAIN)
    raw = reader.read_at(0, reader.size)
    if not raw.lstrip().startswith(b"{"):
        content = recognise_content(raw[:HEAD_BYTES])
        found = content.found if content else "something that is not JSON"
        _refuse(reader.path, f"not an index but {found}", "", content.advice if content else _AGAIN)
    try:
        return _parse_index(raw.decode("utf-8"))
    except UnicodeDecodeError:
        _refuse(reader.path, "the index is not UTF-8 text", "", _AGAIN)
    except Malformed as error:
        _refuse(reader.path, f"malformed index: {error.found}", error.expected, _AGAIN)


def is_plain_file_name(name: str) -> bool:
    """Whether `name` names a file in its own folder on every system: no path, no drive, no device, no tricks."""
    return (
        0 < len(name.encode("utf-8", "replace")) <= 255
        and name.isprintable()
        and not name.startswith(".")
        and not set(name) & set('<>:"/\\|?*')
        and name == name.strip(" .")
        and not _DEVICE_NAME.fullmatch(name)
    )


def _parse_index(text: str) -> dict[str, str]:
    scan = Scanner(text)
    weight_map: dict[str, str] | None = None
    for key in scan.members():
        if key != "weight_map":
            scan.small_value(MAX_OTHER_VALUE)
            continue
        if weight_map is not None:
            raise Malformed("weight_map comes twice")
        weight_map = {}
        for tensor in scan.members():
            if tensor in weight_map:
                raise Malformed(f"weight_map names {shown(tensor)} twice")
            if len(weight_map) == MAX_TENSORS:
                raise Malformed("too many tensors in weight_map", f"at most {MAX_TENSORS:,}")
            weight_map[tensor] = scan.string()
    scan.end()
    if not weight_map:
        raise Malformed("no weight_map, or an empty one")
    files = set(weight_map.values())
    if len(files) > MAX_SHARDS:
        raise Malformed(f"{len(files):,} files", f"at most {MAX_SHARDS:,}")
    for name in sorted(files):
        if not is_plain_file_name(name) or not name.endswith(_SUFFIXES):
            expected = "the plain name of a .safetensors file beside the index"
            raise Malformed(f"weight_map points to {shown(name)}", expected)
    return weight_map


def _open_index(path: Path, open_reader: OpenReader) -> list[Header]:
    with open_reader(path) as reader:
        weight_map = read_index(reader)
    files = sorted(set(weight_map.values()))
    missing = [name for name in files if not (path.parent / name).is_file()]
    if missing:
        found = f"{len(missing)} of {len(files)} files are missing: {few(missing)}"
        _refuse(path, found, "all of them beside the index", "finish the download")
    headers = _read_all([path.parent / name for name in files], path, open_reader, _AGAIN)
    held = {header.path.name: {tensor.name for tensor in header.tensors} for header in headers}
    lost = [tensor for tensor, name in weight_map.items() if tensor not in held[name]]
    if lost:
        found = f"{len(lost)} tensors are not in the file the index names: {few(lost)}"
        _refuse(path, found, "", _AGAIN)
    return headers


def _open_folder(path: Path, open_reader: OpenReader) -> list[Header]:
    files = sorted(file for file in path.iterdir() if not file.name.startswith(".") and file.is_file())
    indices = [file for file in files if file.name.endswith(INDEX_SUFFIX)]
    if len(indices) == 1:
        return _open_index(indices[0], open_reader)
    if indices:
        found = f"{len(indices)} index files: {few([file.name for file in indices])}"
        _refuse(path, found, "one", "give the index file to use")
    weights = [file for file in files if file.name.endswith((*_SUFFIXES, _GGUF_SUFFIX))]
    if not weights:
        _refuse(path, "no .safetensors file lies in this folder, and no .gguf file", "", "check the path")
    if len(weights) > MAX_SHARDS:
        _refuse(path, f"{len(weights):,} model files", "one checkpoint", "give the file to use")
    _check_numbering(path, weights)
    return _read_all(weights, path, open_reader, "the folder holds several checkpoints: give the file to use")


def _check_numbering(folder: Path, files: list[Path]) -> None:
    """FileError if numbered shards ("...-00002-of-00006") are not all there."""
    numbered = [match for file in files if (match := _SHARD_NAME.fullmatch(file.name))]
    present = {(m["stem"], int(m["count"]), int(m["number"])) for m in numbered}
    for stem, count, _ in sorted(present):
        missing = [n for n in range(1, min(count, MAX_SHARDS) + 1) if (stem, count, n) not in present]
        if missing:
            found = f"shard {missing[0]} of {count} of {shown(stem)} is missing"
            _refuse(folder, found, "", "finish the download")


def _read(path: Path, open_reader: OpenReader) -> Header:
    with open_reader(path) as reader:
        if path.name.lower().endswith(_GGUF_SUFFIX) or reader.read_at(0, min(4, reader.size)) == MAGIC:
            return read_gguf_header(reader)
        if path.name.lower().endswith(SUFFIXES):
            return with_notes(reader, read_torch_header(reader))
        return with_notes(reader, read_header(reader))


def _read_all(files: Iterable[Path], path: Path, open_reader: OpenReader, advice: str) -> list[Header]:
    """The headers of the files of a checkpoint at `path`; FileError if a tensor is in two, or all hold too many."""
    headers: list[Header] = []
    holder: dict[str, Path] = {}
    for file in files:
        header = _read(file, open_reader)
        headers.append(header)
        for tensor in header.tensors:
            other = holder.setdefault(tensor.name, header.path)
            if other is not header.path:
                found = f"tensor {shown(tensor.name)} is in {other.name} and in {header.path.name}"
                _refuse(path, found, "every tensor once", advice)
        if len(holder) > MAX_TENSORS:
            _refuse(path, f"more than {MAX_TENSORS:,} tensors in its files", "one checkpoint", advice)
    return headers


def _refuse(path: Path, found: str, expected: str, advice: str) -> NoReturn:
    raise FileError(found, where=str(path), expected=expected, advice=advice)
