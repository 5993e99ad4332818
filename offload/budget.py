"""Sizes as people type them, caps, and the ledger that holds a cap before anything is allocated."""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from types import MappingProxyType, TracebackType
from typing import Self

from lowvram.errors import InternalError, OutOfMemoryError, UsageError

_UNITS: Mapping[str, int] = MappingProxyType(
    {
        "b": 1,
        "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
        "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
    }
)  # fmt: skip
_SIZE = re.compile(r"([0-9]{1,18}(?:\.[0-9]{0,18})?|\.[0-9]{1,18})\s*([a-z]*)")
_MAX_BYTES = 2**63 - 1
_BARE_BYTES = 10**6
"""A number without a unit from here on was probably counted in bytes, below it in GB."""
_NAMED_IN_ERRORS = 3


def parse_bytes(text: str, *, flag: str = "--vram") -> int:
    """Bytes in a size with a unit: "16GB" (10^9), "16GiB" (2^30), "0.5 gb", "64MiB", "512B", in any case.

    A fraction of a byte is cut off. Raises UsageError, with two sizes that can be typed instead, for anything
    else; a number without a unit and a single letter ("16G") are refused because both readings are common.
    """
    match = _SIZE.fullmatch(text.strip().lower())
    if match is None:
        raise _refused(text, flag, "is not a size", "16GB", "16GiB")
    digits, unit = match[1], match[2]
    if unit == "" and Fraction(digits) >= _BARE_BYTES and "." not in digits:
        raise _refused(text, flag, "has no unit", f"{digits}B", format_bytes(int(digits)).replace(" ", ""))
    letter = unit or "g"
    if len(letter) == 1 and letter in "kmgt":
        prefix = letter.upper()
        problem = "does not say 1000s or 1024s" if unit else "has no unit"
        raise _refused(text, flag, problem, f"{digits}{prefix}B", f"{digits}{prefix}iB")
    if unit not in _UNITS:
        raise _refused(text, flag, f"has the unknown unit {unit!r}", f"{digits}GB", f"{digits}GiB")
    nbytes = int(Fraction(digits) * _UNITS[unit])
    if nbytes < 1:
        raise _refused(text, flag, "is less than one byte", "16GB", "16GiB")
    if nbytes > _MAX_BYTES:
        raise _refused(text, flag, "is larger than any memory", "16GB", "16GiB")
    return nbytes


def _refused(text: str, flag: str, problem: str, first: str, second: str) -> UsageError:
    shown = text if len(text) <= 40 else text[:37] + "..."
    return UsageError(
        f"{shown!r} {problem}",
        where=flag,
        expected="a size with a unit: GB is 1000^3 bytes, GiB is 1024^3",
        advice=f"write {flag} {first} or {flag} {second}",
    )


def format_bytes(nbytes: int) -> str:
    """`nbytes` in decimal units with three significant digits: "16.0 GB", "350 MB", "999 B"."""
    if nbytes < 0:
        return "-" + format_bytes(-nbytes)
    if nbytes < 1000:
        return f"{nbytes} B"
    for unit, size in (("KB", 10**3), ("MB", 10**6), ("GB", 10**9), ("TB", 10**12)):
        value = nbytes / size
        # 999.5 would round to four digits: the next unit takes it.
        if value < 999.5 or unit == "TB":
            digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
            return f"{value:.{digits}f} {unit}"
    raise InternalError("a size fits no unit", advice="report this")


def exact_size(nbytes: int) -> int:
    """`nbytes`: an allocator that does not round."""
    return nbytes


