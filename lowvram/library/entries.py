"""What one checkpoint is: its headers read, its name looked at."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

from lowvram.errors import FileError, LowvramError
from lowvram.library.known import known_file
from lowvram.library.naming import derived_name, expert_of, version_of
from lowvram.library.walk import TOKENIZER, Found
from lowvram.offload.io import FileReader
from lowvram.quant.spec import ClipSpec, DitSpec, TextSpec, VaeSpec
from lowvram.sampling.presets import load_models, preset_of_file

if TYPE_CHECKING:
    from lowvram.quant.files.header import Header
    from lowvram.quant.identify import Checkpoint, Kind

MAX_TOKENIZER_BYTES = 64 << 20
_PART_WORDS: Mapping[str, str] = {"vae": "vae", "umt5": "text", "roberta": "clip", "lora": "lora", "": "dit"}
"""Kind of a part by a word in its name, which is all that is known of a broken file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A part of a Wan model that lies on this machine."""

    path: str
    """What opens it: a file, an index, or a folder of shards."""
    kind: str
    """ "dit", "vae", "text", "clip", "lora", "tokenizer", "broken"; "other" for what is no part of a Wan model."""
    variant: str = ""
    """What the network is; of a broken file, the kind that its name says."""
    models: tuple[str, ...] = ()
    """Known models whose part it can be, by sizes alone."""
    standard: bool = True
    """Whether it has the sizes the authors' has, and does not merely fit: smaller VAEs exist."""
    encoding: str = ""
    """The one that most of its bytes are in."""
    nbytes: int = 0
    tensors: int = 0
    expert: str | None = None
    """ "high" or "low" where name or hash say so."""
    version: str | None = None
    """ "2.1" or "2.2" where the name says so."""
    preset: str | None = None
    """The few-step preset it was made for, as its name or hash says."""
    derived: str = ""
    """A word of its name that says it was trained further."""
    has_tokenizer: bool = False
    vocabulary: int = 0
    """Of a text encoder or a tokenizer."""
    problem: str = ""
    """Why it cannot be used; empty if it can."""
    place: str = ""
    """Whose folder it was found in."""
    sha256: str = ""
    """Where it is known without reading the file."""


def read_entries(path: Path) -> tuple[Entry, ...]:
    """The parts of a model in a checkpoint: one, or several in an all-in-one file. Reads headers only, and says
    nothing yet of what names tell."""
    if path.name.lower() == TOKENIZER:
        return (_tokenizer(path),)
    from lowvram.quant.files.shards import open_checkpoint_files
    from lowvram.quant.identify import kinds

    try:
        headers = open_checkpoint_files(path, FileReader)
    except LowvramError as error:
        return (_unusable(path, "broken", error),)
    held = kinds(headers)
    if not held:
        return (_not_wan(path, headers),)
    return tuple(_entry(path, headers, kind, len(held) == 1) for kind in held)


def _entry(path: Path, headers: list[Header], kind: Kind, alone: bool) -> Entry:
    from lowvram.quant.identify import identify

    if kind == "lora":
        return _lora(path, headers)
    try:
        part = identify(headers, kind)
    except LowvramError as error:
        return _unusable(path, kind, error)
    models, standard = models_with(part)
    return Entry(
        path=str(path),
        kind=kind,
        variant=part.variant,
        models=models,
        standard=standard,
        encoding=_main_encoding(part),
        nbytes=sum(header.size for header in headers) if alone else sum(r.nbytes for r in part.refs.values()),
        tensors=len(part.refs),
        has_tokenizer=part.tokenizer is not None,
        vocabulary=part.spec.vocab if isinstance(part.spec, TextSpec) else 0,
    )


def named(entry: Entry, found: Found, sha256: str, place: str) -> Entry:
    """The entry with what its name tells; a known hash stands for the name it was published under."""
    known = known_file(sha256)
    name: PurePath = PurePath(known.name) if known else found.path
    if entry.kind not in ("dit", "lora"):
        return replace(entry, place=place, sha256=sha256, version=version_of(name))
    index = name.name.endswith(".index.json")
    return replace(
        entry,
        place=place,
        sha256=sha256,
        expert="high" if found.first_of_two and not known else expert_of(name),
        version=version_of(name),
        preset=preset_of_file(name, entry.kind),
        derived=derived_name(name.parent.name if index else name.name, entry.variant)
        if entry.kind == "dit"
        else "",
    )


