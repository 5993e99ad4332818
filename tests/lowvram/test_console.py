"""The console: results and talk go to their streams, errors are short, progress is honest."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
from dataclasses import dataclass, replace

import pytest

from lowvram.cli import console
from lowvram.cli.console import Forecast, Progress, Terminated
from lowvram.errors import BudgetError, FileError, InternalError, LowvramError

JOB = (Forecast("text", 2, 4.0), Forecast("denoise", 4, 40.0), Forecast("decode", 3, 6.0))
GB = 10**9


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


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
        "import sys\nimport lowvram.cli.console, lowvram.report, lowvram.media.video, lowvram.media.probe\n"
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


# ---- progress


def test_the_eta_uses_the_median_step_and_the_plan_for_later_stages() -> None:
    assert console.remaining(JOB, 0, 0, [], 0.0) == 50.0
    assert console.remaining(JOB, 0, 0, [], 1.5) == 48.5
    assert console.remaining(JOB, 1, 0, [], 0.0) == 46.0
    assert console.remaining(JOB, 1, 0, [90.0, 20.0, 20.0], 5.0) == 21.0
    assert console.remaining(JOB, 1, 0, [20.0], 500.0) == 46.0, "a late step does not make the rest shorter"
    assert console.remaining(JOB, 2, 0, [2.0, 2.0, 2.0], 9.0) == 0.0
    assert console.remaining(JOB, 2, 0, [2.0] * 5, 0.0) == 0.0, "more steps than planned"


def test_times_read_like_a_clock() -> None:
    times = [console.clock_time(t) for t in (-1, 0, 0.2, 59.5, 75, 3600, 4000)]
    assert times == ["0:00", "0:00", "0:01", "1:00", "1:15", "1:00:00", "1:06:40"]


def test_plain_progress_is_a_line_per_step_with_everything_in_it(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with Progress(JOB, 16 * GB, clock, "plain") as progress:
        progress.begin("denoise")
        for _ in range(4):
            clock.now += 10.0
            progress.step(vram=9_300_000_000)
        progress.end()
        progress.note("tile 64")
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "[2/3] denoise 1/4  10.0 s/it  ETA 0:36  VRAM 9.3/16.0 GB",
        "[2/3] denoise 2/4  10.0 s/it  ETA 0:26  VRAM 9.3/16.0 GB",
        "[2/3] denoise 3/4  10.0 s/it  ETA 0:16  VRAM 9.3/16.0 GB",
        "[2/3] denoise 4/4  10.0 s/it  ETA 0:06  VRAM 9.3/16.0 GB",
        "[2/3] denoise done in 40.0 s",
        "tile 64",
    ]


def test_what_was_done_before_counts_and_takes_no_time(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    resumed = (JOB[0], replace(JOB[1], done=3), JOB[2])
    with Progress(resumed, 16 * GB, clock, "plain") as progress:
        progress.begin("text")
        assert progress.status().eta == 4 + 10 + 6
        progress.begin("denoise", 3)
        assert (progress.status().step, progress.status().eta) == (3, 10 + 6)
        clock.now += 12.0
        progress.step()
    assert capsys.readouterr().err.splitlines() == ["[2/3] denoise 4/4  12.0 s/it  ETA 0:06"]


def test_a_stage_that_failed_is_begun_again_where_it_was_and_not_in_the_next_segment() -> None:
    """Memory that ran out: what leads to the stage is done again, its own steps are not."""
    segment = (Forecast("prepare", 2, 1.0), Forecast("denoise", 4, 40.0), Forecast("decode", 1, 6.0))
    progress = Progress(segment * 2, GB, Clock(), "off")
    seen = []
    for stage, done, steps in (
        ("prepare", 0, 2),
        ("denoise", 0, 3),
        ("prepare", 0, 2),
        ("denoise", 3, 1),
        ("decode", 0, 1),
        ("prepare", 0, 2),
    ):
        progress.begin(stage, done)
        for _ in range(steps):
            progress.step()
        seen.append((progress.status().index, progress.status().step))
    assert seen == [(1, 2), (2, 3), (1, 2), (2, 4), (3, 1), (4, 2)]


def test_quick_steps_do_not_flood_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with Progress((Forecast("decode", 1000, 50.0),), GB, clock, "plain") as progress:
        progress.begin("decode")
        for _ in range(1000):
            clock.now += 0.0625
            progress.step()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 13
    assert lines[0] == "[1/1] decode 80/1000  0.06 s/it  ETA 0:58"
    assert lines[-1].startswith("[1/1] decode 1000/1000") and "ETA 0:00" in lines[-1]


def test_off_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with Progress(JOB, GB, clock, "off") as progress:
        progress.begin("text")
        clock.now += 100.0
        progress.step(vram=1)
        progress.note("x")
        progress.end()
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("columns", ["120", "62"])  # a narrow one has no bar
def test_a_terminal_shows_the_same_line_and_keeps_notes(
    columns: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("FORCE_COLOR", "1"), ("TERM", "xterm"), ("COLUMNS", columns), ("NO_COLOR", "1")):
        monkeypatch.setenv(name, value)
    clock = Clock()
    with Progress(JOB, 16 * GB, clock, "live") as progress:
        progress.begin("denoise")
        clock.now += 10.0
        progress.step(vram=9_300_000_000)
        progress.note("[tile] 64")
    out, err = capsys.readouterr()
    assert out == ""
    assert "[2/3] denoise 1/4  10.0 s/it  ETA 0:36  VRAM 9.3/16.0 GB" in err
    assert "[tile] 64" in err


@pytest.mark.parametrize(
    ("encoding", "terminal", "no_color", "shown"),
    [
        ("utf-8", "xterm-256color", "", True),
        ("cp1252", "xterm-256color", "", False),
        ("utf-8", "dumb", "", False),
        ("utf-8", "xterm-256color", "1", False),
    ],
)
def test_pictures_are_for_terminals_that_have_the_characters_and_the_colours(
    encoding: str, terminal: str, no_color: str, shown: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("FORCE_COLOR", "1"), ("TERM", terminal), ("NO_COLOR", no_color)):
        monkeypatch.setenv(name, value)
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(raw, encoding, errors="backslashreplace"))
    with Progress(JOB, GB, Clock(), "live") as progress:
        assert progress.shows_pictures == shown
        progress.note("to \u65e5\u672c.mp4")  # no terminal stops a job
    sys.stderr.flush()
    assert "to \u65e5\u672c.mp4".encode(encoding, "backslashreplace") in raw.getvalue()


def test_an_error_inside_passes_through_and_ends_the_display() -> None:
    with pytest.raises(ZeroDivisionError), Progress(JOB, GB, Clock(), "live"):
        raise ZeroDivisionError


def test_a_stage_outside_the_forecast_is_refused() -> None:
    with pytest.raises(ValueError, match="upscale"):
        Progress(JOB, GB, Clock(), "off").begin("upscale")


@pytest.mark.parametrize(
    ("quiet", "as_json", "terminal", "mode"),
    [
        (False, False, True, "live"),
        (False, False, False, "plain"),
        (True, False, True, "off"),
        (False, True, True, "off"),
    ],
)
def test_the_mode_follows_flags_and_terminal(
    monkeypatch: pytest.MonkeyPatch, quiet: bool, as_json: bool, terminal: bool, mode: str
) -> None:
    class Stream(io.StringIO):
        def isatty(self) -> bool:
            return terminal

    monkeypatch.setattr(sys, "stderr", Stream())
    assert console.progress_mode(quiet, as_json) == mode


@pytest.mark.parametrize(
    ("used", "budget", "shown"),
    [
        (9_300_000_000, 16 * GB, "9.3/16.0 GB"),
        (3_400_000, 9_800_000_000, "3.40 MB/9.8 GB"),
        (0, 9_800_000_000, "0.0/9.8 GB"),
        (9_400_000, 13_000_000, "9.4/13.0 MB"),
        (12_000, 13_000_000, "12.0 KB/13.0 MB"),
        (300_000, 999_000, "300.0/999.0 KB"),
        (7, 10, "7.0/10.0 B"),
    ],
)
def test_memory_is_shown_in_a_unit_that_shows_it(used: int, budget: int, shown: str) -> None:
    assert console.used_of(used, budget) == shown


def test_work_without_a_forecast_can_be_shown(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All segments of a driven video are made, and only their joining is left."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    with Progress([], GB, Clock(), "live") as progress:
        progress.note("joining")
    assert "joining" in capsys.readouterr().err
