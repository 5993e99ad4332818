"""`lowvram quantize`: a network of one file or several, tensor by tensor, into new files.

Memory holds about two copies of the largest matrix. Every tensor that is done is noted beside the new file, so a
conversion that was killed goes on where it was; the files take their names together, at the end.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lowvram import __version__
from lowvram.errors import StorageError, UsageError
from lowvram.offload.budget import format_bytes
from lowvram.offload.io import FileReader, free_bytes, write_atomic
from lowvram.offload.partial import PartialFile
from lowvram.offload.slab import as_bytes
from lowvram.quant.convert import (
    Conversion,
    NewFile,
    convert,
    index_of,
    plain_pieces,
    plan_files,
    relative,
    squares,
)
from lowvram.quant.encodings.base import TORCH_DTYPES
from lowvram.quant.encodings.kquants import Blocks
from lowvram.quant.encodings.plain import Plain
from lowvram.quant.encodings.registry import encoding_by_name
from lowvram.quant.files.shards import INDEX_SUFFIX
from lowvram.quant.files.torch_saved import SUFFIXES
from lowvram.quant.identify import Checkpoint, identify_path
from lowvram.quant.refs import Part
from lowvram.quant.vocabulary import Vocabulary, sentencepiece_model

_WEIGHTS = (".safetensors", ".sft", ".gguf")


@dataclass(frozen=True, slots=True)
class Done:
    """One tensor that lies in the new file."""

    name: str
    """Native."""
    encoding: str
    changed: bool
    """Whether it was encoded anew; else its bytes were copied."""
    error: float
    """|new - old| / |old|"""
    nbytes: int
    """In the new file."""


@dataclass(frozen=True, slots=True)
class Task:
    """A conversion, settled: nothing is written yet."""

    source: Checkpoint
    files: tuple[NewFile, ...]
    folder: Path
    """Where the new files go."""
    index: str | None
    """Name of their index, if they need one."""
    extra: Mapping[str, bytes]
    """Small files beside them, by name."""

    @property
    def changes(self) -> int:
        """Tensors that are encoded anew: what takes the time."""
        return sum(c.changes for file in self.files for c in file.conversions)

    @property
    def nbytes(self) -> int:
        return sum(file.head.nbytes for file in self.files)


def plan_conversion(source: Path, out: Path, to: str, overwrite: bool = False) -> Task:
    """What `quantize source out --to to` will do. `out` is a file, or a folder that gets a file for each of the source.

    FileError if the source is no network, UsageError if it cannot be stored so or something else lies at `out`,
    StorageError if the disk has no room.
    """
    found = identify_path(source, FileReader)
    gguf = isinstance(encoding_by_name(to), Blocks)
    folder, names = _targets(found, out, gguf)
    identity = _identity(found, to)
    files = tuple(plan_files(found, to, names, f"{__version__} {to} {identity}", _tokenizer(found)))
    index = _index_name(found, files)
    task = Task(found, files, folder, index, _beside(found, source, folder == out, to))
    if not overwrite:
        _refuse_existing(task)
    if task.nbytes > free_bytes(folder):
        raise StorageError(
            f"the new files need {format_bytes(task.nbytes)}, {format_bytes(free_bytes(folder))} are free",
            where=str(folder),
            advice="free space there, or write to another disk",
        )
    return task


def _tokenizer(found: Checkpoint) -> Part | bytes | None:
    """What the new file carries: a copy of the sentencepiece model, or the one that a GGUF's vocabulary makes."""
    if not isinstance(found.tokenizer, Vocabulary):
        return found.tokenizer
    with FileReader(found.tokenizer.file) as reader:
        return sentencepiece_model(found.tokenizer, reader)


def run_conversion(task: Task) -> Iterator[Done]:
    """Does the work, tensor by tensor; what an earlier run has done comes first. After the last the files are there."""
    with ExitStack() as stack:
        readers = {file: stack.enter_context(FileReader(file)) for file in task.source.files}
        opened = []
        for file in task.files:
            if _is_made(task, file):
                continue
            target = stack.enter_context(
                PartialFile(
                    task.folder / file.name, file.head.nbytes, hashlib.sha256(file.head.data).hexdigest()
                )
            )
            opened.append(target)
            yield from _write(file, target, readers)
        for target in opened:
            target.commit()
    if task.index is not None:
        write_atomic(task.folder / task.index, index_of(task.files))
    for name, data in task.extra.items():
        write_atomic(task.folder / name, data)


def _write(file: NewFile, target: PartialFile, readers: Mapping[Path, FileReader]) -> Iterator[Done]:
    done = {}
    for line in target.notes:
        name, error = line.split(" ")
        done[name] = float(error)
    if not done:
        target.write_at(0, file.head.data)
        for offset, data in file.constants.items():
            target.write_at(offset, data)
        for offset, part in file.copied.items():
            target.write_at(offset, readers[part.file].read_at(part.offset, part.nbytes))
    for conversion in file.conversions:
        name = conversion.ref.name
        if name not in done:
            done[name] = _transfer(conversion, target, readers)
            target.note(f"{name} {done[name]!r}")
        yield Done(name, conversion.encoding.name, conversion.changes, done[name], conversion.nbytes)


