"""What cannot be animated ends the command at once: the right exit code, three lines, nothing written."""

from __future__ import annotations

import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from videos import packets

from lowvram import Runtime
from lowvram.driving import open_folder
from lowvram.state import Saved, new_job

Spoil = Callable[[Path], Any]

REPLACE = ["--mode", "replace"]
FILES: dict[str, tuple[Spoil, list[str], str]] = {
    # what is wrong with the folder, how; flags; what is said of it
    "a shorter face": (lambda f: packets(f / "src_face.mp4", 512, range(11)), [], "11 frames"),
    "no mask": (lambda f: (f / "src_mask.mp4").unlink(), REPLACE, "src_mask.mp4 is missing"),
    "a larger mask": (lambda f: packets(f / "src_mask.mp4", 64, range(12)), REPLACE, "frames of 64x64"),
    "a larger background": (lambda f: packets(f / "src_bg.mp4", 64, range(12)), REPLACE, "frames of 64x64"),
    "a small face": (lambda f: packets(f / "src_face.mp4", 256, range(12)), [], "face crops of 256x256"),
    "no frames": (lambda f: packets(f / "src_pose.mp4", 32, []), [], "no video stream"),
    "a variable rate": (lambda f: packets(f / "src_pose.mp4", 32, [0, 1, 2, 9]), [], "frames of different length"),
    "half a token": (lambda f: packets(f / "src_pose.mp4", 40, range(12)), [], "frames of 40x40"),
    "a script": (
        lambda f: (f / "src_pose.mp4").write_text("ffconcat version 1.0\nfile src_bg.mp4\n"), [], "not readable"
    ),
    "a bomb": (lambda f: (f / "src_ref.png").write_bytes(bomb()), [], "13000x13000"),
    "a text": (lambda f: (f / "src_ref.png").write_text("no picture"), [], "not a picture that can be read"),
    "a picture for print": (
        lambda f: Image.new("CMYK", (32, 32)).save(f / "src_ref.png", "JPEG"), [], "a CMYK picture"
    ),
    "holes": (
        lambda f: Image.new("RGBA", (32, 32), (200, 30, 30, 0)).save(f / "src_ref.png"), [], "transparent parts"
    ),
    "half a picture": (
        lambda f: (f / "src_ref.png").write_bytes((f / "src_ref.png").read_bytes()[:-300]), [], "cannot be decoded"
    ),
    "no sound": (lambda f: None, ["--audio-from", "gone.mp4"], "no such file"),
    "no folder": (shutil.rmtree, [], "no such folder"),
}  # fmt: skip
USAGE: dict[str, tuple[list[str], str]] = {
    "no mode": (["--mode", "swap"], 'mode "swap"'),
    "a length": (["--frames", "81"], "--segment says how many"),
    "a size": (["--size", "64x64"], "leave --size out"),
    "a picture": (["--image", "gone.png"], "src_ref.png"),
    "a last picture": (["--last-image", "gone.png"], "src_ref.png"),
    "another model": (["--model", "nano"], "cannot be driven by a video"),
    "three frames carried": (["--carry", "3"], "3 carried frames"),
    "no whole latents": (["--segment", "10"], "--segment: 10 frames"),
    "nothing new in a segment": (["--segment", "5", "--carry", "5"], "give --segment 9 or more"),
    "a segment of one frame": (["--segment", "1"], "give --segment 5 or more"),
    "a report nowhere": (["--report", "nowhere/report.json"], "its folder does not exist"),
    "a report that is a video": (["--report", "report.mp4"], ".json or .svg"),
}
BAD = [(3, *case) for case in FILES.values()] + [(2, lambda f: None, *case) for case in USAGE.values()]


@pytest.mark.parametrize(("code", "spoil", "flags", "words"), BAD, ids=[*FILES, *USAGE])
def test_what_cannot_be_used_ends_the_command_at_once_and_writes_nothing(
    code: int,
    spoil: Spoil,
    flags: list[str],
    words: str,
    drive: Callable[..., Path],
    tmp_path: Path,
    jobs: Path,
    cli: Callable[..., Any],
) -> None:
    folder = tmp_path / "drive"
    shutil.copytree(drive(12), folder)
    spoil(folder)
    before = sorted(tmp_path.rglob("*"))
    said = cli("animate", folder, "-o", tmp_path / "out.mp4", *flags)
    assert (said.code, said.out) == (code, "")
    assert words in said.err and said.err.startswith("error: ") and said.err.count("\n") <= 3
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


def test_a_driven_job_keeps_no_latent_and_is_not_done_again_once_it_is_finished(
    drive: Callable[..., Path], tmp_path: Path, jobs: Path, cli: Callable[..., Any]
) -> None:
    pipe = Runtime("1GB", "2GB", "cpu").load("nano-animate")
    driven = pipe.driven_job(open_folder(drive(12), "animate"))
    saved = Saved(job=driven, output=str(tmp_path / "out.mp4"), vram=10**9, ram=2 * 10**9, device="cpu")
    folder = new_job(saved, jobs, "20260101-000000")
    said = cli("decode", folder.name, "-o", tmp_path / "again.mp4")
    assert said.code == 2 and "no latent" in said.err and f"resume {folder.name}" in said.err
    folder.finish()
    said = cli("decode", folder.name, "-o", tmp_path / "again.mp4")
    assert said.code == 2 and "no latent" in said.err and "resume" not in said.err
    said = cli("resume", folder.name)
    assert said.code == 2 and "is finished" in said.err
    assert not list(tmp_path.glob("*.mp4"))
