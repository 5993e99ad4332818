"""Runtime, Pipeline, Video: the product as a library. `help(lowvram)` shows how they are used."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lowvram import __version__, discovery, fewstep
from lowvram.animation import Animation, driven_settings
from lowvram.caps import beside, budget_of, machine_here, size_of
from lowvram.conditions.contract import Condition
from lowvram.driving import Driving, open_folder
from lowvram.job import Job, check_complete, check_driven, describe, make_job
from lowvram.matmul import unfit_for
from lowvram.media.target import check_target, reserved
from lowvram.media.video import VideoWriter, check_size, write_behind
from lowvram.model import Model
from lowvram.model_files import open_model, with_loras
from lowvram.offload.budget import Ledger, format_bytes
from lowvram.offload.device import CpuDevice, Device
from lowvram.offload.io import user_path
from lowvram.offload.kept import KeptBytes
from lowvram.planning.choose import make_plan
from lowvram.planning.plan import Plan
from lowvram.preview import Decoder, Preview
from lowvram.report import Report, Sample, StageReport
from lowvram.settings import check_used, with_files, with_preset_loras
from lowvram.stages import condition, decode, denoise, text
from lowvram.stages.denoise import State
from lowvram.stages.run import Listener, Run, Silent, resident_set
from lowvram.stages.steadfast import denoise_steadfastly
from lowvram.text_cache import text_cache
from lowvram.triton_kernels import dispatch
from lowvram.triton_kernels.modes import Choice, Matmul
from lowvram.triton_kernels.ops import ops_for


class Runtime:
    """A budget on this machine, which no job exceeds.

    vram, ram   caps on the whole job, as texts such as "16GB" or in bytes; None takes what is free now
    device      "cuda" or "cpu"; None takes CUDA if there is any
    cache       whether the features of prompts (not their words) are kept in the user's cache folder and taken from there
    keep        how much of `ram` holds transformer weights from one job to the next, such as "16GB": a job with another
                LoRA, prompt or seed then reads from disk only what is not there yet. Jobs have the rest of `ram`.

    UsageError for a size without a unit, or a device that is not here. CUDA is initialised here.
    """

    def __init__(
        self,
        vram: str | int | None = None,
        ram: str | int | None = None,
        device: str | None = None,
        *,
        cache: bool = True,
        keep: str | int | None = None,
    ) -> None:
        self.machine = machine_here(device)
        self.budget = budget_of(vram, ram, self.machine)
        self.kept = None if keep is None else KeptBytes(size_of(keep, "keep"))
        if self.kept is not None:
            self.budget = beside(self.budget, self.kept.capacity)
        self.texts = text_cache() if cache else None

    def __repr__(self) -> str:
        vram, ram = map(format_bytes, (self.budget.vram, self.budget.ram))
        return f"Runtime({self.machine.kind}, {vram} VRAM, {ram} RAM)"

    def load(
        self,
        model: str,
        *,
        models_dirs: str | Sequence[str] = (),
        weights: str | None = None,
        preset: str | None = None,
        force: bool = False,
        progress: Callable[[Path], None] = lambda path: None,
        **files: str | None,
    ) -> Pipeline:
        """The model called `model` ("nano", "wan2.2-t2v-a14b", ...), or the one in the folder `model`.

        Its parts are looked for where other programs keep such files. Headers are read, no weights.

        models_dirs  a folder or several to look in, before the usual ones
        weights      the encoding to take where several are here, such as "fp8"
        preset       the few-step preset of the jobs to come: transformers made for it are taken where they are here
        force        whether to take experts whose names contradict the part they are given as
        progress     called with every file whose header is about to be read for the first time
        files        single files instead of found ones, by part: high, low, single (the only transformer), vae, text,
                     clip, tokenizer

        UsageError for an unknown name, or where several files fit equally; FileError for a part that is missing or is
        not what it should be.
        """
        given = {part: path for part, path in files.items() if path}
        folders = (models_dirs,) if isinstance(models_dirs, str) else tuple(models_dirs)
        found = discovery.find(
            model, given, models_dirs=folders, weights=weights, preset=preset, force=force, progress=progress
        )
        opened = open_model(model, found.paths)
        check_used(opened, given)
        return Pipeline(self, opened, found.paths, found.reasons, folders)

    def attention(self, asked: str = "auto", ends: str | None = None) -> Choice:
        """How self attention runs here when `asked` for a mode; on CUDA it is tried on the card first."""
        arch = self.machine.arch
        on_card = partial(dispatch.try_mode, device=torch.device("cuda", 0), arch=arch)
        test = on_card if self.machine.kind == "cuda" else None
        return dispatch.choose(asked, arch, dispatch.installed(), test, ends)

    def begin(
        self,
        device: Device,
        model: Model,
        plan: Plan,
        listener: Listener,
        clock: Callable[[], float] = time.monotonic,
        preview: Preview | None = None,
    ) -> Run:
        """A job of `model` on `device`, beside the weights that are kept from the ones before."""
        rss = partial(_held_beside, self.kept)
        return Run(
            device, plan, listener, clock, model.opener, preview=preview, kept=self.kept, rss=rss, began=rss()
        )

    def end(self) -> None:
        """The last use of the transformers by a job is over: kept weights that it had no use for go."""
        if self.kept is not None:
            self.kept.next_job()

    def matmul(self, asked: str, model: Model) -> Matmul:
        """How the blocks of `model` multiply here when `asked` for it; on CUDA it is tried on the card first."""
        machine = self.machine

        def on_card(form: str) -> str:
            if form == "fp8" and machine.unfused:
                return machine.unfused  # what would run in its place is slower than exact multiplication
            return dispatch.try_w8a8(form, torch.device("cuda", 0), ops_for(machine.arch, machine.unfused))

        test = on_card if machine.kind == "cuda" else None
        return dispatch.choose_matmul(asked, machine.arch, partial(unfit_for, model=model), test)

    @contextmanager
    def device(self) -> Iterator[Device]:
        """The device under the budget's caps."""
        ram = Ledger(self.budget.ram, "RAM")
        if self.machine.kind == "cuda":
            from lowvram.offload.cuda import CudaDevice

            device: Device = CudaDevice(0, self.budget.vram, context=self.machine.context, ram=ram)
        else:
            device = CpuDevice(self.budget.vram, ram=ram)
        try:
            yield device
        finally:
            device.close()


