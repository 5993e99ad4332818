"""Progress: what is done, what is left, and how it is shown where there is a terminal and where there is none."""

from __future__ import annotations

import io
import sys
from dataclasses import dataclass, replace

import pytest

from lowvram.cli.progress import Forecast, Progress, clock_time, progress_mode, remaining, used_of

JOB = (Forecast("text", 2, 4.0), Forecast("denoise", 4, 40.0), Forecast("decode", 3, 6.0))
GB = 10**9


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


def test_the_eta_uses_the_median_step_and_the_plan_for_later_stages() -> None:
    assert remaining(JOB, 0, 0, [], 0.0) == 50.0
    assert remaining(JOB, 0, 0, [], 1.5) == 48.5
    assert remaining(JOB, 1, 0, [], 0.0) == 46.0
    assert remaining(JOB, 1, 0, [90.0, 20.0, 20.0], 5.0) == 21.0
    assert remaining(JOB, 1, 0, [20.0], 500.0) == 46.0, "a late step does not make the rest shorter"
    assert remaining(JOB, 2, 0, [2.0, 2.0, 2.0], 9.0) == 0.0
    assert remaining(JOB, 2, 0, [2.0] * 5, 0.0) == 0.0, "more steps than planned"


def test_times_read_like_a_clock() -> None:
    times = [clock_time(t) for t in (-1, 0, 0.2, 59.5, 75, 3600, 4000)]
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
    assert progress_mode(quiet, as_json) == mode


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
    assert used_of(used, budget) == shown


def test_work_without_a_forecast_can_be_shown(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All segments of a driven video are made, and only their joining is left."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    with Progress([], GB, Clock(), "live") as progress:
        progress.note("joining")
    assert "joining" in capsys.readouterr().err
