"""Half a minute of video from the command line: memory stays flat, a kill costs a step, the sound fits."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

from lowvram.media.join import join
from lowvram.media.probe import probe
from lowvram.state import list_jobs

KILL = getattr(signal, "SIGKILL", signal.SIGTERM)


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
    (listed,) = cli("jobs", "--json").objects
    assert [listed[k] for k in ("state", "segment", "segments", "step", "steps")] == ["stopped", 3, 12, 1, 2]
    assert "1/2 of segment 4/12" in cli("jobs").out

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
