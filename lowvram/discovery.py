"""Where the parts of a model lie.

A model is asked for by name or by a folder in anyone's naming; single files may be given for any part. Found are
paths only: what is in them is read by `lowvram.model`.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from importlib.resources import files as package_files
from pathlib import Path

from lowvram.errors import FileError, UsageError
from lowvram.quant.spec import ModelSpec
from lowvram.sampling.presets import load_models, unknown_name

PARTS = ("high", "low", "single", "vae", "text", "tokenizer")
FLAGS: Mapping[str, str] = {
    "high": "--high",
    "low": "--low",
    "single": "--transformer",
    "vae": "--vae",
    "text": "--text-encoder",
    "tokenizer": "tokenizer",
}
"""What a person gives a part with."""

_PLACES: Mapping[str, tuple[str, ...]] = {
    "high": (
        "high_noise_model",
        "transformer",
        "high_noise_model*",
        "*high*noise*.safetensors",
        "*high*.safetensors",
        "*high*.gguf",
        "*high*noise*.gguf",
        "*high*.gguf",
    ),
    "low": (
        "low_noise_model",
        "transformer_2",
        "low_noise_model*",
        "*low*noise*.safetensors",
        "*low*.safetensors",
        "*low*.gguf",
        "*low*noise*.gguf",
        "*low*.gguf",
    ),
    "single": (
        "transformer",
        "diffusion_pytorch_model.safetensors.index.json",
        "diffusion_pytorch_model*.safetensors",
        "*wan*t2v*.safetensors",
        "*wan*ti2v*.safetensors",
        "*wan*i2v*.safetensors",
        "*wan*t2v*.gguf",
        "*wan*ti2v*.gguf",
    ),
    "vae": ("vae", "*vae*.safetensors", "*vae*.pth"),
    "text": ("text_encoder", "*umt5*.safetensors", "text_encoder*.safetensors", "*umt5*.gguf", "*umt5*.pth"),
    "tokenizer": ("tokenizer/spiece.model", "google/umt5-xxl/spiece.model", "spiece.model"),
}
"""Folders and files of the native, diffusers and ComfyUI layouts, the surest first, in lower case.

The .pth files of the authors' own folders cannot be read, but naming them tells what to look for instead."""


def find(model: str, given: Mapping[str, str] | None = None) -> dict[str, str]:
    """Paths by part of `model`, a name or a folder; `given` files win over found ones.

    Returns absolute paths of every part that was found: "high" and "low" if there are two transformers, else
    "single". A missing part is not an error here, because not every job needs every part. UsageError if `model` is
    neither a known name nor an existing folder; FileError if nothing of it is there.
    """
    chosen = {part: path for part, path in (given or {}).items() if path}
    folder = _folder(model)
    if folder is None and not chosen:
        raise FileError(
            f"no files were given for {model}",
            expected="a folder that holds its parts, or the files themselves",
            advice="give --model FOLDER, or --high/--low (or --transformer), --vae and --text-encoder FILE",
        )
    found = {} if folder is None else _parts_in(folder)
    if "high" in chosen or "low" in chosen:
        found.pop("single", None)
    if "single" in chosen:
        found.pop("high", None)
        found.pop("low", None)
    parts = found | chosen
    for part, path in parts.items():
        if not Path(path).expanduser().exists():
            raise FileError("no such file or folder", where=path, advice=f"check {FLAGS[part]}")
    if not parts:
        raise FileError(
            "no part of a Wan model was recognised here",
            where=model,
            expected="high_noise_model/ and low_noise_model/, or transformer/, with vae and text encoder",
            advice="name the files: --high/--low (or --transformer), --vae, --text-encoder",
        )
    # A job that goes on from another folder must find them again.
    return {part: str(Path(path).expanduser().absolute()) for part, path in parts.items()}


def lora_path(model: str, preset: str, expert: str) -> Path | None:
    """The LoRA file of `expert` that ships with an embedded model for a few-step preset; None if there is none."""
    folder = _embedded(model)
    if folder is None:
        return None
    path = folder / "loras" / f"{preset}-{expert}.safetensors"
    return path if path.exists() else None


def is_here(model: str) -> bool:
    """Whether the files of `model` can be found without naming them."""
    return _embedded(model) is not None or model not in load_models()


def default_spec(model: str) -> ModelSpec | None:
    """The preset of a model asked for by name; None for a path."""
    return load_models().get(model)


def _embedded(model: str) -> Path | None:
    """The folder of a model that ships inside the package."""
    folder = Path(str(package_files("lowvram") / "assets" / model))
    return folder if model in load_models() and folder.is_dir() else None


def _folder(model: str) -> Path | None:
    """The folder of `model`; None for a known name that is not embedded."""
    embedded = _embedded(model)
    if embedded is not None:
        return embedded
    names = load_models()
    if model in names:
        return None
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise UsageError(
            "a file, where the folder of a whole model belongs",
            where=f"--model {model}",
            advice=f"use --transformer {model} (or --high/--low), with --vae and --text-encoder",
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
