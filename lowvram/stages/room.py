"""Whether the memory that a plan counts on is still there: asked while a stage is under way, before anything fails.

And how to get back what an attempt that failed still holds.
"""

from __future__ import annotations

from typing import TypeVar

from lowvram.errors import OutOfMemoryError
from lowvram.offload.budget import format_bytes
from lowvram.offload.device import Device
from lowvram.planning.facts import PROGRAM_RAM
from lowvram.planning.plan import StagePlan

E = TypeVar("E", bound=BaseException)

_TOLERATED = 64
"""A plan goes on with a 64th less than it counted on: other programs' memory is never quite still, and a plan is up to
3 % above what will be measured."""

GROWTH = 100_000_000
"""Bytes that a program grows by while a job runs, whatever the job: libraries that are loaded when they are needed, and
what its heap keeps. 46 MB were seen with torch 2.13."""


class SqueezedError(OutOfMemoryError):
    """There is less memory than the plan of a stage counts on, found before the stage ran out of it.

    excess   bytes of RAM that the process holds above its cap; 0 if it is VRAM that is short
    """

    def __init__(self, found: str, *, where: str, expected: str, advice: str, excess: int = 0) -> None:
        self.excess = excess
        super().__init__(found, where=where, expected=expected, advice=advice)


def check_vram(device: Device, planned: StagePlan) -> None:
    """SqueezedError if the device no longer has room for `planned`."""
    vram = device.memory_left()
    if vram < planned.vram - planned.vram // _TOLERATED:
        raise SqueezedError(
            f"other programs take VRAM: {format_bytes(vram)} are left",
            where=f"stage {planned.name}",
            expected=f"the {format_bytes(planned.vram)} that were planned",
            advice="close other programs that use the GPU, then continue with `lowvram resume last`",
        )


def check_ram(device: Device, planned: StagePlan, rss: int, began: int) -> None:
    """SqueezedError if this process holds more RAM than its cap in the stage `planned`.

    rss, began    bytes that this process holds now, and held when the job began: what a program around this one had
                  before is not the job's, beyond what the job counts for the program itself
    """
    cap = device.ram.cap
    if cap is None:
        return
    cap += max(0, began + GROWTH - PROGRAM_RAM)
    if device.kind == "cpu":  # what stands for VRAM lies in RAM as well
        cap += planned.vram
    if rss > cap:
        raise SqueezedError(
            f"this process holds {format_bytes(rss)} of RAM, of which {format_bytes(device.ram.used)} are accounted for",
            where=f"stage {planned.name}",
            expected=f"at most {format_bytes(cap)}",
            advice="give a larger --ram, then continue with `lowvram resume last`; if that is not it, report this",
            excess=rss - cap,
        )


def without_frames(error: E) -> E:
    """The error without traceback and causes, for work that is tried again: their frames hold the tensors of what failed.

    Call it inside the handler and go on outside: as long as the handler runs, the interpreter holds them too.
    """
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)
