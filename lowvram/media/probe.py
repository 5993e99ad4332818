"""What a media file holds: sizes, rate, frame count, the settings stored with it. Nothing is decoded here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowvram.errors import FileError

if TYPE_CHECKING:
    from av.container import InputContainer

FORMATS = "mov,mp4,matroska,webm,avi,gif,mpegts,flv"
"""Containers that hold their own bytes. Playlists and concat scripts, which name other files or hosts, are not here."""
SOUND_FORMATS = f"{FORMATS},wav,mp3,flac,ogg,aac"
"""The same, and those for sound alone."""

BOOKKEEPING = frozenset({"major_brand", "minor_version", "compatible_brands", "encoder", "creation_time"})
"""Tags that a container writes about itself."""


@dataclass(frozen=True, slots=True)
class VideoInfo:
    """The first video stream of a file, and the file's tags."""

    width: int
    """pixels"""
    height: int
    """pixels"""
    frames: int
    """Frames in the file as its header says; where it does not (a file that was cut off), whole frames counted."""
    fps: Fraction
    """Mean frames per second; 0 if the file does not say."""
    codec: str
    """FFmpeg's name of the codec: "h264", "vp9", ..."""
    metadata: Mapping[str, str]
    """The file's tags, without those that the container keeps about itself."""


def probe(path: Path) -> VideoInfo:
    """Read what `path` holds from its headers and packet index.

    Raises FileError if the file is missing, is no known container or has no video stream.
    """
    with open_media(path) as container:
        stream = container.streams.video[0]
        codec = stream.codec_context
        frames = stream.frames or sum(
            1 for each in container.demux(stream) if each.size and not each.is_corrupt
        )
        return VideoInfo(
            width=codec.width,
            height=codec.height,
            frames=frames,
            fps=Fraction(stream.average_rate or 0),
            codec=codec.name,
            metadata={key: value for key, value in container.metadata.items() if key not in BOOKKEEPING},
        )


@contextmanager
def open_media(path: Path) -> Iterator[InputContainer]:
    """Open a local media file that has a video stream; what FFmpeg raises inside the block becomes FileError.

    Only the file itself is read, whatever it says: no other protocol than local files, no playlist formats.
    """
    with _opened(path, FORMATS, "video", "an mp4, mov, mkv, webm, avi or gif file") as container:
        if not container.streams.video:
            raise FileError("no video stream", where=str(path), advice="give a file that holds a video")
        yield container


@contextmanager
def open_sound(path: Path) -> Iterator[InputContainer]:
    """Open a local media file that has sound, with or without pictures; otherwise as `open_media`."""
    with _opened(path, SOUND_FORMATS, "sound", "a video, or a wav, mp3, m4a, flac or ogg file") as container:
        if not container.streams.audio:
            raise FileError(
                "no sound",
                where=str(path),
                expected="a video with sound, or a sound file",
                advice="leave --audio-from out",
            )
        yield container


@contextmanager
def _opened(path: Path, formats: str, kind: str, expected: str) -> Iterator[InputContainer]:
    import av

    options: dict[str, Any] = {"protocol_whitelist": "file", "format_whitelist": formats}
    try:
        with av.open(f"file:{path}", mode="r", options=options, metadata_errors="replace") as container:
            yield container
    except av.error.FFmpegError as error:
        missing = isinstance(error, FileNotFoundError)
        raise FileError(
            "no such file" if missing else f"not readable as {kind} ({error.strerror})",
            where=str(path),
            expected="" if missing else f"{expected} that is whole",
            advice="check the path" if missing else "play it in another program, or make the file again",
        ) from error
