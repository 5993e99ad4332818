"""Whether a file is whole and is what was published: every tensor range against its size, every byte against its hash."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from lowvram.errors import LowvramError
from lowvram.library.cache import Cache, stamp_of
from lowvram.library.hashing import file_sha256
from lowvram.library.known import known_file, published_as, stored_hash
from lowvram.library.walk import WEIGHTS
from lowvram.offload.io import FileReader


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was found of one file."""

    path: str
    ok: bool
    sha256: str
    """Empty if the file could not be read to its end."""
    finding: str
    """For people: what it was compared with, or what is wrong."""


def verify(
    path: Path, cache: Cache, progress: Callable[[Path, int, int], None] = lambda path, done, size: None
) -> Iterator[Verdict]:
    """A verdict on every file of the checkpoint at `path`. All of it is read; hashes are remembered in `cache`.

    progress  called with a file, its bytes that were read, and its size
    """
    try:
        files = _files(path)
    except LowvramError as error:
        yield Verdict(str(path), False, "", f"{error.found}; {error.advice}")
        return
    for file in files:
        try:
            stamp = stamp_of(file)
            sha256 = file_sha256(file, lambda done, size, file=file: progress(file, done, size))  # type: ignore[misc]
            cache.keep_sha256(file, stamp, sha256)
        except (LowvramError, OSError) as error:
            yield Verdict(str(file), False, "", str(error).splitlines()[0])
            continue
        yield _judged(file, stamp.nbytes, sha256)


def _files(path: Path) -> list[Path]:
    """The files of a checkpoint, each with a header whose tensors lie inside it; any other file by itself."""
    if path.is_file() and not path.name.lower().endswith((*WEIGHTS, ".json")):
        return [path]
    from lowvram.quant.files.shards import open_checkpoint_files

    # The parsers refuse tensors that overlap, leave the file or leave holes.
    return [header.path for header in open_checkpoint_files(path, FileReader)]


def _judged(file: Path, nbytes: int, sha256: str) -> Verdict:
    known = known_file(sha256)
    if known is not None:
        return Verdict(str(file), True, sha256, f"published as {known.name}")
    stored = stored_hash(file)
    if stored:
        right = stored == sha256
        finding = (
            "what the Hub cache says it is"
            if right
            else f"the Hub cache says sha256 {stored}: fetch it again"
        )
        return Verdict(str(file), right, sha256, finding)
    named = published_as(file.name)
    if named is not None:
        size = (
            f"{nbytes:,} bytes instead of {named.nbytes:,}"
            if named.nbytes not in (0, nbytes)
            else "other contents"
        )
        return Verdict(str(file), False, sha256, f"not the file that was published under this name: {size}")
    return Verdict(str(file), True, sha256, "whole; no published hash of it is known")
