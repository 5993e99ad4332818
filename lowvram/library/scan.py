"""Places -> every part of a Wan model in them.

Each place is looked through by its own thread: one that stops answering (a network folder, a disk that spins up) is
given up after a while, told, and delays nobody else.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from lowvram.errors import LowvramError
from lowvram.library.cache import Cache, Stamp, stamp_of
from lowvram.library.entries import Entry, named, read_entries
from lowvram.library.known import stored_hash
from lowvram.library.places import Place
from lowvram.library.walk import Found, ScanDir, Unreadable, walk

PATIENCE = 20.0
"""Seconds without a sign of life after which a place is given up."""


@dataclass(frozen=True, slots=True)
class Library:
    """What was found."""

    entries: tuple[Entry, ...]
    """Parts of Wan models, in the order of the places."""
    places: tuple[Place, ...]
    unreadable: tuple[Unreadable, ...]
    others: int
    """Checkpoints that are no part of a Wan model."""


@dataclass(frozen=True, slots=True)
class _Looking:
    place: int
    path: Path


@dataclass(frozen=True, slots=True)
class _Read:
    place: int
    found: Found
    stamps: tuple[Stamp, ...]
    entries: tuple[Entry, ...]
    identity: tuple[int, int]


@dataclass(frozen=True, slots=True)
class _Missed:
    place: int
    what: Unreadable


@dataclass(frozen=True, slots=True)
class _Done:
    place: int


_Event = _Looking | _Read | _Missed | _Done


def scan(
    places: Iterable[Place],
    cache: Cache,
    progress: Callable[[Path], None] = lambda path: None,
    *,
    patience: float = PATIENCE,
    clock: Callable[[], float] = time.monotonic,
    scandir: ScanDir = os.scandir,
) -> Library:
    """Look through `places`, reading the headers that `cache` does not know yet. The cache is added to, not saved.

    progress  called with every checkpoint whose headers are about to be read
    """
    all_places = tuple(places)
    events: queue.SimpleQueue[_Event] = queue.SimpleQueue()
    for number, place in enumerate(all_places):
        threading.Thread(
            target=_look_through,
            args=(number, place, cache, events, scandir),
            name=f"scan {number}",
            daemon=True,
        ).start()
    heard = {number: clock() for number in range(len(all_places))}
    read: list[_Read] = []
    missed: list[_Missed] = []
    parsing = False
    while heard:
        oldest = min(heard.values())
        try:
            event = events.get(timeout=max(0.01, oldest + patience - clock()))
        except queue.Empty:
            now = clock()
            for number in [n for n, last in heard.items() if now - last >= patience]:
                del heard[number]
                why = f"did not answer for {patience:g} seconds: given up"
                missed.append(_Missed(number, Unreadable(all_places[number].folder, why)))
            continue
        if event.place not in heard:
            continue  # it was given up
        heard[event.place] = clock()
        match event:
            case _Looking(path=path):
                progress(path)
                if not parsing:
                    parsing = True
                    load_parsers()
                    heard = dict.fromkeys(heard, clock())  # places wait for it too, and are not silent
            case _Read():
                # Here and not where it was read: a place that was given up may still answer while the cache is saved.
                cache.keep(event.found.path, event.stamps, event.entries)
                read.append(event)
            case _Missed():
                missed.append(event)
            case _Done():
                del heard[event.place]
    return _library(all_places, read, missed, cache)


def load_parsers() -> None:
    """What reads headers, torch among it: from a slow disk that takes longer than any place may be silent."""
    from lowvram.quant import identify, lora  # noqa: F401 imported where a header is read


def _look_through(
    number: int, place: Place, cache: Cache, events: queue.SimpleQueue[_Event], scandir: ScanDir
) -> None:
    try:
        for found in walk(place, scandir):
            if isinstance(found, Unreadable):
                events.put(_Missed(number, found))
                continue
            try:
                _read(number, found, cache, events)
            except (OSError, LowvramError) as error:
                # Gone or locked since it was listed.
                events.put(_Missed(number, Unreadable(found.path, str(error).splitlines()[0])))
    finally:
        events.put(_Done(number))


def _read(number: int, found: Found, cache: Cache, events: queue.SimpleQueue[_Event]) -> None:
    stamps = tuple(stamp_of(file) for file in found.files)
    status = os.stat(found.path)
    entries = cache.entries(found.path, stamps)
    if entries is None:
        events.put(_Looking(number, found.path))
        entries = read_entries(found.path)
    events.put(_Read(number, found, stamps, entries, (status.st_dev, status.st_ino)))


def _library(places: tuple[Place, ...], read: list[_Read], missed: list[_Missed], cache: Cache) -> Library:
    """Everything in the order of the places and paths; a file that is reached in several ways once."""
    entries: list[Entry] = []
    seen: set[tuple[int, int]] = set()
    others = 0
    for each in sorted(read, key=lambda r: (r.place, str(r.found.path))):
        if each.identity in seen:
            continue
        seen.add(each.identity)
        sha256 = known_hash(each.found.path, cache)
        place = places[each.place]
        for entry in each.entries:
            if is_part(entry):
                entries.append(named(entry, each.found, sha256, place.label))
            else:
                others += 1
    told = tuple(m.what for m in sorted(missed, key=lambda m: (m.place, str(m.what.folder))))
    return Library(tuple(entries), places, told, others)


def known_hash(path: Path, cache: Cache) -> str:
    """The sha256 of a file as far as it is known without reading it; else empty."""
    if stored := stored_hash(path):
        return stored
    try:
        return cache.sha256(path, stamp_of(path))
    except OSError:
        return ""


def is_part(entry: Entry) -> bool:
    """Whether an entry is worth telling: a part of a Wan model, or a broken file that is called like one."""
    if entry.kind == "broken":
        return "wan" in Path(entry.path).name.lower() or "umt5" in Path(entry.path).name.lower()
    return entry.kind != "other"
