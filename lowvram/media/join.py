"""One video of several that follow each other, and the sound that goes with it. Pictures are copied, not encoded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from lowvram.errors import FileError, StorageError
from lowvram.media.finish import open_mp4, publish
from lowvram.media.probe import open_media
from lowvram.media.sound import RATE, fitted

if TYPE_CHECKING:
    from av.audio.stream import AudioStream
    from av.container import OutputContainer
    from av.packet import Packet
    from av.video.stream import VideoStream

SOUND_BIT_RATE = 192_000


def join(
    parts: Sequence[tuple[Path, int]],
    target: Path,
    size: tuple[int, int],
    fps: Fraction,
    metadata: Mapping[str, str],
    *,
    sound: Path | None = None,
    overwrite: bool = False,
) -> None:
    """`target` shows the videos `parts` one after the other, and sounds like `sound` from its first picture on.

    parts: files that a `VideoWriter` made at this size and rate, and the frames in each. The sound is as long as the
    pictures: cut, or filled with silence. Raises StorageError if it cannot be written or does not decode, FileError
    if the sound is none.
    """
    import av

    frames = sum(count for _, count in parts)

    def make(path: Path) -> None:
        with open_mp4(path, "faststart", metadata) as writer:
            _mux(writer, parts, fps, sound)

    try:
        publish(target, make, frames, size, overwrite=overwrite, whole=parts[0][0].parent)
    except (OSError, av.error.FFmpegError) as error:
        raise StorageError(
            f"the video could not be written ({error.strerror})",
            where=str(target),
            advice="free space or choose another folder, and go on with `lowvram resume`",
        ) from error


def _mux(
    writer: OutputContainer, parts: Sequence[tuple[Path, int]], fps: Fraction, sound: Path | None
) -> None:
    """Pictures and sound in the order of their times, so that a player need not seek between them."""
    with open_media(parts[0][0]) as first:
        pictures: VideoStream = writer.add_stream_from_template(first.streams.video[0])
        heard: AudioStream | None = None
        if sound is not None:
            heard = writer.add_stream("aac", rate=RATE, layout="stereo")
            heard.bit_rate = SOUND_BIT_RATE
    seconds = sum(count for _, count in parts) / fps
    audio = _encoded(heard, sound, seconds) if heard is not None and sound is not None else iter(())
    waiting = next(audio, None)
    for packet in _pictures(parts, fps):
        shown = (packet.dts or 0) * Fraction(packet.time_base)
        while waiting is not None and (waiting.dts or 0) * Fraction(waiting.time_base) <= shown:
            writer.mux(waiting)
            waiting = next(audio, None)
        packet.stream = pictures
        writer.mux(packet)
    while waiting is not None:
        writer.mux(waiting)
        waiting = next(audio, None)


def _pictures(parts: Sequence[tuple[Path, int]], fps: Fraction) -> Iterator[Packet[VideoStream]]:
    """The packets of every part, each part's times behind those of the parts before."""
    before = 0
    for path, count in parts:
        with open_media(path) as container:
            found = 0
            for packet in container.demux(container.streams.video[0]):
                if packet.pts is None or packet.dts is None:
                    continue
                shift = round(Fraction(before) / fps / Fraction(packet.time_base))
                packet.pts += shift
                packet.dts += shift
                found += 1
                yield packet
        if found != count:
            raise FileError(
                f"{found} of {count} frames of a finished segment are there",
                where=str(path),
                advice="start the job again",
            )
        before += count


def _encoded(stream: AudioStream, sound: Path, seconds: Fraction) -> Iterator[Packet[AudioStream]]:
    import av

    done = 0
    for samples in fitted(sound, seconds):
        frame = av.AudioFrame.from_ndarray(samples.copy(), format="fltp", layout="stereo")
        frame.sample_rate, frame.pts, frame.time_base = RATE, done, Fraction(1, RATE)
        done += samples.shape[1]
        yield from stream.encode(frame)
    yield from stream.encode(None)
