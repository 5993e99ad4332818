"""The folder of Wan2.2-T2V-A14B as its authors publish it works as it lies: shards with an index, .pth files and all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowvram import Runtime
from lowvram.errors import FileError

SETTINGS: dict[str, Any] = {"seed": 5, "steps": 2, "shift": 3.0, "guidance": (1.0, 1.0)}


@pytest.fixture(scope="module")
def authors(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("authors") / "Wan2.2-T2V-A14B"
    for expert in ("high_noise_model", "low_noise_model"):
        (folder / expert).mkdir(parents=True)
        weights = load_file(tiny_model / f"{expert}.safetensors")
        files = [f"diffusion_pytorch_model-0000{n}-of-00002.safetensors" for n in (1, 2)]
        where = {name: files[i % 2] for i, name in enumerate(weights)}
        for file in files:
            save_file({n: t for n, t in weights.items() if where[n] == file}, folder / expert / file)
        index = folder / expert / "diffusion_pytorch_model.safetensors.index.json"
        index.write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": where}))
        (folder / expert / "config.json").write_text("{}")
    # One as torch before 1.6 wrote it: its numbers begin at any byte.
    for part, name, old in (
        ("vae", "Wan2.1_VAE", True),
        ("text_encoder", "models_t5_umt5-xxl-enc-bf16", False),
    ):
        weights = load_file(tiny_model / f"{part}.safetensors")
        torch.save(weights, folder / f"{name}.pth", _use_new_zipfile_serialization=not old)
    (folder / "google" / "umt5-xxl").mkdir(parents=True)
    (folder / "google" / "umt5-xxl" / "spiece.model").hardlink_to(tiny_model / "spiece.model")
    return folder


def test_it_makes_the_same_video_as_the_same_weights_in_safetensors(authors: Path, tiny_model: Path) -> None:
    first, second = (
        Runtime(10**9, 2 * 10**9, "cpu").load(str(folder))("a red circle", **SETTINGS)
        for folder in (authors, tiny_model)
    )
    assert torch.equal(first.latent, second.latent)
    assert next(first.frames()).tolist() == next(second.frames()).tolist()


def test_inspect_says_what_a_pth_file_is(authors: Path, cli: Callable[..., Any]) -> None:
    said = cli("inspect", "--json", authors / "Wan2.1_VAE.pth", authors / "models_t5_umt5-xxl-enc-bf16.pth")
    assert said.code == 0
    assert [(o["kind"], o["variant"]) for o in said.objects] == [("vae", "2.1"), ("text", "umt5")]


def test_a_pth_that_would_run_something_ends_with_exit_code_3(
    tmp_path: Path, cli: Callable[..., Any]
) -> None:
    class Runs:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "ran",)

    torch.save({"w": torch.zeros(2), "x": Runs()}, tmp_path / "vae.pth")
    said = cli("inspect", tmp_path / "vae.pth")
    assert (
        said.code == FileError.exit_code == 3
        and "a program and no data" in said.err
        and len(said.err.splitlines()) <= 3
    )
    assert not (tmp_path / "ran").exists()
