"""What is measured: named cases, each a job cut to what it is about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lowvram.errors import UsageError

What = Literal["text", "forward", "step", "handover", "decode", "pair", "job"]
Placement = Literal["resident", "ram", "disk cold", "disk warm"]
"""Where the blocks that are not resident come from. The system's cache has forgotten the files before every round of a
"disk cold" trial, and has read them before the first of a "disk warm" one."""

PROMPT = "a red circle moves left on a teal background"
GB = 10**9


@dataclass(frozen=True, slots=True)
class Case:
    """One job on one model.

    what  "text"      the text encoder alone
          "forward"   one evaluation of a transformer
          "step"      one step with guidance: two evaluations
          "handover"  what the change of experts costs in a job of four steps
          "decode"    a latent to frames
          "pair"      two steps, one of each expert: the shortest job that goes through everything
          "job"       four steps, text to frames
    """

    what: What
    model: str
    weights: str
    width: int
    height: int
    frames: int

    @property
    def name(self) -> str:
        return f"{self.what} {self.model} {self.width}x{self.height}x{self.frames}"

    def settings(self) -> dict[str, Any]:
        """What `Pipeline.job` takes."""
        steps = {"handover": 4, "job": 4, "pair": 2}.get(self.what, 1)
        guidance = (4.0, 4.0) if self.what == "step" else (1.0, 1.0)
        return {
            "width": self.width,
            "height": self.height,
            "frames": self.frames,
            "steps": steps,
            "guidance": guidance,
            "seed": 1,
        } | ({"shift": 1.0} if self.what == "pair" else {})


@dataclass(frozen=True, slots=True)
class Trial:
    """A case under a budget, in bytes."""

    case: Case
    placement: Placement
    vram: int
    ram: int

    @property
    def label(self) -> str:
        """What tells it from others, for people."""
        return f"{self.case.name}, {self.placement}, {self.vram / GB:.3g} GB"


def chosen(trials: Sequence[Trial], only: Sequence[str]) -> tuple[Trial, ...]:
    """The trials whose label holds every text of `only`. UsageError if there is none."""
    found = tuple(trial for trial in trials if all(text in trial.label for text in only))
    if not found:
        raise UsageError(
            f"none of {len(trials)} trials has {' and '.join(only)} in its name",
            where="--only",
            expected=f"parts of names such as {trials[-1].label!r}",
            advice=f"cases are {', '.join(dict.fromkeys(trial.case.what for trial in trials))}",
        )
    return found


def dry_trials() -> tuple[Trial, ...]:
    """All kinds of cases and placements on the embedded model: shows that a benchmark runs, not how fast anything is."""
    whats: tuple[What, ...] = ("text", "forward", "step", "handover", "decode")
    roomy = tuple(Trial(Case(w, "nano", "fp8", 64, 64, 9), "resident", 200_000_000, 8 * GB) for w in whats)
    return (*roomy, *dry_jobs("job"))


def dry_jobs(what: What) -> tuple[Trial, ...]:
    """One job of the embedded model in every placement: long enough that tokens, and not the decoder, decide what fits."""
    case = Case(what, "nano", "fp8", 64, 64, 33)
    return (
        Trial(case, "resident", 200_000_000, 8 * GB),
        Trial(case, "ram", 9_300_000, 8 * GB),
        Trial(case, "disk cold", 9_300_000, 703_500_000),
        Trial(case, "disk warm", 9_300_000, 703_500_000),
    )


SIZES = (("wan2.2-t2v-a14b", 832, 480, 81), ("wan2.2-t2v-a14b", 1280, 720, 81), ("wan2.2-t2v-a14b", 1280, 720, 121),
         ("wan2.2-ti2v-5b", 1280, 704, 121))  # fmt: skip


def full_trials(vram: int, ram: int, weights: str = "fp8") -> tuple[Trial, ...]:
    """Every case at true sizes that a card of `vram` and a host of `ram` bytes can be asked for, small sizes first.

    Jobs go through all budgets, the parts of a job through all placements at the largest of them.
    """
    budgets = [b * GB for b in (24, 16, 12, 8, 6) if b * GB <= vram]
    trials = []
    for model, width, height, frames in SIZES:
        case = {w: Case(w, model, weights, width, height, frames) for w in _WHATS}
        parts = [case[w] for w in _WHATS if w != "job" and (w != "handover" or model.endswith("a14b"))]
        if vram > 40 * GB:
            trials += [Trial(each, "resident", vram, ram) for each in (*parts, case["job"])]
        trials += [Trial(each, "ram", b, ram) for b in budgets[:1] for each in parts]
        trials += [Trial(case["job"], "ram", b, ram) for b in budgets]
        for placement in _FROM_DISK:
            trials += [Trial(each, placement, b, min(ram, 8 * GB)) for b in budgets[:1] for each in parts]
            trials += [Trial(case["job"], placement, b, min(ram, 8 * GB)) for b in budgets]
    return tuple(trials)


_WHATS: tuple[What, ...] = ("text", "forward", "step", "decode", "handover", "job")
_FROM_DISK: tuple[Placement, ...] = ("disk cold", "disk warm")
