"""--preview: what the video will be, in a file beside it and on the terminal, every few steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from lowvram.cli.carry import Output
from lowvram.cli.progress import Progress
from lowvram.errors import UsageError
from lowvram.job import Job
from lowvram.offload.io import write_atomic
from lowvram.preview import Decoder, Pixels, Preview, animated, colours_of, open_decoder
from lowvram.quant.spec import ModelSpec

if TYPE_CHECKING:
    from rich.text import Text

COLUMNS = 56
"""Of the terminal that a picture takes at most."""


def preview_path(target: Path) -> Path:
    """Where the preview of a video is."""
    return target.with_name(f"{target.stem}.preview.webp")


def preview_decoder(out: Output, spec: ModelSpec, job: Job) -> Decoder | None:
    """What makes the previews of the job, if not a linear map. UsageError if none can be made as asked, FileError for a
    file that is no decoder for the model."""
    steps = len(job.schedule)
    if out.preview is not None and out.preview > steps:
        raise UsageError(
            f"after every {out.preview} steps, but there are {steps}",
            where="--preview",
            expected=f"1 to {steps}",
            advice=f"for example --preview {max(1, steps // 4)}",
        )
    if out.preview is None and out.preview_decoder is not None:
        raise UsageError(
            "a preview decoder, but no previews are asked for",
            where="--preview-decoder",
            advice="say with --preview N after how many steps one is to be made",
        )
    if out.preview_decoder is not None:
        return open_decoder(out.preview_decoder, spec.vae)
    if out.preview is not None:
        colours_of(spec.vae)
    return None


def open_preview(
    out: Output, spec: ModelSpec, decoder: Decoder | None, job: Job, progress: Progress
) -> Preview | None:
    """A preview of this job, by a decoder or else by a linear map; None if none is asked for. UsageError if none is known
    for the model."""
    if out.preview is None:
        return None
    path, milliseconds = preview_path(out.target), round((4000 if decoder is None else 1000) / job.fps)
    before = 0 if job.driving is None else 1  # the reference picture's latent

    def show(done: int, frames: Sequence[Pixels]) -> None:
        write_atomic(path, animated(frames, milliseconds))
        progress.note(f"after step {done} of {len(job.schedule)}: {path}")
        if progress.shows_pictures:
            progress.show(half_blocks(frames[len(frames) // 2]))

    return Preview(decoder or colours_of(spec.vae), out.preview, show, before)


def half_blocks(picture: Pixels) -> Text:
    """A picture as characters, each an upper half in one colour on a lower half in another."""
    from rich.text import Text

    height, width = picture.shape[:2]
    scale = min(1.0, COLUMNS / width)
    rows = max(1, round(height * scale / 2))
    small = Image.fromarray(picture).resize((max(1, round(width * scale)), 2 * rows), Image.Resampling.BOX)
    text = Text()
    for row in range(rows):
        for column in range(small.width):
            upper, lower = (small.getpixel((column, 2 * row + n)) for n in (0, 1))
            text.append("\u2580", style=f"rgb{_joined(upper)} on rgb{_joined(lower)}")
        text.append("\n")
    return text


def _joined(colour: object) -> str:
    assert isinstance(colour, tuple)
    return f"({','.join(map(str, colour))})"
