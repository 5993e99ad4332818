"""Where the parts of a model lie.

A model is asked for by name, and its parts are looked for where people keep such files; or by a folder, in anyone's
naming. Single files may be given for any part. Found are paths only: what is in them is read by `lowvram.model`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib.resources import files as package_files
from pathlib import Path

from lowvram.errors import FileError, UsageError
from lowvram.library.cache import load_cache, models_cache, save_cache
from lowvram.library.choose import choose, choose_loras, missing_error, needed_parts, possible_models
from lowvram.library.entries import read_entries
from lowvram.library.naming import expert_of
from lowvram.library.parts import FLAGS, PARTS, typed
from lowvram.library.places import Place, given_places, machine_drives, usual_places
from lowvram.library.scan import Library, scan
from lowvram.library.walk import INDEX_SUFFIX
from lowvram.offload.io import FileReader, user_path
from lowvram.quant.spec import ModelSpec
from lowvram.sampling.presets import few_step, load_models, preset_of_file, unknown_name

_PLACES: Mapping[str, tuple[str, ...]] = {
    "high": ("high_noise_model", "transformer", "high_noise_model.safetensors"),
    "low": ("low_noise_model", "transformer_2", "low_noise_model.safetensors"),
    "single": (
        "transformer",
        "diffusion_pytorch_model.safetensors.index.json",
        "diffusion_pytorch_model*.safetensors",
    ),
    "vae": ("vae", "vae.safetensors", "wan2.?_vae.pth"),
    "text": ("text_encoder", "text_encoder.safetensors", "models_t5_umt5-xxl-enc-bf16.pth"),
    "clip": (
        "image_encoder",
        "clip_vision*.safetensors",
        "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth",
    ),
    "tokenizer": ("tokenizer/spiece.model", "google/umt5-xxl/spiece.model", "spiece.model"),
}
"""Folders and files of the authors', diffusers' and our own layouts, the surest first. Anything else is recognised by
its contents."""

_SHARED: Mapping[str, str] = {"nano-animate": "nano"}
"""Embedded models, and the one that has the parts which their own folder has not."""

_TRANSFORMERS = frozenset({"high", "low", "single"})
_SAMPLES, _SAMPLE_BYTES = 8, 4096


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """Where the parts of a model lie, and why these files."""

    paths: dict[str, str]
    """Absolute paths by part: "high" and "low" if there are two transformers, else "single"; "vae", "text",
    "tokenizer". A missing part is not an error here, because not every job needs every part."""
    reasons: dict[str, str]
    """Of the parts that were chosen among others."""


def find(
    model: str,
    given: Mapping[str, str] | None = None,
    *,
    models_dirs: Sequence[str] = (),
    weights: str | None = None,
    preset: str | None = None,
    force: bool = False,
    progress: Callable[[Path], None] = lambda path: None,
) -> ModelFiles:
    """The files of `model`, a name or a folder; `given` files win over found ones.

    models_dirs  more folders to look in, before the usual ones
    weights      the encoding that transformers must have where several are here
    preset       the few-step preset of the job: transformers made for it are taken where they are here
    force        take experts whose names contradict the flags they were given with

    UsageError if `model` is neither a known name nor a folder, or if several sets of files fit it equally; FileError
    if a part is not there.
    """
    chosen = {part: path for part, path in (given or {}).items() if path}
    if unknown := [part for part in chosen if part not in PARTS]:
        raise UsageError(
            f'"{unknown[0]}" is no part of a model',
            where=chosen[unknown[0]],
            expected=", ".join(PARTS),
            advice="name the file after one of these",
        )
    given_places(models_dirs)  # a folder that is not there is told, also where none is looked through
    for part, path in chosen.items():
        if not user_path(path).exists():
            raise FileError("no such file or folder", where=path, advice=f"check {FLAGS[part]}")
    folder = _folder(model)
    if is_embedded(model):
        found = ModelFiles(_embedded_parts(model), {})
    elif folder is not None:
        found = _in_folder(folder, model, chosen, weights, preset, progress)
    elif _is_complete(model, chosen):
        found = ModelFiles({}, {})
    else:
        found = _by_name(model, chosen, models_dirs, weights, preset, progress)
    if weights is not None and not _TRANSFORMERS & found.reasons.keys():
        raise UsageError(
            f"--weights {weights}, but no transformer is chosen by its encoding",
            where=" and ".join(FLAGS[part] for part in chosen if part in _TRANSFORMERS) or f"--model {model}",
            expected="the name of a model that is here in several encodings",
            advice="leave --weights out, or name that model alone",
        )
    parts = _without_other_transformers(found.paths, chosen) | chosen
    if "text" in chosen and "tokenizer" not in chosen and _has_tokenizer(user_path(chosen["text"])):
        parts.pop("tokenizer", None)  # a found one may be of another vocabulary
    paths = {part: str(user_path(path).absolute()) for part, path in parts.items()}
    _check_experts(paths, chosen, force)
    reasons = {part: why for part, why in found.reasons.items() if part in paths and part not in chosen}
    return ModelFiles(paths, reasons)


def _has_tokenizer(text: Path) -> bool:
    """Whether a text encoder brings its own."""
    return any(entry.has_tokenizer for entry in read_entries(text))


def look(models_dirs: Sequence[str] = (), progress: Callable[[Path], None] = lambda path: None) -> Library:
    """Every part of a Wan model on this machine: in `models_dirs` first, then where people keep such files."""
    places = [*given_places(models_dirs), *usual_places(os.environ, Path.home(), machine_drives())]
    return _scan(places, progress)


def _scan(places: Sequence[Place], progress: Callable[[Path], None]) -> Library:
    path = models_cache()
    cache = load_cache(path)
    before = dict(cache.records)
    library = scan(places, cache, progress)
    if cache.records != before:
        save_cache(path, cache)
    return library


def _by_name(
    model: str,
    given: Mapping[str, str],
    models_dirs: Sequence[str],
    weights: str | None,
    preset: str | None,
    progress: Callable[[Path], None],
) -> ModelFiles:
    library = look(models_dirs, progress)
    chosen = choose(library.entries, model, given=given, weights=weights, preset=preset)
    if chosen.missing:
        labels = dict.fromkeys(place.label for place in library.places)
        where = f"looked in {', '.join(labels)}" if labels else "no folder of models is known"
        raise missing_error(chosen, library.entries, where)
    return ModelFiles(
        {part: taken.path for part, taken in chosen.parts.items()},
        {part: taken.why for part, taken in chosen.parts.items()},
    )


def _in_folder(
    folder: Path,
    model: str,
    given: Mapping[str, str],
    weights: str | None,
    preset: str | None,
    progress: Callable[[Path], None],
) -> ModelFiles:
    """The parts in a folder: by the names of the known layouts, the rest by what the files hold."""
    paths = _parts_in(folder)
    if not _TRANSFORMERS & (paths.keys() | given.keys()):
        # ComfyUI's folder `vae` holds everybody's: without a transformer in its place this is none of these layouts.
        paths = {part: path for part, path in paths.items() if part == "tokenizer"}
    reasons: dict[str, str] = {}
    have = paths.keys() | given.keys()
    if not {"vae", "text"} <= have or not ("single" in have or {"high", "low"} <= have):
        library = _scan([Place(folder, folder.name)], progress)
        models = possible_models(library.entries)
        if len(models) > 1 and not have & _TRANSFORMERS:
            raise UsageError(
                f"{len(models)} models lie here: {', '.join(models)}",
                where=str(folder),
                expected="one of them",
                advice=f"choose with --model {models[0]} --models-dir {typed(str(folder))}",
            )
        name = models[0] if models else next((m for m in load_models() if _fits(paths, m, library)), None)
        if name is not None:
            named = [part for part in PARTS if part in have]
            chosen = choose(library.entries, name, given=named, weights=weights, preset=preset)
            paths |= {part: taken.path for part, taken in chosen.parts.items()}
            reasons = {part: taken.why for part, taken in chosen.parts.items()}
    if not paths and not given:
        raise FileError(
            "no part of a Wan model was recognised here",
            where=model,
            expected="high_noise_model/ and low_noise_model/, or transformer/, with vae and text encoder",
            advice="name the files: --high/--low (or --transformer), --vae, --text-encoder",
        )
    return ModelFiles(paths, reasons)


def _is_complete(model: str, given: Mapping[str, str]) -> bool:
    """Whether every part was named: then nothing is looked for. A tokenizer may be inside the text encoder."""
    optional = {"tokenizer"} | ({"high", "low"} if "single" in given else set())
    return set(needed_parts(load_models()[model])) - optional <= given.keys()


def _fits(paths: Mapping[str, str], model: str, library: Library) -> bool:
    """Whether a transformer that was found by its place is one of `model`."""
    mine = tuple(paths[part] for part in ("high", "single") if part in paths)
    return any(
        entry.kind == "dit" and model in entry.models and entry.path.startswith(mine)
        for entry in library.entries
    )


def preset_loras(
    model: str, spec: ModelSpec, files: Mapping[str, str], preset: str, models_dirs: Sequence[str] = ()
) -> dict[str, str]:
    """The LoRAs of a few-step preset for each transformer, "both" for one that serves them all: those that ship with an
    embedded model, else those that are on this machine. Empty where there are none, or the transformers are distilled
    themselves. UsageError if several fit."""
    folder = _embedded(model)
    if folder is not None:
        paths = {e: folder / "loras" / f"{preset}-{e}.safetensors" for e in spec.expert_names()}
        return {expert: str(path) for expert, path in paths.items() if path.exists()}
    if not few_step(preset).loras or any(preset_of_file(Path(path), "dit") for path in files.values()):
        return {}
    names = {
        name
        for name, known in load_models().items()
        if (known.dit, known.experts) == (spec.dit, spec.experts)
    }
    if not names & set(few_step(preset).bases):
        return {}
    return choose_loras(look(models_dirs).entries, names, spec, preset)


def is_embedded(model: str) -> bool:
    """Whether `model` ships inside the package."""
    return _embedded(model) is not None


def is_here(
    model: str,
    models_dirs: Sequence[str] = (),
    progress: Callable[[Path], None] = lambda path: None,
    preset: str | None = None,
) -> bool:
    """Whether every part of `model` can be found without naming a file. UsageError if several sets fit it equally.

    preset: as `find` takes it.
    """
    if is_embedded(model) or model not in load_models():
        return True
    return not choose(look(models_dirs, progress).entries, model, preset=preset).missing


def _embedded(model: str) -> Path | None:
    """The folder of a model that ships inside the package."""
    folder = Path(str(package_files("lowvram") / "assets" / model))
    return folder if model in load_models() and folder.is_dir() else None


def _embedded_parts(model: str) -> dict[str, str]:
    """The parts of a model that ships inside the package; a transformer is never another model's."""
    folder, shared = _embedded(model), _SHARED.get(model)
    assert folder is not None
    rest = {} if shared is None else _embedded_parts(shared)
    return {part: path for part, path in rest.items() if part in ("vae", "text", "tokenizer")} | _parts_in(
        folder
    )


