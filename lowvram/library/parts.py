"""What a model is made of, and what its parts are called."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Mapping

PARTS = ("high", "low", "single", "vae", "text", "clip", "tokenizer")
PART_NAMES: Mapping[str, str] = {
    "high": "high-noise transformer",
    "low": "low-noise transformer",
    "single": "transformer",
    "vae": "VAE",
    "text": "text encoder",
    "clip": "CLIP vision encoder",
    "tokenizer": "tokenizer",
}
FLAGS: Mapping[str, str] = {
    "high": "--high",
    "low": "--low",
    "single": "--transformer",
    "vae": "--vae",
    "text": "--text-encoder",
    "clip": "--clip",
    "tokenizer": "--tokenizer",
}
"""What a person gives a part with."""


def typed(path: str) -> str:
    """A path as it is typed on a command line: in quotes where a shell would take it apart."""
    if re.fullmatch(r"[\w@%+=:,./\\~-]+", path):
        return path
    if sys.platform == "win32" or not set('"$`\\!') & set(path):
        return f'"{path}"'
    return shlex.quote(path)
