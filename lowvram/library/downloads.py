"""Which published files a model is made of, for those who do not have them yet."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.resources import files

from lowvram.errors import UsageError
from lowvram.sampling.presets import unknown_name

_SETTINGS = frozenset({"vae"})


@dataclass(frozen=True, slots=True)
class Download:
    """A file of a Hub repository."""

    part: str
    repository: str
    name: str
    """Its path in the repository."""


def downloads(
    model: str, parts: Iterable[str], weights: str | None = None, text: str = "fp8"
) -> list[Download]:
    """The files for these parts of `model`.

    weights  encoding of the transformers; None for the model's first
    text     "fp8" or "fp16"

    UsageError for a model or an encoding that no file is known of.
    """
    table = tomllib.loads(files("lowvram").joinpath("presets", "downloads.toml").read_text(encoding="utf-8"))
    if model not in table["model"]:
        raise unknown_name("model to fetch", model, table["model"], where="lowvram models pull")
    own = table["model"][model]
    encodings = [name for name in own if name not in _SETTINGS]
    if weights is not None and weights not in encodings:
        raise UsageError(
            f"no file of {model} in {weights} is known",
            where="--weights",
            expected=", ".join(encodings),
            advice="choose one of these, or fetch the file yourself and name its folder with --models-dir",
        )
    sources = own[weights or encodings[0]] | {
        "vae": table["shared"]["vae"][own["vae"]],
        "text": table["shared"]["text"][text],
        "tokenizer": table["shared"]["tokenizer"]["umt5-xxl"],
        "clip": table["shared"]["clip"]["vit-h"],
    }
    found = [(part, sources[part].partition(":")) for part in parts if part in sources]
    return [Download(part, repository, name) for part, (repository, _, name) in found]
