"""Wan video diffusion inside a hard memory budget.

    from lowvram import Runtime
    video = Runtime(vram="16GB").load("nano")("a red circle moves left on a black background")
    video.save("out.mp4")

Importing this needs neither a GPU nor torch; both are touched when a `Runtime` is made.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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
    from lowvram.job import Job
    from lowvram.planning.plan import Plan

__version__ = "0.1.0"

__all__ = [
    "BudgetError",
    "BusyError",
    "DeviceLostError",
    "FileError",
    "InternalError",
    "Job",
    "LowvramError",
    "NonFiniteError",
    "OutOfMemoryError",
    "Pipeline",
    "Plan",
    "Runtime",
    "StorageError",
    "UsageError",
    "Video",
    "__version__",
]


def __getattr__(name: str) -> Any:
    """The public names, imported when first used."""
    if name not in __all__:
        raise AttributeError(f"module 'lowvram' has no attribute {name!r}")
    from importlib import import_module

    module = {"Pipeline": "api", "Runtime": "api", "Video": "api", "Job": "job", "Plan": "planning.plan"}.get(
        name, "errors"
    )
    return getattr(import_module(f"lowvram.{module}"), name)


def __dir__() -> list[str]:
    return __all__
