"""The stored tensors that belong to one weight (codes, scales, notes): grouped by name, recognised as an encoding."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

from lowvram.errors import FileError
from lowvram.quant.encodings import registry
from lowvram.quant.encodings.base import Recognised, StoredPart
from lowvram.quant.files.header import Header, StoredTensor, shown
from lowvram.quant.files.notes import MAX_NOTE_BYTES
from lowvram.quant.files.safetensors import MAX_TENSORS
from lowvram.quant.files.strict_json import Malformed, Scanner
from lowvram.quant.names import NOTE_ROLES, split_side
from lowvram.quant.refs import Part, Shape, TensorRef
from lowvram.quant.spec import numel

_HEADER_NOTES = "_quantization_metadata"
"""Header metadata in which ComfyUI files may carry the notes of all layers (checkpoint-formats 3.3)."""


class Stored(NamedTuple):
    """A stored tensor of a weight."""

    tensor: StoredTensor
    file: Path
    note: Mapping[str, object] | None = None
    """What it says, if its role is one of NOTE_ROLES."""


Group = dict[str, Stored]
"""The stored tensors of one weight by role."""


def group_by_weight(headers: Sequence[Header]) -> dict[str, Group]:
    """Stored tensors by the name of the weight they belong to. FileError for two in one role, or a broken note."""
    groups: defaultdict[str, Group] = defaultdict(dict)
    for header in headers:
        for tensor in header.tensors:
            base, role = split_side(tensor.name)
            if role in groups[base]:
                _refuse(header.path, f"two tensors are the {role} of {shown(base)}", "every tensor once")
            text = header.notes.get(tensor.name) if role in NOTE_ROLES else None
            note = None if text is None else _parse_note(text, tensor.name, header.path)
            groups[base][role] = Stored(tensor, header.path, note)
    for header in headers:
        for layer, note in _header_notes(header).items():
            group = groups.get(f"{layer}.weight")
            if group is not None and "comfy_quant" not in group:
                name = f"{_HEADER_NOTES} of {layer}"
                group["comfy_quant"] = Stored(StoredTensor(name, "U8", (), 0, 0), header.path, note)
    return dict(groups)


def recognise_group(name: str, group: Group, bias: Stored | None, where: Path) -> Recognised:
    """What the stored tensors of the weight `name` are; FileError if nothing known. `bias` is that of its layer."""
    recognised = registry.recognise(
        {role: StoredPart(s.tensor.dtype, s.tensor.shape, s.note) for role, s in group.items()}
    )
    if recognised is None:
        _refuse_unknown(name, group, where)
    if not recognised.flat:
        return recognised
    rows = bias.tensor.shape[0] if bias is not None and len(bias.tensor.shape) == 1 else 0
    shape = (rows, numel(recognised.shape) // rows) if rows else ()
    if not rows or numel(shape) != numel(recognised.shape) or not recognised.encoding.fits(shape):
        found = f"the shape of {shown(name)} cannot be told: its groups fit no bias beside it"
        raise FileError(found, where=str(where), advice="use the int8 version of the model")
    return Recognised(recognised.encoding, shape, recognised.roles)


def make_ref(native: str, recognised: Recognised, group: Group, shape: Shape) -> TensorRef:
    """The tensor `native` of the logical `shape`, stored as `recognised`.

    Its parts take dtype and shape from the encoding, so that all who use them see one form: files have scales of [N]
    and of [N, 1], and the blocks of GGUF are bytes to everyone but their encoding.
    """
    parts = []
    for part in recognised.encoding.layout(recognised.shape):
        tensor, file, _ = group[part.role]
        parts.append(Part(part.role, file, tensor.offset, tensor.nbytes, part.dtype, part.shape))
    return TensorRef(native, shape, recognised.encoding, tuple(parts))


_PACKED: Mapping[str, str] = {"wscales": "SVDQuant (Nunchaku)", "qzeros": "AWQ", "g_idx": "GPTQ"}
"""Last part of a name that only files of this format have."""


def refuse_packed(names: Iterable[str], where: Path) -> None:
    """FileError for files whose numbers are packed in the order of one program's kernels: nothing else can read them."""
    for name in names:
        kind = _PACKED.get(name.rpartition(".")[2])
        if kind is not None:
            found = f"these are {kind} weights ({shown(name)}), packed for that program's kernels alone"
            advice = "use a bf16, fp8, int8 or GGUF version of the same model; `lowvram quantize` makes smaller ones of it"
            raise FileError(found, where=str(where), advice=advice)


def _parse_note(text: bytes, name: str, where: Path) -> Mapping[str, object]:
    try:
        scan = Scanner(text.decode("utf-8"))
        value = scan.small_value(MAX_NOTE_BYTES)
        scan.end()
        if not isinstance(value, dict):
            raise Malformed("no object", "an object")
    except UnicodeDecodeError:
        _refuse(where, f"{shown(name)} is not UTF-8 text", "a JSON object")
    except Malformed as error:
        _refuse(where, f"{shown(name)} holds {error.found}", error.expected or "a JSON object")
    return value


def _header_notes(header: Header) -> dict[str, Mapping[str, object]]:
    """Notes of layers by name of the layer, from the metadata of the file."""
    text = header.metadata.get(_HEADER_NOTES)
    if text is None:
        return {}
    notes: dict[str, Mapping[str, object]] = {}
    try:
        scan = Scanner(text)
        for key in scan.members():
            if key != "layers":
                scan.small_value(MAX_NOTE_BYTES)
                continue
            for layer in scan.members():
                note = scan.small_value(MAX_NOTE_BYTES)
                if not isinstance(note, dict) or layer in notes or len(notes) == MAX_TENSORS:
                    raise Malformed(f"the entry of {shown(layer)}", "one object for a layer")
                notes[layer] = note
        scan.end()
    except Malformed as error:
        _refuse(header.path, f"{_HEADER_NOTES} in the header holds {error.found}", error.expected)
    return notes


def _refuse_unknown(name: str, group: Group, where: Path) -> NoReturn:
    if not {"weight", "packed"} & group.keys():
        role = next(iter(group))
        _refuse(where, f"the {role} of {shown(name)} is there without its weight", "both")
    stored = ", ".join(f"{role} {s.tensor.dtype} {list(s.tensor.shape)}" for role, s in group.items())
    note = group["comfy_quant"].note if "comfy_quant" in group else None
    if note is not None and isinstance(note.get("format"), str):
        stored += f", marked {shown(str(note['format']), 40)}"
    found = f"tensor {shown(name)} is stored in a format that is not supported yet: {stored}"
    advice = "use a bf16, fp16, fp8, int8 or GGUF version of the model"
    raise FileError(found, where=str(where), advice=advice)


def _refuse(where: Path, found: str, expected: str) -> NoReturn:
    advice = "check that the file is whole and is a Wan 2.1 or 2.2 model"
    raise FileError(found, where=str(where), expected=expected, advice=advice)
