"""lowvram plan: what a job would claim, move and take. Needs no weights and no GPU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import typer

from lowvram.cli import options as o
from lowvram.columns import aligned
from lowvram.errors import UsageError
from lowvram.library.parts import FLAGS
from lowvram.offload.io import user_path
from lowvram.sampling.presets import load_models, unknown_name

if TYPE_CHECKING:
    from lowvram.planning.plan import Plan


@o.with_job_flags
def plan(
    flags: o.JobFlags,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="Not needed for a plan.")] = "",
    machine: Annotated[
        str | None, typer.Option("--machine", metavar="NAME", help="Plan for a card, such as rtx4090.")
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            "--weights",
            metavar="FORMAT|FILE",
            help="How the transformers are stored: an encoding, such as fp8, or a file.",
        ),
    ] = None,
    preview_decoder: o.PreviewDecoder = None,
    as_json: o.Json = False,
) -> None:
    """Forecast peak memory, bytes moved and time of a job."""
    settings, given = flags.settings(), flags.files()
    from lowvram.api import Runtime
    from lowvram.cli.console import emit, emit_json
    from lowvram.cli.models import announce, tell_files, tell_preset
    from lowvram.discovery import find, is_here
    from lowvram.elsewhere import plan_elsewhere, plan_without_files
    from lowvram.model_files import open_model
    from lowvram.preview import open_decoder

    if machine is not None and flags.device is not None:
        raise UsageError(
            f"--device {flags.device} beside --machine {machine}",
            expected="one or the other: a device is one of this machine",
            advice="leave --device out to plan for that card",
        )
    look, folders = announce(as_json), flags.models_dir or ()
    asked = {
        "vram": flags.vram,
        "ram": flags.ram,
        "prompt": prompt,
        "preview_decoder": preview_decoder,
        "models_dirs": folders,
        "device": flags.device,
    } | settings
    if weights is not None or machine is not None:
        _check_known(flags.model, given, weights)
    if weights is not None or not (
        (given and machine is None) or is_here(flags.model, folders, look, flags.preset)
    ):
        if weights is not None and user_path(weights).is_file():
            given, weights = {"single": weights} | given, None
        found = plan_without_files(flags.model, weights=weights, machine=machine, files=given, **asked)
    elif machine is not None:
        files = find(flags.model, given, models_dirs=folders, preset=flags.preset, progress=look).paths
        model = open_model(flags.model, files)
        found = plan_elsewhere(model, machine, files=files, **asked)
    else:
        pipe = Runtime(flags.vram, flags.ram, flags.device, cache=not flags.no_cache).load(
            flags.model,
            models_dirs=folders,
            preset=flags.preset,
            force=flags.force,
            progress=look,
            **given,
        )
        tell_files(pipe, as_json)
        job = pipe.job(prompt, **settings)
        tell_preset(pipe, flags, job, as_json)
        decoder = None if preview_decoder is None else open_decoder(preview_decoder, pipe.model.spec.vae)
        found = pipe.plan_job(job, decoder)
    if as_json:
        emit_json(found.to_json())
    else:
        emit(table(found))


def _check_known(model: str, given: Mapping[str, str], weights: str | None) -> None:
    """UsageError for a model that is neither known nor here, and for transformers that are imagined and given."""
    known = model in load_models()
    if not known and not given and not user_path(model).exists():
        raise unknown_name("model", model, load_models(), where="--model")
    twice = [FLAGS[part] for part in ("high", "low", "single") if part in given]
    if weights is not None and (twice or not known):
        raise UsageError(
            f"--weights together with {' and '.join(twice) or f'--model {model}'}",
            expected="one or the other: --weights says how transformers are stored that are not here",
            advice="name the model alone, such as --model wan2.2-t2v-a14b, or leave --weights out",
        )


def table(plan: Plan) -> str:
    """The plan for people."""
    from lowvram.cli.progress import clock_time
    from lowvram.offload.budget import format_bytes

    machine, budget = plan.machine, plan.budget
    rows: list[tuple[str, ...]] = [("stage", "VRAM", "RAM", "from disk", "to device", "time")]
    for s in plan.stages:
        sizes = (format_bytes(n) for n in (s.vram, s.ram, s.disk_read, s.h2d))
        rows.append((s.name, *sizes, clock_time(s.seconds)))
    rows.append(
        ("whole job", format_bytes(plan.vram), format_bytes(plan.ram), "", "", clock_time(plan.seconds))
    )
    rates = "measured here" if machine.measured else "times are a forecast from published rates"
    head = (
        f"{machine.label}: budget {format_bytes(budget.vram)} VRAM, {format_bytes(budget.ram)} RAM ({rates})"
    )
    largest = max(plan.stages, key=lambda s: s.vram)
    claims = sorted(_merged(largest.claims).items(), key=lambda pair: -pair[1])
    parts = ", ".join(f"{name} {format_bytes(n)}" for name, n in claims)
    kept = ", ".join(f"{name} {format_bytes(n)}" for name, n in plan.saved.items() if n)
    choices = [f"{name}: {why}" for name, why in plan.choices.items()]
    choices += [f"saved: {format_bytes(sum(plan.saved.values()))} on disk while it runs ({kept})"]
    return "\n".join(
        [
            head,
            "",
            *aligned(rows, left=(0,)),
            "",
            f"peak ({largest.name}): {parts}",
            "",
            *choices,
            *plan.advice,
        ]
    )


def _merged(claims: Mapping[str, int]) -> dict[str, int]:
    """Claims with numbered ones (slots, residents) added up."""
    merged: dict[str, int] = {}
    for name, nbytes in claims.items():
        first = name.split(" ")[0]
        key = {"slot": "slots", "resident": "resident blocks"}.get(first, name)
        merged[key] = merged.get(key, 0) + nbytes
    return merged
