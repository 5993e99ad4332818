"""Plans for models of which not all files are here, and for machines that are not here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lowvram import fewstep
from lowvram.caps import budget_of, machine_here
from lowvram.imagined import imagined_model, with_parts
from lowvram.job import Job, make_job
from lowvram.machine import machine_profile
from lowvram.matmul import unfit_for
from lowvram.model import Model
from lowvram.model_files import with_loras
from lowvram.offload.io import user_path
from lowvram.planning.choose import make_plan
from lowvram.planning.plan import Plan
from lowvram.preview import open_decoder
from lowvram.quant.encodings.registry import encoding_by_name
from lowvram.sampling.presets import few_step, model_preset, preset_of_file
from lowvram.settings import check_used, with_files, with_preset_loras
from lowvram.triton_kernels import dispatch

DEFAULT_WEIGHTS = "bf16"


def plan_without_files(
    name: str,
    *,
    weights: str | None,
    machine: str | None,
    vram: str | int | None,
    ram: str | int | None,
    prompt: str = "",
    force: bool = False,
    preview_decoder: Path | None = None,
    files: Mapping[str, str] = MappingProxyType({}),
    **elsewhere: Any,
) -> Plan:
    """A plan for a known model of which not all files are here, on a machine that may not be here either.

    weights    how the transformers are stored
    files      parts that are here, as `Runtime.load` takes them: planned as their headers say
    elsewhere  more that `plan_elsewhere` takes

    What is here besides: pictures and LoRAs among the settings, and preview_decoder, the small decoder that makes previews.
    """
    encoding_by_name(weights or DEFAULT_WEIGHTS)
    model = imagined_model(name, model_preset(name), weights or DEFAULT_WEIGHTS)
    check_used(model, files)
    model = with_parts(model, {part: str(user_path(path)) for part, path in files.items()})
    return plan_elsewhere(
        model, machine, vram, ram, prompt, force=force, preview_decoder=preview_decoder, **elsewhere
    )


def plan_elsewhere(
    model: Model,
    machine: str | None,
    vram: str | int | None,
    ram: str | int | None,
    prompt: str = "",
    *,
    force: bool = False,
    preview_decoder: Path | None = None,
    files: Mapping[str, str] = MappingProxyType({}),
    models_dirs: Sequence[str] = (),
    device: str | None = None,
    **settings: Any,
) -> Plan:
    """A plan for a model on a machine of the table, or on this one without a try of its card.

    files        those of the model, if all are here: a preset may be theirs, as in `Pipeline.job`
    models_dirs  where the LoRAs of a preset are looked for besides the usual places; the plan says if they are not here
    device       of this machine, as for `Runtime`
    """
    spec = model.spec
    preview = None if preview_decoder is None else open_decoder(preview_decoder, spec.vae)
    where = machine_profile(machine) if machine else machine_here(device)
    asked = settings.pop("attention", None) or "auto"
    packages = frozenset(dispatch.PACKAGES) if machine else dispatch.installed()
    settings["attention"] = dispatch.choose(
        asked, where.arch, packages, ends=settings.pop("attention_ends", None)
    )
    settings["matmul"] = dispatch.choose_matmul(
        settings.get("matmul") or "auto", where.arch, partial(unfit_for, model=model)
    )
    stored = {expert: str(t.file) for expert, t in model.transformers.items() if t.is_here}
    settings = with_preset_loras(model, files or stored, models_dirs, settings)
    settings = fewstep.with_preset(with_files(settings), files)
    job = make_job(spec, model=model.name, files=dict(files), prompt=prompt, **settings)
    if not force:
        fewstep.check(job, spec)
    budget = budget_of(vram, ram, where)
    found = make_plan(job, with_loras(model, job.loras), budget, where, preview=preview)
    return replace(found, advice=(*found.advice, *_left_out(job, stored)))


def _left_out(job: Job, stored: Mapping[str, str]) -> Iterator[str]:
    """What a plan does not count because it is not here: the LoRAs of a preset, unless the transformers need none."""
    if job.preset is None or job.loras or any(preset_of_file(Path(path), "dit") for path in stored.values()):
        return
    preset = few_step(job.preset)
    if preset.loras or not preset.checkpoints:
        yield f"the LoRAs of --preset {preset.name} are not here, and not counted: name them with --lora"
