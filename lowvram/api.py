"""Runtime, Pipeline, Video: the product as a library.

runtime = Runtime(vram="16GB", ram="24GB")
pipe = runtime.load("nano")
print(pipe.plan("a red circle moves left on a black background"))
video = pipe("a red circle moves left on a black background", seed=1)
video.save("out.mp4")
"""

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
from lowvram.conditions.contract import Condition
from lowvram.driving import Driving, open_folder
from lowvram.errors import UsageError
from lowvram.job import Job, LoraChoice, check_complete, check_driven, describe, make_job
from lowvram.machine import Machine, machine_profile, this_machine
from lowvram.matmul import unfit_for
from lowvram.media.picture import open_picture
from lowvram.media.video import VideoWriter, check_size, check_target, write_behind
from lowvram.model import Model, imagined_model, open_model, with_loras
from lowvram.offload.budget import Budget, Ledger, format_bytes, parse_bytes
from lowvram.offload.device import CpuDevice, Device
from lowvram.offload.kept import KeptBytes
from lowvram.planning.choose import make_plan
from lowvram.planning.plan import Plan
from lowvram.preview import Decoder, Preview, open_decoder
from lowvram.quant.encodings.registry import encoding_by_name
from lowvram.report import Report, Sample
from lowvram.sampling.presets import few_step, model_preset
from lowvram.stages import condition, decode, denoise, text
from lowvram.stages.denoise import State
from lowvram.stages.run import Listener, Run, Silent, resident_set
from lowvram.stages.steadfast import denoise_steadfastly
from lowvram.text_cache import text_cache
from lowvram.triton_kernels import dispatch
from lowvram.triton_kernels.modes import Choice, Matmul
from lowvram.triton_kernels.ops import ops_for

DEFAULT_WEIGHTS = "bf16"


class Runtime:
    """A budget on a machine.

    vram, ram   sizes such as "16GB" or bytes; None takes what is free now
    device      "cuda" or "cpu"; None takes CUDA if there is any
    cache       whether prompts that were encoded before are taken from disk, and those of new jobs are kept there
    keep        how much of the RAM holds transformer weights from one job to the next, such as "16GB": a job with another
                LoRA, prompt or seed then reads from disk only what is not there yet. Jobs have the rest of the RAM.
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
        self.machine = _machine(device)
        self.budget = _budget(vram, ram, self.machine)
        self.kept = None if keep is None else KeptBytes(_size(keep, "keep"))
        if self.kept is not None:
            self.budget = _beside(self.budget, self.kept.capacity)
        self.texts = text_cache() if cache else None

    def load(
        self,
        model: str,
        *,
        models_dirs: Sequence[str] = (),
        weights: str | None = None,
        preset: str | None = None,
        force: bool = False,
        progress: Callable[[Path], None] = lambda path: None,
        **files: str | None,
    ) -> Pipeline:
        """The model called `model`, or the one in the folder `model`: headers are read, no weights.

        Parts that are not named are looked for as `lowvram.discovery.find` says, which takes the other settings.

        files: "high", "low", "single", "vae", "text", "clip", "tokenizer" name single files instead of found ones.
        """
        given = {part: path for part, path in files.items() if path}
        found = discovery.find(
            model,
            given,
            models_dirs=models_dirs,
            weights=weights,
            preset=preset,
            force=force,
            progress=progress,
        )
        return Pipeline(self, open_model(model, found.paths), found.paths, found.reasons, tuple(models_dirs))

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
    """A model, ready to plan and to run jobs."""

    runtime: Runtime
    model: Model
    files: dict[str, str]
    reasons: Mapping[str, str] = field(default_factory=dict)
    """Why these files, of the parts that were chosen among others."""
    models_dirs: tuple[str, ...] = ()
    """Where LoRAs of a preset are looked for besides the usual places."""

    def job(self, prompt: str = "", *, force: bool = False, **settings: Any) -> Job:
        """A job on this model; `settings` are those of `lowvram.job.make_job`, pictures as paths.

        The few-step preset is that of the files, where they are known and nothing of the schedule is set. UsageError if
        settings and files contradict each other (see `lowvram.fewstep`), unless `force`.
        """
        settings = fewstep.with_preset(_with_preset_loras(self, _with_pictures(settings)), self.files)
        settings["attention"] = self.runtime.attention(
            settings.get("attention") or "auto", settings.pop("attention_ends", None)
        )
        settings["matmul"] = self.runtime.matmul(settings.get("matmul") or "auto", self.model)
        job = make_job(self.model.spec, model=self.model.name, files=self.files, prompt=prompt, **settings)
        if not force:
            fewstep.check(job, self.model.spec)
        return job

    def plan(self, prompt: str = "", **settings: Any) -> Plan:
        """What the job would claim, move and take."""
        return self.plan_job(self.job(prompt, **settings))

    def plan_job(self, job: Job, preview: Decoder | None = None) -> Plan:
        """The plan of a job, and of a small decoder that makes previews beside it."""
        budget, machine = self.runtime.budget, self.runtime.machine
        cached = text.is_cached(self.model, job, self.runtime.texts, machine)
        model = with_loras(self.model, job.loras)
        return make_plan(job, model, budget, machine, text_cached=cached, preview=preview)

    def __call__(self, prompt: str, *, listener: Listener | None = None, **settings: Any) -> Video:
        """Text and denoise: the finished latent. Frames are decoded when the video is saved or iterated."""
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
        """A video of the character in `folder`, which Wan-Animate's preprocessing wrote: see `lowvram.driving`.

        carried: frames that every segment takes over from the one before it, 1 or 5. match_colours: whether they
        hold its colours. sound: a video or a sound file whose sound the result gets. Nothing is computed before it is saved.
        """
        driving = open_folder(
            Path(folder).expanduser(),
            mode,
            carried=carried,
            match_colours=match_colours,
            sound=None if sound is None else Path(sound).expanduser(),
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
        """Run `job`, from `state` on if it was interrupted; `save` is called after every step.

        made: its condition, if that was made before; `keep` is called if it is made now. preview: is shown what becomes of
        the latent.
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
    """A finished latent, decoded as often as asked."""

    pipeline: Pipeline
    job: Job
    plan: Plan
    latent: Tensor
    """[C, F, H, W] float32 on the host."""
    listener: Listener = field(default_factory=Silent)
    clock: Callable[[], float] = time.monotonic
    reports: list[Any] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)

    def frames(self) -> Iterator[NDArray[np.uint8]]:
        """Frames [H, W, 3] uint8 RGB in order, decoded as they are taken. What is kept of them is no part of the budget."""
        return self._frames(alone=False)

    def _frames(self, *, alone: bool) -> Iterator[NDArray[np.uint8]]:
        runtime = self.pipeline.runtime
        with runtime.device() as device:
            run = replace(
                runtime.begin(device, self.pipeline.model, self.plan, self.listener, self.clock),
                reports=self.reports,
                notes=self.notes,
                samples=self.samples,
                alone=alone,
            )
            for chunk in decode.decode(run, self.pipeline.model, self.job, self.latent):
                yield from chunk

    def save(self, path: str | Path, *, overwrite: bool = False) -> Report:
        """Decode into an mp4 that is verified before it takes its name; what happened, stage by stage."""
        target = Path(path)
        check_target(target, overwrite)
        check_size(self.job.width, self.job.height)
        facts = {"comment": json.dumps(describe(self.job, __version__), ensure_ascii=False)}
        with VideoWriter(
            target, self.job.width, self.job.height, self.job.fps, facts, overwrite=overwrite
        ) as writer:
            write_behind(writer, (frame[None] for frame in self._frames(alone=True)))
        return Report(tuple(self.reports), tuple(self.notes), tuple(self.samples))


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
    **settings: Any,
) -> Plan:
    """A plan for a known model whose files are not here, on a machine that may not be here either.

    preview_decoder: the file of a small decoder that makes previews, which is here.
    """
    spec = model_preset(name)
    preview = None if preview_decoder is None else open_decoder(preview_decoder, spec.vae)
    encoding_by_name(weights or DEFAULT_WEIGHTS)
    where = machine_profile(machine) if machine else this_machine()
    asked = settings.pop("attention", None) or "auto"
    packages = frozenset(dispatch.PACKAGES) if machine else dispatch.installed()
    settings["attention"] = dispatch.choose(
        asked, where.arch, packages, ends=settings.pop("attention_ends", None)
    )
    model = imagined_model(name, spec, weights or DEFAULT_WEIGHTS)
    settings["matmul"] = dispatch.choose_matmul(
        settings.get("matmul") or "auto", where.arch, partial(unfit_for, model=model)
    )
    job = make_job(spec, model=name, files={}, prompt=prompt, **_with_pictures(settings))
    if not force:
        fewstep.check(job, spec)
    return make_plan(job, model, _budget(vram, ram, where), where, preview=preview)