def _transfer(conversion: Conversion, target: PartialFile, readers: Mapping[Path, FileReader]) -> float:
    """Read, convert and write one tensor; its relative error."""
    ref, encoding = conversion.ref, conversion.encoding
    if not conversion.changes:
        for part in ref.parts:
            for start in range(0, part.nbytes, _PIECE):
                data = readers[part.file].read_at(part.offset + start, min(_PIECE, part.nbytes - start))
                target.write_at(conversion.places[part.role] + start, data)
        return 0.0
    pieces = plain_pieces(ref, encoding)
    if pieces is None:
        parts = {part.role: _read(part, readers) for part in ref.parts}
        stored = ref.encoding
        dtype = TORCH_DTYPES[stored.code] if isinstance(stored, Plain) else torch.float32
        source = stored.decode(parts, ref.shape, dtype)
        del parts
        made, error = convert(encoding, source)
        for role, tensor in made.items():
            target.write_at(conversion.places[role], _bytes(tensor))
        return error
    (part,) = ref.parts
    loss = size = 0.0
    for piece in pieces:
        old = _read(part, readers, piece)
        new = encoding.encode(old)["weight"]
        target.write_at(conversion.places["weight"] + piece.start * new.element_size(), _bytes(new))
        more = squares(old, new)
        loss, size = loss + more[0], size + more[1]
    return relative(loss, size)


_PIECE = 16 << 20
"""Bytes copied at once."""


def _read(part: Part, readers: Mapping[Path, FileReader], piece: slice | None = None) -> Tensor:
    """A stored part, or a piece of the flat one."""
    dtype = TORCH_DTYPES[part.dtype]
    count = part.nbytes // dtype.itemsize
    start, stop = (0, count) if piece is None else (piece.start, piece.stop)
    raw = torch.empty((stop - start) * dtype.itemsize, dtype=torch.uint8)
    if raw.numel():
        readers[part.file].read_into(part.offset + start * dtype.itemsize, as_bytes(raw))
    typed = raw.view(dtype)
    return typed.view(part.shape) if piece is None else typed


def _bytes(tensor: Tensor) -> memoryview:
    return as_bytes(tensor.contiguous().flatten().view(torch.uint8))


def _targets(found: Checkpoint, out: Path, gguf: bool) -> tuple[Path, dict[Path, str]]:
    """The folder of the new files, and the name of the new file for each old one."""
    suffix = ".gguf" if gguf else ".safetensors"
    if out.name.endswith(_WEIGHTS):
        if not out.name.endswith(suffix):
            raise UsageError(
                "not the name of such a file",
                where=str(out),
                expected=f"a name that ends in {suffix}",
                advice="rename it",
            )
        return out.parent, dict.fromkeys(found.files, out.name)
    if gguf and len(found.files) > 1:
        # No reader of Wan files joins shards of GGUF.
        return out, dict.fromkeys(found.files, f"{out.name}{suffix}")
    return out, {file: f"{_stem(file)}{suffix}" for file in found.files}


def _stem(file: Path) -> str:
    return next(
        (file.name.removesuffix(s) for s in (*_WEIGHTS, *SUFFIXES) if file.name.endswith(s)), file.name
    )


def _identity(found: Checkpoint, to: str) -> str:
    """A short text that other sources, and changed ones, do not have."""
    facts = [to]
    for path in found.files:
        with FileReader(path) as reader:
            facts.append(f"{path.name} {reader.identity.size} {reader.identity.mtime_ns}")
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]


def _index_name(found: Checkpoint, files: tuple[NewFile, ...]) -> str | None:
    if len(files) == 1:
        return None
    stem = "model" if found.kind == "text" else "diffusion_pytorch_model"
    return f"{stem}{INDEX_SUFFIX}"


def _is_made(task: Task, file: NewFile) -> bool:
    """Whether an earlier run, stopped between two renames, has made this file from these sources."""
    path = task.folder / file.name
    if not path.is_file():
        return False
    with FileReader(path) as reader:
        return reader.size == file.head.nbytes and reader.read_at(0, len(file.head.data)) == file.head.data


def _refuse_existing(task: Task) -> None:
    made = [_is_made(task, file) for file in task.files]
    there = [
        f.name for f, m in zip(task.files, made, strict=True) if not m and (task.folder / f.name).exists()
    ]
    if all(made):
        raise UsageError(
            "it is there already, made from the same source",
            where=str(task.folder / task.files[0].name),
            advice="use it as it is",
        )
    if there:
        raise UsageError(
            "the output exists already",
            where=str(task.folder / there[0]),
            advice="choose another name, or add --overwrite",
        )


def _kept_modules(found: Checkpoint) -> list[str]:
    """Modules outside the blocks, in the naming that diffusers and transformers use."""
    if found.kind == "dit":
        return ["condition_embedder", "patch_embedding", "proj_out"]
    return ["shared", "embed_tokens", "relative_attention_bias"]


def _beside(found: Checkpoint, source: Path, is_folder: bool, to: str) -> dict[str, bytes]:
    """The config.json that diffusers and transformers want in the folder of a model."""
    config = (source if source.is_dir() else source.parent) / "config.json"
    if not is_folder or found.style not in ("diffusers", "hf") or not config.is_file():
        return {}
    with FileReader(config) as reader:
        try:
            settings = json.loads(reader.read_at(0, min(reader.size, 1 << 20)))
        except (ValueError, RecursionError):
            return {}
    kind = encoding_by_name(to)
    if not isinstance(settings, dict) or not (isinstance(kind, Plain) or to in ("nf4", "fp4")):
        return {}
    settings.pop("quantization_config", None)
    if to in ("nf4", "fp4"):
        settings["quantization_config"] = {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": to,
            "bnb_4bit_use_double_quant": False,
            "bnb_4bit_compute_dtype": "bfloat16",
            "bnb_4bit_quant_storage": "uint8",
            # What stays as it is: else the reader makes quantised layers of it, and finds no scales.
            "llm_int8_skip_modules": _kept_modules(found),
        }
    return {"config.json": json.dumps(settings, indent=2).encode()}
