"""Read one encoding, write another: what becomes of every tensor of a network, in which file, under which name.

Nothing is read or written here. `plan_files` says from headers alone where every byte of the new files goes, and
`convert` makes the bytes of one tensor.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from lowvram.errors import UsageError
from lowvram.quant.encodings.base import CHUNK_ELEMENTS, TORCH_DTYPES, Encoding
from lowvram.quant.encodings.kquants import Blocks
from lowvram.quant.encodings.plain import Plain
from lowvram.quant.encodings.registry import encoding_by_name, planned_encoding
from lowvram.quant.files.writing import Entry, Head, gguf_head, safetensors_head
from lowvram.quant.identify import Checkpoint
from lowvram.quant.names import DIT, TEXT, vae_renames
from lowvram.quant.published import (
    GGUF_FILE_TYPES,
    Published,
    file_markers,
    file_metadata,
    published,
    style_for,
)
from lowvram.quant.refs import Part, TensorRef
from lowvram.quant.renames import Renames
from lowvram.quant.spec import VaeSpec

TOKENIZER = "spiece_model"
_NOT_CARRIED = (
    "_quantization_metadata",
    "quantization_",
    "general.",
    "tokenizer.",
    "t5encoder.",
    "format",
    "lowvram",
)
"""What begins the names of metadata that says how the old file was stored."""


@dataclass(frozen=True, slots=True)
class Conversion:
    """One tensor on its way from one encoding to another."""

    ref: TensorRef
    encoding: Encoding
    """The new one."""
    places: Mapping[str, int]
    """Where each part goes: role -> offset in the new file."""

    @property
    def changes(self) -> bool:
        """Whether the tensor is encoded anew; else its bytes are copied."""
        return self.encoding != self.ref.encoding

    @property
    def nbytes(self) -> int:
        return self.encoding.nbytes(self.ref.shape)


@dataclass(frozen=True, slots=True)
class NewFile:
    """One file to be written."""

    name: str
    head: Head
    conversions: tuple[Conversion, ...]
    constants: Mapping[int, bytes]
    """Notes and markers, by offset."""
    copied: Mapping[int, Part]
    """Parts that are taken over as they are (a tokenizer), by offset."""
    names: tuple[str, ...]
    """Of the stored tensors, for an index."""


def plan_files(
    found: Checkpoint, to: str, files: Mapping[Path, str], source: str, tokenizer: Part | bytes | None = None
) -> list[NewFile]:
    """The files that hold the network `found` in the format `to` (a name that `--weights` knows).

    files: for each file of the network the name of the new file that takes its tensors.
    tokenizer: the sentencepiece model that goes with a text encoder, or where it lies.
    source: a text that tells these sources from all others; it is written into the new files.
    UsageError if the network cannot be stored so, or if nothing of it would change.
    """
    _check(found, to)
    chosen = encoding_by_name(to)
    style = style_for(chosen, found.kind, found.style)
    rename = _renamer(found, style)
    encodings = {name: _encoding(ref, to) for name, ref in found.refs.items()}
    by_file: dict[str, list[TensorRef]] = {}
    for ref in _in_block_order(found.refs.values()):
        by_file.setdefault(files[ref.parts[0].file], []).append(ref)
    made = []
    for number, (name, refs) in enumerate(by_file.items()):
        if isinstance(chosen, Blocks):
            made.append(_gguf(name, refs, encodings, to, source))
            continue
        # What speaks of all files stands in the first.
        markers = file_markers(encodings.values()) if number == 0 else {}
        words = tokenizer if number == 0 else None
        made.append(_safetensors(name, refs, encodings, rename, markers, words, _metadata(found, source)))
    return made


def convert(encoding: Encoding, source: Tensor) -> tuple[dict[str, Tensor], float]:
    """The parts of `source` in `encoding`, and the relative error |new - old| / |old| (Frobenius).

    Takes memory for the parts and for one decoded copy in float32.
    """
    parts = encoding.encode(source)
    back = encoding.decode(parts, tuple(source.shape), torch.float32)
    loss, size = squares(source, back)
    return parts, relative(loss, size)


def squares(old: Tensor, new: Tensor) -> tuple[float, float]:
    """Sums of squares of new - old and of old, in float64."""
    loss = size = 0.0
    flat, other, step = old.flatten(), new.flatten(), CHUNK_ELEMENTS // 8
    for start in range(0, flat.numel(), step):
        before = flat[start : start + step].to(torch.float64)
        size += float(before.square().sum())
        loss += float((other[start : start + step].to(torch.float64) - before).square_().sum())
    return loss, size


def relative(loss: float, size: float) -> float:
    """Root of a ratio of sums of squares; 0 for a tensor of zeros that stayed one."""
    return float((loss / size) ** 0.5) if size else float(loss > 0)


def index_of(files: Sequence[NewFile]) -> bytes:
    """The JSON index of a network in several files, as diffusers and transformers read it."""
    weight_map = {name: file.name for file in files for name in file.names}
    total = sum(file.head.nbytes - len(file.head.data) for file in files)
    return json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2).encode()


def _check(found: Checkpoint, to: str) -> None:
    chosen = encoding_by_name(to)
    if found.kind in ("lora", "clip"):
        _refuse(
            f"a {'LoRA' if found.kind == 'lora' else 'CLIP encoder'} is not quantised", "leave it as it is"
        )
    if isinstance(chosen, Blocks) and found.kind != "dit":
        kind = "text encoder" if found.kind == "text" else "VAE"
        _refuse(f"a {kind} is not written as GGUF", "choose fp8 or int8 for a text encoder, bf16 for a VAE")
    made = [(ref.encoding, _encoding(ref, to)) for ref in found.refs.values()]
    if not isinstance(chosen, Plain) and all(isinstance(new, Plain) for _, new in made):
        _refuse(f"nothing in this network may be stored as {to}", "choose bf16, fp16 or fp32")
    if all(old == new for old, new in made):
        _refuse(f"it is stored as {to} already", "choose another format with --to")


def _encoding(ref: TensorRef, to: str) -> Encoding:
    """What a tensor is stored as: what may not lose precision stays as it is, or becomes bf16 if it was quantised.

    In GGUF it is float32 if it is small or no matrix, else bf16 or fp16 as before (checkpoint-formats 4.1).
    """
    before, chosen = ref.encoding, encoding_by_name(to)
    picked = planned_encoding(ref.name, ref.shape, to)
    if isinstance(chosen, Plain) or not isinstance(picked, Plain) or picked == Plain("F32"):
        return picked
    if isinstance(chosen, Blocks):
        return Plain("F16") if before in (Plain("F16"), Plain("F32"), Plain("F64")) else Plain("BF16")
    return before if isinstance(before, Plain) and before != Plain("F64") else Plain("BF16")


def _in_block_order(refs: Iterable[TensorRef]) -> list[TensorRef]:
    """What is outside the blocks first, then block by block, so that a block is one run of bytes; else as stored."""

    def place(ref: TensorRef) -> tuple[int, str, int]:
        _, _, rest = ref.name.partition("blocks.") if ref.name.startswith("blocks.") else ("", "", "")
        number = rest.partition(".")[0]
        block = int(number) if number.isdecimal() else -1
        return block, str(ref.parts[0].file), ref.parts[0].offset

    return sorted(refs, key=place)


def _renamer(found: Checkpoint, style: str) -> Callable[[str], str]:
    """The function from native names to names of `style`."""
    if style == "native":
        return lambda name: name
    if isinstance(found.spec, VaeSpec):
        table: Renames = vae_renames(found.spec.version, found.spec.res_blocks)
    else:
        table = DIT if found.kind == "dit" else TEXT

    def rename(name: str) -> str:
        renamed = table.from_native(name)
        if renamed is None:
            _refuse(f"{name} has no name in the {style} style", "choose another format with --to")
        return renamed

    return rename


def _metadata(found: Checkpoint, source: str) -> dict[str, str]:
    carried = {k: v for k, v in found.metadata.items() if not k.startswith(_NOT_CARRIED)}
    return carried | {"lowvram": source}


def _safetensors(
    name: str,
    refs: Sequence[TensorRef],
    encodings: Mapping[str, Encoding],
    rename: Callable[[str], str],
    markers: Mapping[str, str],
    tokenizer: Part | bytes | None,
    metadata: Mapping[str, str],
) -> NewFile:
    entries: list[Entry] = []
    constants: dict[str, bytes] = {}
    parts: dict[str, dict[str, str]] = {}
    layers: dict[str, Encoding] = {}
    for ref in refs:
        encoding = encodings[ref.name]
        form = published(encoding, ref.shape)
        stored = rename(ref.name)
        layer = stored.removesuffix(".weight") if len(form.names) > 1 or form.notes else ""
        if layer:
            layers[layer] = encoding
        parts[ref.name] = _part_names(form, layer, stored)
        for part in encoding.layout(ref.shape):
            entries.append(Entry(parts[ref.name][part.role], part.dtype, part.shape))
        for suffix, note in form.notes.items():
            entries.append(Entry(layer + suffix, "U8", (len(note),)))
            constants[layer + suffix] = note
        for suffix in form.ones:
            entries.append(Entry(layer + suffix, "F32", ()))
            constants[layer + suffix] = b"\x00\x00\x80\x3f"
    entries += [Entry(marker, dtype, (0,)) for marker, dtype in markers.items()]
    if isinstance(tokenizer, Part):
        entries.append(Entry(TOKENIZER, "U8", tokenizer.shape))
    elif tokenizer is not None:
        entries.append(Entry(TOKENIZER, "U8", (len(tokenizer),)))
        constants[TOKENIZER] = tokenizer
    head = safetensors_head(entries, {**metadata, **file_metadata(layers)})
    conversions = tuple(
        Conversion(ref, encodings[ref.name], {role: head.offsets[n] for role, n in parts[ref.name].items()})
        for ref in refs
    )
    copied = {head.offsets[TOKENIZER]: tokenizer} if isinstance(tokenizer, Part) else {}
    placed = {head.offsets[n]: data for n, data in constants.items()}
    return NewFile(name, head, conversions, placed, copied, tuple(e.name for e in entries))


def _part_names(form: Published, layer: str, stored: str) -> dict[str, str]:
    """Stored name of each part. A tensor of one part and without notes keeps its whole name: it may be no weight."""
    return {role: layer + suffix if layer else stored for role, suffix in form.names.items()}


def _gguf(
    name: str, refs: Sequence[TensorRef], encodings: Mapping[str, Encoding], to: str, source: str
) -> NewFile:
    entries = []
    for ref in refs:
        encoding = encodings[ref.name]
        assert isinstance(encoding, Blocks | Plain)
        kind = encoding.kind if isinstance(encoding, Blocks) else encoding.code
        entries.append(Entry(ref.name, kind, ref.shape))
    keys: dict[str, str | int] = {
        "general.architecture": "wan",
        "general.quantization_version": 2,
        "general.file_type": GGUF_FILE_TYPES[to],
        "lowvram": source,
    }
    head = gguf_head(entries, keys)
    conversions = tuple(
        Conversion(ref, encodings[ref.name], {"weight": head.offsets[ref.name]}) for ref in refs
    )
    return NewFile(name, head, conversions, {}, {}, tuple(e.name for e in entries))


def plain_pieces(ref: TensorRef, encoding: Encoding) -> Iterator[slice] | None:
    """Slices of the flat tensor that can be converted one after the other; None if the whole is needed at once."""
    if not isinstance(ref.encoding, Plain) or not isinstance(encoding, Plain):
        return None
    count = ref.nbytes // TORCH_DTYPES[ref.encoding.code].itemsize
    return (slice(at, min(count, at + CHUNK_ELEMENTS)) for at in range(0, count, CHUNK_ELEMENTS))


def _refuse(found: str, advice: str) -> NoReturn:
    raise UsageError(found, where="--to", advice=advice)
