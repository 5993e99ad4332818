"""JSON from strangers: read member by member, so that nothing is built before it is known to be wanted.

A general parser builds whatever it meets, and a few megabytes of brackets become gigabytes of objects. Here the
caller walks the members it knows; any other value must be small. Duplicate keys, NaN, and strings that are not
Unicode are refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import NoReturn

_SPACE = re.compile(r"[ \t\n\r]{0,65536}")


class Malformed(ValueError):
    """Text that is not what it should be. `found` and `expected` are short sentences for an error message."""

    def __init__(self, found: str, expected: str = "") -> None:
        self.found, self.expected = found, expected
        super().__init__(found)


def unique_object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A dict of JSON members; Malformed if a key comes twice."""
    members = dict(pairs)
    if len(members) != len(pairs):
        raise Malformed("an object that names a key twice")
    return members


def _no_constant(name: str) -> NoReturn:
    raise Malformed(f"the value {name}, which JSON does not have")


_DECODER = json.JSONDecoder(object_pairs_hook=unique_object, parse_constant=_no_constant)


class Scanner:
    """A position in a JSON text. Every method starts at the position and moves it past what it read."""

    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0

    def take(self, char: str) -> bool:
        """Whether the next character is `char`; if so it is passed."""
        self._skip_space()
        found = self.text.startswith(char, self.at)
        self.at += found
        return found

    def expect(self, char: str) -> None:
        if not self.take(char):
            met = self.text[self.at : self.at + 1]
            raise Malformed(f"{ascii(met) if met else 'the end'} at character {self.at}", ascii(char))

    def string(self) -> str:
        self._skip_space()
        if not self.text.startswith('"', self.at):
            self.expect('"')
        start = self.at
        value = self._decode(self.text, start)
        if not isinstance(value, str):
            raise Malformed(f"no string at character {start}")
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError:
                raise Malformed(f"a string at character {start} that is not Unicode text") from None
        return value

    def members(self) -> Iterator[str]:
        """The keys of an object; the caller must read each value before asking for the next key."""
        self.expect("{")
        if self.take("}"):
            return
        while True:
            key = self.string()
            self.expect(":")
            yield key
            if self.take("}"):
                return
            self.expect(",")

    def small_value(self, limit: int) -> object:
        """Any value of at most `limit` characters."""
        self._skip_space()
        start = self.at
        value = self._decode(self.text[start : start + limit], 0)
        self.at += start
        return value

    def end(self) -> None:
        """Only white space may follow."""
        self._skip_space()
        if self.at != len(self.text):
            raise Malformed(f"more text after the object, at character {self.at}")

    def _skip_space(self) -> None:
        space = _SPACE.match(self.text, self.at)
        self.at = space.end() if space else self.at

    def _decode(self, text: str, at: int) -> object:
        try:
            value, self.at = _DECODER.raw_decode(text, at)
        except Malformed:
            raise
        except (ValueError, RecursionError):
            raise Malformed(
                f"a value that is not JSON, too long or too deep, at character {self.at}"
            ) from None
        return value
