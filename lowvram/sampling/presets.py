"""The models and few-step schedules known by name: `lowvram/presets/*.toml` read into specs. Never imports torch."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib.resources import files
from pathlib import PurePath
from typing import Any

from lowvram.errors import UsageError
from lowvram.quant.face_spec import FaceSpec
from lowvram.quant.spec import (
    LATENT_MEAN_21,
    LATENT_MEAN_22,
    LATENT_STD_21,
    LATENT_STD_22,
    ClipSpec,
    DitSpec,
    ModelSpec,
    TextSpec,
    VaeSpec,
)


@dataclass(frozen=True, slots=True)
class FewStep:
    """How a distilled model or LoRA wants to be sampled. `schedules.few_step_schedule` turns it into a Schedule."""

    name: str
    summary: str
    """One line for a person: what it is and who made it."""
    bases: tuple[str, ...]
    """Names of the models it was trained from."""
    solver: str
    """"euler" or "renoise"."""
    steps: int
    shift: float | None
    """Warp of an even grid of noise levels from 1; None where `sigmas` are listed."""
    sigmas: tuple[float, ...] | None
    """Noise levels, falling, one per step, the final 0 left out; already warped."""
    timesteps: tuple[float, ...] | None
    """Times given to the model where they are not simply 1000 * sigma (fractional, never truncated)."""
    guidance: float
    """Guidance scale of both experts. 1: distilled in, one pass per step."""
    boundary: float | None
    """Noise level at which the experts switch, where it is not the model's own."""
    switch_step: int | None
    """First step of the low-noise expert, where the switch goes by step; wins over any boundary."""
    scale_noise: bool
    """Whether the first sample is noise * sigmas[0] instead of unit noise."""
    attention: str
    """Empty, or why dense attention does not give what was trained."""
    loras: tuple[str, ...]
    """Patterns of the names its LoRAs are published under, in lower case; FOLDER/NAME where the folder names it."""
    checkpoints: tuple[str, ...]
    """The same of whole distilled transformers."""
    strength: float
    """How strongly its LoRAs act where nothing else is asked for."""
    source: str
    """Where the numbers come from."""


@dataclass(frozen=True, slots=True)
class PreviewMap:
    """A linear map from a latent's channels to RGB in -1..1, and the sizes of the VAE that it is for."""

    version: str
    decoder_base: int
    z: int
    factors: tuple[tuple[float, float, float], ...]
    """By channel."""
    bias: tuple[float, float, float]
    first_factors: tuple[tuple[float, float, float], ...] = ()
    """Those of the first latent frame, where they are others."""
    first_bias: tuple[float, float, float] = (0.0, 0.0, 0.0)


def preview_maps() -> tuple[PreviewMap, ...]:
    """Every map that is known."""
    return tuple(PreviewMap(**table) for table in _read("previews.toml")["map"])


def load_models() -> dict[str, ModelSpec]:
    """Every named model: its networks' sizes and the defaults of its authors."""
    data = _read("models.toml")
    vaes = {name: _vae(table) for name, table in data["vae"].items()}
    texts = {name: TextSpec(**table) for name, table in data["text"].items()}
    clips = {name: ClipSpec(**table) for name, table in data["clip"].items()}
    return {
        name: _model(table, vaes, texts, clips, data["negative"]) for name, table in data["model"].items()
    }


def model_preset(name: str) -> ModelSpec:
    """The named model. UsageError with the nearest name if there is none."""
    models = load_models()
    if name not in models:
        raise unknown_name("model", name, models, where="--model")
    return models[name]


def load_few_step() -> dict[str, FewStep]:
    """Every named few-step schedule."""
    return {name: _few_step(name, table) for name, table in _read("fewstep.toml").items()}


def few_step(name: str) -> FewStep:
    """The named few-step schedule. UsageError with the nearest name if there is none."""
    presets = load_few_step()
    if name not in presets:
        raise unknown_name("preset", name, presets, where="--preset")
    return presets[name]


