"""What was learned of files, remembered until they change: headers are read once, hashes are computed once.

A record holds as long as every file of the checkpoint has the size and the time of change it had. A cache that cannot
be read or written costs time and nothing else.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from lowvram import __version__
from lowvram.errors import LowvramError
from lowvram.folders import cache_folder
from lowvram.library.entries import Entry
from lowvram.offload.io import read_small_text, write_atomic

MAX_CACHE_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Stamp:
    """What tells a file from a changed one."""

    name: str
    nbytes: int
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class Record:
    """What is in a checkpoint with these files."""

    stamps: tuple[Stamp, ...]
    entries: tuple[Entry, ...]


@dataclass(frozen=True, slots=True)
class Hashed:
    """The sha256 of a file that had this stamp."""

    stamp: Stamp
    sha256: str


@dataclass(slots=True)
class Cache:
    """Records by path. One thread at a time may add to it, while others look things up."""

    version: str = __version__
    records: dict[str, Record] = field(default_factory=dict)
    hashes: dict[str, Hashed] = field(default_factory=dict)

    def entries(self, path: Path, stamps: tuple[Stamp, ...]) -> tuple[Entry, ...] | None:
        """What is known of a checkpoint; None if nothing is, or if it changed since."""
        record = self.records.get(_key(path))
        return record.entries if record is not None and record.stamps == stamps else None

    def keep(self, path: Path, stamps: tuple[Stamp, ...], entries: tuple[Entry, ...]) -> None:
        self.records[_key(path)] = Record(stamps, entries)

    def sha256(self, path: Path, stamp: Stamp) -> str:
        """The hash of a file; empty if it was never computed, or if the file changed since."""
        hashed = self.hashes.get(_key(path))
        return hashed.sha256 if hashed is not None and hashed.stamp == stamp else ""

    def keep_sha256(self, path: Path, stamp: Stamp, sha256: str) -> None:
        self.hashes[_key(path)] = Hashed(stamp, sha256)


def _key(path: Path) -> str:
    """A path from wherever it is looked at."""
    return str(path.absolute())


def stamp_of(path: Path) -> Stamp:
    """OSError if the file is not there."""
    status = os.stat(path)
    return Stamp(path.name, status.st_size, status.st_mtime_ns)


def models_cache() -> Path:
    """The file that the cache of this user is kept in."""
    return cache_folder() / "models.json"


def load_cache(path: Path) -> Cache:
    """The cache in `path`; an empty one if there is none, or none that this version wrote."""
    try:
        cache = msgspec.json.decode(read_small_text(path, MAX_CACHE_BYTES).encode(), type=Cache, strict=True)
    except (LowvramError, msgspec.DecodeError, OSError):
        return Cache()
    return cache if cache.version == __version__ else Cache(hashes=cache.hashes)


def save_cache(path: Path, cache: Cache) -> None:
    """Write the cache, without what belongs to files that are gone."""
    kept = Cache(
        records={name: r for name, r in cache.records.items() if os.path.exists(name)},
        hashes={name: h for name, h in cache.hashes.items() if os.path.exists(name)},
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, msgspec.json.encode(kept))
    except (LowvramError, OSError):
        return
