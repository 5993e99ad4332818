"""What every stage of a running job shares: the device, the plan, the clock, and who wants to hear of progress."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import psutil
import torch

from lowvram.errors import OutOfMemoryError
from lowvram.model import Group, Model
from lowvram.offload.budget import format_bytes
from lowvram.offload.device import Device, lost
from lowvram.offload.io import FileReader
from lowvram.offload.kept import KeptBytes
from lowvram.offload.placement import BlockId, Placement, block_name
from lowvram.offload.slab import BlockLayout, as_bytes, build_layout, carve, read_runs
from lowvram.offload.stream import BlockStats, BlockStream, Views
from lowvram.planning.plan import Plan, StagePlan
from lowvram.planning.visits import all_on_disk
from lowvram.preview import Decoder, Preview
from lowvram.quant import fused
from lowvram.quant.encodings.base import Encoding
from lowvram.quant.linear import Params
from lowvram.report import BlockReport, Sample, StageReport
from lowvram.stages.room import check_ram, check_vram
from lowvram.stages.weights import to_params


def resident_set() -> int:
    """Bytes of RAM that this process holds in fact."""
    return int(psutil.Process().memory_info().rss)


class Listener(Protocol):
    """Is told of the progress of a job."""

    def begin(self, stage: str, done: int = 0) -> None:
        """A stage starts. done: its steps that were done before, and are not told again."""

    def step(self, vram: int | None = None) -> None:
        """One more step of it is done. vram: bytes that are claimed on the device now."""

    def end(self) -> None:
        """It is done; not told of a stage that fails."""

    def note(self, text: str) -> None:
        """A line for people: something went otherwise than usual."""


class Silent:
    """A listener that ignores what it is told."""

    def begin(self, stage: str, done: int = 0) -> None:
        return

    def step(self, vram: int | None = None) -> None:
        return

    def end(self) -> None:
        return

    def note(self, text: str) -> None:
        return


@dataclass(slots=True)
class Traffic:
    """What a stage moved, added up from its streams."""

    blocks: dict[BlockId, BlockStats] = field(default_factory=dict)

    def add(self, stream: BlockStream) -> None:
        """What a stream moved, and what its blocks took: all of it once the stream is closed."""
        for block, stats in stream.stats().items():
            self.blocks[block] = self.blocks.get(block, BlockStats()) + stats

    @property
    def total(self) -> BlockStats:
        """Of all blocks."""
        return sum(self.blocks.values(), BlockStats())

    def reports(self) -> tuple[BlockReport, ...]:
        """Block by block, if there are several."""
        if len(self.blocks) < 2:
            return ()
        return tuple(
            BlockReport(
                block_name(block),
                s.visits,
                s.compute,
                s.disk_bytes,
                s.device_bytes,
                {"disk": s.disk_stall, "copy": s.copy_stall},
            )
            for block, s in sorted(self.blocks.items())
        )


@dataclass(slots=True)
class Run:
    """A job under way."""

    device: Device
    plan: Plan
    listener: Listener = field(default_factory=Silent)
    clock: Callable[[], float] = time.monotonic
    open_reader: Callable[[Path], FileReader] = FileReader
    reports: list[StageReport] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What went otherwise than planned."""
    samples: list[Sample] = field(default_factory=list)
    preview: Preview | None = None
    """Is shown what the video will be, every so many steps."""
    by_kernel: frozenset[Encoding] = frozenset()
    """Encodings that kernels decode here."""
    kept: KeptBytes | None = None
    """Weights that stay in RAM between jobs, beside what the plan counts."""
    rss: Callable[[], int] = resident_set
    """Bytes of RAM that this process holds, without what is kept."""
    began: int = field(default_factory=resident_set)
    """`rss` when the job began."""
    under_way: StagePlan | None = None
    """The stage that is in the middle of its work."""
    alone: bool = True
    """Whether all RAM that the process takes meanwhile is the job's own. False where a caller may keep its frames."""

    @property
    def decoder(self) -> Decoder | None:
        """What makes previews, if not a linear map."""
        return None if self.preview is None else self.preview.decoder

    def tell(self, note: str) -> None:
        """Something that went otherwise than planned, or than usual: said now, and in the report."""
        self.notes.append(note)
        self.listener.note(note)

    def step(self, stage: str) -> None:
        """A step of `stage` is over."""
        self._sample(stage)
        self.listener.step(self.device.ledger.used)

    def _sample(self, stage: str) -> None:
        used = self.device.ledger.used, self.device.ram.used
        self.samples.append(Sample(self.clock(), stage, *used, self.rss()))

    def check_room(self, stage: str) -> None:
        """SqueezedError if the memory that `stage` counts on is no longer there."""
        check_vram(self.device, self.plan.stage(stage))
        self.check_ram()

    def check_ram(self) -> None:
        """SqueezedError if the process holds more RAM than its cap, in the middle of a stage."""
        if self.alone and self.under_way is not None:
            check_ram(self.device, self.under_way, self.rss(), self.began)

    @contextmanager
    def stage(self, name: str, done: int = 0) -> Iterator[tuple[ExitStack, Traffic]]:
        """A stage inside its claims, of which so many steps are done. Yields a stack that frees what the stage holds, and
        its traffic.

        The claims that no buffer of a stream takes are taken here, so that the ledger always shows the truth.
        """
        planned = self.plan.stage(name)
        self.device.release_unused()
        began, traffic, first = self.clock(), Traffic(), len(self.samples)
        self.listener.begin(name, done)
        with ExitStack() as stack:
            for claim, nbytes in planned.claims.items():
                if not _streamed(claim) and claim not in self.device.ledger.claims:
                    stack.enter_context(self.device.ledger.claim(claim, nbytes))
            for claim, nbytes in planned.ram_claims.items():
                if not _streamed(claim):
                    stack.enter_context(self.device.ram.claim(claim, nbytes))
            self._sample(name)
            self.under_way = planned
            try:
                yield stack, traffic
                self._sample(name)
            except RuntimeError as error:
                match self.device.what_failed(error):
                    case "memory":
                        raise self._lack(planned) from error
                    case "device":
                        raise lost(error, f"stage {name}") from error
                raise
            finally:
                self.under_way = None
        moved = traffic.total
        self.reports.append(
            StageReport(
                name=name,
                seconds=self.clock() - began,
                vram_predicted=planned.vram,
                vram_measured=self.measured_peak(),
                disk_bytes=moved.disk_bytes,
                h2d_bytes=moved.device_bytes,
                stalls={"disk": moved.disk_stall, "copy": moved.copy_stall},
                ram_predicted=planned.ram,
                ram_seen=max(sample.rss for sample in self.samples[first:]),
                blocks=traffic.reports(),
            )
        )
        self.listener.end()

    def _lack(self, planned: StagePlan) -> OutOfMemoryError:
        """What is told when something beside the named buffers found no room on the device."""
        return OutOfMemoryError(
            f"stage {planned.name} found no room, although {format_bytes(planned.vram)} were planned for it",
            where=self.device.ledger.what,
            expected=f"room for its scratch beside {format_bytes(self.device.ledger.used)} of claims",
            advice="close other programs that use the GPU, or give a smaller --vram",
        )

    def measured_peak(self) -> int | None:
        """Peak of the device's allocator since the last call, with the claimed context; None on a CPU."""
        if self.device.kind != "cuda":
            return None
        peak = torch.cuda.max_memory_reserved(self.device.torch_device)
        torch.cuda.reset_peak_memory_stats(self.device.torch_device)
        return int(peak) + self.plan.machine.context

    @contextmanager
    def loaded(self, name: str, group: Group, traffic: Traffic) -> Iterator[Params]:
        """A group of tensors on the device for as long as the block lasts."""
        with self.carried(name, group, traffic) as views:
            yield self.params(group, views)

    @contextmanager
    def resident(self, name: str, group: Group) -> Iterator[Params]:
        """A small group of tensors on the device, beside any stream, for as long as the block lasts."""
        layout = build_layout(group.refs)
        place = self.device.alloc(f"{name} weights", layout.nbytes)
        try:
            passing = self.device.host_alloc(f"ram {name}", layout.nbytes)
            try:
                for read in read_runs(layout):
                    with self.open_reader(read.file) as reader:
                        part = passing.tensor[read.slab_offset : read.slab_offset + read.nbytes]
                        reader.read_into(read.file_offset, as_bytes(part))
                self.device.copy_async(place.tensor, passing.tensor).synchronize()
            finally:
                passing.free()
            yield self.params(group, carve(layout, place.tensor))
        finally:
            place.free()

    def choose_decoders(self, model: Model) -> None:
        """Try the kernels that decode the weights of a model, and note where torch has to do it."""
        dtypes = dict.fromkeys((self.plan.dtype, torch.float32))
        self.by_kernel, notes = fused.choose(
            model.encodings(), self.device.torch_device, self.plan.machine.arch, tuple(dtypes)
        )
        self.notes += notes

    def params(self, group: Group, views: Views) -> Params:
        """The parameters of a group whose parts are `views`."""
        return to_params(group, views, self.by_kernel)

    @contextmanager
    def streamed(self, layouts: Mapping[BlockId, BlockLayout], traffic: Traffic) -> Iterator[BlockStream]:
        """Blocks that come from disk one after the other, each once; see `lowvram.planning.visits.all_on_disk`."""
        places = all_on_disk(layouts)
        with BlockStream(
            layouts, places, self.device, self.open_reader, list(layouts), clock=self.clock
        ) as stream:
            yield stream
        traffic.add(stream)

    @contextmanager
    def carried(self, name: str, group: Group, traffic: Traffic) -> Iterator[Views]:
        """The stored bytes of a group on the device for as long as the block lasts: a stream of one visit."""
        block = (name, 0)
        with BlockStream(
            {block: build_layout(group.refs)},
            Placement({block: "disk"}, slots=1, ring=1),
            self.device,
            self.open_reader,
            [block],
            clock=self.clock,
            kept=self.kept,
        ) as stream:
            _, views = next(stream)
            yield views
        traffic.add(stream)


def _streamed(claim: str) -> bool:
    """Whether a block stream takes this claim itself."""
    return claim.split(" ")[0] in ("slot", "ring", "resident", "ram") or claim.endswith("weights")
