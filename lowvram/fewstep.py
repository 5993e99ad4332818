"""Few-step models and LoRAs: the schedule that goes with a file, and settings that contradict each other.

What a file was made for is known by its name or its published hash (`fewstep.toml`); what is not known is not judged.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from lowvram.errors import UsageError
from lowvram.job import Job, LoraChoice
from lowvram.library.known import known_file, stored_hash
from lowvram.library.naming import expert_of
from lowvram.quant.spec import ModelSpec
from lowvram.sampling.presets import FewStep, few_step, load_few_step, load_models, preset_of_file

SLACK = 2
"""A distilled model is refused more than this many times the steps it was made for."""
MIN_REFUSED = 9
"""Fewer steps are never refused: people mix phases with and without a LoRA."""
GUIDED = 1.5
"""Guidance above this is refused where it was distilled in."""


@dataclass(frozen=True, slots=True)
class Distilled:
    """A file that was made for few steps."""

    path: str
    preset: str
    experts: tuple[str, ...]
    """The transformers of the job that it acts on."""

    @property
    def name(self) -> str:
        return PurePath(self.path).name


def preset_of(path: Path, kind: str) -> str | None:
    """The preset that a "lora" or a "dit" was made for, by its hash where that is known, else by its name."""
    known = known_file(stored_hash(path))
    return preset_of_file(PurePath(known.name) if known else path, kind)


def with_preset(settings: Mapping[str, Any], files: Mapping[str, str]) -> dict[str, Any]:
    """Settings of a job with the preset that its files were made for, if none was asked for and nothing of the schedule
    was set by hand, and with the strength that the preset's LoRAs are used at."""
    loras: tuple[LoraChoice, ...] = settings.get("loras") or ()
    by_hand = any(
        settings.get(name) is not None for name in ("preset", "steps", "solver", "shift", "guidance")
    )
    made_for = {
        preset_of(Path(path), "dit") for part, path in files.items() if part in ("high", "low", "single")
    }
    presets = {preset_of(Path(lora.path), "lora") for lora in loras if lora.acts} | made_for
    presets.discard(None)
    if by_hand or len(presets) != 1:
        return dict(settings)
    return dict(settings) | {"preset": presets.pop()}


def check(job: Job, spec: ModelSpec) -> None:
    """UsageError for the first thing that contradicts what the job's files or its preset were made for."""
    preset = None if job.preset is None else few_step(job.preset)
    distilled = _distilled(job, spec)
    for found, where, expected, advice in (
        *_of_preset(preset, job, spec, distilled),
        *_of_files(preset, job, spec, distilled),
    ):
        raise UsageError(found, where=where, expected=expected, advice=f"{advice}, or go on with --force")


Complaint = tuple[str, str, str, str]
"""found, where, expected, advice"""


def _of_preset(
    preset: FewStep | None, job: Job, spec: ModelSpec, distilled: Sequence[Distilled]
) -> list[Complaint]:
    """What is wrong with a preset on this model."""
    if preset is None:
        return []
    made_for = [each.name for each in distilled if each.preset == preset.name]
    where = f"--preset {preset.name}" + (f", which {made_for[0]} was made for" if made_for else "")
    complaints: list[Complaint] = []
    if preset.attention:
        complaints.append(
            (preset.attention, where, "attention that is not there yet", "choose another preset")
        )
    names = _known_as(spec)
    if names and not set(names) & set(preset.bases):
        bases = " or ".join(preset.bases)
        complaints.append(
            (f"made for {bases}, not for {names[0]}", where, "a preset of this model", _others(names))
        )
    guided = max(job.schedule.guidance)
    if guided > GUIDED and preset.guidance == 1.0:
        complaints.append(
            (f"guidance {guided:g} on a transformer that has it distilled in", where, "guidance 1",
             "leave --guidance out")
        )  # fmt: skip
    complaints += [
        (
            f"{each.name} was made for {each.preset}",
            where,
            "files of one preset",
            f"use --preset {each.preset}",
        )
        for each in distilled
        if not _alike(preset, few_step(each.preset))
    ]
    covered = {expert for each in distilled for expert in each.experts} | _with_any_lora(job, spec)
    bare = [expert for expert in spec.expert_names() if expert not in covered]
    if bare and job.files and (preset.loras or preset.checkpoints):
        which = "" if bare == ["single"] else f" on the {' and the '.join(bare)}-noise expert"
        complaints.append(
            (
                f"no LoRA{which}, and the transformer is not a distilled one",
                where,
                preset.summary,
                "give its --lora",
            )
        )
    return complaints


