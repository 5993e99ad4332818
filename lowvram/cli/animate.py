"""lowvram animate: a character moves like the person of a video, or takes that person's place."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from lowvram.cli import options as o
from lowvram.errors import UsageError


@partial(o.with_job_flags, hidden=("image", "last_image", "size", "frames"), model="nano-animate")
def animate(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER", help="What Wan-Animate's preprocessing wrote: src_pose.mp4, src_face.mp4, ..."
        ),
    ],
    flags: o.JobFlags,
    mode: Annotated[
        str,
        typer.Option(
            "--mode", metavar="MODE", help="animate, or replace (which needs src_bg.mp4 and src_mask.mp4)."
        ),
    ] = "animate",
    prompt: Annotated[
        str, typer.Option("--prompt", metavar="TEXT", help="The model's own if left out, as is advised.")
    ] = "",
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The mp4 to write.")] = Path(
        "out.mp4"
    ),
    carry: Annotated[
        int,
        typer.Option(
            "--carry", metavar="N", help="Frames each segment takes over from the one before, 1 or 5."
        ),
    ] = 1,
    segment: Annotated[
        int | None,
        typer.Option(
            "--segment", metavar="N", help="Frames of a segment, 4n+1; 77 is what the model was trained with."
        ),
    ] = None,
    match_colours: Annotated[
        bool, typer.Option("--match-colours", help="Hold every segment to the colours of the one before.")
    ] = False,
    audio_from: Annotated[
        Path | None,
        typer.Option(
            "--audio-from", metavar="FILE", help="A video or sound file whose sound goes into the result."
        ),
    ] = None,
    weights: o.Weights = None,
    report: o.Report = None,
    preview: o.Preview = None,
    preview_decoder: o.PreviewDecoder = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")] = False,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Animate a character with a video, or put it into the video. The video's length is that of the result."""
    _refuse_what_the_folder_says(flags)
    settings = flags.settings() | ({} if segment is None else {"frames": segment})
    from lowvram.cli.carry import Output
    from lowvram.cli.work import start
    from lowvram.driving import open_folder
    from lowvram.media.sound import check_sound
    from lowvram.offload.io import user_path

    out = Output(output, overwrite, as_json, quiet, report, preview, preview_decoder)
    sound = None if audio_from is None else user_path(audio_from)
    with out.reserved():
        # the videos first: what is wrong with them is known before a model is looked for
        driving = open_folder(
            user_path(folder), mode, carried=carry, match_colours=match_colours, sound=sound
        )
        if sound is not None:
            check_sound(sound)
        start(flags, prompt, settings, out, weights=weights, driving=driving)


def _refuse_what_the_folder_says(flags: o.JobFlags) -> None:
    sizes = {"--size": flags.size, "--frames": flags.frames}
    pictures = {"--image": flags.image, "--last-image": flags.last_image}
    for flag, given in (sizes | pictures).items():
        if given is None:
            continue
        if flag in sizes:
            expected, instead = (
                "the size and length of src_pose.mp4",
                "--segment says how many frames are made at once",
            )
        else:
            expected, instead = "the character in src_ref.png", "replace that file for another character"
        raise UsageError(f"{flag} {given}", expected=expected, advice=f"leave {flag} out; {instead}")
