"""The autoencoder alone: a video becomes a latent file, and a latent file a video, inside the same budget as a job."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load, save
from torch import Tensor

from lowvram.api import Runtime
from lowvram.errors import BudgetError, FileError, UsageError
from lowvram.job import Job, make_job
from lowvram.media.probe import probe
from lowvram.media.resize import to_tensor
from lowvram.media.target import check_target, reserved
from lowvram.media.video import VideoWriter, read_frames, write_behind
from lowvram.model import Model
from lowvram.models.vae_clip import FRAMES
from lowvram.offload.budget import Budget, format_bytes
from lowvram.offload.io import FileReader, Opener, write_atomic
from lowvram.offload.placement import Placement
from lowvram.planning.decode import plan_decode
from lowvram.planning.encode import planned
from lowvram.planning.facts import Facts
from lowvram.planning.once import Once
from lowvram.planning.plan import Lean, Plan, StagePlan
from lowvram.quant.identify import identify_path
from lowvram.quant.spec import ModelSpec, VaeSpec
from lowvram.sampling.presets import load_models
from lowvram.stages import decode as decode_stage
from lowvram.stages.encode import encode as encode_stage
from lowvram.stages.run import Listener, Silent

TENSOR = "latent"
"""Name of the tensor in a latent file: [z, F, h, w] float32, normalised as the transformer takes it."""
MAX_BYTES = 1 << 33
"""Of a latent file: 4K and a minute take less."""


def open_vae(file: str) -> Model:
    """A VAE in a file, as a model without transformers; what is known of its latents comes from the known models."""
    opener = Opener()
    found = identify_path(Path(file), opener, "vae")
    assert isinstance(found.spec, VaeSpec)
    for name, preset in load_models().items():
        known = preset.vae
        same = (known.version, known.z, known.base) == (found.spec.version, found.spec.z, found.spec.base)
        if same and preset.variant in ("t2v", "ti2v"):  # which need no picture
            spec = replace(preset, vae=replace(found.spec, mean=known.mean, std=known.std))
            return Model(name, spec, {}, found.refs, {}, None, opener=opener)
    raise FileError(
        f"a VAE of version {found.spec.version} with {found.spec.z} channels that no known model has",
        where=file,
        expected="the VAE of Wan 2.1 or 2.2",
        advice="name the model that it belongs to with --model",
    )


def find_vae(runtime: Runtime, model: str | None, file: str | None) -> Model:
    """The model whose VAE is meant: the one called `model`, or that of a VAE's `file`; nano's if neither is given.
    UsageError for both."""
    if file is None:
        return runtime.load(model or "nano").model
    if model is not None:
        raise UsageError(
            f"--model {model} beside --vae {file}",
            expected="one or the other: whose VAE it is, or the VAE itself",
            advice="leave --model out: the file says what it is",
        )
    return open_vae(file)


@dataclass(frozen=True, slots=True)
class Autoencoder:
    """The VAE of a model inside a budget."""

    runtime: Runtime
    model: Model
    listener: Listener = field(default_factory=Silent)

    def frames(self, latent: Tensor, plan: Plan) -> Iterator[NDArray[np.uint8]]:
        """Frames [H, W, 3] uint8 RGB of a latent [z, F, h, w], as they are decoded. What is kept of them is no part of
        the budget."""
        return self._frames(latent, plan, alone=False)

    def _frames(self, latent: Tensor, plan: Plan, *, alone: bool) -> Iterator[NDArray[np.uint8]]:
        """alone: whether all that the process holds meanwhile is held against the budget."""
        job = self._job(self._shape(latent))
        with self.runtime.device() as device:
            run = replace(self.runtime.begin(device, self.model, plan, self.listener), alone=alone)
            for chunk in decode_stage.decode(run, self.model, job, latent):
                yield from chunk

    def encode(self, frames: Iterable[Tensor], plan: Plan) -> Tensor:
        """The latent [z, F, h, w] float32 of frames [3, H, W] in -1..1, as many and as large as was planned."""
        encoding = plan.stage("encode").encode
        assert encoding is not None
        with self.runtime.device() as device:
            run = self.runtime.begin(device, self.model, plan, self.listener)
            with run.stage("encode") as (_, traffic):
                return encode_stage(run, self.model, frames, encoding, traffic)

    def save(self, latent: Tensor, plan: Plan, path: Path, fps: float, *, overwrite: bool = False) -> None:
        """Decode into an mp4 that is verified before it takes its name; errors as of `Video.save`."""
        _, height, width = self._shape(latent)
        check_target(path, overwrite)
        with reserved(path), VideoWriter(path, width, height, fps, overwrite=overwrite) as writer:
            write_behind(writer, (frame[None] for frame in self._frames(latent, plan, alone=True)))

    # ---- plans

    def plan_decode(self, latent: Tensor) -> Plan:
        """What decoding takes. BudgetError if it does not fit, UsageError if the latent is not this VAE's."""
        z = self.model.spec.vae.z
        if latent.ndim != 4 or latent.shape[0] != z or min(latent.shape) < 1:
            raise UsageError(
                f"a latent of shape {list(latent.shape)}",
                expected=f"[{z}, frames, rows, columns], as the VAE of {self.model.name} takes it",
                advice="name the model or the VAE that it was made for with --model or --vae",
            )
        facts = self._facts(self._shape(latent))
        (stage,) = plan_decode(facts, self.runtime.budget)
        return self._checked(facts, stage)

    def plan_encode(self, shape: tuple[int, int, int]) -> Plan:
        """What encoding `shape` (frames, rows, columns of pixels) takes. BudgetError if it does not fit."""
        facts = self._facts(shape)
        device, host, budget = facts.context, facts.host({}), self.runtime.budget
        vram, ram = budget.vram - sum(device.values()), budget.ram - sum(host.values())
        plan = planned(facts, shape[0], vram, ram)
        stage = StagePlan(
            "encode",
            facts.latent[1],
            device | dict(plan.claims),
            host | dict(plan.ram_claims),
            plan.disk_read,
            plan.h2d,
            plan.seconds,
            {"encode": plan.choice},
            encode=plan,
        )
        return self._checked(facts, stage)

    def _checked(self, facts: Facts, stage: StagePlan) -> Plan:
        budget: Budget = self.runtime.budget
        for need, cap, flag in ((stage.vram, budget.vram, "--vram"), (stage.ram, budget.ram, "--ram")):
            if need > cap:
                raise BudgetError(
                    f"to {stage.name} needs {format_bytes(need)}, the budget is {format_bytes(cap)}",
                    where=flag,
                    expected=f"{format_bytes(need)} or more",
                    advice=f"raise {flag}, or take a smaller or shorter video",
                    minimum_vram=stage.vram if flag == "--vram" else None,
                    minimum_ram=stage.ram if flag == "--ram" else None,
                )
        return Plan(budget, facts.machine, facts.dtype, (stage,), Placement({}), Lean(), ())

    def _facts(self, shape: tuple[int, int, int]) -> Facts:
        frames, height, width = shape
        machine = self.runtime.machine
        dtype = torch.bfloat16 if machine.kind == "cuda" else torch.float32
        latent = self.model.spec.latent_shape(width, height, frames)
        return Facts(self._job(shape), Once(self.model), machine, dtype, latent, (), {})

    def _job(self, shape: tuple[int, int, int]) -> Job:
        frames, height, width = shape
        spec: ModelSpec = self.model.spec
        job = make_job(spec, model=self.model.name, files={}, prompt="")
        return replace(job, frames=frames, height=height, width=width)

    def _shape(self, latent: Tensor) -> tuple[int, int, int]:
        _, rows, columns = self.model.spec.vae.stride
        return FRAMES * (latent.shape[1] - 1) + 1, latent.shape[2] * rows, latent.shape[3] * columns


