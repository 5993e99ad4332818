"""What cannot be animated ends the command at once: the right exit code, three lines, nothing written."""

from __future__ import annotations

import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from videos import packets


@pytest.mark.parametrize(
    ("spoil", "more", "code", "words"),
    [
        (lambda f: (f / "src_mask.mp4").unlink(), ["--mode", "replace"], 3, "src_mask.mp4 is missing"),
        (
            lambda f: (f / "src_pose.mp4").write_text("ffconcat version 1.0\nfile src_bg.mp4\n"),
            [],
            3,
            "not readable",
        ),
        (lambda f: (f / "src_ref.png").write_bytes(bomb()), [], 3, "13000x13000"),
        (lambda f: packets(f / "src_face.mp4", 512, range(11)), [], 3, "11 frames"),
        (lambda f: packets(f / "src_mask.mp4", 64, range(12)), ["--mode", "replace"], 3, "frames of 64x64"),
        (lambda f: packets(f / "src_pose.mp4", 32, []), [], 3, "no video stream"),
        (lambda f: packets(f / "src_pose.mp4", 32, [0, 1, 2, 9]), [], 3, "frames of different length"),
        (lambda f: None, ["--audio-from", "src_pose.mp4"], 3, "no such file"),
        (lambda f: None, ["--mode", "swap"], 2, 'mode "swap"'),
        (lambda f: None, ["--frames", "81"], 2, "--frames 81"),
        (lambda f: None, ["--model", "nano"], 2, "cannot be driven by a video"),
    ],
    ids=[
        *("no mask", "a script", "a bomb", "a shorter face", "a larger mask", "no frames", "a variable rate"),
        *("no sound", "no mode", "a length", "another model"),
    ],
)
def test_what_cannot_be_used_ends_the_command_at_once_and_writes_nothing(
    drive: Callable[..., Path],
    tmp_path: Path,
    jobs: Path,
    cli: Callable[..., Any],
    spoil: Callable[[Path], Any],
    more: list[str],
    code: int,
    words: str,
) -> None:
    folder = tmp_path / "drive"
    shutil.copytree(drive(12), folder)
    spoil(folder)
    before = sorted(tmp_path.rglob("*"))
    said = cli("animate", folder, "-o", tmp_path / "out.mp4", *more)
    assert (said.code, said.out) == (code, "")
    assert words in said.err and said.err.count("\n") <= 3
    assert sorted(tmp_path.rglob("*")) == before and not jobs.exists()


def bomb() -> bytes:
    """A PNG of 169 megapixels in 20 kB."""
    rows, out = zlib.compressobj(9), [b"\x89PNG\r\n\x1a\n"]
    header = struct.pack(">IIBBBBB", 13_000, 13_000, 1, 0, 0, 0, 0)
    data = b"".join([rows.compress(bytes(1626)) for _ in range(13_000)] + [rows.flush()])
    for kind, content in ((b"IHDR", header), (b"IDAT", data), (b"IEND", b"")):
        out.append(struct.pack(">I", len(content)) + kind + content)
        out.append(struct.pack(">I", zlib.crc32(kind + content)))
    return b"".join(out)
