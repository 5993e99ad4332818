"""Damaged files of every format are read or refused, never anything else: a few hundred of the mutants of bench/fuzz.py."""

from __future__ import annotations

import importlib.util
import random
import subprocess
import sys
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

    @settings(max_examples=400)
    @given(st.integers(0, 2**32))
    def survives(seed: int) -> None:
        with suppress(FileError):
            parse(fuzz.mutant(start, random.Random(seed), len(start)))

    survives()


@pytest.mark.parametrize("name", ["pickle", "index"])
@settings(max_examples=150)
@given(data=st.binary(max_size=300))
def test_any_bytes_are_read_or_refused(name: str, data: bytes) -> None:
    with suppress(FileError):
        fuzz.TARGETS[name][1](data)


def test_the_guided_fuzzer_runs_where_atheris_is(tmp_path: Path) -> None:
    pytest.importorskip("atheris", reason="atheris is not installed")
    script = Path(__file__).parents[2] / "bench" / "fuzz_guided.py"
    command = [sys.executable, str(script), "index", str(tmp_path / "index"), "--", "-runs=300"]
    done = subprocess.run(command, check=False, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "Done 300 runs" in done.stderr, done.stderr[-2000:]


def test_a_parse_that_is_slow_once_is_timed_again() -> None:
    took = [1.5 * fuzz.SLOW, 0.2 * fuzz.SLOW]
    now = 0.0

    def work() -> None:
        nonlocal now
        now += took.pop(0)

    assert fuzz.seconds(work, clock=lambda: now) == pytest.approx(0.2 * fuzz.SLOW) and not took
