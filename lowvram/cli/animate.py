"""lowvram animate: a character moves like the person of a video, or takes that person's place."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lowvram.cli import options as o
from lowvram.errors import UsageError


@o.with_job_flags
def animate(
    folder: Annotated[
        Path, typer.Argument(help="What Wan-Animate's preprocessing wrote: src_pose.mp4, src_face.mp4, ...")
    ],
    flags: o.JobFlags,
    mode: Annotated[
        str, typer.Option("--mode", help="animate, or replace (which needs src_bg.mp4 and src_mask.mp4).")
    ] = "animate",
    prompt: Annotated[str, typer.Option("--prompt", help="The model's own if left out, as is advised.")] = "",
    output: Annotated[Path, typer.Option("--output", "-o", help="The mp4 to write.")] = Path("out.mp4"),
    carry: Annotated[
        int, typer.Option("--carry", help="Frames each segment takes over from the one before, 1 or 5.")
    ] = 1,
    segment: Annotated[
        int | None,
        typer.Option("--segment", help="Frames of a segment, 4n+1; 77 is what the model was trained with."),
    ] = None,
    match_colours: Annotated[
        bool, typer.Option("--match-colours", help="Hold every segment to the colours of the one before.")
    ] = False,
    audio_from: Annotated[
        Path | None, typer.Option("--audio-from", help="A video whose sound goes into the result.")
    ] = None,
    report: o.Report = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")] = False,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Animate a character's picture with a video, or put the character into the video."""
    for flag, given in (("--size", flags.size), ("--frames", flags.frames)):
        if given is not None:
            raise UsageError(
                f"{flag} {given}",
                expected="the size and length of src_pose.mp4",
                advice=f"leave {flag} out; --segment says how many frames are made at once",
            )
    settings = flags.settings() | ({} if segment is None else {"frames": segment})
    from lowvram.cli.carry import Output
    from lowvram.cli.work import start
    from lowvram.driving import open_folder
    from lowvram.media.sound import check_sound

    out = Output(output, overwrite, as_json, quiet, report)
    out.check()
    # the videos first: what is wrong with them is known before a model is looked for
    sound = None if audio_from is None else audio_from.expanduser()
    driving = open_folder(folder.expanduser(), mode, carried=carry, match_colours=match_colours, sound=sound)
    if sound is not None:
        check_sound(sound)
    start(flags, prompt, settings, out, driving=driving)
