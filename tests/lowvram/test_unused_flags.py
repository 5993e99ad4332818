"""A flag that would do nothing where it is given is refused, with the reason: nobody believes in vain that it acts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lowvram import api, caps
from lowvram.autoencoder import save_latent_file
from lowvram.driving import copy_sample
from lowvram.machine import Machine, this_machine

VAE = Path(api.__file__).parent / "assets" / "nano" / "vae.safetensors"
A14B = ("--model", "wan2.2-t2v-a14b", "--frames", 17, "--size", "832x480")


@pytest.mark.parametrize(
    ("arguments", "flag"),
    [
        (("plan", "--machine", "rtx4090", "--device", "cpu"), "--device cpu"),
        (("plan", "--clip", VAE), "--clip"),
        (("plan", *A14B, "--weights", "fp8", "--clip", VAE), "--clip"),
        (("plan", "--lora-partial"), "--lora-partial"),
        (("plan", "--guidance", 1, "--negative", "blurry"), "--negative"),
        (("plan", "--preset", "lightning-4", "--negative", "blurry"), "--negative"),
        (("plan", "--model", "wan2.1-t2v-14b", "--weights", "fp8", "--guidance", "5,3"), "--guidance 5,3"),
        (("generate", "a red circle", "--steps", 4, "--preview", 5), "--preview"),
        (("doctor", "--machine", "rtx4090", "--device", "cpu"), "--device cpu"),
        (("doctor", "--machine", "rtx4090", "--folder", "."), "--folder"),
        (("generate", "a red circle", "--weights", "q4_k"), "--weights q4_k"),
        (("animate", "{folder}", "--weights", "q4_k"), "--weights q4_k"),
        (("demo", "a blue square", "--drive", "{folder}"), "--drive"),
        (("encode", "video.mp4", "--model", "wan2.2-ti2v-5b", "--vae", VAE), "--model"),
        (("decode", "{folder}/in.safetensors", "--model", "wan2.2-ti2v-5b", "--vae", VAE), "--model"),
        (("bench", "--dry", "--folder", "."), "--folder"),
        (("bench", "--dry", "--repeats", 3), "--repeats 3"),
        (("models", "verify", VAE, "--models-dir", "."), "--models-dir"),
    ],
    ids=lambda value: " ".join(map(str, value[:1])) if isinstance(value, tuple) else value,
)
def test_a_flag_without_use_is_refused(
    arguments: tuple[object, ...],
    flag: str,
    tmp_path: Path,
    cli: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    if arguments[0] == "animate":
        copy_sample(tmp_path)
    save_latent_file(tmp_path / "in.safetensors", torch.zeros(16, 1, 8, 8), {})
    said = cli(*(str(each).format(folder=tmp_path) for each in arguments))
    assert said.code == 2 and flag in said.err and len(said.err.splitlines()) <= 3
    assert not (tmp_path / "out.mp4").exists()


def test_a_plan_without_files_is_for_the_device_that_is_asked_for(
    cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def remembering(device: str | None = None) -> Machine:
        asked.append(device)
        return this_machine("cpu")

    monkeypatch.setattr(caps, "this_machine", remembering)
    assert cli("plan", *A14B, "--weights", "fp8", "--device", "cpu").code == 0
    assert asked == ["cpu"]


def test_a_plan_says_which_loras_of_a_preset_it_does_not_count(cli: Callable[..., Any]) -> None:
    plan = ("plan", *A14B, "--weights", "fp8", "--machine", "rtx4090", "--json")
    (bare,), (short,) = (cli(*plan, *more).objects for more in ((), ("--preset", "lightning-4")))
    (note,) = (line for line in short["advice"] if "lightning-4" in line)
    assert "not counted" in note and "--lora" in note
    assert not any("LoRA" in line for line in bare["advice"])


def test_a_plan_without_files_counts_the_loras_that_are_here(cli: Callable[..., Any]) -> None:
    """Those of nano ship inside."""
    plan = ("plan", "--model", "nano", "--weights", "fp8", "--device", "cpu", "--json")
    (bare,), (short,) = (
        cli(*plan, *more).objects for more in (("--steps", 4), ("--preset", "lightning-4", "--force"))
    )
    read = [
        next(s["disk_read"] for s in found["stages"] if s["name"] == "denoise") for found in (bare, short)
    ]
    assert read[0] < read[1] and not any("not counted" in line for line in short["advice"])
