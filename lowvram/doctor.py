"""What is good and what is bad about a machine, and what to do about it: measurements with a verdict each."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch

from lowvram import survey
from lowvram.machine import Rates, machine_names, machine_profile
from lowvram.offload.budget import format_bytes
from lowvram.offload.limits import HostLimits, host_limits
from lowvram.survey import CONTEXT, WORKSPACES, Clock, Place
from lowvram.triton_kernels import toolchain

SCHEMA = "lowvram.doctor/1"
Verdict = Literal["good", "fair", "bad", ""]

OPTIONAL = ("triton", "triton-windows", "sageattention", "flash-attn", "comfy-kitchen", "xformers")
"""Packages that make some cards faster, probed and never required."""


@dataclass(frozen=True, slots=True)
class Reading:
    """One thing that was measured or looked up."""

    name: str
    value: int | float | str | None
    """None: it could not be measured here."""
    unit: Literal["bytes", "bytes/s", "FLOP/s", ""]
    verdict: Verdict = ""
    """Empty where there is nothing to judge."""
    advice: str = ""

    def shown(self) -> str:
        """The value for people."""
        if self.value is None:
            return "not available"
        if isinstance(self.value, str):
            return self.value
        if self.unit == "FLOP/s":
            scale, name = (1e12, "TFLOP/s") if self.value >= 1e12 else (1e9, "GFLOP/s")
            return f"{self.value / scale:.3g} {name}"
        return format_bytes(int(self.value)) + ("/s" if self.unit == "bytes/s" else "")


@dataclass(frozen=True, slots=True)
class Findings:
    """A machine, examined."""

    rates: Rates
    """What the planner needs of it."""
    readings: tuple[Reading, ...]

    def to_json(self) -> dict[str, Any]:
        """The object of `doctor --json`: bytes, bytes per second, operations per second."""
        return {
            "schema": SCHEMA,
            "device": self.rates.device,
            "readings": [
                {"name": r.name, "value": r.value, "unit": r.unit, "verdict": r.verdict, "advice": r.advice}
                for r in self.readings
            ],
        }


def examine(place: Place, folder: Path, clock: Clock) -> Findings:
    """Measure this machine; `folder` is where the models lie. StorageError if that cannot be read or written."""
    arithmetic = list(_arithmetic(place, clock))
    link, link_readings = _link(place, clock)
    disk, disk_readings = _disk(folder, clock)
    measured = survey.context_bytes() if place.kind == "cuda" else (0, 0)
    context, workspaces = measured or (CONTEXT, WORKSPACES)
    by_name = {reading.name: reading.value for reading in arithmetic}
    half = "bf16" if place.kind == "cuda" else "fp32"
    share = 1.0 if place.kind == "cuda" else 0.5
    rates = Rates(
        device=place.label,
        driver=place.driver,
        torch=place.torch_version,
        matmul=float(by_name[f"multiply {half}"] or 1) * share,
        attention=float(by_name["attention"] or 1) * share,
        link=link,
        disk=disk,
        disk_folder=str(folder),
        context=context,
        workspaces=workspaces,
    )
    readings = (
        *_software(place),
        *_memory(place, host_limits(), rates.context),
        *arithmetic,
        *link_readings,
        *disk_readings,
    )
    return Findings(rates, readings)


def _software(place: Place) -> Iterator[Reading]:
    yield Reading("device", f"{place.label} ({place.arch})" if place.arch else place.label, "")
    if place.kind == "cpu":
        built = torch.version.cuda
        advice = "no CUDA device: " + (
            "check the driver with nvidia-smi" if built else "this torch is built without CUDA"
        )
        yield Reading("driver", None, "", "fair", advice)
    else:
        yield Reading("driver", place.driver, "")
    yield Reading("torch", place.torch_version, "")
    found = {name: text for name in OPTIONAL if (text := _version(name))}
    if place.kind == "cuda" and not {"triton", "triton-windows"} & found.keys():
        yield Reading(
            "triton", None, "", "fair", "install triton (Linux) or triton-windows for the fast kernels"
        )
    lacking = toolchain.lack() if place.kind == "cuda" else ""
    for name, text in found.items():
        if name == "triton" and lacking:
            yield Reading(name, text, "", "fair", f"{lacking}: it starts no kernel without")
        else:
            yield Reading(name, text, "")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _memory(place: Place, limits: HostLimits, context: int) -> Iterator[Reading]:
    if place.kind == "cuda":
        free, total = torch.cuda.mem_get_info()
        crowded = free < 0.8 * total
        yield Reading("VRAM", int(total), "bytes")
        yield Reading(
            "VRAM free", int(free), "bytes", "fair" if crowded else "good",
            "close other programs that use the GPU" if crowded else "",
        )  # fmt: skip
        yield Reading("CUDA context", context, "bytes")
    yield Reading("RAM", limits.total, "bytes")
    low = limits.usable < 8 * 10**9
    yield Reading(
        "RAM usable", limits.usable, "bytes", "bad" if low else "good",
        "a 14B model wants 8 GB: close other programs" if low else "",
    )  # fmt: skip
    if limits.group_limit is not None and limits.group_limit < limits.total:
        tight = limits.group_limit < 0.5 * limits.total
        yield Reading(
            "control group limit", limits.group_limit, "bytes", "fair" if tight else "",
            "the container or session gets less than half of the RAM: raise its limit" if tight else "",
        )  # fmt: skip
    if limits.commit_room is not None:
        tight = limits.commit_room < limits.available
        yield Reading(
            "commit limit left", limits.commit_room, "bytes", "fair" if tight else "",
            "enlarge the page file (Windows) or vm.overcommit_ratio (Linux)" if tight else "",
        )  # fmt: skip
    if limits.locked_limit is not None:
        yield Reading("mlock limit", limits.locked_limit, "bytes")
    if limits.wsl:
        yield Reading(
            "WSL",
            "about half of the RAM can be pinned",
            "",
            "fair",
            "raise memory= in .wslconfig, or use Linux",
        )


def _arithmetic(place: Place, clock: Clock) -> Iterator[Reading]:
    small = place.kind == "cpu"
    n = 8192 if not small else 256
    expected = published_matmul(place)
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        rate = survey.matmul_rate(place, dtype, clock, n)
        slow = name == "bf16" and expected and rate < 0.6 * expected
        yield Reading(
            f"multiply {name}", rate, "FLOP/s", "fair" if slow else "good" if name == "bf16" and expected else "",
            "less than 60 % of what this card should do: check power limit, heat, other programs" if slow else "",
        )  # fmt: skip
    yield Reading("multiply int8", survey.int8_rate(place, clock, n), "FLOP/s")
    dtype = torch.float32 if small else torch.bfloat16
    tokens, heads = (512, 4) if small else (16384, 8)
    yield Reading("attention", survey.attention_rate(place, dtype, clock, tokens, heads), "FLOP/s")
    yield Reading("copy inside the device", survey.device_copy_rate(place, clock, _copied(place)), "bytes/s")


def _copied(place: Place) -> int:
    """Bytes of a timed copy: well above any cache."""
    return 64 << 20 if place.kind == "cpu" else 512 << 20


def published_matmul(place: Place) -> float:
    """FLOP/s that the table of cards expects of this one; 0 if it is not there.

    The whole name counts: what begins alike ("Ti", "Laptop GPU") is another chip.
    """
    called = place.label.removeprefix("NVIDIA ")
    cards = (machine_profile(name) for name in machine_names())
    return next((card.matmul for card in cards if re.sub(r" \d+ GB$", "", card.label) == called), 0.0)


def _link(place: Place, clock: Clock) -> tuple[float, list[Reading]]:
    pageable, _ = survey.copy_rate(place, clock, pinned=False, nbytes=_copied(place))
    if place.kind == "cpu":
        return pageable, [Reading("copy in RAM", pageable, "bytes/s")]
    pinned, refused = survey.copy_rate(place, clock, pinned=True, nbytes=_copied(place))
    verdict, advice = _judge(
        pinned, 10e9, 5e9, "check that the card sits in a slot with 16 lanes of PCIe 4 or newer"
    )
    if refused:
        verdict, advice = (
            "bad",
            f"memory cannot be pinned ({refused}): raise the limits of the container or WSL",
        )
    readings = [
        Reading("copy from pinned RAM", pinned, "bytes/s", verdict, advice),
        Reading("copy from pageable RAM", pageable, "bytes/s"),
    ]
    return pinned, readings


def _disk(folder: Path, clock: Clock) -> tuple[float, list[Reading]]:
    direct = survey.disk_rate(folder, clock, direct=True)
    buffered = survey.disk_rate(folder, clock, direct=False)
    best = max(direct or 0.0, buffered or 0.0) or 1.0
    verdict, advice = _judge(best, 1e9, 0.4e9, "keep the models on an NVMe drive")
    readings = [
        Reading("disk, direct reads", direct, "bytes/s"),
        Reading("disk, buffered reads", buffered, "bytes/s", verdict, advice),
    ]
    return best, readings


def _judge(rate: float, good: float, fair: float, advice: str) -> tuple[Verdict, str]:
    if rate >= good:
        return "good", ""
    return ("fair" if rate >= fair else "bad"), advice
