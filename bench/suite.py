"""A benchmark: trials one after the other, each in its own process, into a results file that is whole at every moment."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from lowvram.bench.cases import GB, Trial, chosen, dry_trials, full_trials
from lowvram.bench.child import run_module
from lowvram.bench.forge import TOKENIZER, forge_model, forged_files
from lowvram.bench.measure import Request
from lowvram.bench.project import CARDS, project
from lowvram.bench.results import Ceilings, Measurement, Results, save
from lowvram.discovery import is_embedded
from lowvram.machine import this_machine
from lowvram.offload.budget import format_bytes
from lowvram.sampling.presets import model_preset

LIMIT = 1800.0
"""Seconds that a trial may take."""


@dataclass(frozen=True, slots=True)
class Tried:
    """What became of a trial."""

    trial: Trial
    measured: Measurement | None
    why: str
    """Why nothing was measured."""


def is_done(results: Results, trial: Trial) -> bool:
    """Whether the file holds this trial already."""
    key = (trial.case.name, trial.case.weights, trial.placement, trial.vram, trial.ram)
    return any(
        (m.case, m.weights, m.placement, m.vram_budget, m.ram_budget) == key for m in results.measurements
    )


def run_trials(
    results: Results,
    path: Path,
    trials: Iterable[Trial],
    source: Callable[[Trial], Mapping[str, str]],
    *,
    device: str | None,
    repeats: int,
    ballast: bool = False,
) -> Iterator[Tried]:
    """Do what the file does not hold yet; it is saved after every trial."""
    for trial in trials:
        if is_done(results, trial):
            continue
        request = Request(trial, dict(source(trial)), device, repeats, ballast)
        outcome = run_module("lowvram.bench.measure", [msgspec.json.encode(request).decode()], LIMIT)
        if not outcome.result:
            yield Tried(trial, None, outcome.why)
            continue
        measured = msgspec.json.decode(outcome.result, type=Measurement)
        results.measurements.append(measured)
        save(path, results)
        yield Tried(trial, measured, "")


def run(
    results: Results,
    path: Path,
    *,
    dry: bool,
    folder: Path | None,
    weights: str,
    repeats: int,
    device: str | None,
    tell: Callable[[str], None],
    only: Sequence[str] = (),
) -> int:
    """The benchmark of `lowvram bench`: ceilings, trials, projections. How many trials failed.

    only  texts that the labels of the trials must hold; UsageError if none does
    """
    machine = this_machine(device)
    results.ceilings = Ceilings(machine.matmul, machine.attention, machine.link, machine.disk)
    save(path, results)
    trials = chosen(dry_trials() if dry else full_trials(machine.vram, machine.ram, weights), only)
    made = Forged(folder, tell)
    failed = 0
    for tried in run_trials(
        results, path, trials, made.source, device=device, repeats=repeats, ballast=machine.kind == "cuda"
    ):
        failed += tried.measured is None
        tell(f"{tried.trial.label}: {tried.why or 'done'}")
    if not results.projections:
        jobs = [case for case in dict.fromkeys(trial.case for trial in trials) if case.what == "job"]
        cards = CARDS[:1] if dry else CARDS
        results.projections.extend(project(jobs, cards, (GB,) if dry else (6 * GB, 8 * GB, 16 * GB)))
        save(path, results)
    return failed


@dataclass(slots=True)
class Forged:
    """Random checkpoints, written when they are first needed and kept."""

    folder: Path | None
    tell: Callable[[str], None]

    def source(self, trial: Trial) -> dict[str, str]:
        """The files of the model of `trial`; none for the one that ships with the program."""
        if is_embedded(trial.case.model):
            return {}
        assert self.folder is not None
        place = self.folder / f"{trial.case.model}-{trial.case.weights}"
        if not (place / TOKENIZER).exists():  # written last
            self.tell(f"writing random {trial.case.model} in {trial.case.weights} to {place}")
            forge_model(model_preset(trial.case.model), place, trial.case.weights)
        return forged_files(model_preset(trial.case.model), place, trial.case.weights)


def table(measurements: Sequence[Measurement]) -> str:
    """What was measured, for people."""
    heading = ("case", "blocks from", "budget", "time", "of ceiling", "VRAM planned", "VRAM", "RAM")
    rows = [heading, *(_row(m) for m in measurements)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(heading))]
    return "\n".join(
        "  ".join(
            c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def _row(m: Measurement) -> tuple[str, ...]:
    seconds = f"{m.seconds:.2f} s" if abs(m.seconds) >= 1 else f"{1000 * m.seconds:.0f} ms"
    share = "-" if m.fraction is None else f"{100 * m.fraction:.0f} %"
    used = "-" if m.vram_allocated is None else format_bytes(m.vram_allocated)
    return (
        m.case,
        m.placement,
        format_bytes(m.vram_budget),
        seconds,
        share,
        format_bytes(m.vram_predicted),
        used,
        format_bytes(m.rss),
    )
