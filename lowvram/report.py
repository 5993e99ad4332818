"""Where memory, bytes and time went: the facts of a finished job, as one JSON object and as a short table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from lowvram.columns import aligned
from lowvram.drift import Colours, shift
from lowvram.offload.budget import format_bytes

SCHEMA = "lowvram.report/1"


@dataclass(frozen=True, slots=True)
class BlockReport:
    """What one block of a network took in all its visits. Bytes are integers, times are seconds."""

    name: str
    """Network and depth, such as "high.3"."""
    visits: int
    compute: float
    """From where its work could begin to where it ended."""
    disk_bytes: int
    h2d_bytes: int
    stalls: Mapping[str, float]
    """Seconds that computing waited for it, by cause: "disk", "copy"."""

    def to_json(self) -> dict[str, object]:
        """Plain values only."""
        return {
            "name": self.name,
            "visits": self.visits,
            "compute": self.compute,
            "disk_read": self.disk_bytes,
            "h2d": self.h2d_bytes,
            "stalls": dict(self.stalls),
        }


@dataclass(frozen=True, slots=True)
class StageReport:
    """What one stage took. Bytes are integers, times are seconds."""

    name: str
    seconds: float
    vram_predicted: int
    """Peak bytes that the plan stated."""
    vram_measured: int | None
    """Peak bytes that the device saw; None where nothing measures them."""
    disk_bytes: int
    """Bytes read from disk."""
    h2d_bytes: int
    """Bytes copied from host to device."""
    stalls: Mapping[str, float] = field(default_factory=dict)
    """Seconds that computing waited, by cause: "disk", "copy", "decode"."""
    ram_predicted: int = 0
    """Peak bytes of RAM that the plan stated."""
    ram_seen: int = 0
    """Most bytes that the process held when the stage and its steps began and ended; on a CPU with what stands for VRAM."""
    blocks: tuple[BlockReport, ...] = ()
    """Of the network that passed through the stage."""

    def to_json(self) -> dict[str, object]:
        """Plain values only."""
        return {
            "name": self.name,
            "seconds": self.seconds,
            "vram": {"predicted": self.vram_predicted, "measured": self.vram_measured},
            "ram": {"predicted": self.ram_predicted, "seen": self.ram_seen},
            "disk_read": self.disk_bytes,
            "h2d": self.h2d_bytes,
            "stalls": dict(self.stalls),
            "blocks": [block.to_json() for block in self.blocks],
        }


@dataclass(frozen=True, slots=True)
class Sample:
    """The memory at one moment. Bytes; seconds of the job's clock."""

    at: float
    stage: str
    vram: int
    """Claimed on the device."""
    ram: int
    """Claimed on the host."""
    rss: int
    """Resident set of the process."""


@dataclass(frozen=True, slots=True)
class Report:
    """What a whole job took, stage by stage in the order they ran."""

    stages: tuple[StageReport, ...]
    notes: tuple[str, ...] = ()
    """What went otherwise than planned."""
    samples: tuple[Sample, ...] = ()
    """The memory when stages and steps began and ended."""
    colours: tuple[Colours, ...] = ()
    """Of the segments of a driven video; the first one is always there, of the others those that this run made."""

    def __str__(self) -> str:
        return table(self)

    @property
    def seconds(self) -> float:
        """Time in all stages."""
        return sum(stage.seconds for stage in self.stages)

    @property
    def vram_predicted(self) -> int:
        """Highest peak that the plan stated for any stage, bytes."""
        return max((stage.vram_predicted for stage in self.stages), default=0)

    @property
    def vram_measured(self) -> int | None:
        """Highest peak measured in any stage, bytes; None unless every stage was measured."""
        peaks = [stage.vram_measured for stage in self.stages if stage.vram_measured is not None]
        return max(peaks, default=0) if len(peaks) == len(self.stages) else None

    @property
    def stalls(self) -> dict[str, float]:
        """Seconds waited in the whole job, by cause, longest first."""
        total: dict[str, float] = {}
        for stage in self.stages:
            for cause, seconds in stage.stalls.items():
                total[cause] = total.get(cause, 0.0) + seconds
        return dict(sorted(total.items(), key=lambda item: -item[1]))

    def to_json(self) -> dict[str, object]:
        """The report as one JSON object; sums and peaks are stated, so that a reader need not fold the stages."""
        return {
            "schema": SCHEMA,
            "seconds": self.seconds,
            "vram": {"predicted": self.vram_predicted, "measured": self.vram_measured},
            "disk_read": sum(stage.disk_bytes for stage in self.stages),
            "h2d": sum(stage.h2d_bytes for stage in self.stages),
            "stalls": self.stalls,
            "stages": [stage.to_json() for stage in self.stages],
            "notes": list(self.notes),
            "memory": [
                {
                    "seconds": s.at - self.samples[0].at,
                    "stage": s.stage,
                    "vram": s.vram,
                    "ram": s.ram,
                    "rss": s.rss,
                }
                for s in self.samples
            ],
            "colours": [_colours_json(c, self.colours[0]) for c in self.colours],
        }


