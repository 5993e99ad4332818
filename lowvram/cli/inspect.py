"""lowvram inspect: what a file is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowvram.cli import options as o

if TYPE_CHECKING:
    from lowvram.quant.files.header import Header

VIDEOS = (".mp4", ".mkv", ".webm", ".mov")
MAX_SHOWN = 400
"""Characters of one value on a terminal."""
MAX_METADATA = 65_536
"""Characters of one metadata value as JSON."""


def inspect(
    paths: Annotated[
        list[Path], typer.Argument(metavar="FILE", help="Checkpoints, LoRAs, folders, videos or PNGs.")
    ],
    as_json: o.Json = False,
) -> None:
    """Say what model files, videos and pictures hold. Only headers are read."""
    from lowvram.cli.console import emit, emit_json

    for place, path in enumerate(paths):
        facts = describe(path)
        if as_json:
            emit_json(facts)
        else:
            emit("\n".join([*([""] if place else []), *lines(facts)]))


def lines(facts: Mapping[str, Any], indent: str = "") -> Iterable[str]:
    """Facts for people: one a line, nested ones below, whatever they hold fit for a terminal. What is empty is left out."""
    from lowvram.cli.console import one_line

    for name, value in facts.items():
        if value is None or value in ("", [], (), {}):
            continue
        if isinstance(value, Mapping):
            yield f"{indent}{one_line(name)}:"
            yield from lines(value, indent + "  ")
            continue
        text = one_line(_told(value))
        yield f"{indent}{one_line(name)}: {text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + '...'}"


def _told(value: object) -> str:
    """A value in words: numbers as short as they are meant, lists with commas, records in brackets."""
    match value:
        case bool():
            return "yes" if value else "no"
        case float():
            return f"{value:.6g}"
        case Mapping():
            return f"({', '.join(f'{key} {_told(each)}' for key, each in value.items())})"
        case list() | tuple():
            return ", ".join(map(_told, value))
        case _:
            return str(value)


def describe(path: Path) -> dict[str, Any]:
    """Facts about a file or a folder of shards. FileError if it is nothing known."""
    if path.suffix.lower() in VIDEOS:
        return _video(path)
    if path.suffix.lower() == ".png":
        return _picture(path)
    from lowvram.offload.io import FileReader
    from lowvram.quant.files.shards import open_checkpoint_files
    from lowvram.quant.identify import identify

    headers = open_checkpoint_files(path, FileReader)
    found = identify(headers)
    facts: dict[str, Any] = {
        "file": str(path),
        "kind": found.kind,
        "variant": found.variant,
        "naming": found.style,
        "tensors": len(found.refs),
        "bytes": sum(ref.nbytes for ref in found.refs.values()),
    }
    if found.spec is not None:
        from dataclasses import asdict

        facts["sizes"] = {k: v for k, v in asdict(found.spec).items() if k not in ("mean", "std")}
        facts["encodings"] = dict(Counter(ref.encoding.name for ref in found.refs.values()))
    if found.kind == "lora":
        facts |= _lora(headers)
    facts |= _name(path, found.kind, found.variant)
    if found.metadata:
        facts["metadata"] = {key: text[:MAX_METADATA] for key, text in found.metadata.items()}
    return facts


def _lora(headers: list[Header]) -> dict[str, Any]:
    """How much of a LoRA fits each known model; the unused names are those of the best fit."""
    from lowvram.errors import FileError
    from lowvram.quant.lora import LoraSet, match_lora
    from lowvram.sampling.presets import load_models

    fits: dict[str, LoraSet] = {}
    why = ""
    for name, model in load_models().items():
        try:
            fits[name] = match_lora(headers, model.dit, partial=True)
        except FileError as error:
            why = error.found
    if not fits:
        return {"fits": "no model known here", "why": why}
    best = max(fits.values(), key=lambda found: found.matched / max(1, found.total))
    facts: dict[str, Any] = {
        "ranks": list(best.ranks),
        "fits": {name: f"{found.matched} of {found.total}" for name, found in fits.items()},
    }
    if best.unused:
        facts["unused"] = [*best.unused[:5], *(["..."] if len(best.unused) > 5 else [])]
    return facts


def _name(path: Path, kind: str, variant: str) -> dict[str, Any]:
    """What the name says, and a published hash if the Hub cache knows the file by it."""
    from lowvram.fewstep import preset_of
    from lowvram.library.known import known_file, stored_hash
    from lowvram.library.naming import derived_name, expert_of, version_of

    if kind not in ("dit", "lora"):
        return {}
    known = known_file(stored_hash(path))
    name = Path(known.name) if known else path
    said = {
        "published_as": known.name if known else None,
        "expert": expert_of(name),
        "version": version_of(name),
        "preset": preset_of(path, kind),
        "derived": derived_name(name.name, variant) or None,
    }
    return {key: value for key, value in said.items() if value is not None}


def _video(path: Path) -> dict[str, Any]:
    from lowvram.media.made_with import made_with
    from lowvram.media.probe import probe

    info = probe(path)
    facts: dict[str, Any] = {
        "file": str(path),
        "kind": "video",
        "size": f"{info.width}x{info.height}",
        "frames": info.frames,
        "fps": float(info.fps),
        "codec": info.codec,
    }
    return facts | (made_with(info.metadata) or _unknown(info.metadata))


def _picture(path: Path) -> dict[str, Any]:
    from lowvram.media.made_with import made_with, png_size, png_texts

    texts = png_texts(path)
    facts = {"file": str(path), "kind": "picture", "size": "{}x{}".format(*png_size(path))}
    return facts | (made_with(texts) or _unknown(texts))


def _unknown(tags: Mapping[str, str]) -> dict[str, Any]:
    return {"metadata": {key: text[:MAX_METADATA] for key, text in tags.items()}} if tags else {}
