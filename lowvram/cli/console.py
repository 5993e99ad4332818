"""What the command line says, and where: results on stdout, everything for people on stderr.

Nothing here decides anything about a job. A reader that goes away (`lowvram ... | head`) never stops a job.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TextIO

from lowvram.errors import LowvramError, OutOfMemoryError, StorageError

INTERRUPTED, TERMINATED, BUG = 130, 143, 70

# ---- plain output


def open_streams() -> None:
    """Give a process that was started without stdout or stderr (`>&-`, Windows' pythonw) ones that nobody reads."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 as long as the process


def emit(text: str) -> None:
    """A result: `text` and a newline on stdout, at once. Raises StorageError if stdout is a file on a full disk."""
    try:
        _write(sys.stdout, text)
    except OSError as error:
        raise StorageError(
            f"the result could not be written ({error.strerror})",
            where="stdout",
            advice="free space where the output goes",
        ) from error


def emit_json(obj: Mapping[str, object]) -> None:
    """A result for programs: one object on one line of stdout, ASCII, at once.

    Raises ValueError for NaN or infinity, which JSON does not have.
    """
    emit(json.dumps(obj, allow_nan=False, separators=(",", ":")))


def say(text: str) -> None:
    """A line for people, on stderr. A log that cannot be written is no reason to stop a job."""
    with suppress(OSError):
        _write(sys.stderr, text)


def _write(stream: TextIO, text: str) -> None:
    try:
        try:
            stream.write(f"{text}\n")
        except UnicodeEncodeError:
            encoding = stream.encoding or "ascii"
            stream.write(f"{text.encode(encoding, 'backslashreplace').decode(encoding)}\n")
        stream.flush()
    except OSError as error:
        # Windows reports a pipe without a reader as an invalid argument.
        if not isinstance(error, BrokenPipeError) and error.errno != errno.EINVAL:
            raise
        # What is still buffered has to go somewhere, or the interpreter complains once more as it exits.
        with open(os.devnull, "w", encoding="ascii") as nowhere:
            os.dup2(nowhere.fileno(), stream.fileno())


# ---- errors


class Terminated(KeyboardInterrupt):
    """SIGTERM. What saves the state on Ctrl-C saves it on this too."""


@contextmanager
def sigterm_raises() -> Iterator[None]:
    """Inside the block SIGTERM raises Terminated in the main thread. Only the main thread may enter it."""

    def handle(number: int, frame: FrameType | None) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def explain(error: BaseException) -> tuple[int, tuple[str, ...]]:
    """Exit code and at most three lines for people, free of control characters."""
    lines: Sequence[str]
    match error:
        case LowvramError():
            first = f"{error.where}: {error.found}" if error.where else error.found
            expected = [f"expected {error.expected}"] if error.expected else []
            code, lines = error.exit_code, [first, *expected, error.advice]
        case Terminated():
            code, lines = TERMINATED, [str(error) or "terminated"]
        case KeyboardInterrupt():
            code, lines = INTERRUPTED, [str(error) or "interrupted"]
        case MemoryError():
            code = OutOfMemoryError.exit_code
            lines = ["the system has no RAM left", "close other programs, or give a smaller --ram"]
        case OSError() if error.filename and error.strerror:
            code = StorageError.exit_code
            lines = [f"{error.filename}: {error.strerror}", "check the path and its permissions"]
        case _:
            what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            code, lines = BUG, [f"this is a bug in lowvram ({what}); run again with --debug and report it"]
    return code, tuple(one_line(line) for line in lines)


def print_error(error: BaseException, debug: bool) -> int:
    """Tell people about `error` on stderr (traceback first if `debug`) and return the exit code.

    The first line begins with "error: ", the one or two after it are indented by the same width.
    """
    code, lines = explain(error)
    if debug:
        say("".join(traceback.format_exception(error)).rstrip())
    say("\n".join(("error: " if i == 0 else "       ") + line for i, line in enumerate(lines)))
    return code


def error_record(error: BaseException) -> dict[str, object]:
    """The same facts as an object for `emit_json`."""
    code, lines = explain(error)
    return {"schema": "lowvram.error/1", "exit_code": code, "error": lines[0], "details": list(lines[1:])}


def one_line(text: str) -> str:
    """Text fit for one line of a terminal: names from files may hold newlines and terminal commands."""
    line = " ".join(text.split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