@dataclass(frozen=True, slots=True)
class Pipeline:
    """A model, ready to plan and to run jobs: see `job` for their settings."""

    runtime: Runtime
    model: Model
    files: dict[str, str]
    reasons: Mapping[str, str] = field(default_factory=dict)
    """Why these files, of the parts that were chosen among others."""
    models_dirs: tuple[str, ...] = ()
    """Where LoRAs of a preset are looked for besides the usual places."""

    def __repr__(self) -> str:
        return f"Pipeline({self.model.name}, {self.runtime})"

    def job(self, prompt: str = "", *, force: bool = False, **settings: Any) -> Job:
        """A job on this model, settled and checked. What is left out, or None, is the model's own default:

        negative        what the video should not show
        width           pixels, a multiple of 16 (of 32 for TI2V-5B)
        height          likewise
        area            about so many pixels in a frame, in the shape of `image`, instead of width and height
        frames          4n + 1; of one segment in a driven job
        fps             frames a second of the video that is written, 1 to 120
        seed            0 to 2**63 - 1; the same on every machine
        steps           of the denoise, 1 to 1000
        solver          "unipc", "dpm++", "euler" or "renoise"
        shift           of the noise schedule, 0.001 to 1000: larger spends more steps at high noise
        guidance        scale, or those of the (high, low) noise expert; 1 takes half the time
        preset          a few-step schedule such as "lightning-4", instead of steps, solver and shift. Where files are known
                        to be made for one and nothing of the schedule is set, it is theirs.
        loras           paths of LoRAs, or a `LoraChoice` each to say the expert and the strength
        image           path of a picture that the video begins with
        last_image      path of a picture that it ends with
        attention       "auto", "sdpa", "int8", "int8-fp16", "int8-fp8", "sparse", "sage", "flash" or "kitchen"
        attention_ends  the mode of the first and last step and the first block: "sdpa" or "int8"
        matmul          "auto", "exact", "int8" or "fp8"
        residual        "auto", or "fp32" for a residual stream in float32

        UsageError for what cannot be made, and if settings and files contradict each other (a LoRA of 4 steps in a job
        of 20), unless `force`; FileError for a picture that cannot be read.
        """
        settings = fewstep.with_preset(
            with_preset_loras(self.model, self.files, self.models_dirs, with_files(settings)), self.files
        )
        settings["attention"] = self.runtime.attention(
            settings.get("attention") or "auto", settings.pop("attention_ends", None)
        )
        settings["matmul"] = self.runtime.matmul(settings.get("matmul") or "auto", self.model)
        job = make_job(self.model.spec, model=self.model.name, files=self.files, prompt=prompt, **settings)
        if not force:
            fewstep.check(job, self.model.spec)
        return job

    def plan(self, prompt: str = "", **settings: Any) -> Plan:
        """What the job would claim, move and take; `settings` as for `job`. Nothing is loaded.

        BudgetError, with the least budget that would do and settings that fit, if it does not fit.
        """
        return self.plan_job(self.job(prompt, **settings))

    def plan_job(self, job: Job, preview: Decoder | None = None) -> Plan:
        """The plan of a job, and of a small decoder that makes previews beside it."""
        budget, machine = self.runtime.budget, self.runtime.machine
        cached = text.is_cached(self.model, job, self.runtime.texts, machine)
        model = with_loras(self.model, job.loras)
        return make_plan(job, model, budget, machine, text_cached=cached, preview=preview)

    def __call__(self, prompt: str, *, listener: Listener | None = None, **settings: Any) -> Video:
        """Make a video as far as its latent; `settings` as for `job`. Frames are decoded when it is saved or iterated.

        listener: told of progress by `begin(stage, done)`, `step(vram)`, `end()` and `note(text)`, see
        `lowvram.stages.run.Listener`; what it raises ends the job, and nothing is held then. BudgetError before anything is loaded if the job does not fit; OutOfMemoryError,
        DeviceLostError, NonFiniteError, FileError and StorageError for what goes wrong on the way.
        """
        return self.run(self.job(prompt, **settings), listener=listener)

    def animate(
        self,
        folder: str | Path,
        mode: str = "animate",
        *,
        prompt: str = "",
        carried: int = 1,
        match_colours: bool = False,
        sound: str | Path | None = None,
        listener: Listener | None = None,
        **settings: Any,
    ) -> Animation:
        """A video of the character in `folder`, planned: nothing is computed before it is saved.

        folder          what Wan-Animate's preprocessing wrote: src_pose.mp4, src_face.mp4, src_ref.png, and for
                        "replace" src_bg.mp4 and src_mask.mp4
        mode            "animate": the character moves like the video's person; "replace": it takes that person's place
        carried         frames that every segment takes over from the one before it, 1 or 5
        match_colours   whether every segment is held to the colours of the one before
        sound           a video or a sound file whose sound the result gets
        settings        as for `job`, without a size and pictures: those are the folder's

        FileError for a folder or video that cannot be used, BudgetError if a segment does not fit.
        """
        driving = open_folder(
            user_path(folder),
            mode,
            carried=carried,
            match_colours=match_colours,
            sound=None if sound is None else user_path(sound),
        )
        job = self.driven_job(driving, prompt, **settings)
        return Animation(self, job, self.plan_job(job), listener or Silent())

    def driven_job(self, driving: Driving, prompt: str = "", **settings: Any) -> Job:
        """A job that follows these videos; `settings` as for `job`, without a size."""
        check_driven(self.model.spec)
        return self.job(prompt, **driven_settings(self.model.spec, driving, settings))

    def run(
        self,
        job: Job,
        *,
        state: State | None = None,
        save: Callable[[State], None] = lambda state: None,
        made: Condition | None = None,
        keep: Callable[[Condition], None] = lambda made: None,
        listener: Listener | None = None,
        clock: Callable[[], float] = time.monotonic,
        plan: Plan | None = None,
        preview: Preview | None = None,
    ) -> Video:
        """Run `job`, in a plan made before if there is one; a job that was interrupted goes on with the same numbers.

        state, save     where the denoise was; called with where it is after every step
        made, keep      what was made of the job's pictures; called with it if it is made now
        preview         shown every so many steps what the video will be
        """
        check_complete(self.model.spec, job)
        model = with_loras(self.model, job.loras)
        plan = plan or self.plan_job(job, None if preview is None else preview.decoder)
        state = state or denoise.initial_state(job, model)
        with self.runtime.device() as device:
            run = self.runtime.begin(device, model, plan, listener or Silent(), clock, preview)
            if device.kind == "cuda":
                run.notes.append(f"attention of torch by {dispatch.sdpa_backend_of(device.torch_device)}")
                run.choose_decoders(model)
            texts = text.features(run, model, job, self.runtime.texts)
            if made is None:
                made = condition.condition(run, model, job)
                keep(made)
            latent = denoise_steadfastly(run, model, job, texts, made, state, save)
            if preview is not None and preview.problem:
                run.notes.append(preview.problem)
        self.runtime.end()
        return Video(
            self, job, plan, latent, listener or Silent(), clock, run.reports, run.notes, run.samples
        )

    def video(self, job: Job, latent: Tensor, plan: Plan, listener: Listener | None = None) -> Video:
        """A video whose denoise was finished earlier."""
        return Video(self, job, plan, latent, listener or Silent())


