"""Published files known by their sha256: what they were called, and how large they are."""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)


@dataclass(frozen=True, slots=True)
class KnownFile:
    """A file as it was published."""

    name: str
    """With the folder of its repository where that tells an expert."""
    sha256: str
    nbytes: int
    """0 if it is not known."""


def known_files() -> tuple[KnownFile, ...]:
    """Every file of the table."""
    text = files("lowvram").joinpath("presets", "known_files.toml").read_text(encoding="utf-8")
    return tuple(KnownFile(f["name"], f["sha256"], f.get("bytes", 0)) for f in tomllib.loads(text)["file"])


def known_file(sha256: str) -> KnownFile | None:
    """The published file with these contents; None if the table has none, or if the hash is empty: not known."""
    if not sha256:
        return None
    return next((known for known in known_files() if known.sha256 == sha256), None)


def published_as(name: str) -> KnownFile | None:
    """The file that was published under this name; None if the table has none."""
    return next((known for known in known_files() if known.name.lower() == name.lower()), None)


def stored_hash(path: Path) -> str:
    """The sha256 that the Hugging Face cache names its files by; empty if `path` is not a link into it."""
    try:
        real = path.resolve()
    except (OSError, RuntimeError, ValueError):
        return ""
    return real.name if real.parent.name == "blobs" and _SHA256.fullmatch(real.name) else ""
