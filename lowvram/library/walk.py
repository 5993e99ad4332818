"""Folders -> the checkpoints in them, without opening one: a bounded walk that cannot loop.

A checkpoint is a single file, or an index with its shards, or numbered shards without an index.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from lowvram.errors import LowvramError
from lowvram.library.places import Place
from lowvram.offload.io import FileReader

MAX_DEPTH = 12
MAX_ENTRIES = 200_000
"""Files and folders looked at in one place."""

INDEX_SUFFIX = ".safetensors.index.json"
WEIGHTS = (".safetensors", ".sft", ".gguf")
PICKLES = (".pth", ".pt", ".ckpt", ".bin")
TOKENIZER = "spiece.model"
_PICKLE_NAME = re.compile(r"wan|umt5|xlm-roberta|relighting", re.IGNORECASE)
"""Of pickles only those that can be parts of a Wan model are told: other tools keep thousands."""
_SHARD = re.compile(r"(?P<stem>.+)-\d{3,6}-of-(?P<count>\d{3,6})\.(safetensors|sft|gguf)", re.ASCII)
_SKIPPED = frozenset(
    {
        "blobs", "refs", ".locks", ".no_exist", ".cache", ".git", "__pycache__", "node_modules", "site-packages",
        "venv", ".venv", "python_embeded", "custom_nodes", "output", "temp",
    }
)  # fmt: skip
_HUB_OTHERS = ("datasets--", "spaces--")

ScanDir = Callable[[Path], AbstractContextManager[Iterator["os.DirEntry[str]"]]]


@dataclass(frozen=True, slots=True)
class Found:
    """A checkpoint, or a file that is part of a model otherwise."""

    path: Path
    """What to open: the file, the index, or the folder of numbered shards."""
    files: tuple[Path, ...]
    """Everything it is made of, an index included."""
    first_of_two: bool = False
    """Whether it is diffusers' `transformer` beside a `transformer_2`."""


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A folder that could not be looked through, wholly or in part."""

    folder: Path
    why: str


def walk(place: Place, scandir: ScanDir = os.scandir) -> Iterator[Found | Unreadable]:
    """The checkpoints under a place, folder by folder in order of names.

    Links are followed, every folder is entered once. Folders that may not be read are told and passed over, and so is
    what lies deeper than MAX_DEPTH or behind MAX_ENTRIES.
    """
    seen: set[tuple[int, int]] = set()
    left = MAX_ENTRIES
    waiting = [(place.folder, 0)]
    while waiting:
        folder, depth = waiting.pop()
        try:
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            with scandir(folder) as listing:
                names = {}
                for entry in listing:
                    left -= 1
                    if left < 0:
                        yield Unreadable(
                            folder, f"more than {MAX_ENTRIES:,} files: the rest was not looked at"
                        )
                        return
                    names[entry.name] = _is_folder(entry)
        except OSError as error:
            yield Unreadable(folder, error.strerror or str(error))
            continue
        yield from _checkpoints(folder, sorted(name for name, is_dir in names.items() if not is_dir))
        inner = sorted((name for name, is_dir in names.items() if is_dir and _is_entered(name)), reverse=True)
        if inner and depth == MAX_DEPTH:
            yield Unreadable(folder, f"folders more than {MAX_DEPTH} levels deep were not looked at")
        else:
            waiting += [(folder / name, depth + 1) for name in inner]


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False  # a link that leads to itself, or to a disk that is gone


def _is_entered(name: str) -> bool:
    return name.lower() not in _SKIPPED and not name.startswith(_HUB_OTHERS)


def _checkpoints(folder: Path, names: list[str]) -> Iterator[Found]:
    first = folder.name == "transformer" and (folder.parent / "transformer_2").is_dir()
    taken: set[str] = set()
    for name in names:
        if name.endswith(INDEX_SUFFIX):
            shards = _shards(folder / name)
            taken.update(shards)
            yield Found(folder / name, (folder / name, *(folder / shard for shard in shards)), first)
    numbered: dict[str, list[str]] = {}
    for name in names:
        match = _SHARD.fullmatch(name)
        if match and int(match["count"]) > 1 and name not in taken:
            numbered.setdefault(match["stem"], []).append(name)
    alone = [name for name in names if name.lower().endswith(WEIGHTS) and name not in taken]
    for shards in numbered.values():
        # Only a folder that holds nothing else can be opened without an index.
        whole = len(shards) == len(alone)
        yield Found(folder if whole else folder / shards[0], tuple(folder / shard for shard in shards), first)
        taken.update(shards)
    for name in names:
        lower = name.lower()
        known = lower.endswith(WEIGHTS) or lower == TOKENIZER
        if name not in taken and (known or (lower.endswith(PICKLES) and _PICKLE_NAME.search(name))):
            yield Found(folder / name, (folder / name,), first)


def _shards(index: Path) -> list[str]:
    """Names of the files an index points to; none if it cannot be read, which opening it will tell."""
    from lowvram.quant.files.shards import read_index

    try:
        with FileReader(index) as reader:
            return sorted(set(read_index(reader).values()))
    except (LowvramError, OSError):
        return []
