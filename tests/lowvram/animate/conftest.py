"""A small Wan-Animate of random numbers, folders that drive it, and a LoRA as the relighting one is."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from videos import write_video

from lowvram.api import Pipeline, Runtime
from lowvram.planning.plan import Plan
from lowvram.quant.face_spec import FaceSpec
from lowvram.quant.names import CLIP
from lowvram.quant.spec import CLIP_TOKENS, ClipSpec, DitSpec

FACE = FaceSpec((4, 4, 4, 4, 8, 8, 8, 8), style=8, directions=4, motion=16, hidden=16, heads=2, every=2)
ANIMATE = DitSpec(
    256, 256, 4, 36, 16, text_dim=256, freq_dim=64, image_tokens=CLIP_TOKENS, image_dim=80, face=FACE
)


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
            write_video(folder / f"src_{name}.mp4", moving, rate)
        mask = np.zeros((height, width, 3), np.uint8)
        mask[height // 4 : height // 2 + 8, width // 4 : width // 2 + 8] = 255
        write_video(folder / "src_mask.mp4", [np.roll(mask, n % 8, 1) for n in range(frames)], rate)
        Image.fromarray(coarse[::-1]).resize((48, 40)).save(folder / "src_ref.png")
        return folder

    return make


@pytest.fixture(scope="session")
def settings() -> dict[str, Any]:
    """Of a short job: three segments for a video of 20 frames."""
    return {"frames": 9, "steps": 2, "seed": 3}


@pytest.fixture(scope="module")
def pipe(tiny_animate: Path) -> Pipeline:
    return Runtime(vram="2GB", ram="4GB", device="cpu").load(str(tiny_animate))


@pytest.fixture(scope="module")
def plan(pipe: Pipeline, drive: Callable[..., Path], settings: dict[str, Any]) -> Plan:
    """Of one segment, whatever the mode and the length."""
    return pipe.animate(drive(20), **settings).plan


@pytest.fixture
def relighting_lora(tmp_path: Path) -> Callable[[str], Path]:
    """relighting_lora(name): a LoRA on what the relighting LoRA changes, named as PEFT names it; as a .ckpt it is what
    the authors publish."""

    def make(name: str) -> Path:
        path = tmp_path / name
        generator = torch.Generator().manual_seed(9)
        factors: dict[str, Tensor] = {}
        for weight, shape in ANIMATE.shapes().items():
            if weight.startswith("blocks.") and len(shape) == 2 and weight.endswith(".weight"):
                module = f"base_model.model.{weight.removesuffix('.weight')}"
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

    return make