def _folder(model: str) -> Path | None:
    """The folder of `model`; None for a known name that is not embedded."""
    embedded = _embedded(model)
    if embedded is not None:
        return embedded
    names = load_models()
    if model in names:
        return None
    path = user_path(model)
    if path.is_dir():
        return path
    if path.exists():
        raise UsageError(
            "a file, where the folder of a whole model belongs",
            where=f"--model {model}",
            advice=f"use --transformer {typed(model)} (or --high/--low), with --vae and --text-encoder",
        )
    if path.name != model:
        raise UsageError(
            "no such folder", where=f"--model {model}", advice="check the path, or give a known name"
        )
    raise unknown_name("model or folder", model, names, where="--model")


def _parts_in(folder: Path) -> dict[str, str]:
    found = {part: path for part in PARTS if (path := _first(folder, _PLACES[part])) is not None}
    if "low" in found and "high" in found:
        found.pop("single", None)
    else:
        found.pop("high", None)
        found.pop("low", None)
    return found


def _first(folder: Path, places: tuple[str, ...]) -> str | None:
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    for place in places:
        if "/" in place and (folder / place).is_file():
            return str(folder / place)
        for name in names:
            if fnmatchcase(name.lower(), place):
                return str(folder / name)
    return None


def _without_other_transformers(found: Mapping[str, str], given: Mapping[str, str]) -> dict[str, str]:
    """Found parts, without transformers that the given ones replace."""
    out = {"single"} if {"high", "low"} & given.keys() else {"high", "low"} if "single" in given else set()
    return {part: path for part, path in found.items() if part not in out}