@dataclass(frozen=True, slots=True)
class Video:
    """A finished latent, decoded as often as asked: `save` writes an mp4, `frames` yields arrays."""

    pipeline: Pipeline
    job: Job
    plan: Plan
    latent: Tensor
    """[C, F, H, W] float32 on the host."""
    listener: Listener = field(default_factory=Silent)
    clock: Callable[[], float] = time.monotonic
    reports: list[StageReport] = field(default_factory=list)
    """What every stage took that was done for the latent, or by `frames`."""
    notes: list[str] = field(default_factory=list)
    """What went otherwise than planned meanwhile."""
    samples: list[Sample] = field(default_factory=list)
    """The memory meanwhile."""

    def __repr__(self) -> str:
        return f"Video({self.job.summary})"

    def frames(self) -> Iterator[NDArray[np.uint8]]:
        """Frames [height, width, 3] uint8 RGB in order, decoded as they are taken.

        Memory of the frames that the caller keeps is no part of the budget.
        """
        with self._decoding(self.reports, self.notes, self.samples, alone=False) as frames:
            yield from frames

    @contextmanager
    def _decoding(
        self, reports: list[StageReport], notes: list[str], samples: list[Sample], *, alone: bool
    ) -> Iterator[Iterator[NDArray[np.uint8]]]:
        """The frames as they are decoded; what that takes comes to these lists.

        alone: whether all that the process takes meanwhile is held against the budget.
        """
        runtime = self.pipeline.runtime
        with runtime.device() as device:
            run = runtime.begin(device, self.pipeline.model, self.plan, self.listener, self.clock)
            run = replace(run, reports=reports, notes=notes, samples=samples, alone=alone)
            chunks = decode.decode(run, self.pipeline.model, self.job, self.latent)
            yield (frame for chunk in chunks for frame in chunk)

    def save(self, path: str | Path, *, overwrite: bool = False) -> Report:
        """Decode into an mp4 (H.264) that is decoded once more and checked before it takes its name.

        The report is of all stages: those before, and this decode. Printed, it is a table.

        UsageError for a name that does not end in .mp4, or a file that exists, unless `overwrite`; BusyError if it is
        being made already; StorageError if it cannot be written: the frames so far are kept beside it as
        NAME.partial.mp4.
        """
        target = user_path(path)
        check_target(target, overwrite)
        with reserved(target):
            return self.make(target, overwrite=overwrite)

    def make(self, target: Path, *, overwrite: bool = False) -> Report:
        """`save` for a caller that has reserved `target`."""
        check_target(target, overwrite)
        check_size(self.job.width, self.job.height)
        facts = {"comment": json.dumps(describe(self.job, __version__), ensure_ascii=False)}
        reports, notes, samples = [*self.reports], [*self.notes], [*self.samples]
        with (
            VideoWriter(
                target, self.job.width, self.job.height, self.job.fps, facts, overwrite=overwrite
            ) as writer,
            self._decoding(reports, notes, samples, alone=True) as frames,
        ):
            write_behind(writer, (frame[None] for frame in frames))
        return Report(tuple(reports), tuple(notes), tuple(samples))


def _held_beside(kept: KeptBytes | None) -> int:
    """Bytes of RAM that this process holds, without what is kept for the next job."""
    return resident_set() - (0 if kept is None else kept.used)
