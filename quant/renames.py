"""A bijection between two ways of naming the tensors of a network, made from tables of modules."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

_BLOCK_NUMBER = re.compile(r"0|[1-9]\d{0,3}", re.ASCII)
"""Longer numbers are nobody's: no model has ten thousand blocks."""


@dataclass(frozen=True, slots=True)
class _Table:
    """Renames in one direction: modules, whose parameters keep their own name, and whole tensor names."""

    modules: Mapping[str, str]
    tensors: Mapping[str, str]

    def rename(self, name: str) -> str | None:
        if name in self.tensors:
            return self.tensors[name]
        module, _, parameter = name.rpartition(".")
        if parameter in ("weight", "bias", "gamma") and module in self.modules:
            return f"{self.modules[module]}.{parameter}"
        return None

    def reversed(self) -> _Table:
        back = ({value: key for key, value in table.items()} for table in (self.modules, self.tensors))
        return _Table(*(MappingProxyType(table) for table in back))


@dataclass(frozen=True, slots=True)
class _Direction:
    """Names outside blocks, names inside, and what stands before a block's number on either side."""

    outer: _Table
    inner: _Table
    block: str
    new_block: str

    def rename(self, name: str) -> str | None:
        if self.block and name.startswith(self.block):
            number, _, leaf = name[len(self.block) :].partition(".")
            if leaf and _BLOCK_NUMBER.fullmatch(number):
                renamed = self.inner.rename(leaf)
                return renamed and f"{self.new_block}{number}.{renamed}"
        return self.outer.rename(name)


@dataclass(frozen=True, slots=True)
class Renames:
    """A bijection between native tensor names and those of another style."""

    _from: tuple[_Direction, ...]
    _to: tuple[_Direction, ...]

    @staticmethod
    def of(
        outer: Mapping[str, str], inner: Mapping[str, str], blocks: tuple[str, str], whole: frozenset[str]
    ) -> Renames:
        """From tables native -> other of modules and (those in `whole`) tensors, outside and inside of blocks."""

        def table(renames: Mapping[str, str]) -> _Table:
            split: tuple[dict[str, str], dict[str, str]] = ({}, {})
            for native, other in renames.items():
                split[native in whole][native] = other
            return _Table(MappingProxyType(split[0]), MappingProxyType(split[1]))

        outside, inside = table(outer), table(inner)
        forward = _Direction(outside, inside, *blocks)
        back = _Direction(outside.reversed(), inside.reversed(), blocks[1], blocks[0])
        return Renames((forward,), (back,))

    def __or__(self, other: Renames) -> Renames:
        """Both: the names of either."""
        return Renames(self._from + other._from, self._to + other._to)

    def to_native(self, name: str) -> str | None:
        """The native name of a tensor of the other style; None if the style has no such name."""
        return next((new for each in self._to if (new := each.rename(name))), None)

    def from_native(self, name: str) -> str | None:
        """The other style's name of a native tensor; None if native has no such name."""
        return next((new for each in self._from if (new := each.rename(name))), None)

    def knows_native(self, name: str) -> bool:
        return self.from_native(name) is not None
