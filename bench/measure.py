"""One trial, measured in this process: `python -m lowvram.bench.measure REQUEST` prints a Measurement as JSON.

A process of its own for each trial: its peak of RAM, its CUDA context and its allocator are then the trial's alone.
"""

from __future__ import annotations

import hashlib
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import psutil  # type: ignore[import-untyped]
import torch
from torch import Tensor

from lowvram.api import Pipeline, Runtime, Video
from lowvram.bench.ballast import ballast
from lowvram.bench.cases import PROMPT, Case, Trial
from lowvram.bench.disk import forget, remember
from lowvram.bench.results import Measurement, Stage
from lowvram.bench.work import Work, case_work
from lowvram.job import Job
from lowvram.offload.device import Device
from lowvram.offload.estimate import Tracker, track
from lowvram.offload.io import read_kernel_text
from lowvram.planning.plan import Plan
from lowvram.quant.spec import numel
from lowvram.report import Sample, StageReport

Clock = Callable[[], float]


class Request(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """What a process is asked to measure."""

    trial: Trial
    files: dict[str, str]
    """Of the model, by part; none for the embedded one."""
    device: str | None
    repeats: int
    ballast: bool = False


class Watched(Runtime):
    """A runtime that remembers what its devices claimed."""

    def __init__(self, vram: int, ram: int, device: str | None) -> None:
        super().__init__(vram, ram, device, cache=False)
        self.host_claims: list[Mapping[str, int]] = []

    @contextmanager
    def device(self) -> Iterator[Device]:
        with super().device() as device:
            try:
                yield device
            finally:
                self.host_claims.append(device.ram.peak_claims)

    @property
    def pinned(self) -> int:
        """The most bytes of host memory that were claimed for copies."""
        kinds = ("ring", "ram")
        return max(
            (sum(n for c, n in claims.items() if c.split(" ")[0] in kinds) for claims in self.host_claims),
            default=0,
        )


@dataclass(slots=True)
class Stopwatch:
    """A listener that notes when steps end and what the driver has given away."""

    clock: Clock
    cuda: bool
    tracker: Tracker | None = None
    """Counts tensors where no allocator does."""
    waiting: int = 0
    """Bytes that it counts and that are the host's: the noise that a job begins with, then the latent it ends with."""
    peaks: dict[str, int] = field(default_factory=dict)
    """By stage, what it counted."""
    at: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)
    stage: str = ""
    least_free: int | None = None

    def begin(self, stage: str, done: int = 0) -> None:
        self.stage = stage
        self.at.append(self.clock())
        if self.tracker is not None:
            self.tracker.restart()

    def step(self, vram: int | None = None) -> None:
        now = self.clock()
        if self.stage == "denoise":
            self.steps.append(now - self.at[-1])
        self.at.append(now)
        self._look()

    def end(self) -> None:
        self._look()
        if self.tracker is not None:
            self.peaks[self.stage] = self.tracker.peak().peak_bytes - self.waiting

    def note(self, text: str) -> None:
        return

    def _look(self) -> None:
        if self.cuda:
            free, _ = torch.cuda.mem_get_info()
            self.least_free = free if self.least_free is None else min(self.least_free, free)


@dataclass(frozen=True, slots=True)
class Round:
    """The case, done once."""

    seconds: float
    watch: Stopwatch
    stages: tuple[StageReport, ...]
    samples: tuple[Sample, ...]
    checksum: str


