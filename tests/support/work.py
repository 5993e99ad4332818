"""How much work something is, counted instead of timed: the same on every machine, however busy it is."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeVar

T = TypeVar("T")


def lines_run(work: Callable[[], T]) -> tuple[T, int]:
    """What `work` returns, and how many lines of Python this thread ran for it.

    What runs in C (json, regular expressions, copies of bytes) counts as the line that calls it: bounds on memory are
    for that.
    """
    count = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal count
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        result = work()
    finally:
        sys.settrace(before)
    return result, count


def fair_share(data: bytes) -> int:
    """Lines of Python that reading a hostile file may run: work grows with what is there, never with what is claimed."""
    return 10_000 + 8 * len(data)
