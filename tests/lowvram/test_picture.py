"""Pictures: what their files may be, what is refused from the header, and what is seen."""

from __future__ import annotations

import struct
import tracemalloc
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from work import lines_run

from lowvram.errors import FileError, StorageError
from lowvram.media.picture import MAX_BYTES, open_picture, read_picture

LINES = 5_000
CORNERS = np.zeros((4, 6, 3), np.uint8)
CORNERS[0, 0] = 255, 0, 0  # red at the top left, blue at the bottom right
CORNERS[3, 5] = 0, 0, 255


def saved(folder: Path, image: Image.Image, name: str = "picture.png", **options: object) -> Path:
    path = folder / name
    image.save(path, **options)  # type: ignore[arg-type]
    return path


def seen(path: Path) -> NDArray[np.uint8]:
    picture = open_picture(path)
    pixels = read_picture(picture)
    assert pixels.shape == (picture.height, picture.width, 3) and pixels.dtype == np.uint8
    return pixels


def png_header(width: int, height: int, depth: int = 8, colour: int = 2) -> bytes:
    """A PNG that is nothing but its header and one compressed row's worth of data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0" * 20000)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.webp", "picture with ä.png", "no_suffix"])
def test_the_pixels_of_a_picture_are_its_pixels(tmp_path: Path, name: str) -> None:
    kind = {".bmp": "BMP", ".webp": "WEBP"}.get(Path(name).suffix, "PNG")
    path = saved(tmp_path, Image.fromarray(CORNERS), name, format=kind, lossless=True)
    assert np.array_equal(seen(path), CORNERS)


@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        (1, CORNERS),
        (3, CORNERS[::-1, ::-1]),
        (6, np.rot90(CORNERS, -1)),
        (8, np.rot90(CORNERS)),
        (2, CORNERS[:, ::-1]),
    ],
)
def test_a_picture_is_turned_as_its_exif_data_says(
    tmp_path: Path, orientation: int, upright: NDArray[np.uint8]
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(seen(saved(tmp_path, Image.fromarray(CORNERS), exif=exif)), upright)
    photo = saved(tmp_path, Image.fromarray(CORNERS).resize((60, 40)), "photo.jpg", exif=exif, quality=95)
    assert seen(photo).shape[:2] == ((60, 40) if orientation in (6, 8) else (40, 60))


def test_grey_palette_bilevel_and_16_bit_pictures_become_rgb(tmp_path: Path) -> None:
    colours = Image.fromarray(CORNERS)
    assert np.array_equal(seen(saved(tmp_path, colours.quantize(8))), CORNERS)
    grey = np.arange(0, 240, 10, dtype=np.uint8).reshape(4, 6)
    for image in (Image.fromarray(grey), Image.fromarray(grey.astype(np.uint16) * 257)):
        assert np.array_equal(seen(saved(tmp_path, image)), np.repeat(grey[..., None], 3, axis=2))
    assert np.array_equal(np.unique(seen(saved(tmp_path, Image.fromarray(grey > 100)))), [0, 255])


def test_an_opaque_alpha_channel_is_dropped_and_a_transparent_one_refused(tmp_path: Path) -> None:
    image = Image.fromarray(CORNERS).convert("RGBA")
    assert np.array_equal(seen(saved(tmp_path, image)), CORNERS)
    image.putpixel((3, 2), (10, 20, 30, 0))
    with pytest.raises(FileError, match="transparent"):
        seen(saved(tmp_path, image))
    palette = Image.fromarray(CORNERS).quantize(8)
    with pytest.raises(FileError, match="transparent"):
        seen(saved(tmp_path, palette, transparency=palette.getpixel((0, 0))))


def test_a_cmyk_picture_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="CMYK") as refused:
        open_picture(saved(tmp_path, Image.new("CMYK", (6, 4)), "a.jpg"))
    assert len(str(refused.value).splitlines()) == 3


def test_animations_are_refused(tmp_path: Path) -> None:
    frames = [Image.fromarray(CORNERS), Image.fromarray(CORNERS[::-1].copy())]
    for name in ("a.png", "a.webp"):
        with pytest.raises(FileError, match="animation"):
            open_picture(saved(tmp_path, frames[0], name, save_all=True, append_images=frames[1:]))


@pytest.mark.parametrize(("width", "height"), [(13000, 13000), (2**31 - 1, 2**31 - 1), (200_000_000, 1)])
def test_169_megapixels_in_20_kb_are_refused_from_the_header(tmp_path: Path, width: int, height: int) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(png_header(width, height))
    assert path.stat().st_size < 20_000

    def refused() -> None:
        with pytest.raises(FileError, match="megapixels"):
            open_picture(path)

    tracemalloc.start()
    refused()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20 and lines_run(refused)[1] < LINES


def test_a_huge_file_is_refused_without_reading_it(tmp_path: Path) -> None:
    path = tmp_path / "huge.png"
    with path.open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(FileError, match="256 MB"):
        open_picture(path)


def test_what_is_no_picture_or_a_broken_one_is_a_file_error(tmp_path: Path) -> None:
    whole = BytesIO()
    Image.fromarray(np.random.default_rng(1).integers(0, 255, (64, 64, 3), np.uint8)).save(whole, "PNG")
    data = whole.getvalue()
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 255
    gif = BytesIO()
    Image.fromarray(CORNERS).save(gif, "GIF")
    for bad in (b"", b"ffconcat version 1.0\nfile other.png\n", data[: len(data) // 2], bytes(flipped), gif.getvalue(),
                png_header(64, 64, depth=3), b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"):  # fmt: skip
        path = tmp_path / "bad.png"
        path.write_bytes(bad)
        with pytest.raises(FileError) as refused:
            seen(path)
        assert len(str(refused.value).splitlines()) <= 3
    with pytest.raises(FileError, match="folder"):
        open_picture(tmp_path)


def test_another_picture_under_the_same_name_is_noticed(tmp_path: Path) -> None:
    path = saved(tmp_path, Image.fromarray(CORNERS))
    picture = open_picture(path)
    saved(tmp_path, Image.fromarray(CORNERS[::-1].copy()))
    with pytest.raises(StorageError, match=picture.sha256[:12]):
        read_picture(picture)
