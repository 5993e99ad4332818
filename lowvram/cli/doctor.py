"""lowvram doctor: what this machine can do, what is wrong with it, and what to do about that."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lowvram.cli import options as o
from lowvram.errors import UsageError

if TYPE_CHECKING:
    from lowvram.doctor import Findings
    from lowvram.machine import Machine


def doctor(
    folder: Annotated[
        Path | None,
        typer.Option(
            "--folder",
            metavar="FOLDER",
            help="Where the models lie: the disk that is measured; this one if left out.",
        ),
    ] = None,
    device: o.Device = None,
    machine: Annotated[
        str | None,
        typer.Option(
            "--machine", metavar="NAME", help="Show what a plan assumes of a card, such as rtx4090."
        ),
    ] = None,
    as_json: o.Json = False,
) -> None:
    """Measure this machine, and say what is good and bad. Plans use what was measured."""
    import time

    from lowvram.cli.console import emit, emit_json, say
    from lowvram.machine import machine_profile, rates_path, save_rates

    if machine is not None:
        for flag, given in (("--folder", folder), ("--device", device)):
            if given is not None:
                raise UsageError(
                    f"{flag} {given} beside --machine {machine}",
                    expected="one or the other: a card of the table is not measured",
                    advice=f"leave {flag} out to see that card, or --machine to measure this machine",
                )
        card = machine_profile(machine)
        if as_json:
            emit_json({"schema": "lowvram.profile/1"} | dataclasses.asdict(card))
        else:
            emit(profile(card))
        return
    folder = folder or Path(".")
    if not folder.is_dir():
        raise UsageError(
            "no such folder", where=f"--folder {folder}", advice="give the folder of your models"
        )
    from lowvram.caps import check_device
    from lowvram.doctor import examine
    from lowvram.survey import identify

    check_device(device)
    place = identify(device)
    found = examine(place, folder.absolute(), time.perf_counter)
    kept = rates_path(place.kind)
    save_rates(kept, found.rates)
    if as_json:
        emit_json(found.to_json())
        return
    emit(table(found))
    say(f"kept in {kept} until the device, its driver or torch changes; plans use it")


def table(found: Findings) -> str:
    """The findings for people: a line each, advice below what is not good."""
    width = max(len(reading.name) for reading in found.readings)
    lines = []
    for reading in found.readings:
        lines.append(f"{reading.name.ljust(width)}  {reading.shown().ljust(24)}  {reading.verdict}".rstrip())
        if reading.advice:
            lines.append(f"{'':{width}}  -> {reading.advice}")
    bad = sum(reading.verdict == "bad" for reading in found.readings)
    fair = sum(reading.verdict == "fair" for reading in found.readings)
    verdict = "nothing is wrong" if not bad + fair else f"{bad} bad, {fair} fair: see the arrows"
    return "\n".join([*lines, "", verdict])


def profile(machine: Machine) -> str:
    """What a plan assumes of a card that is not here, and why."""
    from lowvram.offload.budget import format_bytes

    shown = {
        "vram": format_bytes(machine.vram),
        "ram": format_bytes(machine.ram),
        "matmul": f"{machine.matmul / 1e12:.3g} TFLOP/s",
        "attention": f"{machine.attention / 1e12:.3g} TFLOP/s",
        "link": f"{format_bytes(int(machine.link))}/s",
        "disk": f"{format_bytes(int(machine.disk))}/s",
        "context": format_bytes(machine.context),
        "workspaces": format_bytes(machine.workspaces),
    }
    rows = [f"{name.ljust(10)}  {value.ljust(14)}  {machine.sources[name]}" for name, value in shown.items()]
    return "\n".join([f"{machine.label} ({machine.arch}), not measured here", *rows])
