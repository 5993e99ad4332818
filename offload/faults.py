"""Failures on demand: the fault points of devices and files, so that every error path can be walked."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Literal

FaultKind = Literal["alloc", "host_alloc", "pin", "copy", "read", "short_read", "write"]


@dataclass(frozen=True, slots=True)
class FaultPlan:
    """The `nth` time (from 1) that something of this kind happens it fails, and ever after if `persistent`."""

    kind: FaultKind
    nth: int
    persistent: bool = False


class Faults:
    """Counts what happens and says what fails. One object may serve a device and its files together."""

    def __init__(self, *plans: FaultPlan) -> None:
        self._plans = plans
        self._lock = threading.Lock()
        self._seen: dict[FaultKind, int] = {}
        self._struck = 0

    def strikes(self, kind: FaultKind) -> bool:
        """Count one more of `kind`; True if this one must fail."""
        with self._lock:
            seen = self._seen.get(kind, 0) + 1
            self._seen[kind] = seen
            hit = any(
                plan.kind == kind and (seen == plan.nth or (plan.persistent and seen > plan.nth))
                for plan in self._plans
            )
            self._struck += hit
            return hit

    @property
    def struck(self) -> int:
        """How many failures were made."""
        return self._struck
