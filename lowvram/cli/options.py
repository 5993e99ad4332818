"""Options that several verbs share, and how their texts become values. Never imports torch."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import re
from collections.abc import Callable, Collection, Mapping
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import typer

from lowvram.errors import UsageError
from lowvram.offload.io import user_path

Model = Annotated[
    str,
    typer.Option(
        "--model", "-m", metavar="NAME|FOLDER", help="A known name, or a folder with the model's parts."
    ),
]
High = Annotated[str | None, typer.Option("--high", metavar="FILE", help="High-noise transformer file.")]
Low = Annotated[str | None, typer.Option("--low", metavar="FILE", help="Low-noise transformer file.")]
Transformer = Annotated[
    str | None, typer.Option("--transformer", metavar="FILE", help="Transformer file of a one-expert model.")
]
Vae = Annotated[str | None, typer.Option("--vae", metavar="FILE", help="VAE file.")]
TextEncoder = Annotated[str | None, typer.Option("--text-encoder", metavar="FILE", help="UMT5 encoder file.")]
Tokenizer = Annotated[
    str | None,
    typer.Option(
        "--tokenizer", metavar="FILE", help="spiece.model, where the text encoder does not carry it."
    ),
]
ModelsDir = Annotated[
    list[str] | None,
    typer.Option(
        "--models-dir",
        metavar="FOLDER",
        help="A folder to look in for model files; may be given several times.",
    ),
]
Clip = Annotated[
    str | None,
    typer.Option("--clip", metavar="FILE", help="CLIP vision encoder file (Wan 2.1 image to video)."),
]
Image = Annotated[
    str | None, typer.Option("--image", metavar="FILE", help="A picture that the video begins with.")
]
LastImage = Annotated[
    str | None, typer.Option("--last-image", metavar="FILE", help="A picture that the video ends with.")
]
Size = Annotated[
    str | None,
    typer.Option(
        "--size",
        metavar="SIZE",
        help="WIDTHxHEIGHT in pixels; with --image also 480p or 720p, in the picture's shape.",
    ),
]
Frames = Annotated[
    int | None,
    typer.Option("--frames", metavar="N", help="Number of frames, 4n+1."),
]
Fps = Annotated[
    int | None,
    typer.Option(
        "--fps", metavar="N", help="Frames a second; the model's own if left out, or the driving video's."
    ),
]
Negative = Annotated[
    str | None, typer.Option("--negative", metavar="TEXT", help="What the video should not show.")
]
Seed = Annotated[int, typer.Option("--seed", metavar="N", help="Same seed, same video.")]
Steps = Annotated[
    int | None,
    typer.Option("--steps", metavar="N", help="Denoising steps."),
]
Solver = Annotated[
    str | None, typer.Option("--solver", metavar="NAME", help="unipc, dpm++, euler or renoise.")
]
Shift = Annotated[float | None, typer.Option("--shift", metavar="NUMBER", help="Noise schedule shift.")]
Guidance = Annotated[
    str | None,
    typer.Option("--guidance", metavar="NUMBERS", help="HIGH[,LOW] guidance scale of the experts."),
]
Attention = Annotated[
    str | None,
    typer.Option(
        "--attention",
        metavar="MODE",
        help="auto, sdpa, int8, int8-fp16, int8-fp8, sparse, sage, flash or kitchen; auto if left out.",
    ),
]
AttentionEnds = Annotated[
    str | None,
    typer.Option(
        "--attention-ends",
        metavar="MODE",
        help="Mode of the first and last step and the first block: sdpa or int8.",
    ),
]
Matmul = Annotated[
    str | None,
    typer.Option(
        "--matmul",
        metavar="MODE",
        help="auto, exact, int8 or fp8 (weights of that form only: activations are quantised too); auto if left out.",
    ),
]
Weights = Annotated[
    str | None,
    typer.Option(
        "--weights", metavar="FORMAT", help="Which encoding to take where several are here, such as fp8."
    ),
]
Residual = Annotated[
    str | None,
    typer.Option(
        "--residual",
        metavar="MODE",
        help="auto, or fp32: the residual stream in float32, nearer to the authors' numbers, for twice its memory.",
    ),
]
Preset = Annotated[
    str | None, typer.Option("--preset", metavar="NAME", help="Few-step schedule, such as lightning-4.")
]
Lora = Annotated[
    list[str] | None,
    typer.Option(
        "--lora",
        metavar="FILE",
        help="FILE[:high|:low][@STRENGTH, or @1,0.5,0 over the steps]; may be given several times.",
    ),
]
LoraPartial = Annotated[
    bool, typer.Option("--lora-partial", help="Take LoRAs of which less than 95 % fit the model.")
]
Vram = Annotated[
    str | None,
    typer.Option("--vram", metavar="BYTES", help="Device memory the whole job may take, such as 16GB."),
]
Ram = Annotated[
    str | None,
    typer.Option("--ram", metavar="BYTES", help="Host memory the whole job may take, such as 24GB."),
]
Device = Annotated[
    str | None, typer.Option("--device", metavar="DEVICE", help="cuda or cpu; CUDA if there is any.")
]
Force = Annotated[
    bool, typer.Option("--force", help="Go on with settings that contradict the model or the LoRAs.")
]
NoCache = Annotated[
    bool, typer.Option("--no-cache", help="Encode the prompt anew, and keep nothing of it on disk.")
]
Json = Annotated[bool, typer.Option("--json", help="Results as one JSON object a line.")]
Report = Annotated[
    Path | None,
    typer.Option(
        "--report",
        metavar="FILE",
        help="Where memory, bytes and time went: a JSON file, or a drawing as .svg.",
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
Preview = Annotated[
    int | None,
    typer.Option(
        "--preview",
        min=1,
        metavar="N",
        help="Every so many steps, show what the video will be: OUTPUT.preview.webp.",
    ),
]
PreviewDecoder = Annotated[
    Path | None,
    typer.Option(
        "--preview-decoder",
        metavar="FILE",
        help="Show it sharp, by a small decoder: taew2_1 or taew2_2.safetensors. It is part of the plan.",
    ),
]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class JobFlags:
    """The flags of every verb that takes a job: which model, which video, which budget."""

    model: Model = "nano"
    high: High = None
    low: Low = None
    transformer: Transformer = None
    vae: Vae = None
    text_encoder: TextEncoder = None
    clip: Clip = None
    tokenizer: Tokenizer = None
    models_dir: ModelsDir = None
    image: Image = None
    last_image: LastImage = None
    size: Size = None
    frames: Frames = None
    fps: Fps = None
    negative: Negative = None
    seed: Seed = 0
    steps: Steps = None
    solver: Solver = None
    shift: Shift = None
    guidance: Guidance = None
    preset: Preset = None
    attention: Attention = None
    attention_ends: AttentionEnds = None
    matmul: Matmul = None
    residual: Residual = None
    lora: Lora = None
    lora_partial: LoraPartial = False
    force: Force = False
    vram: Vram = None
    ram: Ram = None
    device: Device = None
    no_cache: NoCache = False

    def files(self) -> dict[str, str]:
        """The parts that were named, by part."""
        given = {
            "high": self.high,
            "low": self.low,
            "single": self.transformer,
            "vae": self.vae,
            "text": self.text_encoder,
            "clip": self.clip,
            "tokenizer": self.tokenizer,
        }
        return {part: path for part, path in given.items() if path}

    def settings(self) -> dict[str, Any]:
        """What `Pipeline.job` takes; flags that were not given are left out."""
        plain = {
            "frames": self.frames,
            "fps": self.fps,
            "negative": self.negative,
            "seed": self.seed,
            "steps": self.steps,
            "solver": self.solver,
            "shift": self.shift,
            "preset": self.preset,
            "image": self.image,
            "last_image": self.last_image,
            "force": self.force or None,
            "attention": self.attention,
            "attention_ends": self.attention_ends,
            "matmul": self.matmul,
            "residual": self.residual,
        }
        given = {name: value for name, value in plain.items() if value is not None}
        return (
            given
            | parse_size(self.size, self.image is not None)
            | parse_guidance(self.guidance)
            | parse_loras(self.lora, self.lora_partial)
        )


def with_job_flags(
    work: Callable[..., None], *, hidden: Collection[str] = (), model: str = "nano"
) -> Callable[..., None]:
    """A verb whose parameter `flags` is a JobFlags, as a function of single flags, which is what Typer reads.

    hidden: flags that the verb's help leaves out, for the verb refuses them. model: what `--model` is if left out.
    """
    hints = get_type_hints(work, include_extras=True)
    flag_hints = get_type_hints(JobFlags, include_extras=True)
    for name in hidden:
        kind_of, option = get_args(flag_hints[name])
        option = copy.copy(option)
        option.hidden = True
        flag_hints[name] = Annotated[kind_of, option]
    kind = inspect.Parameter.KEYWORD_ONLY
    single = [
        inspect.Parameter(
            f.name, kind, default=model if f.name == "model" else f.default, annotation=flag_hints[f.name]
        )
        for f in dataclasses.fields(JobFlags)
    ]
    parameters = []
    for own in inspect.signature(work).parameters.values():
        parameters += single if own.name == "flags" else [own.replace(kind=kind, annotation=hints[own.name])]

    @wraps(work)
    def call(**given: Any) -> None:
        flags = JobFlags(**{p.name: given.pop(p.name) for p in single})
        work(flags=flags, **given)

    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {p.name: p.annotation for p in parameters}
    return call


_AREAS: Mapping[str, int] = {"480p": 832 * 480, "720p": 1280 * 720}


def parse_size(text: str | None, pictured: bool = False) -> dict[str, int]:
    """ "1280x720" or "1280*720" -> width and height; "480p" -> area, beside a picture; nothing for None."""
    if text is None:
        return {}
    if pictured and text.strip().lower() in _AREAS:
        return {"area": _AREAS[text.strip().lower()]}
    match = re.fullmatch(r"(\d{1,5})[xX*×](\d{1,5})", text.strip())
    if match is None:
        area = text.strip().lower() in _AREAS
        raise UsageError(
            f'"{text}" without a picture, whose shape it takes' if area else f'"{text}"',
            where="--size",
            expected="WIDTHxHEIGHT",
            advice="for example --size 1280x720" + (", or give --image FILE" if area else ""),
        )
    return {"width": int(match[1]), "height": int(match[2])}


def parse_guidance(text: str | None) -> dict[str, tuple[float, float]]:
    """ "4" or "4,3" -> scales of the (high, low) expert; nothing for None."""
    if text is None:
        return {}
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 2):
        raise UsageError(
            f'"{text}"',
            where="--guidance",
            expected="one number, or HIGH,LOW",
            advice="for example --guidance 4,3",
        )
    return {"guidance": (numbers[0], numbers[-1])}


def parse_loras(texts: list[str] | None, partial: bool = False) -> dict[str, Any]:
    """FILE[:high|:low][@STRENGTH[,STRENGTH...]] each -> LoraChoices; nothing for none."""
    if partial and not texts:
        raise UsageError(
            "no LoRA is given", where="--lora-partial", expected="--lora FILE", advice="leave it out"
        )
    if not texts:
        return {}
    from lowvram.job import LoraChoice

    choices = []
    for text in texts:
        whole = user_path(text)
        if "@" in text and whole.is_file():  # a name may hold what else would be a strength
            choices.append(LoraChoice(path=str(whole.absolute()), partial=partial))
            continue
        match = re.fullmatch(r"(?P<path>.+?)(?::(?P<expert>high|low))?(?:@(?P<strength>[^@/\\]+))?", text)
        try:
            if match is None:
                raise ValueError
            strengths = tuple(map(float, (match["strength"] or "1").split(",")))
        except ValueError:
            raise UsageError(
                f'"{text}"',
                where="--lora",
                expected="FILE[:high|:low][@STRENGTH]",
                advice="STRENGTH is a number, or several for equal shares of the steps: @1,0.5,0",
            ) from None
        # Absolute: a job that goes on from another folder must find it again.
        path = str(user_path(match["path"]).absolute())
        expert = match["expert"] or "both"
        strength = strengths if len(strengths) > 1 else strengths[0]
        choices.append(LoraChoice(path=path, expert=expert, strength=strength, partial=partial))
    return {"loras": tuple(choices)}
