"""Settings of a job as they were asked for, before they are settled: what they name on this machine is looked at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lowvram import discovery
from lowvram.errors import UsageError
from lowvram.job import LoraChoice
from lowvram.media.picture import open_picture
from lowvram.model import Model
from lowvram.offload.io import user_path
from lowvram.sampling.presets import few_step


def with_files(settings: dict[str, Any]) -> dict[str, Any]:
    """Paths of pictures become what their headers say, those of LoRAs a choice for both experts at full strength."""
    paths = {name: settings[name] for name in ("image", "last_image") if settings.get(name) is not None}
    found: dict[str, Any] = {name: open_picture(user_path(path)) for name, path in paths.items()}
    if loras := settings.get("loras"):
        several = (loras,) if isinstance(loras, str | Path | LoraChoice) else loras
        found["loras"] = tuple(
            each if isinstance(each, LoraChoice) else LoraChoice(path=str(user_path(each).absolute()))
            for each in several
        )
    return settings | found


def with_preset_loras(
    model: Model, files: Mapping[str, str], models_dirs: Sequence[str], settings: dict[str, Any]
) -> dict[str, Any]:
    """A preset brings its LoRAs: those that ship inside, or those that are on this machine."""
    preset = settings.get("preset")
    if preset is None or settings.get("loras"):
        return settings
    paths = discovery.preset_loras(model.name, model.spec, files, preset, models_dirs)
    strength = few_step(preset).strength
    loras = tuple(LoraChoice(path=path, expert=expert, strength=strength) for expert, path in paths.items())
    return settings | {"loras": loras}


def check_used(model: Model, given: Mapping[str, str]) -> None:
    """UsageError for a file that the model has no use for."""
    if given.get("clip") and not model.spec.dit.image_tokens:
        raise UsageError(
            "a CLIP vision encoder for a model that has no use for it",
            where=f"--clip {given['clip']}",
            advice="leave --clip out, or name the model that you mean",
        )
