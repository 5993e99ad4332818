"""Wan-Animate end to end on a small model: segments, what they carry over, placement, interruption, memory."""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import weakref
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from device_peaks import Peaks, check
from PIL import Image
from safetensors.torch import save_file
from strict_device import StrictRuntime, metered
from torch import Tensor

from lowvram import drift
from lowvram.animation import Animation
from lowvram.api import Pipeline, Runtime
from lowvram.conditions import animate
from lowvram.conditions.animate import Animate
from lowvram.conditions.contract import Condition
from lowvram.driving import open_folder
from lowvram.job import LoraChoice
from lowvram.media.join import join
from lowvram.media.probe import probe
from lowvram.media.video import VideoWriter, read_frames
from lowvram.models.vae_tiles import Tiling
from lowvram.offload.placement import Placement
from lowvram.planning.facts import gather
from lowvram.planning.plan import Plan
from lowvram.quant.face_spec import FaceSpec
from lowvram.quant.names import CLIP
from lowvram.quant.spec import CLIP_TOKENS, ClipSpec, DitSpec
from lowvram.stages import encode, tiles
from lowvram.stages.segments import Forgetful, Stand, colour_change
from lowvram.state import list_jobs

KILL = getattr(signal, "SIGKILL", signal.SIGTERM)

FACE = FaceSpec((4, 4, 4, 4, 8, 8, 8, 8), style=8, directions=4, motion=16, hidden=16, heads=2, every=2)
ANIMATE = DitSpec(
    256, 256, 4, 36, 16, text_dim=256, freq_dim=64, image_tokens=CLIP_TOKENS, image_dim=80, face=FACE
)
SEGMENT = 9


