"""Damaged files of every format are read or refused, never anything else: a few hundred of the mutants of bench/fuzz.py."""

from __future__ import annotations

import importlib.util
import random
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowvram.errors import FileError

SPEC = importlib.util.spec_from_file_location("fuzz", Path(__file__).parents[2] / "bench" / "fuzz.py")
assert SPEC is not None and SPEC.loader is not None
fuzz = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(fuzz)


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_the_file_that_is_mutated_is_whole(name: str) -> None:
    make, parse = fuzz.TARGETS[name]
    parse(make())


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_a_mutant_is_read_or_refused(name: str) -> None:
    make, parse = fuzz.TARGETS[name]
    start = make()

    @settings(max_examples=150, deadline=None, derandomize=True, database=None)
    @given(st.integers(0, 2**32))
    def survives(seed: int) -> None:
        with suppress(FileError):
            parse(fuzz.mutant(start, random.Random(seed), len(start)))

    survives()


@pytest.mark.parametrize("name", ["pickle", "index"])
@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(data=st.binary(max_size=300))
def test_any_bytes_are_read_or_refused(name: str, data: bytes) -> None:
    with suppress(FileError):
        fuzz.TARGETS[name][1](data)