def _check_experts(paths: Mapping[str, str], given: Mapping[str, str], force: bool) -> None:
    """Experts in the wrong place give mush without an error, so they are refused before."""
    if {"high", "low"} <= paths.keys() and Path(paths["high"]).samefile(paths["low"]):
        return  # told when they are opened
    for part, other in (("high", "low"), ("low", "high")):
        if part in given and not force and expert_of(Path(paths[part])) == other:
            raise UsageError(
                f"the name says that this is the {other}-noise expert",
                where=f"{FLAGS[part]} {given[part]}",
                expected=f"the {part}-noise expert",
                advice=f"give it with {FLAGS[other]}, or --force if the name is wrong",
            )
    if {"high", "low"} <= paths.keys() and _same_numbers(Path(paths["high"]), Path(paths["low"])):
        raise UsageError(
            "both experts hold the same numbers",
            where=f"{paths['high']} and {paths['low']}",
            expected="the high-noise and the low-noise expert",
            advice="check --high and --low: one is a copy of the other",
        )


def _same_numbers(first: Path, second: Path) -> bool:
    """Whether two files are copies, from samples of their bytes. Holes and zeros prove nothing, and neither does an index:
    it names the tensors, which both experts have."""
    if not (first.is_file() and second.is_file()) or first.name.endswith(INDEX_SUFFIX):
        return False
    with FileReader(first) as one, FileReader(second) as two:
        if one.size != two.size:
            return False
        step = one.size // _SAMPLES
        told = False
        for offset in range(step // 2, one.size, max(1, step)):
            sample = one.read_at(offset, _SAMPLE_BYTES)
            if sample != two.read_at(offset, _SAMPLE_BYTES):
                return False
            told |= any(sample)
        return told
