"""The console: results and talk go to their streams, errors are short, progress is honest."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys

import pytest

from lowvram.cli import console
from lowvram.cli.console import Terminated
from lowvram.errors import BudgetError, FileError, InternalError, LowvramError

# ---- output


def test_results_go_to_stdout_and_talk_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    console.emit_json({"a": "é\n", "b": [1, 2.5, None]})
    console.emit("done out.mp4")
    console.say("loading")
    out, err = capsys.readouterr()
    first, second = out.splitlines()
    assert json.loads(first) == {"a": "é\n", "b": [1, 2.5, None]} and first.isascii()
    assert (second, err) == ("done out.mp4", "loading\n")


def test_json_never_holds_what_json_has_not() -> None:
    with pytest.raises(ValueError, match="JSON"):
        console.emit_json({"a": float("nan")})


def test_a_terminal_without_the_letters_still_gets_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(raw, encoding="ascii", errors="strict", newline="\n"))
    console.say("кот ok")
    assert raw.getvalue() == b"\\u043a\\u043e\\u0442 ok\n"


def test_a_reader_that_leaves_does_not_stop_the_work() -> None:
    code = (
        "import sys\nfrom lowvram.cli import console\nsys.stdin.read()\n"
        "for i in range(2000): console.emit_json({'i': i})\nconsole.say('finished')"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    child.stdout.close()
    child.stdout = None
    _, err = child.communicate("")
    assert (child.returncode, err) == (0, "finished\n")


def test_importing_the_console_brings_neither_torch_nor_rich() -> None:
    code = (
        "import sys\nimport lowvram.cli.console, lowvram.cli.progress, lowvram.report, lowvram.media.video, lowvram.media.probe\n"
        "print(sorted({'torch', 'rich', 'av', 'typer'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# ---- errors


def every_error(kind: type[LowvramError]) -> list[type[LowvramError]]:
    return [kind, *(each for child in kind.__subclasses__() for each in every_error(child))]


@pytest.mark.parametrize("kind", every_error(LowvramError), ids=lambda kind: kind.__name__)
def test_our_errors_take_three_lines_and_their_own_code(
    kind: type[LowvramError], capsys: pytest.CaptureFixture[str]
) -> None:
    error = kind("found a\nthing", where="x\x1b[2J\u202e.gguf", expected="another", advice="do this")
    assert console.print_error(error, debug=False) == kind.exit_code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "error: x\\x1b[2J\\u202e.gguf: found a thing",
        "       expected another",
        "       do this",
    ]


def test_an_error_without_place_or_expectation_is_shorter(capsys: pytest.CaptureFixture[str]) -> None:
    assert console.print_error(BudgetError("too little", advice="give 8 GB"), debug=False) == 4
    assert capsys.readouterr().err == "error: too little\n       give 8 GB\n"


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (KeyError("x"), 70, "bug in lowvram (KeyError: 'x'); run again with --debug"),
        (AssertionError(), 70, "bug in lowvram (AssertionError); run again with --debug"),
        (RuntimeError("a\nb\nc\nd"), 70, "(RuntimeError: a b c d)"),
        (InternalError("slot reused", advice="report this"), 70, "slot reused"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (KeyboardInterrupt("interrupted; lowvram resume last"), 130, "lowvram resume last"),
        (Terminated(), 143, "terminated"),
        (MemoryError(), 5, "no RAM left"),
        (PermissionError(13, "Permission denied", "/srv/models"), 6, "/srv/models: Permission denied"),
        (OSError("no file in it"), 70, "bug in lowvram (OSError: no file in it)"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_every_other_end_has_a_code_and_at_most_three_lines(
    error: BaseException, code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert console.print_error(error, debug=False) == code
    err = capsys.readouterr().err
    assert err.startswith("error: ") and words in err
    assert len(err.splitlines()) <= 3 and "Traceback" not in err


def test_debug_adds_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        raise FileError("bad header", where="a.gguf", advice="download it again")
    except FileError as error:
        assert console.print_error(error, debug=True) == 3
    err = capsys.readouterr().err
    assert err.startswith("Traceback") and "test_console.py" in err
    assert err.endswith("error: a.gguf: bad header\n       download it again\n")


def test_an_error_is_a_record_for_programs() -> None:
    record = console.error_record(FileError("bad header", where="a.gguf", advice="download it again"))
    assert record == {
        "schema": "lowvram.error/1",
        "exit_code": 3,
        "error": "a.gguf: bad header",
        "details": ["download it again"],
    }


def test_sigterm_raises_inside_the_block_and_the_old_handler_returns() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt) as caught, console.sigterm_raises():
        signal.raise_signal(signal.SIGTERM)
    assert console.explain(caught.value)[0] == 143
    assert signal.getsignal(signal.SIGTERM) is before