def _of_files(
    preset: FewStep | None, job: Job, spec: ModelSpec, distilled: Sequence[Distilled]
) -> list[Complaint]:
    """What is wrong with distilled files in this schedule."""
    complaints: list[Complaint] = []
    kinds = {each.preset for each in distilled}
    for one in sorted(kinds):
        for other in sorted(kinds):
            if one < other and not _alike(few_step(one), few_step(other)):
                pair = [next(d.name for d in distilled if d.preset == kind) for kind in (one, other)]
                complaints.append(
                    (
                        f"made for {one} and for {other}",
                        " and ".join(pair),
                        "files of one preset",
                        "give a matching pair",
                    )
                )
    names = _known_as(spec)
    for each in distilled:
        made_for = few_step(each.preset)
        tasks = _other_task(each.name, spec)
        if tasks is not None:
            complaints.append(
                (
                    f"made for {tasks[0]}, not for {tasks[1]}",
                    each.name,
                    "a file of this model",
                    "leave it out",
                )
            )
        if names and not set(names) & set(made_for.bases):
            bases = " or ".join(made_for.bases)
            complaints.append(
                (f"made for {bases}, not for {names[0]}", each.name, "a file of this model", "leave it out")
            )
        steps = len(job.schedule)
        if preset is None and steps >= MIN_REFUSED and steps > SLACK * made_for.steps:
            complaints.append(
                (f"{steps} steps with a file made for {made_for.steps}", each.name, made_for.summary,
                 f"use --preset {each.preset}")
            )  # fmt: skip
        guided = max((g for expert, g in _guidance(job, spec) if expert in each.experts), default=1.0)
        if guided > GUIDED and made_for.guidance == 1.0:
            complaints.append(
                (f"guidance {guided:g} on a transformer that has it distilled in", each.name, "guidance 1",
                 f"use --preset {each.preset} or --guidance 1")
            )  # fmt: skip
        if made_for.attention and preset is None:
            complaints.append(
                (made_for.attention, each.name, "attention that is not there yet", "use another file")
            )
    return complaints


def _distilled(job: Job, spec: ModelSpec) -> list[Distilled]:
    """The job's files that are known to be made for few steps."""
    found = [
        Distilled(path, preset, (part,))
        for part, path in job.files.items()
        if part in spec.expert_names() and (preset := preset_of(Path(path), "dit")) is not None
    ]
    for lora in job.loras:
        preset = preset_of(Path(lora.path), "lora") if lora.acts else None
        if preset is not None:
            found.append(Distilled(lora.path, preset, acts_on(lora, spec)))
    return found


def acts_on(lora: LoraChoice, spec: ModelSpec) -> tuple[str, ...]:
    """The transformers that a LoRA acts on: those asked for, else the one its name says, else all. UsageError if its
    name says another than the one it is given to."""
    if spec.experts == 1:
        return spec.expert_names()
    named = expert_of(Path(lora.path))
    if lora.expert == "both":
        return spec.expert_names() if named is None else (named,)
    if named not in (None, lora.expert):
        raise UsageError(
            f"its name says that it is for the {named}-noise expert, but it is given to the {lora.expert}-noise one",
            where=lora.path,
            advice=f"give it with :{named}, or rename the file if its name is wrong",
        )
    return (lora.expert,)


def _with_any_lora(job: Job, spec: ModelSpec) -> set[str]:
    return {expert for lora in job.loras if lora.acts for expert in acts_on(lora, spec)}


def _guidance(job: Job, spec: ModelSpec) -> list[tuple[str, float]]:
    """(expert, scale) of every step."""
    names = spec.expert_names()
    return [(names[e], g) for e, g in zip(job.schedule.experts, job.schedule.guidance, strict=True)]


def _known_as(spec: ModelSpec) -> list[str]:
    """The published models that have these transformers; empty for others, of which nothing is known."""
    return [
        name
        for name, model in load_models().items()
        if name.startswith("wan") and (model.dit, model.experts) == (spec.dit, spec.experts)
    ]


def _other_task(name: str, spec: ModelSpec) -> tuple[str, str] | None:
    """(what a file was made for as its name says, what the model does) if they differ.

    Both tasks have LoRAs of one shape and one preset. What is made for text serves the one-expert models that begin
    with a picture too.
    """
    tasks = {"t2v": "text to video", "i2v": "image to video"}
    if spec.variant not in tasks:
        return None
    said = {task for task in tasks if re.search(rf"(?:^|[^a-z0-9]){task}(?![a-z0-9])", name.lower())}
    wrong = said - {spec.variant}
    if len(said) != 1 or not wrong or (spec.experts == 1 and said == {"t2v"}):
        return None
    return tasks[said.pop()], tasks[spec.variant]


def _alike(one: FewStep, other: FewStep) -> bool:
    """Whether two presets are the same training sampled in more or fewer steps."""
    if one.name == other.name:
        return True
    return (
        (one.solver, one.shift) == (other.solver, other.shift)
        and one.shift is not None
        and not (set(one.bases).isdisjoint(other.bases))
    )


def _others(names: Sequence[str]) -> str:
    fit = [p.name for p in load_few_step().values() if set(p.bases) & set(names) and not p.attention]
    return f"presets for it: {', '.join(fit)}" if fit else "there is no preset for it"
