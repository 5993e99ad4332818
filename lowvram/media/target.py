"""The file that a job is to make: its name, those of what is made beside it, and who may write them."""

from __future__ import annotations

import os
import tempfile
from contextlib import AbstractContextManager
from pathlib import Path

from lowvram.errors import StorageError, UsageError
from lowvram.offload.locks import holding


def partial_path(target: Path) -> Path:
    """Where frames go until the video is whole: `a/b.mp4` -> `a/b.partial.mp4`."""
    return target.with_name(f"{target.stem}.partial{target.suffix}")


def finishing_path(target: Path) -> Path:
    """Where the finished file is made before it takes the target's name."""
    return target.with_name(f"{target.stem}.finishing{target.suffix}")


def check_target(path: Path, overwrite: bool, suffix: str = ".mp4") -> None:
    """Everything about the output that can be known before a job starts.

    Raises UsageError for a name that does not end in `suffix` or is that of another job's unfinished video, a folder that
    does not exist, or an existing file unless `overwrite`; StorageError if no file can be made in the folder.
    """
    if path.suffix.lower() != suffix:
        raise UsageError(
            f"the output is no {suffix} file", where=str(path), advice=f"give a name that ends in {suffix}"
        )
    if path.stem.endswith((".partial", ".finishing")):
        raise UsageError(
            "this is what unfinished videos are called", where=str(path), advice="choose another name"
        )
    if path.is_dir():
        raise UsageError("the output is a folder", where=str(path), advice="give a file name inside it")
    if not path.parent.is_dir():
        raise UsageError(
            "the folder of the output does not exist",
            where=str(path.parent),
            advice="make the folder, or choose another output",
        )
    if path.exists() and not overwrite:
        raise UsageError(
            "the output exists already", where=str(path), advice="choose another name, or add --overwrite"
        )
    check_place(path)


def check_place(path: Path) -> None:
    """StorageError if no file like `path` can be made in its folder: tried, because permission bits do not tell."""
    try:
        # As long as the longest name that will be needed, so that a name too long is met now.
        handle, name = tempfile.mkstemp(prefix=f"{path.stem}.check-", suffix=path.suffix, dir=path.parent)
        os.close(handle)
        os.unlink(name)
    except OSError as error:
        raise StorageError(
            f"no file can be made here ({error.strerror})",
            where=str(path.parent),
            advice="choose a folder that you may write to, with free space",
        ) from error


def reserved(target: Path) -> AbstractContextManager[None]:
    """Reserve an output, and what is made beside it, until the block ends. BusyError if another job has reserved it.

    Two jobs that made one video would cut off each other's frames. The folder of `target` must be there.
    """
    return holding(
        target.with_name(f".{target.name}.lock"),
        "making this file",
        where=str(target),
        advice="choose another name with -o, or wait until it is made",
    )