@pytest.fixture(scope="session")
def tiny_animate(
    tiny_model: Path,
    random_weights: Callable[..., dict[str, Tensor]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A folder with a small Wan-Animate of random numbers, its CLIP, and the parts of `tiny_model`."""
    folder = tmp_path_factory.mktemp("tiny-animate") / "model"
    folder.mkdir()
    for name in ("vae.safetensors", "text_encoder.safetensors", "spiece.model"):
        shutil.copy(tiny_model / name, folder / name)
    weights = random_weights(ANIMATE.shapes(), 5)
    generator = torch.Generator().manual_seed(6)
    for name, w in weights.items():
        if name.startswith("motion_encoder."):  # equalised: stored with unit variance
            weights[name] = torch.randn(w.shape, generator=generator).to(w.dtype)
    save_file(weights, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    clip = random_weights(ClipSpec(dim=80, ffn=160, layers=3).shapes(), 7)
    clip = {str(CLIP.from_native(name)): w for name, w in clip.items()}
    save_file(clip, folder / "clip_vision_tiny.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def drive(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """drive(frames, width, height, rate): a folder as Wan-Animate's preprocessing writes it, made once."""

    @cache
    def make(frames: int, width: int = 32, height: int = 32, rate: Fraction = Fraction(30)) -> Path:
        folder = tmp_path_factory.mktemp("drive")
        generator = np.random.default_rng(frames)
        coarse = generator.integers(0, 255, (4, 4, 3), np.uint8)
        for name, size in (("pose", (width, height)), ("face", (512, 512)), ("bg", (width, height))):
            picture = np.asarray(Image.fromarray(coarse).resize(size))
            moving = [np.roll(picture, 3 * n, 1) for n in range(frames)]
            _write_video(folder / f"src_{name}.mp4", moving, rate)
        mask = np.zeros((height, width, 3), np.uint8)
        mask[height // 4 : height // 2 + 8, width // 4 : width // 2 + 8] = 255
        _write_video(folder / "src_mask.mp4", [np.roll(mask, n % 8, 1) for n in range(frames)], rate)
        Image.fromarray(coarse[::-1]).resize((48, 40)).save(folder / "src_ref.png")
        return folder

    return make


def _write_video(path: Path, frames: Sequence[np.ndarray], rate: Fraction) -> None:
    height, width = frames[0].shape[:2]
    with VideoWriter(path, width, height, rate) as writer:
        for frame in frames:
            writer.write(frame[None])


def frames_of(path: Path) -> np.ndarray:
    return np.stack(list(read_frames(path)))


SETTINGS: dict[str, Any] = {"frames": SEGMENT, "steps": 2, "seed": 3}


@pytest.fixture(scope="module")
def pipe(tiny_animate: Path) -> Pipeline:
    return Runtime(vram="2GB", ram="4GB", device="cpu").load(str(tiny_animate))


@pytest.fixture(scope="module")
def plan(pipe: Pipeline, drive: Callable[..., Path]) -> Plan:
    """Of one segment, whatever the mode and the length."""
    return pipe.animate(drive(20), **SETTINGS).plan


@pytest.mark.parametrize("mode", ["animate", "replace"])
def test_a_video_of_three_segments_is_as_long_as_its_driving_video(
    pipe: Pipeline,
    plan: Plan,
    drive: Callable[..., Path],
    tmp_path: Path,
    mode: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(drift, "NOTABLE", 0.0)
    output = tmp_path / "out.mp4"
    job = pipe.driven_job(open_folder(drive(20), mode), **SETTINGS)
    report = Animation(pipe, job, plan).save(output)
    found = probe(output)
    assert (found.width, found.height, found.frames, found.fps) == (32, 32, 20, 30)
    names = [stage.name for stage in report.stages]
    assert names == ["text", "clip", "faces", "encode", "prepare", "denoise", "decode"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.mp4"]
    # the last segments show frames 9 to 16 and 17 to 19; the codec clips what noise is out of range
    assert [c.segment for c in report.colours] == [0, 1, 2]
    for colours, part in zip(report.colours, np.split(frames_of(output), [9, 17]), strict=True):
        assert colours.mean == pytest.approx(part.mean((0, 1, 2)), abs=3)
    assert report.notes[-1].startswith("colours: segment ")


def test_the_plan_is_that_of_a_segment_for_any_length(
    pipe: Pipeline, plan: Plan, drive: Callable[..., Path]
) -> None:
    longer = pipe.animate(drive(49), **SETTINGS).plan
    assert [(s.claims, s.ram_claims) for s in longer.stages] == [
        (s.claims, s.ram_claims) for s in plan.stages
    ]


def relighting_lora(path: Path) -> Path:
    """A LoRA on what the relighting LoRA changes, named as PEFT names it; as a .ckpt it is what the authors publish."""
    generator = torch.Generator().manual_seed(9)
    factors: dict[str, Tensor] = {}
    for name, shape in ANIMATE.shapes().items():
        if name.startswith("blocks.") and len(shape) == 2 and name.endswith(".weight"):
            module = f"base_model.model.{name.removesuffix('.weight')}"
            factors[f"{module}.lora_A.weight"] = (
                torch.randn(4, shape[1], generator=generator) / shape[1] ** 0.5
            )
            factors[f"{module}.lora_B.weight"] = torch.randn(shape[0], 4, generator=generator) / 4
    assert len(factors) == 2 * 12 * ANIMATE.layers
    if path.suffix == ".ckpt":
        bare = {k.removeprefix("base_model.model."): w for k, w in factors.items()}
        torch.save({"state_dict": bare, "epoch": 1}, path)
    else:
        save_file(factors, path)
    return path


def test_streamed_equals_resident_bit_for_bit_with_the_relighting_lora(
    pipe: Pipeline, drive: Callable[..., Path], tmp_path: Path
) -> None:
    resident, checkpoint = (
        pipe.animate(
            drive(12), "replace", loras=(LoraChoice(path=str(relighting_lora(tmp_path / name))),), **SETTINGS
        )
        for name in ("lora.safetensors", "lora.ckpt")
    )
    assert set(resident.plan.denoise.where.values()) == {"resident"}
    on_disk = Placement(dict.fromkeys(resident.plan.denoise.where, "disk"), slots=2, ring=2)
    streamed = replace(checkpoint, plan=replace(checkpoint.plan, denoise=on_disk))
    for name, animation in (("resident", resident), ("streamed", streamed)):
        animation.save(tmp_path / f"{name}.mp4")
    streamed_frames, resident_frames = (
        frames_of(tmp_path / f"{name}.mp4") for name in ("streamed", "resident")
    )
    assert np.array_equal(streamed_frames, resident_frames)


def test_a_strict_device_gives_the_same_video_and_holds_what_was_planned(
    pipe: Pipeline, tiny_animate: Path, drive: Callable[..., Path], tmp_path: Path
) -> None:
    lora = LoraChoice(path=str(relighting_lora(tmp_path / "lora.safetensors")))
    plain = pipe.animate(drive(12), "replace", loras=(lora,), **SETTINGS)
    plain.save(tmp_path / "plain.mp4")
    strict = StrictRuntime("2GB", "4GB", "cpu", cache=False).load(str(tiny_animate))
    with metered() as tracker:
        stages = Peaks(tracker)
        replace(plain, pipeline=strict, listener=stages).save(tmp_path / "strict.mp4")
    check(plain.plan, stages)
    assert (tmp_path / "strict.mp4").read_bytes() == (tmp_path / "plain.mp4").read_bytes()


def test_memory_that_runs_out_while_driving_videos_are_encoded_is_met_with_smaller_tiles(
    pipe: Pipeline, drive: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In each of the three encodes, after its first latent: the videos are read again."""
    latents: list[Tensor] = []
    tilings: list[Tiling] = []

    def recorded(*args: Any) -> Tensor:
        latents.append(encode.encode(*args))
        return latents[-1]

    def scarce(device: Any, ways: Any, tiling: Tiling, attempt: Any, tell: Any) -> Iterator[Any]:
        def failing(now: Tiling, first: int) -> Iterator[Any]:
            tilings.append(now)
            results = attempt(now, first)
            if now == tiling:
                yield next(results)
                raise torch.OutOfMemoryError
            yield from results

        return tiles.in_tiles(device, ways, tiling, failing, tell)

    monkeypatch.setattr(animate, "encode", recorded)
    animation = pipe.animate(drive(9, 128, 128), "replace", **SETTINGS | {"steps": 1})
    animation.save(tmp_path / "plain.mp4")
    whole = latents[1:]  # the reference picture is one latent
    latents.clear()
    monkeypatch.setattr(encode, "in_tiles", scarce)
    animation.save(tmp_path / "scarce.mp4")
    assert len(tilings) == 6
    for made, expected in zip(latents[1:], whole, strict=True):
        assert float((made - expected).abs().max() / expected.abs().max()) <= 1e-5


class Weighed(Forgetful):
    """The condition of every segment by tensor: bytes, and whether it is still there."""

    def __init__(self) -> None:
        self.sizes: list[dict[str, int]] = []
        self.alive: list[weakref.ref[Tensor]] = []

    def condition(self, segment: int, made: Condition) -> None:
        # what the segments share is that of the picture: its CLIP tokens
        assert [ref() for ref in self.alive] == [None] * len(self.alive)
        found = made.to_tensors()
        self.sizes.append({name: t.untyped_storage().nbytes() for name, t in found.items()})
        self.alive += [weakref.ref(t) for name, t in found.items() if name != "image"]


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_what_conditions_lie_on_the_host_is_claimed_and_is_that_of_one_segment(
    pipe: Pipeline, drive: Callable[..., Path], tmp_path: Path, guidance: float
) -> None:
    settings = SETTINGS | {"frames": 5, "steps": 1, "guidance": (guidance, guidance)}
    animation = pipe.animate(drive(12), **settings)
    weighed = Weighed()
    animation.make(tmp_path / "out.mp4", tmp_path, Stand(), weighed)
    sizes = Animate().makes(gather(animation.job, pipe.model, animation.plan.machine))
    assert weighed.sizes == [sizes] * 3
    for stage in animation.plan.stages[1:]:
        assert stage.ram_claims["condition"] == sum(sizes.values()), stage.name


def test_matched_colours_undo_a_drift_that_the_carried_frames_show() -> None:
    generator = np.random.default_rng(0)
    wanted = generator.uniform(-0.5, 0.5, (5, 16, 16, 3)).astype(np.float32)
    drifted = (wanted * np.float32([0.95, 1.04, 1.0]) + np.float32([0.05, -0.03, 0.0])).astype(np.float32)
    gain, offset = colour_change(drifted, wanted)
    assert np.abs(drifted * gain + offset - wanted).max() < 2e-3
    assert np.abs(drifted - wanted).max() > 0.05
    # what cannot be drift is not undone: a black frame is not made bright
    gain, offset = colour_change(np.full_like(wanted, -1), wanted)
    assert np.abs(-gain + offset + 1).max() <= 0.11


# ---- from the command line


def arguments(folder: Path, model: Path, output: Path) -> list[str]:
    texts = [
        "animate",
        folder,
        "--mode",
        "animate",
        "--model",
        model,
        "--segment",
        5,
        "--steps",
        2,
        "--seed",
        3,
    ]
    texts += [
        "--match-colours",
        "--audio-from",
        folder / "src_pose.mp4",
        "-o",
        output,
        "--device",
        "cpu",
        "--quiet",
    ]
    return [str(text) for text in texts]


CHILD = """
import os, signal, sys
import psutil
from lowvram.cli import driven, main

keep, begin, at = driven.FolderKeeper.state, driven.FolderKeeper.begin, (int(sys.argv[1]), int(sys.argv[2]))
def dying(self, segment, state):
    keep(self, segment, state)
    if (segment, state.step) == at:
        os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))
def weighing(self, segment, carried):
    begin(self, segment, carried)
    memory = psutil.Process().memory_info()
    if hasattr(memory, "peak_wset"):
        print(memory.peak_wset)
    else:
        import resource
        print(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
driven.FolderKeeper.state, driven.FolderKeeper.begin = dying, weighing
main.run(sys.argv[3:])
"""


def test_half_a_minute_takes_no_more_memory_than_its_beginning_and_outlives_a_kill(
    tiny_animate: Path, drive: Callable[..., Path], tmp_path: Path, jobs: Path, cli: Callable[..., Any]
) -> None:
    """Twelve segments, killed after the first step of the fourth, and made once more without an interruption."""
    folder = with_sound(drive(49, rate=Fraction(49, 30)), tmp_path / "drive")
    output, again = tmp_path / "out.mp4", tmp_path / "again.mp4"

    def child(segment: int, step: int, target: Path, *more: object) -> subprocess.CompletedProcess[str]:
        call = [sys.executable, "-c", CHILD, segment, step, *arguments(folder, tiny_animate, target), *more]
        return subprocess.run(
            [str(each) for each in call],
            check=False,
            env=os.environ | {"LOWVRAM_STATE": str(jobs)},
            capture_output=True,
            text=True,
            timeout=300,
        )

    killed = child(3, 1, output)
    assert killed.returncode == -KILL, killed.stderr
    (job,) = list_jobs(jobs)
    assert not output.exists() and not job.finished
    assert sorted(p.name for p in job.path.glob("segment-*")) == [f"segment-0000{n}.mp4" for n in range(3)]

    said = cli("resume", "last", "--json")
    assert said.code == 0, said.err
    # what is not made again is not measured again, but the first segment, which the others are held against
    assert [c["segment"] for c in said.objects[-1]["report"]["colours"]] == [0, *range(3, 12)]
    assert job.finished and not list(job.path.glob("segment-*"))

    report = tmp_path / "report.json"
    whole = child(-1, -1, again, "--report", report)
    assert whole.returncode == 0, whole.stderr
    peaks = [int(line) for line in whole.stdout.splitlines()[:-1]]  # the last one is the result
    assert len(peaks) == 12
    assert peaks[11] <= peaks[2] + 4 * 2**20, peaks
    assert [s["name"] for s in json.loads(report.read_text())["stages"]].count("denoise") == 1
    assert again.read_bytes() == output.read_bytes()

    found = probe(output)
    assert (found.frames, found.frames / found.fps) == (49, 30)
    with av.open(str(output)) as container:
        heard = sum(frame.samples for frame in container.decode(audio=0)) / 48_000
    assert abs(heard - 30) <= 1 / 30


def with_sound(folder: Path, target: Path) -> Path:
    """The driving folder with a tone beside the poses, shorter than they are."""
    shutil.copytree(folder, target)
    found = probe(folder / "src_pose.mp4")
    part = (folder / "src_pose.mp4", found.frames)
    tone = target / "tone.mp4"
    with av.open(str(tone), "w") as container:
        picture = container.add_stream("libx264", rate=30)
        picture.width, picture.height, picture.pix_fmt = 32, 32, "yuv420p"
        sound = container.add_stream("aac", rate=48_000, layout="stereo")
        container.mux(
            picture.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24"))
        )
        container.mux(picture.encode(None))
        wave = np.sin(np.arange(12_000) / 20).astype(np.float32)
        frame = av.AudioFrame.from_ndarray(np.stack([wave, wave]) / 2, format="fltp", layout="stereo")
        frame.sample_rate, frame.pts, frame.time_base = 48_000, 0, Fraction(1, 48_000)
        container.mux(sound.encode(frame))
        container.mux(sound.encode(None))
    join(
        [part],
        target / "src_pose.mp4",
        (32, 32),
        Fraction(found.fps).limit_denominator(1001),
        {},
        sound=tone,
        overwrite=True,
    )
    return target


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


def packets(path: Path, side: int, times: Sequence[int]) -> None:
    """A video of grey frames shown at these times, in thirtieths of a second; without any, an mp4 keeps no stream."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt = side, side, "yuv420p"
        container.start_encoding()
        for time in times:
            frame = av.VideoFrame.from_ndarray(np.full((side, side, 3), 90, np.uint8), format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 30)
            container.mux(stream.encode(frame))
        if times:
            container.mux(stream.encode(None))


def bomb() -> bytes:
    """A PNG of 169 megapixels in 20 kB."""
    rows, out = zlib.compressobj(9), [b"\x89PNG\r\n\x1a\n"]
    header = struct.pack(">IIBBBBB", 13_000, 13_000, 1, 0, 0, 0, 0)
    data = b"".join([rows.compress(bytes(1626)) for _ in range(13_000)] + [rows.flush()])
    for kind, content in ((b"IHDR", header), (b"IDAT", data), (b"IEND", b"")):
        out.append(struct.pack(">I", len(content)) + kind + content)
        out.append(struct.pack(">I", zlib.crc32(kind + content)))
    return b"".join(out)
