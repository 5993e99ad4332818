"""A folder of loose files, named and nested as ComfyUI's users have them, is the model that it holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lowvram import Runtime

SETTINGS: dict[str, Any] = {"seed": 5, "steps": 2, "shift": 3.0, "guidance": (1.0, 1.0)}
NAMES = {
    "high_noise_model": "diffusion_models/mine/wan2.2_small_HighNoise.safetensors",
    "low_noise_model": "diffusion_models/mine/wan2.2_small_LowNoise.safetensors",
    "vae": "vae/some vae.safetensors",
    "text_encoder": "text_encoders/umt5 small.safetensors",
}


@pytest.fixture
def loose(tiny_model: Path, tmp_path: Path) -> Path:
    for name, path in NAMES.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).hardlink_to(tiny_model / f"{name}.safetensors")
    (tmp_path / "spiece.model").hardlink_to(tiny_model / "spiece.model")
    return tmp_path


def test_it_makes_the_same_video_as_the_files_under_their_plain_names(loose: Path, tiny_model: Path) -> None:
    pipes = [Runtime(10**9, 2 * 10**9, "cpu").load(str(folder)) for folder in (loose, tiny_model)]
    assert {part: str(Path(path).relative_to(loose)) for part, path in pipes[0].files.items()} == {
        "high": NAMES["high_noise_model"],
        "low": NAMES["low_noise_model"],
        "vae": NAMES["vae"],
        "text": NAMES["text_encoder"],
        "tokenizer": "spiece.model",
    }
    first, second = (pipe("a red circle", **SETTINGS).latent for pipe in pipes)
    assert torch.equal(first, second)


def test_the_command_says_which_files_it_took(loose: Path, cli: Callable[..., Any]) -> None:
    said = cli("plan", "--model", loose)
    assert said.code == 0
    assert f"high      {loose / NAMES['high_noise_model']}  (high-noise by its name" in said.err
    assert "(the only one that fits" in said.err
