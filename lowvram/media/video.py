"""Frames into a file that is playable at every moment, and out of a file again.

While frames arrive they go into `NAME.partial.mp4`, a fragmented mp4: a fragment reaches the disk about once per
second of video, and whatever kills the process, the fragments before it play. At the end the same packets are
copied, not encoded again, into an ordinary mp4 with its index in front, every frame of that file is decoded, and
only then does it take the target's name.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from queue import Queue
from threading import Thread
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, cast

import numpy as np
from numpy.typing import NDArray

from lowvram.errors import FileError, InternalError, LowvramError, StorageError, UsageError
from lowvram.media.color import BT709, HDR, LIMITED, convert, to_rgb, to_yuv
from lowvram.media.finish import open_mp4, publish, remux
from lowvram.media.probe import open_media
from lowvram.media.target import check_target, partial_path

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.filter import Graph
    from av.packet import Packet
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

Frames = NDArray[np.uint8]

THREADS = 4
"""Encoder threads. x264 writes other bytes for another number of threads, so it never follows the machine."""
BITS_PER_PIXEL = 0.25
"""Bit rate of the encoders that have no constant quality; about what x264 spends on detailed video at CRF 17."""

ENCODERS = ("libx264", "libopenh264", "h264_mf", "h264_videotoolbox")
"""H.264 encoders in order of choice. Those of GPU vendors take video memory that no budget knows of."""


def check_size(width: int, height: int) -> None:
    """Raises UsageError unless both are positive and even: yuv420p holds one colour sample per 2x2 pixels."""
    if width < 2 or height < 2 or width % 2 or height % 2:
        even = f"{max(2, width - width % 2)}x{max(2, height - height % 2)}"
        raise UsageError(
            f"a video of {width}x{height} cannot be written",
            expected="an even width and an even height",
            advice=f"use {even}",
        )


class VideoWriter:
    """Writes frames to `path` as H.264, yuv420p, BT.709 limited range, in an mp4.

        with VideoWriter(path, 1280, 720, 24, {"comment": "..."}) as video:
            for frames in decoded:      # uint8 [T, H, W, 3] RGB, any T
                video.write(frames)

    Frames are encoded as they come, so memory does not grow with their number. Leaving the block in peace
    finishes the file (remux, decode every frame, sync, rename); leaving it by an exception keeps what came so far
    as `NAME.partial.mp4` and leaves the target as it was. The same frames give the same bytes, however they are
    cut into writes, as long as PyAV is the same and the encoder is libx264.

    encoder    the encoder in use, from ENCODERS
    fallback   why it is not libx264; "" if it is
    frames     frames given so far
    durable    frames that are surely in the partial file, whatever happens to this process

    Raises what `check_target` and `check_size` raise, UsageError if this PyAV has no H.264 encoder, StorageError if
    the disk fills up, the folder goes away or the written file does not decode.
    """

    def __init__(
        self,
        path: Path,
        width: int,
        height: int,
        fps: Fraction | float,
        metadata: Mapping[str, str] | None = None,
        *,
        overwrite: bool = False,
    ) -> None:
        check_target(path, overwrite)
        check_size(width, height)
        if not (math.isfinite(fps) and 1 <= fps <= 1000):
            raise UsageError(f"{fps} frames per second", expected="1 to 1000", advice="use 16 or 24")
        self.path, self.width, self.height = path, width, height
        self.fps = Fraction(fps).limit_denominator(1001)
        self.metadata = dict(metadata or {})
        self.overwrite = overwrite
        self.encoder, self.fallback = choose_encoder(width, height, self.fps)
        self.partial = partial_path(path)
        self.frames = 0
        self.durable = 0
        self._muxed = 0

    def __enter__(self) -> Self:
        with self._storage(), ExitStack() as undone:
            self._container = open_mp4(
                self.partial, "frag_keyframe+empty_moov+default_base_moof", self.metadata
            )
            undone.callback(self.partial.unlink, missing_ok=True)
            undone.callback(self._container.close)
            self._stream: VideoStream = self._container.add_stream(self.encoder, rate=self.fps)  # type: ignore[assignment]
            configure(self._stream.codec_context, self.encoder, self.width, self.height, self.fps)
            # Writes the header now; left alone, PyAV makes the file when the first packet leaves the encoder.
            self._container.start_encoding()
            self._to_yuv = to_yuv(self.width, self.height)
            undone.pop_all()
        return self

    def write(self, frames: Frames) -> None:
        """Encode `frames`, uint8 [T, H, W, 3] RGB."""
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[1:] != (self.height, self.width, 3):
            raise InternalError(
                f"frames of shape {list(frames.shape)}, {frames.dtype}",
                where="video writer",
                expected=f"[T, {self.height}, {self.width}, 3], uint8",
                advice="report this",
            )
        import av

        with self._storage():
            for rgb in frames:
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), format="rgb24")
                frame = convert(self._to_yuv, frame)
                frame.pts, frame.time_base = self.frames, 1 / self.fps
                self._mux(self._stream.encode(frame))
                self.frames += 1

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is not None or not self.frames:
            # The first error is the one to be told; what closing adds to it is not.
            with suppress(OSError, LowvramError):
                self._close()
            if not self.frames:
                with suppress(OSError):
                    self.partial.unlink(missing_ok=True)
            if kind is None:
                raise InternalError("no frames were written", where=str(self.path), advice="report this")
            return
        self._close()
        self._publish()

    def _close(self) -> None:
        with self._storage():
            try:
                self._mux(self._stream.encode(None))
            finally:
                self._container.close()
        self.durable = self.frames

    def _mux(self, packets: Iterable[Packet[VideoStream]]) -> None:
        for packet in packets:
            self._container.mux(packet)
            if packet.is_keyframe:
                self.durable = self._muxed
            self._muxed += 1

    def _publish(self) -> None:
        with self._storage():
            publish(
                self.path,
                lambda finishing: remux(self.partial, finishing, self.metadata),
                self.frames,
                (self.width, self.height),
                overwrite=self.overwrite,
                whole=self.partial,
            )
        # The video is there now: what fails from here on takes nothing away.
        with suppress(OSError):
            self.partial.unlink(missing_ok=True)

    @contextmanager
    def _storage(self) -> Iterator[None]:
        import av

        try:
            yield
        except (OSError, av.error.FFmpegError, FileError) as error:
            reason = error.found if isinstance(error, FileError) else error.strerror
            kept = f"; {self.partial} holds the frames so far" if self.durable else ""
            raise StorageError(
                f"the video could not be written ({reason})",
                where=str(self.path),
                advice=f"free space, or choose another folder{kept}",
            ) from error


AHEAD = 4
"""Frames that may wait for the encoder while the next are made."""


def write_behind(writer: VideoWriter, chunks: Iterable[Frames]) -> None:
    """Write `chunks`, each [T, H, W, 3], from a thread of its own, while the next are made in this one.

    The same bytes as writing them in turn. An error of either side is raised here, and the thread is over then.
    """
    waiting: Queue[Frames | None] = Queue(AHEAD)
    errors: list[BaseException] = []

    def write() -> None:
        while (chunk := waiting.get()) is not None:
            if not errors:  # after an error only so that nobody waits for room
                try:
                    writer.write(chunk)
                except BaseException as error:  # noqa: BLE001 raised again by the caller
                    errors.append(error)

    thread = Thread(target=write, name="video writer", daemon=True)
    thread.start()
    try:
        for chunk in chunks:
            if errors:
                break
            waiting.put(chunk)
    finally:
        waiting.put(None)
        thread.join()
    if errors:
        raise errors[0]


def read_frames(path: Path) -> Generator[Frames, None, None]:
    """The frames of the first video stream, each uint8 [H, W, 3] RGB, one in memory at a time.

    The file's own matrix and range are used; a file that does not name its matrix is taken as BT.601, as FFmpeg does.
    Raises FileError if the file is not a video, or where it stops being one: what lies before that has come out then;
    and for HDR and for frames that are turned when they are shown, before the first.
    """
    with open_media(path) as container:
        graph: Graph | None = None
        first: tuple[int, int, str] | None = None
        for frame in decoded(container):
            shape = (frame.width, frame.height, frame.format.name)
            if first is None:
                _check_shown_as_stored(container, frame, path)
            if graph is None or shape != first:
                first, graph = shape, to_rgb(*shape)
            yield cast(Frames, convert(graph, frame).to_ndarray())


def _check_shown_as_stored(container: InputContainer, frame: VideoFrame, path: Path) -> None:
    """FileError for a video whose pixels, taken as they are, are not what people see."""
    light = HDR.get(container.streams.video[0].codec_context.color_trc)
    if light is not None:
        raise FileError(
            f"an HDR video ({light})",
            where=str(path),
            expected="ordinary brightness (BT.709): read as that, its colours would be pale",
            advice="convert it to SDR, as every video editor can",
        )
    turned = getattr(frame, "rotation", 0)  # not in every PyAV
    if turned % 360:
        raise FileError(
            f"its frames are turned by {turned % 360} degrees when they are shown",
            where=str(path),
            expected="frames that are stored upright",
            advice="ffmpeg -i IN OUT.mp4 turns them",
        )


def decoded(container: InputContainer) -> Iterator[VideoFrame]:
    """The frames of the first video stream; those that wait for their turn come out before an error does."""
    import av

    for packet in container.demux(container.streams.video[0]):
        try:
            frames = packet.decode()
        except av.error.FFmpegError:
            yield from packet.stream.codec_context.decode(None)
            raise
        yield from frames


# ---- the encoder


def choose_encoder(width: int, height: int, fps: Fraction) -> tuple[str, str]:
    """The first encoder of ENCODERS that opens here, and why those before it did not ("" for the first).

    Raises UsageError if none does.
    """
    import av

    refused: list[str] = []
    for name in ENCODERS:
        try:
            context = av.CodecContext.create(name, "w")
            configure(context, name, width, height, fps)
            context.open()
        except (av.error.FFmpegError, ValueError) as error:
            refused.append(f"{name}: {getattr(error, 'strerror', None) or 'not in this build of PyAV'}")
            continue
        return name, "; ".join(refused)
    raise UsageError(
        f"no H.264 encoder opens ({'; '.join(refused)})",
        where=f"PyAV {av.__version__}",
        advice="install the PyAV of PyPI: pip install --force-reinstall av",
    )


def configure(context: Any, encoder: str, width: int, height: int, fps: Fraction) -> None:
    """Set size, rate, colour tags and quality on an encoder's codec context that is not open yet."""
    context.width, context.height, context.pix_fmt = width, height, "yuv420p"
    context.framerate, context.time_base = fps, 1 / fps
    context.color_primaries = context.color_trc = context.colorspace = BT709
    context.color_range = LIMITED
    context.gop_size = round(fps)
    context.thread_count = THREADS
    if encoder == "libx264":
        # x264's macroblock tree reads memory that it did not set: at 320x192 eight of ten runs differed (core 165).
        # Without it there is no rate lookahead either, so frames reach the disk sooner.
        context.options = {"crf": "17", "preset": "medium", "mbtree": "0"}
    else:
        context.bit_rate = int(width * height * fps * BITS_PER_PIXEL)