def _with_pictures(settings: dict[str, Any]) -> dict[str, Any]:
    """Paths of pictures become what their headers say."""
    paths = {name: settings[name] for name in ("image", "last_image") if settings.get(name) is not None}
    return settings | {name: open_picture(Path(path).expanduser()) for name, path in paths.items()}


def _with_preset_loras(pipe: Pipeline, settings: dict[str, Any]) -> dict[str, Any]:
    """A preset brings its LoRAs: those that ship inside, or those that are on this machine."""
    preset = settings.get("preset")
    if preset is None or settings.get("loras"):
        return settings
    paths = discovery.preset_loras(pipe.model.name, pipe.model.spec, pipe.files, preset, pipe.models_dirs)
    strength = few_step(preset).strength
    loras = tuple(LoraChoice(path=path, expert=expert, strength=strength) for expert, path in paths.items())
    return settings | {"loras": loras}


def _held_beside(kept: KeptBytes | None) -> int:
    """Bytes of RAM that this process holds, without what is kept for the next job."""
    return resident_set() - (0 if kept is None else kept.used)


def check_device(device: str | None) -> None:
    """UsageError for a device that is none, or that is not here."""
    if device not in (None, "cpu", "cuda"):
        raise UsageError(
            f'device "{device}"', where="--device", expected="cpu or cuda", advice="leave it out"
        )
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            "no CUDA device here", where="--device", advice="check the driver, or use --device cpu"
        )


def _machine(device: str | None) -> Machine:
    check_device(device)
    return this_machine(device)


def _budget(vram: str | int | None, ram: str | int | None, machine: Machine) -> Budget:
    return Budget(
        machine.vram if vram is None else _size(vram, "--vram"),
        machine.ram if ram is None else _size(ram, "--ram"),
    )


def _size(value: str | int, flag: str) -> int:
    return value if isinstance(value, int) else parse_bytes(value, flag=flag)


def _beside(budget: Budget, kept: int) -> Budget:
    """What is left for jobs. UsageError if that is nothing."""
    if not 0 <= kept < budget.ram:
        raise UsageError(
            f"{format_bytes(kept)} of {format_bytes(budget.ram)} RAM are to be kept",
            where="keep",
            expected="less than the RAM of the budget",
            advice="give a larger ram, or keep less",
        )
    return replace(budget, ram=budget.ram - kept)
