"""Where people keep model files: the folders of other programs, the Hugging Face cache, and what they were told to.

Nothing here reads a model. Every folder is looked for, none is written to.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Thread

import yaml

from lowvram.errors import FileError, LowvramError
from lowvram.offload.io import read_small_text, user_path

MODELS_VARIABLE = "LOWVRAM_MODELS"
"""Folders to look in instead of the usual places, separated as in PATH."""

PATIENCE = 2.0
"""Seconds that a drive may take to say that it is there."""
CACHE_LABEL = "Hugging Face cache"
MAX_YAML_BYTES = 1 << 20
_YAML_NAMES = ("extra_model_paths.yaml", "extra_models_config.yaml")
_WANGP_FOLDERS = ("ckpts", "loras", "loras_i2v")
_WANGP_CONFIG = "wgp_config.json"
_PROGRAMS: Mapping[str, tuple[str, ...]] = {
    "ComfyUI": ("ComfyUI", "comfyui", "ComfyUI_windows_portable/ComfyUI", "ComfyUI-Shared", "comfy/ComfyUI"),
    "SwarmUI": ("SwarmUI", "StableSwarmUI"),
    "Stability Matrix": ("StabilityMatrix", "StabilityMatrix/Data", "StabilityMatrix-win-x64/Data"),
    "WanGP": ("Wan2GP", "WanGP", "pinokio/api/wan.git/app", "pinokio/api/Wan2GP"),
}
"""Folders that a program is installed in, under one of `_parents`."""
_MODEL_FOLDERS = frozenset(
    {
        "diffusionmodels", "unet", "vae", "textencoders", "clip", "clipvision", "lora", "loras", "checkpoints",
        "stablediffusion",
    }
)  # fmt: skip
"""Sub-folders of a program's models, in lower case without punctuation, that may hold parts of a Wan model."""


@dataclass(frozen=True, slots=True)
class Place:
    """A folder to look through."""

    folder: Path
    label: str
    """Whose it is, for people: "ComfyUI", "--models-dir", ..."""


def usual_places(environ: Mapping[str, str], home: Path, drives: Iterable[Path] = ()) -> list[Place]:
    """The folders that are there, the surest first, none twice.

    environ  variables: LOWVRAM_MODELS (then nothing else is looked at), COMFYUI_PATH, HF_HUB_CACHE, HF_HOME, APPDATA, ...
    home     of the user
    drives   roots under which programs may be installed besides the home folder
    """
    told = environ.get(MODELS_VARIABLE)
    if told is not None:
        given = (Place(user_path(each), MODELS_VARIABLE) for each in told.split(os.pathsep) if each)
        return _distinct(given)
    return _distinct(_usual(environ, home, list(drives)))


def machine_drives() -> list[Path]:
    """Roots of this machine where programs are installed outside the home folder, and that answer."""
    if sys.platform == "win32":
        return answering(os.listdrives() if hasattr(os, "listdrives") else ["C:\\"])
    return answering(("/workspace", "/opt", "/data", "/mnt"))


def answering(
    roots: Iterable[str],
    is_dir: Callable[[str], bool] = os.path.isdir,
    join: Callable[[Thread, float], None] = Thread.join,
) -> list[Path]:
    """The roots that are folders and say so within PATIENCE seconds, all asked at once.

    Each is asked for many folders later on, and a network drive whose server is gone takes half a minute for every one.
    """
    there: dict[str, bool] = {}

    def ask(root: str) -> None:
        there[root] = is_dir(root)

    asked = {root: Thread(target=ask, args=(root,), name=f"ask {root}", daemon=True) for root in roots}
    for thread in asked.values():
        thread.start()
    for thread in asked.values():
        join(thread, PATIENCE)
    return [Path(root) for root in asked if there.get(root)]


def given_places(folders: Iterable[str]) -> list[Place]:
    """The folders that --models-dir names, as programs lay them out: a ComfyUI folder stands for its model folders.

    FileError for one that is not there.
    """
    found: list[Place] = []
    for text in folders:
        folder = user_path(text).absolute()
        if not folder.is_dir():
            raise FileError("no such folder", where=text, advice="check --models-dir")
        # A walk enters no custom nodes, so what they hold comes before the folder that they lie in.
        found += [*_tokenizers(folder, "--models-dir"), Place(folder, "--models-dir"), *_yaml_places(folder)]
    return _distinct(found)


def hub_cache(environ: Mapping[str, str], home: Path) -> Path:
    """Where huggingface_hub keeps its files: HF_HUB_CACHE, HF_HOME/hub, or its own default."""
    if cache := environ.get("HF_HUB_CACHE") or environ.get("HUGGINGFACE_HUB_CACHE"):
        return user_path(cache)
    if root := environ.get("HF_HOME"):
        return user_path(root) / "hub"
    base = environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else home / ".cache") / "huggingface" / "hub"


def _usual(environ: Mapping[str, str], home: Path, drives: list[Path]) -> Iterator[Place]:
    parents = _parents(home, drives)
    roots = [(name, root) for name in _PROGRAMS for root in _installed(name, parents, environ)]
    for name, root in roots:
        if name == "ComfyUI":
            yield from _comfy(root)
        elif name == "SwarmUI":
            yield from _inside(root / "Models", name)
            yield from _comfy(root / "dlbackend" / "ComfyUI")
        elif name == "Stability Matrix":
            yield from _inside(root / "Models", name)
            for package in _children(root / "Packages"):
                yield from _comfy(package)
        else:
            yield from _wangp(root)
    yield from _desktop(environ, home)
    cache = hub_cache(environ, home)
    yield Place(cache, CACHE_LABEL)


