"""What is made of something that does not change, once: a search for a plan asks for the same things thousands of times."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

_S = TypeVar("_S")
_T = TypeVar("_T")
_P = ParamSpec("_P")


class Once(Generic[_S]):
    """What pure functions made of `subject`."""

    __slots__ = ("_made", "subject")

    def __init__(self, subject: _S) -> None:
        self.subject = subject
        self._made: dict[tuple[Hashable, ...], Any] = {}

    def __call__(self, make: Callable[Concatenate[_S, _P], _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """`make(subject, *args)`, or what an earlier call returned."""
        assert not kwargs
        what = make, *args
        if what not in self._made:
            self._made[what] = make(self.subject, *args, **kwargs)
        found: _T = self._made[what]
        return found
