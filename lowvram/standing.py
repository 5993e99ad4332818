"""How far the jobs on disk are: told from their folders without reading what is large in them."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lowvram.errors import FileError, StorageError
from lowvram.offload.io import FileReader
from lowvram.quant.files.safetensors import read_header
from lowvram.state import SEGMENT, JobFolder, Saved


@dataclass(frozen=True, slots=True)
class Standing:
    """How far a job is."""

    folder: JobFolder
    saved: Saved | None
    """None if it cannot be read: such a job can only be removed."""
    state: Literal["running", "stopped", "finished", "damaged"]
    step: int
    """Steps that are done, of the segment under way if there are several."""
    segment: int
    """Segments that are done."""
    nbytes: int
    """Of its folder."""
    touched: float
    """When it was last worked on, in seconds since 1970."""

    @property
    def steps(self) -> int:
        """Of the whole denoise, or of one segment."""
        return 0 if self.saved is None else len(self.saved.job.schedule)

    @property
    def segments(self) -> int:
        """More than one in driven videos only."""
        if self.saved is None or self.saved.job.driving is None:
            return 1
        return self.saved.job.driving.segments(self.saved.job.frames)


def standing(folder: JobFolder) -> Standing:
    """How far the job in `folder` is now."""
    saved: Saved | None = None
    with suppress(FileError, StorageError):
        saved = folder.load()
    sizes, times = [0], [0.0]
    for name in os.listdir(folder.path) if folder.path.is_dir() else ():
        with suppress(OSError):  # another process replaces its files meanwhile
            status = os.stat(folder.path / name)
            sizes.append(status.st_size)
            times.append(status.st_mtime)
    begun = _numbers(folder.carried_path).get(SEGMENT, 0)
    state = _numbers(folder.state_path)
    step = state.get("solver.step", 0) if state.get(SEGMENT, 0) == begun else 0
    if saved is not None and (folder.finished or folder.latent_path.exists()):
        step = len(saved.job.schedule)
    said: Literal["running", "stopped", "finished", "damaged"] = "stopped"
    if folder.running:
        said = "running"
    elif saved is None:
        said = "damaged"
    elif folder.finished:
        said = "finished"
    return Standing(folder, saved, said, step, begun, sum(sizes), max(times))


def _numbers(path: Path) -> dict[str, int]:
    """The whole numbers in a file of tensors; none if it is not there, or damaged."""
    for _ in range(3):  # it may be replaced while it is read
        try:
            with FileReader(path) as reader:
                whole = [t for t in read_header(reader).tensors if t.dtype == "I64" and not t.shape]
                return {t.name: int.from_bytes(reader.read_at(t.offset, 8), "little") for t in whole}
        except FileError:
            return {}
        except StorageError:
            continue
    return {}
