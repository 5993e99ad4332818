"""How far a job is: on a terminal a line that is redrawn, elsewhere lines that do not flood a log."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self

from lowvram.cli.console import say
from lowvram.offload.budget import format_bytes

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live

BAR = 24
"""Columns of a progress bar, where the line beside it leaves them."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """What the plan says of one stage."""

    name: str
    steps: int
    """Denoise steps, text layers, VAE chunks: how often `Progress.step` will be called."""
    seconds: float
    """Of all its steps."""
    done: int = 0
    """Steps that were done before."""


@dataclass(frozen=True, slots=True)
class Status:
    """Where a job is at one moment."""

    stage: str
    index: int
    """Place of the stage in the job, from 1."""
    stages: int
    step: int
    """Steps of the stage that are done."""
    steps: int
    per_step: float | None
    """Median seconds per step so far; None before the first is done."""
    eta: float
    """Seconds left in the whole job."""
    vram: int | None
    """Bytes in use; None if not known."""
    budget: int
    """Bytes allowed."""

    def line(self) -> str:
        """The status for people, e.g. `[3/5] denoise 12/40  15.1 s/it  ETA 7:03  VRAM 9.3/16.0 GB`."""
        parts = [f"[{self.index}/{self.stages}] {self.stage} {self.step}/{self.steps}"]
        if self.per_step is not None:
            parts.append(f"{self.per_step:.{1 if self.per_step >= 1 else 2}f} s/it")
        parts.append(f"ETA {clock_time(self.eta)}")
        if self.vram is not None:
            parts.append(f"VRAM {used_of(self.vram, self.budget)}")
        return "  ".join(parts)


def used_of(used: int, budget: int) -> str:
    """9.3 of 16 GB -> "9.3/16.0 GB", 3.4 MB of 9.8 GB -> "3.4 MB/9.8 GB": in one unit if that shows both."""
    names = (("GB", 10**9), ("MB", 10**6), ("KB", 10**3), ("B", 1))
    unit, size = next((pair for pair in names if budget >= pair[1]), names[-1])
    whole = f"{budget / size:.1f} {unit}"
    if used and used < size / 20:  # would be 0.0
        return f"{format_bytes(used)}/{whole}"
    return f"{used / size:.1f}/{whole}"


def clock_time(seconds: float) -> str:
    """75 -> "1:15", 4000 -> "1:06:40"; rounded up, so that it reaches zero only at the end."""
    whole = max(0, -int(-seconds // 1))
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def remaining(
    forecast: Sequence[Forecast], index: int, done: int, durations: Sequence[float], elapsed: float
) -> float:
    """Seconds left in the whole job.

    index      stage that runs, from 0
    done       its steps that were done before it began
    durations  seconds of each of its steps that is done; their median speaks for the rest, because the first step
               holds compilation and cold caches. Before there is one, the forecast speaks.
    elapsed    seconds since the last of them ended, or since the stage began

    Later stages are taken from the forecast as it stands.
    """
    stage = forecast[index]
    left = max(0, stage.steps - done - len(durations))
    per_step = statistics.median(durations) if durations else stage.seconds / max(1, stage.steps)
    here = max(0.0, left * per_step - min(elapsed, per_step)) if left else 0.0
    return here + sum(
        later.seconds * (1 - later.done / max(1, later.steps)) for later in forecast[index + 1 :]
    )


Mode = Literal["live", "plain", "off"]


def progress_mode(quiet: bool, as_json: bool) -> Mode:
    """`off` for --quiet and --json, `live` if stderr is a terminal, else `plain` lines."""
    if quiet or as_json:
        return "off"
    return "live" if sys.stderr.isatty() else "plain"


class Progress:
    """Shows on stderr how far a job is.

        with Progress(plan_forecast, budget.vram, time.monotonic, progress_mode(quiet, as_json)) as progress:
            progress.begin("denoise")
            for ...:
                progress.step(vram=device.used())
            progress.end()

    live   one line that is redrawn, with a bar; each finished stage leaves a line
    plain  one line per step, but not more often than every `every` seconds, except the last step of a stage
    off    nothing, `note` included

    `clock` returns seconds that only grow. Not for use by several threads.
    """

    def __init__(
        self,
        forecast: Sequence[Forecast],
        budget: int,
        clock: Callable[[], float],
        mode: Mode,
        *,
        every: float = 5.0,
    ) -> None:
        self._forecast, self._budget, self._clock = tuple(forecast), budget, clock
        self._mode, self._every = mode, every
        self._index = self._next = self._done = 0
        self._durations: list[float] = []
        self._began = self._last_step = self._last_line = clock()
        self._vram: int | None = None
        self._live: Live | None = None

    def __enter__(self) -> Self:
        if self._mode == "live":
            from rich.console import Console
            from rich.live import Live

            self._live = Live(
                console=Console(stderr=True),
                get_renderable=self._renderable,
                refresh_per_second=4,
                transient=True,
                redirect_stdout=False,
            )
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def begin(self, stage: str, done: int = 0) -> None:
        """The next stage of this name of the forecast starts, after so many of its steps; if there is none, or the stage
        under way is not done yet (it failed, and is begun again with what leads to it), the last one once more.

        Raises ValueError if there never was one.
        """
        names = [each.name for each in self._forecast]
        begun = names[: self._next][::-1]
        under_way = self._next > 0 and self._taken < self._forecast[self._index].steps
        if stage in names[self._next :] and not (under_way and stage in begun):
            index = names.index(stage, self._next)
        else:
            index = len(begun) - 1 - begun.index(stage)
        self._next = index + 1
        self._durations, self._index, self._done = [], index, done
        self._began = self._last_step = self._last_line = self._clock()

    def step(self, vram: int | None = None) -> None:
        """One more step of the stage is done; `vram` is the bytes in use now."""
        now = self._clock()
        self._durations.append(now - self._last_step)
        self._last_step, self._vram = now, vram
        last = self._taken >= self._forecast[self._index].steps
        if self._mode == "plain" and (last or now - self._last_line >= self._every):
            self._last_line = now
            say(self.status().line())

    def end(self) -> None:
        """The stage is done."""
        stage = self._forecast[self._index]
        seconds = self._clock() - self._began
        self.note(f"[{self._index + 1}/{len(self._forecast)}] {stage.name} done in {seconds:.1f} s")

    def note(self, text: str) -> None:
        """A line for people that the progress does not overwrite."""
        if self._live is not None:
            self._live.console.print(text, markup=False, highlight=False, soft_wrap=True)
        elif self._mode != "off":
            say(text)

    @property
    def shows_pictures(self) -> bool:
        """Whether there is a terminal that has colours, and characters to make pictures of (cp1252 has none)."""
        if self._live is None:
            return False
        console = self._live.console
        coloured = console.color_system is not None and not console.no_color
        return coloured and not console.options.ascii_only

    def show(self, picture: RenderableType) -> None:
        """Something for people that the progress does not overwrite; nothing if it is not live."""
        if self._live is not None:
            self._live.console.print(picture)

    @property
    def _taken(self) -> int:
        """Steps of the stage that are done."""
        return self._done + len(self._durations)

    def status(self) -> Status:
        """Where the job is now."""
        stage = self._forecast[self._index]
        durations = self._durations
        return Status(
            stage=stage.name,
            index=self._index + 1,
            stages=len(self._forecast),
            step=self._taken,
            steps=stage.steps,
            per_step=statistics.median(durations) if durations else None,
            eta=remaining(
                self._forecast, self._index, self._done, durations, self._clock() - self._last_step
            ),
            vram=self._vram,
            budget=self._budget,
        )

    def _renderable(self) -> RenderableType:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        grid = Table.grid(padding=(0, 1))
        if not self._forecast or self._live is None:
            return grid
        status = self.status()
        line = Text(status.line(), no_wrap=True, overflow="ellipsis")
        room = self._live.console.width - len(line) - 2
        if room < BAR // 2:  # the numbers say more than the bar
            return line
        bar = ProgressBar(total=max(1, status.steps), completed=status.step, width=min(BAR, room))
        grid.add_row(bar, line)
        return grid
