"""Whether the memory that a plan counts on is still there: asked between steps, before anything fails."""

from __future__ import annotations

from lowvram.errors import OutOfMemoryError
from lowvram.offload.budget import format_bytes
from lowvram.offload.device import Device
from lowvram.planning.facts import PROGRAM_RAM
from lowvram.planning.plan import StagePlan

_TOLERATED = 64
"""A plan goes on with a 64th less than it counted on: other programs' memory is never quite still, and a plan is up to
3 % above what will be measured."""


class SqueezedError(OutOfMemoryError):
    """There is less memory than the plan of a stage counts on, found before the stage ran out of it.

    ram    bytes of RAM that a plan may take from now on; None if that is not what is short
    """

    def __init__(self, found: str, *, where: str, expected: str, advice: str, ram: int | None = None) -> None:
        self.ram = ram
        super().__init__(found, where=where, expected=expected, advice=advice)


def check_room(device: Device, planned: StagePlan, rss: int, began: int) -> None:
    """SqueezedError if the device no longer has room for `planned`, or if this process holds more RAM than its cap.

    rss, began    bytes that this process holds now, and held when the job began: what a program around this one had
                  before is not the job's
    """
    vram, cap = device.memory_left(), device.ram.cap
    if vram < planned.vram - planned.vram // _TOLERATED:
        raise SqueezedError(
            f"other programs take VRAM: {format_bytes(vram)} are left",
            where=f"stage {planned.name}",
            expected=f"the {format_bytes(planned.vram)} that were planned",
            advice="close other programs that use the GPU, then continue with `lowvram resume last`",
            ram=None,
        )
    if cap is None:
        return
    cap += max(0, began - PROGRAM_RAM)
    if device.kind == "cpu":  # what stands for VRAM lies in RAM as well
        cap += planned.vram
    if rss > cap:
        raise SqueezedError(
            f"this process holds {format_bytes(rss)} of RAM, of which {format_bytes(device.ram.used)} are accounted for",
            where=f"stage {planned.name}",
            expected=f"at most {format_bytes(cap)}",
            advice="give a larger --ram, then continue with `lowvram resume last`; if that is not it, report this",
            ram=planned.ram - (rss - cap),
        )