def measure(request: Request, clock: Clock = time.perf_counter) -> Measurement:
    """Do the trial `repeats` times after one to warm up; with 0 only once. Errors are those of the job."""
    trial, case = request.trial, request.trial.case
    with ExitStack() as stack:
        if request.ballast:
            stack.enter_context(ballast(trial.vram))
        cuda = request.device != "cpu" and torch.cuda.is_available()
        before = torch.cuda.mem_get_info()[0] if cuda else 0
        runtime = Watched(trial.vram, trial.ram, request.device)
        files: dict[str, Any] = dict(request.files)
        pipe = runtime.load(case.model, **files)
        job = pipe.job(PROMPT, **case.settings())
        plan = pipe.plan_job(job)
        paths = [Path(path) for path in dict.fromkeys(job.files.values())]
        for path in paths if trial.placement == "disk warm" else ():
            remember(path)
        counted: dict[str, int] = {}
        rounds = []
        for n in range(request.repeats + 1):
            for path in paths if trial.placement == "disk cold" else ():
                forget(path)
            if n == 0 and request.repeats and not cuda:
                # The round to warm up is where a CPU's tensors are counted: that takes time.
                with track() as tracker:
                    counted = do_case(pipe, case, job, plan, Stopwatch(clock, cuda, tracker)).watch.peaks
            else:
                rounds.append(do_case(pipe, case, job, plan, Stopwatch(clock, cuda)))
        if cuda and request.repeats:
            rounds.pop(0)
    last = rounds[-1]
    frees = [r.watch.least_free for r in rounds if r.watch.least_free is not None]
    seconds = statistics.median(r.seconds for r in rounds)
    machine, work = runtime.machine, case_work(case, pipe.model.spec)
    peaks = [s.vram_measured for s in last.stages if s.vram_measured is not None]
    return Measurement(
        case=case.name,
        model=case.model,
        weights=case.weights,
        width=case.width,
        height=case.height,
        frames=case.frames,
        placement=trial.placement,
        vram_budget=trial.vram,
        ram_budget=trial.ram,
        ballast=request.ballast,
        blocks=plan.blocks(),
        seconds=seconds,
        runs=[r.seconds for r in rounds],
        steps=last.watch.steps,
        handover=handover(last.watch.steps, job.schedule.experts),
        vram_predicted=max(plan.stage(s.name).vram for s in last.stages),
        vram_allocated=max(peaks or counted.values(), default=None),
        vram_driver=before - min(frees) if frees else None,
        ram_predicted=plan.ram,
        rss=peak_rss(),
        pinned=runtime.pinned,
        stages=[stage_of(s, counted.get(s.name)) for s in last.stages],
        samples=list(last.samples),
        flops=work.flops,
        fraction=fraction(work, seconds, machine.matmul, machine.attention),
        checksum=last.checksum,
    )


def do_case(pipe: Pipeline, case: Case, job: Job, plan: Plan, watch: Stopwatch) -> Round:
    """The case once; `seconds` are those of the part it is about."""
    watch.waiting = 4 * numel(pipe.model.spec.denoised_shape(job.width, job.height, job.frames))
    if case.what == "decode":
        latent = torch.randn(
            pipe.model.spec.latent_shape(job.width, job.height, job.frames),
            generator=torch.Generator().manual_seed(job.seed),
        )
        video = Video(pipe, job, plan, latent, watch, watch.clock, [])
    else:
        video = pipe.run(job, listener=watch, clock=watch.clock, plan=plan)
    digest = hashlib.sha256(_bytes(video.latent) if case.what != "decode" else b"")
    if case.what in ("decode", "pair", "job"):
        for frame in video.frames():
            digest.update(frame.tobytes())
    stages: tuple[StageReport, ...] = tuple(video.reports)
    by_name = {stage.name: stage.seconds for stage in stages}
    match case.what:
        case "text" | "decode":
            seconds = by_name[case.what]
        case "forward" | "step":
            seconds = sum(watch.steps)
        case "handover":
            seconds = handover(watch.steps, job.schedule.experts) or 0.0
        case "pair" | "job":
            seconds = sum(by_name.values())
    return Round(seconds, watch, stages, tuple(video.samples), digest.hexdigest()[:16])


def handover(steps: list[float], experts: tuple[int, ...]) -> float | None:
    """How much longer the first step of the second expert took than its others, or than the first expert's if it has
    one step only; None without a change of experts."""
    if len(set(experts)) < 2 or len(steps) != len(experts):
        return None
    first = experts.index(1)
    others = steps[first + 1 :] or steps[1:first] or steps[:first]
    return steps[first] - statistics.median(others)


def fraction(work: Work, seconds: float, matmul: float, attention: float) -> float | None:
    """Share of the machine's own ceiling; None where nothing is counted."""
    return work.seconds(matmul, attention) / seconds if work.flops and seconds > 0 else None


def stage_of(report: StageReport, counted: int | None) -> Stage:
    """A stage's report, as results files hold it; `counted` is its peak where no allocator knows it."""
    return Stage(
        report.name,
        report.seconds,
        report.vram_predicted,
        counted if report.vram_measured is None else report.vram_measured,
        report.disk_bytes,
        report.h2d_bytes,
        dict(report.stalls),
    )


def peak_rss() -> int:
    """The most RAM this process has had, bytes."""
    memory = psutil.Process().memory_info()
    if hasattr(memory, "peak_wset"):  # Windows
        return int(memory.peak_wset)
    # getrusage begins with what the process that started this one had.
    said = re.search(r"^VmHWM:\s+(\d+) kB", read_kernel_text(Path("/proc/self/status")) or "", re.MULTILINE)
    if said:
        return int(said[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def main() -> None:
    """The process that `lowvram.bench.child` starts."""
    request = msgspec.json.decode(sys.argv[1], type=Request)
    print(msgspec.json.encode(measure(request)).decode())


if __name__ == "__main__":
    main()
