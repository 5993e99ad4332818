"""Pictures: recognised from their header, known by their content, decoded to RGB.

A file is hostile until it is decoded: its size in bytes and pixels is bounded before anything is allocated for it,
and only the formats named here are tried. Colour profiles are not applied, as nowhere in this field.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from lowvram.errors import FileError, StorageError
from lowvram.offload.io import FileReader

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
MAX_BYTES = 256_000_000
MAX_PIXELS = 100_000_000
"""The largest cameras in use make 100 megapixels; decoding takes three bytes for each."""
_PLAIN = ("RGB", "L", "1")
_SEE_THROUGH = ("RGBA", "LA", "PA", "RGBa", "La")
_SIXTEEN = ("I;16", "I;16B", "I;16L", "I;16N")

Pixels = NDArray[np.uint8]


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """A picture file as a job knows it."""

    path: str
    """Absolute."""
    sha256: str
    """Of the file's bytes: a job that goes on later must see the same picture."""
    width: int
    height: int
    """Pixels, as a viewer shows it: turned as its EXIF data says."""


def open_picture(path: Path) -> Picture:
    """What the picture at `path` is. FileError if it is none that can be used.

    It is decoded once, if its header may be believed: what is broken or transparent is known before a model is loaded.
    """
    data = _read(path)
    with _opened(data, path) as image:
        height, width, _ = _pixels(image, path).shape
    digest = hashlib.sha256(data).hexdigest()
    return Picture(path=str(path.absolute()), sha256=digest, width=width, height=height)


def read_picture(picture: Picture) -> Pixels:
    """The pixels [H, W, 3] uint8 RGB. StorageError if the file is no longer the one that was opened."""
    path = Path(picture.path)
    data = _read(path)
    if hashlib.sha256(data).hexdigest() != picture.sha256:
        raise StorageError(
            "the picture is not the one this job began with",
            where=str(path),
            expected=f"the file whose SHA-256 begins with {picture.sha256[:12]}",
            advice="put the picture back, or start the job again with the new one",
        )
    with _opened(data, path) as image:
        return _pixels(image, path)


def _pixels(image: Image, path: Path) -> Pixels:
    from PIL import ImageOps

    _check(image, path)
    image.load()
    upright = ImageOps.exif_transpose(image)
    assert upright is not None
    return np.asarray(_to_rgb(upright, path))


def _to_rgb(image: Image, path: Path) -> Image:
    from PIL import Image as pillow

    if image.mode in _SIXTEEN:  # the high byte of each value, as Pillow does it with colours of 16 bits
        image = pillow.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
    if image.mode == "P" and "transparency" not in image.info:
        return image.convert("RGB")
    if image.mode in _SEE_THROUGH or "transparency" in image.info:
        image = image.convert("RGBA")
        if np.asarray(image)[..., 3].min() < 255:
            raise _refused(
                path,
                "the picture has transparent parts",
                "a colour for every pixel",
                "lay it on a background",
            )
    return image.convert("RGB")


def _check(image: Image, path: Path) -> None:
    """FileError for what cannot be used, from the header alone."""
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise _refused(
            path,
            f"a picture of {width}x{height} pixels",
            f"at most {MAX_PIXELS // 10**6} megapixels",
            "make it smaller: a video shows about one megapixel of it",
        )
    if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:
        raise _refused(path, "an animation", "a single picture", "save the frame that you mean as a picture")
    if image.mode == "CMYK":
        raise _refused(
            path, "a CMYK picture, made for print", "RGB colours", "save it as RGB in a picture editor"
        )
    if image.mode not in (*_PLAIN, *_SEE_THROUGH, *_SIXTEEN, "P"):
        raise _refused(
            path, f"a picture in the format {image.mode}", "8 or 16 bits of RGB or grey", "save it as RGB"
        )


def _read(path: Path) -> bytes:
    with FileReader(path) as reader:
        if reader.size > MAX_BYTES:
            found = f"a file of {reader.size // 10**6:,} MB"
            raise _refused(path, found, f"a picture of at most {MAX_BYTES // 10**6} MB", "make it smaller")
        return reader.read_at(0, reader.size)


@contextmanager
def _opened(data: bytes, path: Path) -> Iterator[Image]:
    """The picture in `data`, not decoded yet; whatever Pillow raises about it becomes a FileError."""
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the number of pixels is checked here
            with Image.open(BytesIO(data), formats=FORMATS) as image:
                yield image
    except (FileError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        expected = f"at most {MAX_PIXELS // 10**6} megapixels"
        raise _refused(path, "a picture of too many pixels", expected, "make it smaller") from error
    except Exception as error:  # its decoders raise whatever broke them
        found = f"the picture cannot be decoded ({' '.join(str(error).split())[:80]})"
        if isinstance(error, UnidentifiedImageError):
            found = "not a picture that can be read"
        expected = "a whole " + ", ".join(FORMATS[:-1]) + f" or {FORMATS[-1]} file"
        raise _refused(path, found, expected, "open it in another program and save it again") from error


def _refused(path: Path, found: str, expected: str, advice: str) -> FileError:
    return FileError(found, where=str(path), expected=expected, advice=advice)
