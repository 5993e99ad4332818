"""Options that several verbs share, and how their texts become values. Never imports torch."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from lowvram.errors import UsageError

Model = Annotated[
    str, typer.Option("--model", "-m", help="A known name, or a folder with the model's parts.")
]
High = Annotated[str | None, typer.Option("--high", help="High-noise transformer file.")]
Low = Annotated[str | None, typer.Option("--low", help="Low-noise transformer file.")]
Transformer = Annotated[
    str | None, typer.Option("--transformer", help="Transformer file of a one-expert model.")
]
Vae = Annotated[str | None, typer.Option("--vae", help="VAE file.")]
TextEncoder = Annotated[str | None, typer.Option("--text-encoder", help="UMT5 encoder file.")]
Size = Annotated[str | None, typer.Option("--size", help="WIDTHxHEIGHT in pixels, such as 1280x720.")]
Frames = Annotated[int | None, typer.Option("--frames", "--frame_num", help="Number of frames, 4n+1.")]
Fps = Annotated[int | None, typer.Option("--fps", help="Frames a second; the model's own if left out.")]
Negative = Annotated[str | None, typer.Option("--negative", help="What the video should not show.")]
Seed = Annotated[int, typer.Option("--seed", "--base_seed", help="Same seed, same video.")]
Steps = Annotated[int | None, typer.Option("--steps", "--sample_steps", help="Denoising steps.")]
Solver = Annotated[
    str | None, typer.Option("--solver", "--sample_solver", help="unipc, dpm++, euler or renoise.")
]
Shift = Annotated[float | None, typer.Option("--shift", "--sample_shift", help="Noise schedule shift.")]
Guidance = Annotated[
    str | None,
    typer.Option("--guidance", "--sample_guide_scale", help="HIGH[,LOW] guidance scale of the experts."),
]
Preset = Annotated[str | None, typer.Option("--preset", help="Few-step schedule, such as lightning-4.")]
Lora = Annotated[
    list[str] | None, typer.Option("--lora", help="FILE[:high|:low][@STRENGTH]; may be given several times.")
]
LoraPartial = Annotated[
    bool, typer.Option("--lora-partial", help="Take LoRAs of which less than 95 % fit the model.")
]
Vram = Annotated[
    str | None, typer.Option("--vram", help="Device memory the whole job may take, such as 16GB.")
]
Ram = Annotated[str | None, typer.Option("--ram", help="Host memory the whole job may take, such as 24GB.")]
Device = Annotated[str | None, typer.Option("--device", help="cuda or cpu; CUDA if there is any.")]
Json = Annotated[bool, typer.Option("--json", help="Results as one JSON object a line.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
Offload = Annotated[str | None, typer.Option("--offload_model", hidden=True)]
T5Cpu = Annotated[bool, typer.Option("--t5_cpu", hidden=True)]
CkptDir = Annotated[str | None, typer.Option("--ckpt_dir", hidden=True)]


def parse_size(text: str | None) -> dict[str, int]:
    """ "1280x720" or "1280*720" -> width and height; nothing for None."""
    if text is None:
        return {}
    match = re.fullmatch(r"(\d{1,5})[xX*×](\d{1,5})", text.strip())
    if match is None:
        raise UsageError(
            f'"{text}"', where="--size", expected="WIDTHxHEIGHT", advice="for example --size 1280x720"
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
    """FILE[:high|:low][@STRENGTH] each -> LoraChoices; nothing for none."""
    if not texts:
        return {}
    from lowvram.job import LoraChoice

    choices = []
    for text in texts:
        match = re.fullmatch(r"(?P<path>.+?)(?::(?P<expert>high|low))?(?:@(?P<strength>[^@/\\]+))?", text)
        try:
            strength = float(match["strength"]) if match and match["strength"] else 1.0
        except ValueError:
            raise UsageError(
                f'"{text}"',
                where="--lora",
                expected="FILE[:high|:low][@STRENGTH]",
                advice="STRENGTH is a number",
            ) from None
        assert match is not None
        # Absolute: a job that goes on from another folder must find it again.
        path = str(Path(match["path"]).expanduser().absolute())
        expert = match["expert"] or "both"
        choices.append(LoraChoice(path=path, expert=expert, strength=strength, partial=partial))
    return {"loras": tuple(choices)}


def settings(
    *,
    size: str | None,
    guidance: str | None,
    lora: list[str] | None,
    lora_partial: bool = False,
    **others: Any,
) -> dict[str, Any]:
    """What `make_job` takes, from the texts of the flags; flags that were not given are left out."""
    given = {name: value for name, value in others.items() if value is not None}
    return given | parse_size(size) | parse_guidance(guidance) | parse_loras(lora, lora_partial)


def refuse_placement_flags(offload_model: str | None, t5_cpu: bool) -> None:
    """Wan's own placement flags have no counterpart: the budget decides."""
    flag = "--offload_model" if offload_model is not None else "--t5_cpu" if t5_cpu else None
    if flag:
        raise UsageError(
            f"{flag} is not needed here",
            expected="a budget",
            advice="give --vram and --ram: the plan places the rest",
        )