def _colours_json(colours: Colours, first: Colours) -> dict[str, object]:
    """Levels 0..255 of red, green and blue, and by how many they differ from the first segment's."""
    mean, spread = shift(colours, first)
    return {
        "segment": colours.segment,
        "mean": list(colours.mean),
        "spread": list(colours.spread),
        "mean_shift": list(mean),
        "spread_shift": list(spread),
    }


def merged(report: Report) -> Report:
    """One line for stages of the same name, which ran once for each segment: times and bytes add up, peaks do not."""
    found: dict[str, StageReport] = {}
    for each in report.stages:
        known = found.get(each.name)
        found[each.name] = each if known is None else _together(known, each)
    return replace(report, stages=tuple(found.values()))


def _together(a: StageReport, b: StageReport) -> StageReport:
    peaks = [peak for peak in (a.vram_measured, b.vram_measured) if peak is not None]
    causes = dict.fromkeys([*a.stalls, *b.stalls])
    return StageReport(
        name=a.name,
        seconds=a.seconds + b.seconds,
        vram_predicted=max(a.vram_predicted, b.vram_predicted),
        vram_measured=max(peaks) if len(peaks) == 2 else None,
        disk_bytes=a.disk_bytes + b.disk_bytes,
        h2d_bytes=a.h2d_bytes + b.h2d_bytes,
        stalls={cause: a.stalls.get(cause, 0.0) + b.stalls.get(cause, 0.0) for cause in causes},
        ram_predicted=max(a.ram_predicted, b.ram_predicted),
        ram_seen=max(a.ram_seen, b.ram_seen),
        blocks=_added(a.blocks, b.blocks),
    )


def _added(a: tuple[BlockReport, ...], b: tuple[BlockReport, ...]) -> tuple[BlockReport, ...]:
    """The same blocks, visited in both."""
    found = {block.name: block for block in a}
    for block in b:
        known = found.get(block.name)
        if known is not None:
            block = BlockReport(
                block.name,
                known.visits + block.visits,
                known.compute + block.compute,
                known.disk_bytes + block.disk_bytes,
                known.h2d_bytes + block.h2d_bytes,
                {cause: known.stalls.get(cause, 0.0) + s for cause, s in block.stalls.items()},
            )
        found[block.name] = block
    return tuple(found.values())


def table(report: Report) -> str:
    """The report for people: a heading, one line per stage, a line for the whole; no final newline."""
    whole = StageReport(
        name="whole job",
        seconds=report.seconds,
        vram_predicted=report.vram_predicted,
        vram_measured=report.vram_measured,
        disk_bytes=sum(stage.disk_bytes for stage in report.stages),
        h2d_bytes=sum(stage.h2d_bytes for stage in report.stages),
        stalls=report.stalls,
    )
    heading = ("stage", "time", "peak VRAM", "planned", "disk", "to device", "waited")
    rows = [heading, *(_row(stage) for stage in (*report.stages, whole))]
    return "\n".join([*aligned(rows, left=(0, len(heading) - 1)), *report.notes])


def _row(stage: StageReport) -> tuple[str, ...]:
    stalls = sorted(stage.stalls.items(), key=lambda item: -item[1])
    waited = ", ".join(f"{cause} {seconds:.1f} s" for cause, seconds in stalls if seconds >= 0.05)
    return (
        stage.name,
        f"{stage.seconds:.1f} s",
        "-" if stage.vram_measured is None else format_bytes(stage.vram_measured),
        format_bytes(stage.vram_predicted),
        format_bytes(stage.disk_bytes),
        format_bytes(stage.h2d_bytes),
        waited or "-",
    )
