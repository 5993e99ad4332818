"""A piece of work in a process of its own, with a limit on its time: it may hang, crash or eat all memory."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of it."""

    result: str
    """The last line of its stdout; empty if it failed."""
    why: str
    """The end of its stderr, or how it ended; empty if it succeeded."""
    seconds: float
    timed_out: bool = False
    so_far: str = ""
    """The last whole line of the stdout of one that failed: what it had found until then."""


def run_module(
    module: str,
    arguments: list[str],
    limit: float | None,
    clock: Callable[[], float] = time.monotonic,
    *,
    apart: bool = True,
) -> Outcome:
    """`python -m module arguments`, killed with all that it started after `limit` seconds.

    apart: False for what a child starts itself, so that who kills the child kills this too.
    """
    began = clock()
    with subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=apart,
    ) as child:
        try:
            out, err = child.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            _kill(child, apart)
            out, err = child.communicate()
            last = err.strip().splitlines()[-1:] or [""]
            why = f"stopped after {limit:.0f} s {last[0]}".strip()
            return Outcome("", why, clock() - began, timed_out=True, so_far=_last_whole(out))
        except BaseException:
            _kill(child, apart)
            raise
    seconds = clock() - began
    lines = out.strip().splitlines()
    if child.returncode == 0 and lines:
        return Outcome(lines[-1], "", seconds)
    return Outcome("", _short(err) or _ended(child.returncode), seconds, so_far=_last_whole(out))


def _last_whole(out: str) -> str:
    """The last line that was written to its end."""
    return (out[: out.rfind("\n") + 1].splitlines() or [""])[-1]


def _ended(code: int) -> str:
    """How a process ended that said nothing."""
    try:
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    except ValueError:
        return f"exit code {code}"


def _kill(child: subprocess.Popen[str], apart: bool) -> None:
    if os.name == "nt" or not apart:
        child.kill()
        return
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:
        child.kill()


def _short(err: str) -> str:
    """The error itself: the last lines that are not indented."""
    lines = [line for line in err.strip().splitlines() if line and not line.startswith((" ", "Traceback"))]
    return " | ".join(lines[-3:])[-600:]
