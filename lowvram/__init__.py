"""Wan video diffusion inside a hard memory budget.

    from lowvram import Runtime

    pipe = Runtime(vram="4GB", ram="4GB").load("nano")
    print(pipe.plan("a red circle moves left on a black background").vram)  # bytes
    video = pipe("a red circle moves left on a black background", seed=1)
    video.save("out.mp4")

Runtime      a budget on this machine. `load` finds the files of a model and reads their headers.
Pipeline     a model. `plan` says what a job would take, a call runs it, `job` explains every setting,
             `animate` lets a driving video move a character.
Plan         peak VRAM and RAM of every stage, bytes moved and seconds, before anything is loaded.
Video        a finished latent. `save` writes an mp4, `frames` yields numpy arrays.
Animation    a driven video of any length. `save` makes it and writes an mp4.
Report       what a job took, stage by stage.
Job          all that one video follows from: two equal jobs make the same frames.
LoraChoice   a LoRA file, the expert it acts on and how strongly.

Sizes are bytes, or texts with a unit: "16GB" is 16 * 10**9, "16GiB" is 16 * 2**30. Whatever goes wrong is a LowvramError
that says what was found, where, and what to do: UsageError, FileError, BudgetError, OutOfMemoryError, StorageError,
DeviceLostError, NonFiniteError, BusyError or InternalError.

Importing this needs neither a GPU nor torch; both are touched when a `Runtime` is made.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lowvram.animation import Animation
    from lowvram.api import Pipeline, Runtime, Video
    from lowvram.errors import (
        BudgetError,
        BusyError,
        DeviceLostError,
        FileError,
        InternalError,
        LowvramError,
        NonFiniteError,
        OutOfMemoryError,
        StorageError,
        UsageError,
    )
    from lowvram.job import Job, LoraChoice
    from lowvram.planning.plan import Plan
    from lowvram.report import Report

__version__ = "0.1.0"

__all__ = [
    "Animation",
    "BudgetError",
    "BusyError",
    "DeviceLostError",
    "FileError",
    "InternalError",
    "Job",
    "LoraChoice",
    "LowvramError",
    "NonFiniteError",
    "OutOfMemoryError",
    "Pipeline",
    "Plan",
    "Report",
    "Runtime",
    "StorageError",
    "UsageError",
    "Video",
    "__version__",
]


_MODULES: Mapping[str, str] = {
    "Animation": "animation",
    "Job": "job",
    "LoraChoice": "job",
    "Pipeline": "api",
    "Plan": "planning.plan",
    "Report": "report",
    "Runtime": "api",
    "Video": "api",
}
"""Where public names are defined that are no errors."""


def __getattr__(name: str) -> Any:
    """The public names, imported when first used."""
    if name not in __all__:
        raise AttributeError(f"module 'lowvram' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"lowvram.{_MODULES.get(name, 'errors')}"), name)


def __dir__() -> list[str]:
    return __all__