def models_with(part: Checkpoint) -> tuple[tuple[str, ...], bool]:
    """The models it fits, and whether its sizes are those of one of them."""
    fits, same = [], False
    for name, model in load_models().items():
        match part.spec:
            case DitSpec():
                if model.dit == part.spec:
                    fits.append(name)
                    same = True
            case VaeSpec(version=version, z=z):
                if (model.vae.version, model.vae.z) == (version, z):
                    fits.append(name)
                    same |= _frame(model.vae) == _frame(part.spec)
            case TextSpec(dim=dim):
                if model.dit.text_dim == dim:
                    fits.append(name)
                    same |= model.text == part.spec
            case ClipSpec(dim=dim):
                if model.clip is not None and model.dit.image_dim == dim:
                    fits.append(name)
                    same |= model.clip == part.spec
    return tuple(fits), same


def _frame(vae: VaeSpec) -> tuple[object, ...]:
    """Sizes without statistics, which files may leave out."""
    return (vae.version, vae.base, vae.decoder_base, vae.z, vae.res_blocks)


def _main_encoding(part: Checkpoint) -> str:
    sizes: Counter[str] = Counter()
    for ref in part.refs.values():
        sizes[ref.encoding.name] += ref.nbytes
    return sizes.most_common(1)[0][0] if sizes else ""


def _lora(path: Path, headers: list[Header]) -> Entry:
    """A LoRA, with the models it fits; one made for something else than Wan is "other"."""
    from lowvram.quant.lora import match_lora

    fits, problem, rank = [], "", ""
    matched: dict[DitSpec, bool] = {}
    for name, model in load_models().items():
        if model.dit not in matched:
            try:
                found = match_lora(headers, model.dit)
                matched[model.dit] = True
                rank = "rank " + "/".join(map(str, found.ranks[-2:])) if found.ranks else "differences"
            except FileError as error:
                matched[model.dit] = False
                problem = error.found
        if matched[model.dit]:
            fits.append(name)
    tensors = sum(len(header.tensors) for header in headers)
    nbytes = sum(header.size for header in headers)
    if not fits:
        return Entry(
            path=str(path), kind="other", variant="lora", nbytes=nbytes, tensors=tensors, problem=problem
        )
    return Entry(
        path=str(path),
        kind="lora",
        variant="lora",
        models=tuple(fits),
        encoding=rank,
        nbytes=nbytes,
        tensors=tensors,
    )


def _not_wan(path: Path, headers: list[Header]) -> Entry:
    from lowvram.quant.identify import identify

    try:
        identify(headers)
        problem = "not a part of a Wan model"
    except LowvramError as error:
        problem = error.found
    # What is derived from Wan is worth a line; what has nothing to do with it is not.
    return Entry(
        path=str(path),
        kind="dit" if "not supported yet" in problem else "other",
        nbytes=sum(header.size for header in headers),
        problem=problem,
    )


def _unusable(path: Path, kind: str, error: LowvramError) -> Entry:
    size = path.stat().st_size if path.is_file() else 0
    name = path.name.lower()
    said = next(part for word, part in _PART_WORDS.items() if word in name) if kind == "broken" else ""
    problem = f"{error.found}; {error.advice}"
    return Entry(path=str(path), kind=kind, variant=said, nbytes=size, problem=problem)


def _tokenizer(path: Path) -> Entry:
    from lowvram.quant.vocabulary import sentencepieces

    with FileReader(path) as reader:
        size = reader.size
        data = reader.read_at(0, size) if 0 < size <= MAX_TOKENIZER_BYTES else b""
    processor = sentencepieces(data)
    if processor is None:
        return Entry(path=str(path), kind="other", nbytes=size, problem="not a sentencepiece model")
    pieces = processor.get_piece_size()
    return Entry(path=str(path), kind="tokenizer", variant="sentencepiece", nbytes=size, vocabulary=pieces)