def _parents(home: Path, drives: list[Path]) -> list[Path]:
    names = ("", "Desktop", "Documents", "Downloads", "AI", "ai", "apps", "git", "src", "code", "projects")
    return [home / name for name in names] + [drive / name for drive in drives for name in ("", "AI", "ai")]


def _installed(program: str, parents: list[Path], environ: Mapping[str, str]) -> Iterator[Path]:
    if program == "ComfyUI" and (told := environ.get("COMFYUI_PATH")):
        yield user_path(told)
    if program == "Stability Matrix" and (data := environ.get("APPDATA")):
        yield Path(data) / "StabilityMatrix"
    for parent in parents:
        for name in _PROGRAMS[program]:
            yield parent / name


def _comfy(root: Path) -> Iterator[Place]:
    if (root / "models").is_dir():
        yield from _inside(root / "models", "ComfyUI")
        yield from _tokenizers(root, "ComfyUI")
    yield from _yaml_places(root)


def _tokenizers(root: Path, label: str) -> Iterator[Place]:
    """Kijai's WanVideoWrapper has UMT5's tokenizer among its code, because his text encoders do not carry it."""
    for node in _children(root / "custom_nodes"):
        yield Place(node / "configs" / "T5_tokenizer", label)


def _wangp(root: Path) -> Iterator[Place]:
    """WanGP's own folders, and those its settings moved the checkpoints to."""
    for name in _WANGP_FOLDERS:
        yield Place(root / name, "WanGP")
    try:
        settings = json.loads(read_small_text(root / _WANGP_CONFIG, MAX_YAML_BYTES))
    except (LowvramError, ValueError, RecursionError):
        return
    paths = settings.get("checkpoints_paths") if isinstance(settings, dict) else None
    for path in paths if isinstance(paths, list) else ():
        if isinstance(path, str) and path not in (".", ""):
            yield Place(root / _expanded(path), "WanGP")


def _desktop(environ: Mapping[str, str], home: Path) -> Iterator[Place]:
    """Comfy Desktop: its settings name the folders, newer ones keep installations of their own."""
    settings = [home / "Library" / "Application Support" / "ComfyUI", home / ".config" / "ComfyUI"]
    if data := environ.get("APPDATA"):
        settings.append(Path(data) / "ComfyUI")
    for folder in settings:
        yield from _yaml_places(folder)
    if local := environ.get("LOCALAPPDATA"):
        desktop = Path(local) / "Comfy-Desktop"
        yield from _comfy(desktop / "ComfyUI-Shared")
        for install in _children(desktop / "ComfyUI-Installs"):
            yield from _comfy(install)
            yield from _comfy(install / "ComfyUI")


def _inside(models: Path, label: str) -> Iterator[Place]:
    """The sub-folders of a program's models that can matter: the others hold other people's gigabytes."""
    for folder in _children(models):
        if re.sub(r"[^a-z]", "", folder.name.lower()) in _MODEL_FOLDERS:
            yield Place(folder, label)


def _yaml_places(root: Path) -> Iterator[Place]:
    for name in _YAML_NAMES:
        path = root / name
        if path.is_file():
            yield from yaml_places(path)


def yaml_places(path: Path) -> list[Place]:
    """The model folders a ComfyUI `extra_model_paths.yaml` names; none if it cannot be read.

    Groups of `category: path`, several paths on the lines of one text, relative to the group's `base_path`, which is
    itself relative to the file. User and variables are expanded, as ComfyUI does.
    """
    try:
        groups = yaml.safe_load(read_small_text(path, MAX_YAML_BYTES))
    except (LowvramError, yaml.YAMLError, RecursionError, ValueError):
        return []
    found = []
    for group in groups.values() if isinstance(groups, dict) else ():
        if not isinstance(group, dict):
            continue
        base = path.parent / _expanded(str(group.get("base_path") or ""))
        for category, text in group.items():
            if not isinstance(text, str) or category in ("base_path", "custom_nodes"):
                continue
            if re.sub(r"[^a-z]", "", str(category).lower()) not in _MODEL_FOLDERS:
                continue
            found += [Place(base / _expanded(line), path.name) for line in text.splitlines() if line.strip()]
    return found


def _expanded(text: str) -> Path:
    # Written on Windows, read under WSL, and the other way round.
    plain = os.path.expandvars(os.path.expanduser(text.strip()))
    return Path(plain if os.name == "nt" else plain.replace("\\", "/"))


def _children(folder: Path) -> list[Path]:
    try:
        return sorted(child for child in folder.iterdir() if child.is_dir())
    except OSError:
        return []


def _distinct(places: Iterable[Place]) -> list[Place]:
    """Those that are folders, without those that are or lie in an earlier one."""
    kept: list[Place] = []
    seen: list[Path] = []
    for place in places:
        try:
            if not place.folder.is_dir():
                continue
            real = place.folder.resolve()
        except OSError:
            continue
        if not any(real == other or other in real.parents for other in seen):
            seen.append(real)
            kept.append(place)
    return kept
