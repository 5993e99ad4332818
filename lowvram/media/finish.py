"""Finished video files: made beside the target, checked, synced, and only then given its name."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from lowvram.errors import StorageError
from lowvram.media.probe import open_media
from lowvram.media.target import finishing_path
from lowvram.offload.io import replace_file, sync_folder

if TYPE_CHECKING:
    from av.container import OutputContainer


def open_mp4(path: Path, movflags: str, metadata: Mapping[str, str]) -> OutputContainer:
    """A new mp4 with `metadata` in it. Each packet goes to the system at once; no dates and versions are stored."""
    import av

    options = {"movflags": f"{movflags}+use_metadata_tags", "fflags": "+bitexact+flush_packets"}
    container = av.open(f"file:{path}", mode="w", format="mp4", container_options=options)
    container.metadata.update(metadata)
    return container


def publish(
    path: Path,
    make: Callable[[Path], None],
    frames: int,
    size: tuple[int, int],
    *,
    overwrite: bool,
    whole: Path,
) -> None:
    """A video that `make` writes takes the name `path` once it is whole, decodes to `frames` of `size` and is synced.

    whole: where the frames are, if the name is taken meanwhile. Nothing is left behind by a failure.
    """
    finishing = finishing_path(path)
    try:
        make(finishing)
        verify(finishing, frames, *size)
        sync(finishing)
        if not overwrite and path.exists():
            raise StorageError(
                "the output appeared while the job ran",
                where=str(path),
                advice=f"the whole video is in {whole}; rename it",
            )
        replace_file(finishing, path)
    except BaseException:
        with suppress(OSError):
            finishing.unlink(missing_ok=True)
        raise
    with suppress(OSError):
        sync_folder(path.parent)


def remux(source: Path, target: Path, metadata: Mapping[str, str]) -> None:
    """Copy the video packets of `source` into an ordinary mp4 with its index in front, starting at time 0."""
    import av

    with av.open(f"file:{source}") as reader, open_mp4(target, "faststart", metadata) as writer:
        stream = reader.streams.video[0]
        copy = writer.add_stream_from_template(stream)
        start: int | None = None
        for packet in reader.demux(stream):
            if packet.dts is None or packet.pts is None:
                continue
            # Frames are reordered, so the fragmented file begins at the first frame's delay.
            start = packet.pts if start is None else start
            packet.pts -= start
            packet.dts -= start
            packet.stream = copy
            writer.mux(packet)


def verify(path: Path, frames: int, width: int, height: int) -> None:
    """Decode the whole file. Raises StorageError unless it holds `frames` whole frames of `width` x `height`."""
    count = 0
    with open_media(path) as container:
        for frame in container.decode(container.streams.video[0]):
            if (frame.width, frame.height) != (width, height):
                break
            count += 1
    if count != frames:
        raise StorageError(
            f"only {count} of {frames} frames of the written video decode",
            where=str(path),
            advice="check the disk, and run again",
        )


def sync(path: Path) -> None:
    """Make the file's bytes survive a loss of power."""
    with path.open("r+b") as file:
        os.fsync(file.fileno())