# ---- files


@dataclass(frozen=True, slots=True)
class VideoFile:
    """The first frames of a video file for the encoder; iterated over as often as needed."""

    path: Path
    shape: tuple[int, int, int]
    """Frames, rows and columns of pixels."""

    def __iter__(self) -> Iterator[Tensor]:
        """Each [3, H, W] float32 in -1..1. FileError if they are not what the file's header says."""
        count, *size = self.shape
        done = 0
        for pixels in islice(read_frames(self.path), count):
            if list(pixels.shape[:2]) != size:
                raise self._broken(f"frame {done} is {pixels.shape[1]}x{pixels.shape[0]}")
            yield to_tensor(pixels)
            done += 1
        if done < count:
            raise self._broken(f"only {done} of its {count} frames decode")

    def _broken(self, found: str) -> FileError:
        return FileError(
            found,
            where=str(self.path),
            expected="as many frames of one size as its header says",
            advice="make the video again, for example with ffmpeg -i IN OUT.mp4",
        )


def open_video(path: Path, spec: VaeSpec, frames: int | None) -> tuple[VideoFile, float]:
    """The first `frames` frames of a video (all if None), and its rate in frames a second.

    UsageError, naming the nearest that would do, if the VAE cannot encode such a clip; FileError if it holds no frame.
    """
    found = probe(path)
    if not found.frames:
        raise FileError(
            "a video without a whole frame",
            where=str(path),
            expected="one frame or more",
            advice="play it in another program, or make the file again",
        )
    count = found.frames if frames is None else frames
    _, rows, columns = spec.stride
    if count < 1 or count > found.frames or count % FRAMES != 1:
        nearest = (min(max(count, 1), found.frames) - 1) // FRAMES * FRAMES + 1
        raise UsageError(
            f"{count} frames of a video of {found.frames}",
            where=str(path),
            expected="4n+1 frames",
            advice=f"add --frames {nearest}",
        )
    if found.height % rows or found.width % columns:
        nearest_size = f"{max(1, found.width // columns) * columns}x{max(1, found.height // rows) * rows}"
        raise UsageError(
            f"a video of {found.width}x{found.height}",
            where=str(path),
            expected=f"a width and a height that are multiples of {rows}",
            advice=f"scale or crop it first, for example to {nearest_size}",
        )
    return VideoFile(path, (count, found.height, found.width)), float(found.fps)


