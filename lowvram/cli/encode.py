"""lowvram encode: a video becomes a latent file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lowvram.cli import options as o


def encode(
    video: Annotated[Path, typer.Argument(metavar="FILE", help="The video to read.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="The latent file to write.")
    ] = Path("latents.safetensors"),
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            metavar="NAME|FOLDER",
            help="Whose VAE encodes; nano's if --vae is not given either.",
        ),
    ] = None,
    vae: o.Vae = None,
    frames: Annotated[
        int | None,
        typer.Option("--frames", metavar="N", help="Take the first so many frames, 4n+1; all if left out."),
    ] = None,
    vram: o.Vram = None,
    ram: o.Ram = None,
    device: o.Device = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")] = False,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Encode a video with the VAE of a model. `decode` reads the file; its numbers are float32."""
    import time

    from lowvram.api import Runtime
    from lowvram.autoencoder import Autoencoder, find_vae, open_video, save_latent_file
    from lowvram.cli.console import emit, emit_json
    from lowvram.cli.progress import Forecast, Progress, progress_mode
    from lowvram.media.target import check_target, reserved

    check_target(output, overwrite, ".safetensors")
    with reserved(output):
        runtime = Runtime(vram, ram, device)
        found = find_vae(runtime, model, vae)
        clip, fps = open_video(video, found.spec.vae, frames)
        plan = Autoencoder(runtime, found).plan_encode(clip.shape)
        forecast = [Forecast(s.name, s.steps, s.seconds) for s in plan.stages]
        mode = progress_mode(quiet, as_json)
        with Progress(forecast, plan.budget.vram, time.monotonic, mode) as progress:
            latent = Autoencoder(runtime, found, progress).encode(clip, plan)
        save_latent_file(output, latent, {"model": found.name, "fps": fps})
    if as_json:
        emit_json({"schema": "lowvram.latent/1", "output": str(output), "shape": list(latent.shape)})
    else:
        emit(str(output))