def allocated_size(nbytes: int) -> int:
    """Bytes torch counts as allocated on CUDA for a request: a multiple of 512.

    Source: `round_size` in c10/cuda/CUDACachingAllocator.cpp with kMinBlockSize = 512
    (c10/core/AllocatorConfig.h), with `roundup_power2_divisions` unset, as is the default.
    """
    return -(-nbytes // 512) * 512


def segment_size(nbytes: int) -> int:
    """Bytes torch takes from CUDA for one long-lived buffer: whole 2 MiB from 10 MiB on, else `allocated_size`.

    Source: `get_allocation_size` in c10/cuda/CUDACachingAllocator.cpp with kMinLargeAlloc = 10 MiB and
    kRoundLarge = 2 MiB. Smaller requests share segments (2 MiB for those up to 1 MiB, 20 MiB for the others),
    so the last one may cost up to a segment more.
    """
    if nbytes >= 10 * 2**20:
        return -(-nbytes // 2**21) * 2**21
    return allocated_size(nbytes)


@dataclass(frozen=True, slots=True)
class Budget:
    """Hard caps on the whole job."""

    vram: int
    """Bytes on the device: weights, activations, context, everything."""
    ram: int
    """Bytes on the host, pinned memory included."""

    def __post_init__(self) -> None:
        if self.vram < 1 or self.ram < 1:
            raise UsageError(
                f"a budget of {self.vram} bytes VRAM and {self.ram} bytes RAM",
                expected="at least one byte of each",
                advice="give both caps, for example --vram 16GB --ram 24GB",
            )


class Claim:
    """Bytes taken from a ledger under a name, until released; a context manager."""

    __slots__ = ("_ledger", "name", "nbytes")

    def __init__(self, ledger: Ledger, name: str, nbytes: int) -> None:
        self._ledger: Ledger | None = ledger
        self.name, self.nbytes = name, nbytes

    def release(self) -> None:
        """Give the bytes back; calling it again does nothing."""
        ledger, self._ledger = self._ledger, None
        if ledger is not None:
            ledger._release(self.name)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class Ledger:
    """Named claims against a cap. Claiming comes before allocating, so the cap is never passed.

    cap   bytes, or None to count without a limit
    what  what is counted, for errors: "VRAM", "RAM"
    Safe to use from several threads.
    """

    def __init__(self, cap: int | None, what: str) -> None:
        self.cap, self.what = cap, what
        self._lock = threading.Lock()
        self._claims: dict[str, int] = {}
        self._used = 0
        self._peak = 0
        self._peak_claims: dict[str, int] = {}

    def claim(self, name: str, nbytes: int) -> Claim:
        """Take `nbytes` (0 or more) under `name`, which no live claim may have.

        Raises OutOfMemoryError, and takes nothing, if the cap leaves no room.
        """
        if nbytes < 0:
            raise InternalError(
                f"a claim of {nbytes} bytes", where=f"{self.what} {name}", advice="report this"
            )
        with self._lock:
            if name in self._claims:
                raise InternalError("claimed twice", where=f"{self.what} {name}", advice="report this")
            if self.cap is not None and self._used + nbytes > self.cap:
                raise self._no_room(name, nbytes, self.cap)
            self._claims[name] = nbytes
            self._used += nbytes
            if self._used > self._peak:
                self._peak, self._peak_claims = self._used, dict(self._claims)
        return Claim(self, name, nbytes)

    def _release(self, name: str) -> None:
        with self._lock:
            self._used -= self._claims.pop(name)

    def _no_room(self, name: str, nbytes: int, cap: int) -> OutOfMemoryError:
        largest = sorted(self._claims.items(), key=lambda item: -item[1])[:_NAMED_IN_ERRORS]
        beside = ", ".join(f"{other} {format_bytes(size)}" for other, size in largest)
        room = f"at most {format_bytes(cap - self._used)} of the cap of {format_bytes(cap)}"
        return OutOfMemoryError(
            f"{name} needs {format_bytes(nbytes)}, {format_bytes(self._used + nbytes - cap)} too much",
            where=self.what,
            expected=f"{room}, beside {beside}" if beside else room,
            advice="raise the cap, or ask `lowvram plan` for settings that fit it",
        )

    @property
    def used(self) -> int:
        """Bytes claimed now."""
        return self._used

    @property
    def room(self) -> int | None:
        """Bytes that may still be claimed; None without a cap."""
        return None if self.cap is None else self.cap - self._used

    @property
    def peak(self) -> int:
        """The most bytes that were ever claimed at once."""
        return self._peak

    @property
    def claims(self) -> dict[str, int]:
        """Bytes by name, now."""
        with self._lock:
            return dict(self._claims)

    @property
    def peak_claims(self) -> dict[str, int]:
        """Bytes by name, at the moment of `peak`."""
        with self._lock:
            return dict(self._peak_claims)