def save_latent_file(path: Path, latent: Tensor, facts: Mapping[str, object]) -> None:
    """Write a latent and what is known of it, atomically."""
    write_atomic(path, save({TENSOR: latent.contiguous()}, {"lowvram": json.dumps(facts)}))


def load_latent_file(path: Path) -> tuple[Tensor, float | None]:
    """The latent [z, F, h, w] float32 of a file, and the frame rate if it is known. FileError if it holds no latent."""
    with FileReader(path) as reader:
        if reader.size > MAX_BYTES:
            raise _not_a_latent(path, f"{format_bytes(reader.size)}")
        data = reader.read_at(0, reader.size)
    try:
        tensors = load(data)
    except Exception as problem:
        raise _not_a_latent(path, "no safetensors file, or a damaged one") from problem
    if TENSOR not in tensors or not tensors[TENSOR].is_floating_point():
        raise _not_a_latent(path, f"no tensor called {TENSOR}")
    latent = tensors[TENSOR].float()
    if not torch.isfinite(latent).all():
        raise _not_a_latent(path, "NaN or infinity in it")
    return latent, _rate(data)


def _rate(data: bytes) -> float | None:
    """Frames a second, from the metadata of a safetensors file that was read without complaint."""
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    try:
        rate = json.loads(header["__metadata__"]["lowvram"])["fps"]
    except (KeyError, TypeError, ValueError):
        return None
    return float(rate) if isinstance(rate, int | float) and rate > 0 else None


def _not_a_latent(path: Path, found: str) -> FileError:
    return FileError(
        found,
        where=str(path),
        expected=f'a safetensors file with a tensor "{TENSOR}", as `lowvram encode` writes it',
        advice="encode the video again",
    )
