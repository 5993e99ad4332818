"""What drives a character: the folder that Wan-Animate's preprocessing writes, and how a long video is cut.

src_pose.mp4   skeletons on black: the size and length of the result
src_face.mp4   512x512 face crops, as many
src_ref.png    the character
src_bg.mp4     replace: the scene with the person blacked out
src_mask.mp4   replace: white where the person is

A video is made in segments of equal length. Each but the first begins with the last frames of the one before it,
which are carried over and not shown twice; past its end the driving video is played backwards, then forwards again.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from importlib.resources import files
from pathlib import Path

from lowvram.errors import FileError, UsageError
from lowvram.media.clip import Clip, open_clip
from lowvram.media.picture import Picture, open_picture
from lowvram.offload.io import storage_errors, write_atomic
from lowvram.quant.face_spec import FACE_PIXELS

MODES = ("animate", "replace")
CARRIED = (1, 5)
"""Frames that a segment may take over from the one before it: what the model was trained with."""
_REPLACED = ("src_bg.mp4", "src_mask.mp4")
_FILES = ("src_pose.mp4", "src_face.mp4", "src_ref.png")


@dataclass(frozen=True, slots=True, kw_only=True)
class Driving:
    """Everything of an Animate job that is not in a job without it."""

    mode: str
    """"animate": the character moves like the video's person; "replace": it takes that person's place."""
    pose: Clip
    face: Clip
    picture: Picture
    """The character."""
    background: Clip | None = None
    mask: Clip | None = None
    carried: int = 1
    match_colours: bool = False
    """Whether every segment is given the colours of the first."""
    sound: str | None = None
    """A video, or sound alone, that goes into the result."""

    @property
    def frames(self) -> int:
        """Of the result."""
        return self.pose.frames

    @property
    def rate(self) -> Fraction:
        """Frames per second of the driving video."""
        return Fraction(*self.pose.rate)

    def segments(self, length: int) -> int:
        """How many segments of `length` frames make the whole."""
        return max(1, -(-(self.frames - self.carried) // (length - self.carried)))

    def numbers(self, segment: int, length: int) -> list[int]:
        """Frames of the driving video that segment `segment` follows, carried ones included."""
        start = segment * (length - self.carried)
        return [reflected(n, self.frames) for n in range(start, start + length)]

    def shown(self, segment: int, length: int) -> range:
        """Frames of a segment that are new in the result: not carried over, and not past the video's end."""
        start = segment * (length - self.carried)
        return range(self.carried if segment else 0, min(length, self.frames - start))


def reflected(number: int, frames: int) -> int:
    """The frame shown at time `number` of a video played to and fro: 0 1 2 3 2 1 0 1 ... for 4 frames."""
    if frames == 1:
        return 0
    number %= 2 * (frames - 1)
    return min(number, 2 * (frames - 1) - number)


def copy_sample(folder: Path) -> None:
    """Write the sample that ships with nano-animate into `folder`, which must be new or empty: all files of both modes.

    UsageError if something lies there already, StorageError if it cannot be written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(
            "something lies there already",
            where=f"--drive {folder}",
            advice="name a new folder, or run `lowvram animate` on it",
        )
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for each in files("lowvram").joinpath("assets", "nano-animate", "sample").iterdir():
        write_atomic(folder / each.name, each.read_bytes())


def open_folder(
    folder: Path,
    mode: str,
    *,
    carried: int = 1,
    match_colours: bool = False,
    sound: Path | None = None,
) -> Driving:
    """The folder `folder`, read as far as its headers. UsageError for a mode that is none, FileError for a file."""
    if mode not in MODES:
        raise UsageError(f'mode "{mode}"', where="--mode", expected=" or ".join(MODES), advice="choose one")
    if carried not in CARRIED:
        raise UsageError(
            f"{carried} carried frames", where="--carry", expected="1 or 5", advice="leave --carry out for 1"
        )
    if not folder.is_dir():
        raise FileError(
            "a file" if folder.exists() else "no such folder",
            where=str(folder),
            expected=f"a folder with {', '.join(_FILES)}",
            advice="run Wan-Animate's preprocessing first",
        )
    needed = _FILES + (_REPLACED if mode == "replace" else ())
    missing = [name for name in needed if not (folder / name).exists()]
    if missing:
        raise FileError(
            f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing",
            where=str(folder),
            expected=f"{', '.join(needed)} for --mode {mode}",
            advice="run the preprocessing for this mode, or choose the other mode",
        )
    replaced = [open_clip(folder / name) for name in _REPLACED] if mode == "replace" else [None, None]
    driving = Driving(
        mode=mode,
        pose=open_clip(folder / "src_pose.mp4"),
        face=open_clip(folder / "src_face.mp4"),
        picture=open_picture(folder / "src_ref.png"),
        background=replaced[0],
        mask=replaced[1],
        carried=carried,
        match_colours=match_colours,
        sound=None if sound is None else str(sound.absolute()),
    )
    _check(driving)
    return driving


def _check(driving: Driving) -> None:
    """FileError unless the videos belong together."""
    pose, face = driving.pose, driving.face
    if (face.width, face.height) != (FACE_PIXELS, FACE_PIXELS):
        raise _disagree(
            face,
            f"face crops of {face.width}x{face.height}",
            f"{FACE_PIXELS}x{FACE_PIXELS}, as the model reads them",
        )
    for clip in (face, driving.background, driving.mask):
        if clip is None:
            continue
        if clip.frames != pose.frames:
            raise _disagree(clip, f"{clip.frames} frames", f"{pose.frames}, as in src_pose.mp4")
        if clip is not face and (clip.width, clip.height) != (pose.width, pose.height):
            found, expected = (f"{c.width}x{c.height}" for c in (clip, pose))
            raise _disagree(clip, f"frames of {found}", f"{expected}, as in src_pose.mp4")


def _disagree(clip: Clip, found: str, expected: str) -> FileError:
    advice = "make all videos of the folder in one run of the preprocessing"
    return FileError(found, where=clip.path, expected=expected, advice=advice)
