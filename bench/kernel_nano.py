"""Every mode end to end on the embedded model: how far its videos are from the exact ones, and whether they are right.

The arithmetic of our own modes in torch, on a CPU; held-out prompts of bench/nano, 4 steps.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from lowvram import Pipeline, Runtime
from lowvram.conversion import plan_conversion, run_conversion
from lowvram.triton_kernels.modes import MODES

sys.path.insert(0, str(Path(__file__).parent / "nano"))
from data import Scene, score, split  # noqa: E402

PROMPTS = 24
NANO = Path(__file__).parents[1] / "lowvram" / "assets" / "nano"


def scores() -> Iterator[dict[str, object]]:
    """One object an attention mode: psnr in dB against sdpa over all frames of all videos, that of the median video (a few
    videos go another way from small differences on, and rule the mean), and the shares of right videos."""
    pipe, plain = Runtime(device="cpu").load("nano"), None
    for name in [m.name for m in MODES.values() if m.ours]:
        videos = _videos(pipe, attention=name, attention_ends=name)
        plain = plain or videos
        yield _row(name, videos, plain)


def matmul_scores() -> Iterator[dict[str, object]]:
    """The same for weights of 8 bits: exact multiplication, and that of 8 bits against it. The model is stored as fp8."""
    for to, form in (("int8_convrot", "int8"), ("int8", "int8"), ("fp8_scaled", "fp8")):
        with TemporaryDirectory() as folder:
            files = {} if form == "fp8" else _converted(Path(folder), to)
            pipe = Runtime(device="cpu").load("nano", **files)
            plain = _videos(pipe, matmul="exact")
            yield _row(f"{to}, --matmul exact", plain, plain)
            yield _row(f"{to}, --matmul {form}", _videos(pipe, matmul=form), plain)


def _converted(folder: Path, to: str) -> dict[str, str]:
    files = {}
    for expert in ("high", "low"):
        out = folder / f"{expert}.safetensors"
        list(run_conversion(plan_conversion(NANO / f"{expert}_noise_model.safetensors", out, to)))
        files[expert] = str(out)
    return files


def _scenes() -> list[Scene]:
    return split()[1][::2][:PROMPTS]


def _videos(pipe: Pipeline, **settings: str) -> list[np.ndarray]:
    return [
        np.stack(list(pipe(scene.caption(), seed=i, preset="lightning-4", **settings).frames()))
        for i, scene in enumerate(_scenes())
    ]


def _row(mode: str, videos: list[np.ndarray], plain: list[np.ndarray]) -> dict[str, object]:
    results = [score(video, scene) for video, scene in zip(videos, _scenes(), strict=True)]
    errors = [np.mean((a.astype(float) - b) ** 2) for a, b in zip(videos, plain, strict=True)]
    return {
        "op": "nano",
        "mode": mode,
        "prompts": len(videos),
        "psnr": _decibel(np.mean(errors)),
        "median_psnr": _decibel(np.median(errors)),
        **{k: float(np.mean([getattr(r, k) for r in results])) for k in ("colour", "direction", "shape")},
        "ok": True,
    }


def _decibel(error: np.floating) -> float | None:
    """PSNR of a mean squared error of 8-bit pixels; None if there is none."""
    return None if error == 0 else round(float(10 * np.log10(255**2 / error)), 2)
