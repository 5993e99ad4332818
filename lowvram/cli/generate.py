"""lowvram generate: a prompt becomes a video."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lowvram.cli import options as o


def generate(
    prompt: Annotated[str, typer.Argument(help="What the video shows.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", "--save_file", help="The mp4 to write; out.mp4 if left out."),
    ] = None,
    model: o.Model = "nano",
    high: o.High = None,
    low: o.Low = None,
    transformer: o.Transformer = None,
    vae: o.Vae = None,
    text_encoder: o.TextEncoder = None,
    size: o.Size = None,
    frames: o.Frames = None,
    fps: o.Fps = None,
    negative: o.Negative = None,
    seed: o.Seed = 0,
    steps: o.Steps = None,
    solver: o.Solver = None,
    shift: o.Shift = None,
    guidance: o.Guidance = None,
    preset: o.Preset = None,
    lora: o.Lora = None,
    lora_partial: o.LoraPartial = False,
    vram: o.Vram = None,
    ram: o.Ram = None,
    device: o.Device = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")] = False,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
    ckpt_dir: o.CkptDir = None,
    offload_model: o.Offload = None,
    t5_cpu: o.T5Cpu = False,
) -> None:
    """Make a video from a prompt."""
    o.refuse_placement_flags(offload_model, t5_cpu)
    settings = o.settings(
        size=size, guidance=guidance, lora=lora, lora_partial=lora_partial, frames=frames, fps=fps, negative=negative, seed=seed,
        steps=steps, solver=solver, shift=shift, preset=preset,
    )  # fmt: skip
    files = {"high": high, "low": low, "single": transformer, "vae": vae, "text": text_encoder}
    target = output or Path("out.mp4")
    from lowvram.cli.work import check_output, start

    check_output(target, overwrite)
    start(ckpt_dir or model, files, prompt, settings, target, vram, ram, device, overwrite, as_json, quiet)
