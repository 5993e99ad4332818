"""An acceptance run: its parts one after the other, each in its own process, into a file that is whole at every moment."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from lowvram.bench.child import run_module
from lowvram.bench.parts import PARTS, Setup, Verdict
from lowvram.bench.results import Ceilings, Part, Results, load, new_results, save
from lowvram.bench.suite import table
from lowvram.errors import UsageError
from lowvram.machine import load_rates, rates_path
from lowvram.survey import identify

RESERVE = 15.0
"""Seconds kept at the end of a slot to write and to print."""
QUICK = ("smoke", "kernels", "ceilings", "forecast")
"""Parts that need no checkpoint: whether anything works here, in a few minutes."""


def accept(*, dry: bool, seconds: float, only: Sequence[str], output: Path, folder: Path) -> int:
    """Do the parts that the results file does not hold yet, or those of `only`; 1 if one failed.

    seconds  when to stop starting parts
    output   the folder of the results file
    folder   where random checkpoints go: they are kept for the next slot until every part is done

    UsageError for a part that does not exist.
    """
    for name in only:
        if name not in PARTS:
            raise UsageError(
                f"no part is called {name!r}", where="--only", expected=", ".join(PARTS), advice="choose one"
            )
    results, path = _open(output, dry)
    forged = folder / "lowvram-bench"
    forged.mkdir(parents=True, exist_ok=True)
    _run(results, path, Setup(dry, str(forged)), only, seconds)
    if dry or not _left(results) or not any(forged.iterdir()):
        shutil.rmtree(forged, ignore_errors=True)
    print(table(results.measurements))
    print("\n".join(_line(part) for part in results.parts))
    if forged.exists():
        print(f"for {', '.join(_left(results))}: give the same command again; {forged} is kept for it")
    print(path)
    return int(any(part.outcome == "failed" for part in results.parts))


def _left(results: Results) -> list[str]:
    """The parts that have not come to an end."""
    done = {part.name for part in results.parts if part.outcome != "timed out"}
    return [name for name in PARTS if name not in done]


def _open(folder: Path, dry: bool) -> tuple[Results, Path]:
    """The results file of this device and day, new or to be continued."""
    place = identify("cpu" if dry else None)
    date = datetime.now(UTC).strftime("%Y-%m-%d")
    device = re.sub(r"[^a-z0-9]+", "-", place.label.removeprefix("NVIDIA ").lower()).strip("-")
    path = folder / f"{'dry' if dry else device}-{date}.json"
    folder.mkdir(parents=True, exist_ok=True)
    return (load(path) if path.exists() else new_results(place, date)), path


def _run(results: Results, path: Path, setup: Setup, only: Sequence[str], seconds: float) -> None:
    end = time.monotonic() + seconds - RESERVE
    for name in only or _left(results):
        left = end - time.monotonic()
        if left < 10:
            print(f"{name}: no time left in this slot", flush=True)
            continue
        part = _one(name, setup, min(PARTS[name][0], left), results)
        results.parts = [p for p in results.parts if p.name != name] + [part]
        rates = load_rates(rates_path(setup.kind))
        if rates is not None:
            results.ceilings = Ceilings(rates.matmul, rates.attention, rates.link, rates.disk)
        save(path, results)
        print(_line(part), flush=True)


def _one(name: str, setup: Setup, limit: float, results: Results) -> Part:
    arguments = [name, msgspec.json.encode(setup).decode()]
    outcome = run_module("lowvram.bench.parts", arguments, limit)
    try:
        verdict = msgspec.json.decode(outcome.result or outcome.so_far, type=Verdict)
    except msgspec.MsgspecError:  # it came to no step's end, or what it loads has the last word
        verdict = Verdict("failed", {}, outcome.why or "it ended without a result")
    known = {(m.case, m.placement, m.vram_budget) for m in verdict.measurements}
    results.measurements = [
        m for m in results.measurements if (m.case, m.placement, m.vram_budget) not in known
    ] + verdict.measurements
    if outcome.timed_out:
        return Part(name, "timed out", outcome.seconds, verdict.facts, outcome.why)
    if not outcome.result:
        return Part(name, "failed", outcome.seconds, verdict.facts, outcome.why)
    return Part(name, verdict.outcome, outcome.seconds, verdict.facts, verdict.why)


def _line(part: Part) -> str:
    why = f": {part.why}" if part.why else ""
    return f"{part.name.ljust(14)} {part.outcome.ljust(18)} {part.seconds:6.1f} s{why}"
