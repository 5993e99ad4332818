"""LoRAs on Wan-Animate: what a step can change, and what it cannot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lowvram.api import Pipeline
from lowvram.errors import UsageError
from lowvram.job import LoraChoice


def lora_on(module: str, shape: tuple[int, int], path: Path) -> str:
    factors = {"lora_A": torch.zeros(2, shape[1]), "lora_B": torch.zeros(shape[0], 2)}
    save_file({f"diffusion_model.{module}.{half}.weight": w for half, w in factors.items()}, path)
    return str(path)


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        ("face_adapter.fuser_blocks.0.linear1_kv", (512, 256)),
        ("face_encoder.out_proj", (256, 16)),
        ("motion_encoder.enc.fc.0", (8, 8)),
    ],
)
def test_what_is_made_of_faces_once_cannot_follow_strengths_over_the_steps(
    module: str,
    shape: tuple[int, int],
    pipe: Pipeline,
    drive: Callable[..., Path],
    settings: dict[str, Any],
    tmp_path: Path,
) -> None:
    path = lora_on(module, shape, tmp_path / "faces.safetensors")
    for strength in (0.5, (0.5, 0.5)):
        pipe.animate(drive(12), loras=(LoraChoice(path=path, strength=strength),), **settings)
    with pytest.raises(UsageError, match="how faces are seen") as refused:
        pipe.animate(drive(12), loras=(LoraChoice(path=path, strength=(1.0, 0.5)),), **settings)
    assert str(refused.value).count("\n") == 2 and "such as @1" in refused.value.advice


def test_what_an_adapter_does_in_its_block_can(
    pipe: Pipeline, drive: Callable[..., Path], settings: dict[str, Any], tmp_path: Path
) -> None:
    for leaf in ("linear1_q", "linear2"):
        path = lora_on(f"face_adapter.fuser_blocks.1.{leaf}", (256, 256), tmp_path / f"{leaf}.safetensors")
        pipe.animate(drive(12), loras=(LoraChoice(path=path, strength=(1.0, 0.0)),), **settings)