def preset_of_file(path: PurePath, kind: str) -> str | None:
    """The few-step preset that a "lora" or a "dit" of this name was made for; None if the name says of none.

    Looks at the file's name and at the folder it lies in.
    """
    names = (path.name.lower(), f"{path.parent.name}/{path.name}".lower())
    for name, preset in load_few_step().items():
        patterns = preset.loras if kind == "lora" else preset.checkpoints
        if any(fnmatchcase(each, pattern) for pattern in patterns for each in names):
            return name
    return None


def unknown_name(kind: str, name: str, known: Iterable[str], *, where: str) -> UsageError:
    """The error for a `kind` that has no `name`: lists the known names and the one most likely meant."""
    names = list(known)
    typed = name.lower()
    # Letter distance alone takes "wan2.2-t2v" for the shorter "wan2.2-ti2v-5b".
    begun = [known_name for known_name in names if typed and known_name.startswith(typed)]
    nearest = begun or difflib.get_close_matches(typed, names, n=1, cutoff=0.5)
    return UsageError(
        f'no {kind} is called "{name}"',
        where=where,
        expected=", ".join(names),
        advice=f'did you mean "{nearest[0]}"?' if nearest else "choose one of these",
    )


def _read(file: str) -> dict[str, Any]:
    """A preset file as nested dictionaries; read through the package so that a zipped install works too."""
    return tomllib.loads(files("lowvram").joinpath("presets", file).read_text(encoding="utf-8"))


def _vae(table: dict[str, Any]) -> VaeSpec:
    """A VaeSpec; statistics not written out are those of Wan's own autoencoder of that version."""
    first = table["version"] == "2.1"
    mean = table.get("mean", LATENT_MEAN_21 if first else LATENT_MEAN_22)
    std = table.get("std", LATENT_STD_21 if first else LATENT_STD_22)
    return VaeSpec(**(table | {"mean": tuple(mean), "std": tuple(std)}))


def _model(
    table: dict[str, Any],
    vaes: dict[str, VaeSpec],
    texts: dict[str, TextSpec],
    clips: dict[str, ClipSpec],
    negatives: dict[str, str],
) -> ModelSpec:
    """A ModelSpec; `vae`, `text`, `clip` and `negative` name shared tables of the same file."""
    high, low = table["guidance"]
    return ModelSpec(
        **(
            table
            | {
                "dit": _dit(table["dit"]),
                "vae": vaes[table["vae"]],
                "text": texts[table["text"]],
                "negative": negatives[table["negative"]],
                "clip": clips[table["clip"]] if "clip" in table else None,
                "guidance": (float(high), float(low)),
            }
        )
    )


def _dit(table: dict[str, Any]) -> DitSpec:
    """A DitSpec; a face branch is a table of its own."""
    if "face" not in table:
        return DitSpec(**table)
    face = table["face"] | {"widths": tuple(table["face"]["widths"])}
    return DitSpec(**(table | {"face": FaceSpec(**face)}))


def _few_step(name: str, table: dict[str, Any]) -> FewStep:
    """A FewStep; what the file leaves out is absent or the common case."""
    sigmas, timesteps = table.get("sigmas"), table.get("timesteps")
    return FewStep(
        name=name,
        summary=table["summary"],
        bases=tuple(table["bases"]),
        solver=table["solver"],
        steps=table["steps"],
        shift=table.get("shift"),
        sigmas=None if sigmas is None else tuple(sigmas),
        timesteps=None if timesteps is None else tuple(timesteps),
        guidance=table.get("guidance", 1.0),
        boundary=table.get("boundary"),
        switch_step=table.get("switch_step"),
        scale_noise=table.get("scale_noise", False),
        attention=table.get("attention", ""),
        loras=tuple(table.get("loras", ())),
        checkpoints=tuple(table.get("checkpoints", ())),
        strength=table.get("strength", 1.0),
        source=table["source"],
    )
