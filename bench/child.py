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


def run_module(
    module: str, arguments: list[str], limit: float, clock: Callable[[], float] = time.monotonic
) -> Outcome:
    """`python -m module arguments`, killed with all that it started after `limit` seconds."""
    began = clock()
    with subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as child:
        try:
            out, err = child.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            _kill(child)
            out, err = child.communicate()
            last = err.strip().splitlines()[-1:] or [""]
            return Outcome(
                "", f"stopped after {limit:.0f} s {last[0]}".strip(), clock() - began, timed_out=True
            )
        except BaseException:
            _kill(child)
            raise
    seconds = clock() - began
    lines = out.strip().splitlines()
    if child.returncode == 0 and lines:
        return Outcome(lines[-1], "", seconds)
    return Outcome("", _short(err) or f"exit code {child.returncode}", seconds)


def _kill(child: subprocess.Popen[str]) -> None:
    if os.name == "nt":
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
