"""A job: everything one video needs to know, settled and checked before anything is loaded.

A `Job` holds no defaults to be looked up later: two equal jobs make the same frames. It is what the planner reads,
what is saved for `resume`, and what is written into the finished file.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowvram.driving import Driving
from lowvram.errors import UsageError
from lowvram.framing import LONGEST, size_for
from lowvram.media.picture import Picture
from lowvram.quant.spec import CLIP_TOKENS, ModelSpec
from lowvram.sampling.presets import few_step
from lowvram.sampling.schedules import Schedule, few_step_schedule, make_schedule
from lowvram.triton_kernels.modes import EXACT, SDPA, Choice, Matmul

MAX_FRAMES = 4 * 1023 + 1
"""The rotary table has 1024 positions per axis."""
SMALL = 832 * 480
"""Pixels of a frame at 480p."""
EXPERTS = ("high", "low", "both")
"""What a LoRA may act on: the high-noise or the low-noise transformer, or all there are."""
RESIDUALS = ("auto", "fp32")
"""What the residual stream may be kept in: what networks compute in (bf16 on a card), or float32 as in the authors' code
(wan-models 1.6)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraChoice:
    """A LoRA file, the expert it belongs to and how strongly it acts."""

    path: str
    expert: str = "both"
    """One of EXPERTS."""
    strength: float | tuple[float, ...] = 1.0
    """One number, or one for each equal share of the steps."""
    partial: bool = False
    """Whether a LoRA that fits in part is taken all the same."""

    @property
    def strengths(self) -> tuple[float, ...]:
        return self.strength if isinstance(self.strength, tuple) else (self.strength,)

    @property
    def acts(self) -> bool:
        """Whether it does anything at any step."""
        return any(self.strengths)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One video. Sizes in pixels, lengths in frames."""

    model: str
    """The name or path that was asked for."""
    files: dict[str, str]
    """Where each part lies: "high" and "low" or "single", "vae", "text", "tokenizer"."""
    prompt: str
    negative: str
    loras: tuple[LoraChoice, ...]
    width: int
    height: int
    frames: int
    fps: int | float
    seed: int
    schedule: Schedule
    preset: str | None = None
    """The few-step preset the schedule came from."""
    image: Picture | None = None
    """What the video begins with."""
    last_image: Picture | None = None
    """What it ends with."""
    attention: Choice = SDPA
    """How self attention runs: settled for the machine the job was made on."""
    matmul: Matmul = EXACT
    """How the Linears of the blocks multiply: settled likewise."""
    residual: str = "auto"
    """What the residual stream is kept in, one of RESIDUALS."""
    driving: Driving | None = None
    """Animate: what the character follows. `frames` are those of one segment then."""

    @property
    def summary(self) -> str:
        """Model, size, length and steps, for people."""
        return f"{self.model} {self.width}x{self.height}, {self.frames} frames, {len(self.schedule)} steps"

    @property
    def pictures(self) -> tuple[Picture, ...]:
        """All pictures, in the order of their frames."""
        return tuple(p for p in (self.image, self.last_image) if p is not None)


def make_job(
    spec: ModelSpec,
    *,
    model: str,
    files: dict[str, str],
    prompt: str = "",
    negative: str | None = None,
    loras: tuple[LoraChoice, ...] = (),
    image: Picture | None = None,
    last_image: Picture | None = None,
    driving: Driving | None = None,
    width: int | None = None,
    height: int | None = None,
    area: int | None = None,
    frames: int | None = None,
    fps: float | None = None,
    seed: int = 0,
    steps: int | None = None,
    solver: str | None = None,
    shift: float | None = None,
    guidance: float | tuple[float, float] | None = None,
    preset: str | None = None,
    attention: Choice | None = None,
    matmul: Matmul | None = None,
    residual: str | None = None,
) -> Job:
    """A job on a model of `spec`; None means the model's own default. UsageError for what cannot be made.

    area: about so many pixels in a frame, in the shape of `image`; without width and height only. guidance: one scale,
    or those of the (high, low) expert.
    """
    for name, said in (("prompt", prompt), ("--negative", negative or "")):
        if any("\ud800" <= letter <= "\udfff" for letter in said):
            raise UsageError("bytes that are not UTF-8", where=name, expected="text", advice="type it anew")
    if isinstance(guidance, int | float):
        guidance = (float(guidance), float(guidance))
    check_pictures(spec, image, last_image)
    if image is not None and width is None and height is None:
        width, height = size_for(spec, image.width, image.height, area or spec.width * spec.height)
    width = spec.width if width is None else width
    height = spec.height if height is None else height
    frames = spec.frames if frames is None else frames
    check_size(spec, width, height, frames, where="--frames" if driving is None else "--segment")
    if driving is not None and frames <= driving.carried:
        raise UsageError(
            f"segments of {frames} frames that take over {driving.carried} from the one before",
            where="--segment",
            expected=f"more frames than --carry {driving.carried}",
            advice=f"give --segment {frames + 4} or more; {spec.frames} is what the model was trained with",
        )
    if last_image is not None and frames == 1:
        raise UsageError(
            "a first and a last picture for one frame", where="--frames", advice="give --frames 5 or more"
        )
    if not 0 <= seed < 2**63:
        raise UsageError(
            f"seed {seed}", where="--seed", expected="0 to 2^63 - 1", advice="choose another seed"
        )
    if fps is not None and not 1 <= fps <= 120:
        raise UsageError(
            f"{fps} frames a second", where="--fps", expected="1 to 120", advice="leave --fps out"
        )
    for lora in loras:
        if not all(map(math.isfinite, lora.strengths)):
            raise UsageError(
                f"strength {lora.strength}",
                where="--lora",
                expected="a number",
                advice="1.0 is the usual strength",
            )
        if lora.expert not in EXPERTS:
            raise UsageError(
                f'a LoRA for the expert "{lora.expert}"',
                where="--lora",
                expected=", ".join(EXPERTS),
                advice="leave it out for both",
            )
        if spec.experts == 1 and lora.expert != "both":
            raise UsageError(
                f"a LoRA for the {lora.expert}-noise expert, but {model} has one expert",
                where="--lora",
                advice=f"leave :{lora.expert} out",
            )
    if residual not in (None, *RESIDUALS):
        raise UsageError(
            f'residual "{residual}"',
            where="--residual",
            expected=" or ".join(RESIDUALS),
            advice="leave --residual out for auto",
        )
    if spec.experts == 1 and guidance is not None and guidance[0] != guidance[1]:
        raise UsageError(
            f"two scales, but {model} has one expert",
            where=f"--guidance {guidance[0]:g},{guidance[1]:g}",
            advice=f"give one, such as --guidance {guidance[0]:g}",
        )
    schedule = _schedule(spec, width * height, steps, solver, shift, guidance, preset)
    if negative and max(schedule.guidance) == 1:
        raise UsageError(
            "a negative prompt where guidance is 1: no step looks at it",
            where="--negative",
            advice="leave --negative out, or give a --guidance above 1 if the model is not distilled",
        )
    for lora in loras:
        if not 1 <= len(lora.strengths) <= len(schedule):
            raise UsageError(
                f"{len(lora.strengths)} strengths for {len(schedule)} steps",
                where="--lora",
                expected="one for each equal share of the steps",
                advice=f"give at most {len(schedule)}, as in FILE@1,0.5",
            )
    return Job(
        model=model,
        files=files,
        prompt=clean_prompt(prompt) or spec.prompt,
        negative=clean_prompt(spec.negative if negative is None else negative),
        loras=loras,
        width=width,
        height=height,
        frames=frames,
        fps=fps or spec.fps,
        seed=seed,
        schedule=schedule,
        preset=preset,
        image=image,
        last_image=last_image,
        attention=attention or SDPA,
        matmul=matmul or EXACT,
        residual=residual or "auto",
        driving=driving,
    )


def check_pictures(spec: ModelSpec, image: Picture | None, last_image: Picture | None) -> None:
    """UsageError for pictures that a model of `spec` has no place for."""
    if spec.variant in ("t2v", "animate") and (image or last_image):
        raise UsageError(
            "a picture, but this model makes videos from text alone"
            if spec.variant == "t2v"
            else "a picture, but this model takes it from the folder of its driving videos",
            where="--image" if image else "--last-image",
            expected="an image-to-video model, or TI2V-5B",
            advice="leave it out, or use a model such as wan2.2-i2v-a14b",
        )
    if last_image is None:
        return
    if spec.variant == "ti2v" or spec.dit.image_tokens == CLIP_TOKENS:
        raise UsageError(
            "a last picture, but this model was trained with a first one only",
            where="--last-image",
            expected="a model for first and last frame",
            advice="leave it out, or use wan2.2-i2v-a14b or wan2.1-flf2v-14b",
        )
    if image is None:
        raise UsageError(
            "a last picture without a first", where="--last-image", advice="give the first with --image"
        )


def check_driven(spec: ModelSpec) -> None:
    """UsageError unless a model of `spec` can be driven by a video."""
    if spec.variant != "animate":
        raise UsageError(
            "this model cannot be driven by a video",
            where="--model",
            expected="Wan-Animate, such as wan2.2-animate-14b",
            advice="use `lowvram generate` for this model",
        )


def check_complete(spec: ModelSpec, job: Job) -> None:
    """UsageError if a picture is missing that the model cannot do without. A plan can."""
    if spec.variant == "animate" and job.driving is None:
        raise UsageError(
            "this model is driven by a video",
            where="--model",
            expected="the folder that Wan-Animate's preprocessing writes",
            advice="use `lowvram animate FOLDER`",
        )
    if spec.variant == "i2v" and job.image is None:
        raise UsageError(
            "this model begins a video with a picture, and none is given",
            where="--image",
            advice="give one with --image FILE, or use a text-to-video model",
        )
    if spec.dit.image_tokens == 2 * CLIP_TOKENS and job.last_image is None:
        raise UsageError(
            "this model joins a first and a last picture, and the last is not given",
            where="--last-image",
            advice="give it with --last-image FILE, or use an image-to-video model",
        )


def check_size(spec: ModelSpec, width: int, height: int, frames: int, where: str = "--frames") -> None:
    """UsageError naming the two nearest sizes that the model can make. where: the flag that gave `frames`."""
    for name, size, stride in (("width", width, spec.vae.stride[2]), ("height", height, spec.vae.stride[1])):
        unit = 2 * stride
        if size < unit or size % unit or size > LONGEST:
            raise UsageError(
                f"{name} {size}",
                where="--size",
                expected=f"a multiple of {unit} up to {LONGEST}",
                advice=f"the nearest are {_nearest(size, unit, 0, LONGEST)}",
            )
    if frames < 1 or (frames - 1) % 4 or frames > MAX_FRAMES:
        raise UsageError(
            f"{frames} frames",
            where=where,
            expected="4n + 1: one frame, then groups of four",
            advice=f"the nearest are {_nearest(frames, 4, 1, MAX_FRAMES)}",
        )


def _nearest(value: int, unit: int, offset: int, largest: int) -> str:
    below = max(offset or unit, min((value - offset) // unit * unit + offset, largest))
    above = min(below + unit, largest)
    return f"{below} and {above}" if above > below else str(below)


def _schedule(
    spec: ModelSpec,
    pixels: int,
    steps: int | None,
    solver: str | None,
    shift: float | None,
    guidance: tuple[float, float] | None,
    preset: str | None,
) -> Schedule:
    if preset is None:
        usual = spec.shift_480p if spec.shift_480p and pixels <= SMALL else spec.shift
        return make_schedule(
            solver=solver or "unipc",
            steps=spec.steps if steps is None else steps,
            shift=usual if shift is None else shift,
            boundary=spec.boundary,
            experts=spec.experts,
            guidance=guidance or spec.guidance,
        )
    given = [n for n, v in (("--steps", steps), ("--solver", solver), ("--shift", shift)) if v is not None]
    if given:
        raise UsageError(
            f"{' and '.join(given)} together with --preset {preset}",
            expected="one or the other: a few-step preset fixes its own schedule",
            advice=f"leave {' and '.join(given)} out, or leave --preset out",
        )
    return few_step_schedule(
        few_step(preset), experts=spec.experts, boundary=spec.boundary, guidance=guidance
    )


def clean_prompt(text: str) -> str:
    """Whitespace as upstream leaves it: every run one space, none at the ends."""
    return " ".join(text.split())


def describe(job: Job, version: str) -> dict[str, Any]:
    """What is written into the finished file: enough to make the video again, and no path of this machine."""
    return {
        "lowvram": version,
        "model": Path(job.model).name,
        "prompt": job.prompt,
        "negative": job.negative,
        "seed": job.seed,
        "width": job.width,
        "height": job.height,
        "frames": job.frames if job.driving is None else job.driving.frames,
        "fps": job.fps,
        "solver": job.schedule.solver,
        "steps": len(job.schedule),
        "sigmas": job.schedule.sigmas,
        "guidance": job.schedule.guidance,
        "preset": job.preset,
        "attention": job.attention.mode,
        "attention_ends": job.attention.ends,
        "matmul": job.matmul.mode,
        "residual": job.residual,
        "loras": [
            {"file": Path(lora.path).name, "expert": lora.expert, "strength": lora.strength}
            for lora in job.loras
        ],
        **({} if job.driving is None else _describe_driving(job.driving)),
        "pictures": [{"file": Path(p.path).name, "sha256": p.sha256} for p in job.pictures],
    }


def _describe_driving(driving: Driving) -> dict[str, Any]:
    clips = (driving.pose, driving.face, driving.background, driving.mask)
    return {
        "mode": driving.mode,
        "carried": driving.carried,
        "match_colours": driving.match_colours,
        "driving": {Path(c.path).name: c.sha256 for c in clips if c is not None}
        | {Path(driving.picture.path).name: driving.picture.sha256},
    }
