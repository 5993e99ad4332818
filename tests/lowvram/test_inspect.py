"""What a file says about itself is read from strangers: recognised, bounded, and never able to reach the terminal."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file

from lowvram.cli.inspect import lines
from lowvram.errors import FileError
from lowvram.media.made_with import made_with, png_texts
from lowvram.media.video import VideoWriter
from lowvram.sampling.presets import model_preset

GRAPH = {
    "1": {
        "class_type": "UNETLoader",
        "inputs": {"unet_name": "wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors"},
    },
    "2": {
        "class_type": "UNETLoader",
        "inputs": {"unet_name": "wan2.2_t2v_low_noise_14B_fp8_scaled.safetensors"},
    },
    "3": {
        "class_type": "LoraLoaderModelOnly",
        "inputs": {"lora_name": "speed.safetensors", "strength_model": 0.8, "model": ["1", 0]},
    },
    "4": {"class_type": "CLIPTextEncode", "inputs": {"text": "a cat", "clip": ["9", 0]}},
    "5": {
        "class_type": "KSamplerAdvanced",
        "inputs": {"noise_seed": 7, "steps": 20, "cfg": 3.5, "sampler_name": "euler", "add_noise": "enable"},
    },
    "6": {"class_type": "EmptyHunyuanLatentVideo", "inputs": {"width": 640, "height": 480, "length": 81}},
}
COMFY = {
    "models": [
        "wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors",
        "wan2.2_t2v_low_noise_14B_fp8_scaled.safetensors",
    ],
    "loras": "speed.safetensors@0.8",
    "texts": "a cat",
    "seed": 7,
    "steps": 20,
    "guidance": 3.5,
    "solver": "euler",
    "width": 640,
    "height": 480,
    "frames": 81,
}
WANGP = {
    "type": "WanGP v10 by DeepBeepMeep - Wan2.2",
    "model_type": "t2v_2_2",
    "prompt": "a dog",
    "seed": 3,
    "num_inference_steps": 30,
    "secret": "not shown",
}


def video(path: Path, tags: Mapping[str, str]) -> Path:
    with VideoWriter(path, 32, 32, 8, tags, overwrite=False) as writer:
        writer.write(np.zeros((5, 32, 32, 3), np.uint8))
    return path


@pytest.mark.parametrize(
    ("tags", "program", "job"),
    [
        ({"prompt": json.dumps(GRAPH), "workflow": "{}"}, "ComfyUI", COMFY),
        ({"comment": json.dumps({"prompt": json.dumps(GRAPH), "workflow": {}})}, "ComfyUI", COMFY),
        ({"comment": json.dumps(WANGP)}, "WanGP", {k: v for k, v in WANGP.items() if k != "secret"}),
        (
            {"comment": json.dumps({"lowvram": "0.1.0", "seed": 1})},
            "lowvram 0.1.0",
            {"lowvram": "0.1.0", "seed": 1},
        ),
    ],
)
def test_videos_of_every_program_are_recognised(
    tags: dict[str, str], program: str, job: dict[str, Any], tmp_path: Path, cli: Callable[..., Any]
) -> None:
    said = cli("inspect", "--json", video(tmp_path / "v.mp4", tags))
    assert said.code == 0
    (facts,) = said.objects
    assert (facts["made_with"], facts["job"]) == (program, job)
    assert (facts["size"], facts["frames"]) == ("32x32", 5)


def test_a_png_of_comfyui_is_recognised_however_its_text_is_stored(
    tmp_path: Path, cli: Callable[..., Any]
) -> None:
    text = json.dumps(GRAPH | {"7": {"inputs": {"text": "日本"}}})
    for place, (packed, international) in enumerate(
        ((False, False), (True, False), (False, True), (True, True))
    ):
        info = PngInfo()
        add = info.add_itxt if international else info.add_text
        add("prompt", text if international else json.dumps(GRAPH), zip=packed)
        path = tmp_path / f"{place}.png"
        Image.new("RGB", (8, 8)).save(path, pnginfo=info)
        (facts,) = cli("inspect", "--json", path).objects
        assert facts["made_with"] == "ComfyUI" and facts["job"]["seed"] == 7
        assert facts["job"]["texts"] == (["a cat", "日本"] if international else "a cat")


def test_hostile_texts_are_bounded_and_cannot_reach_the_terminal(
    tmp_path: Path, cli: Callable[..., Any]
) -> None:
    evil = "\x1b[2J\x1b]0;owned\x07" + "x" * 10_000 + "\nfake: line"
    said = cli(
        "inspect", video(tmp_path / "a.mp4", {"comment": json.dumps({"lowvram": "1", "prompt": evil})})
    )
    assert said.code == 0 and "\x1b" not in said.out and "\x07" not in said.out
    assert "\nfake: line" not in said.out and max(map(len, said.out.splitlines())) < 600
    for text in (
        "[" * 100_000,
        "{" * 100_000,
        '{"a":' * 50_000,
        "{",
        '{"model_type": NaN',
        "\x00",
        "{}" * 3_000_000,
    ):
        assert made_with({"comment": text, "prompt": text}) in ({}, {"made_with": "ComfyUI", "job": {}})
    deep: dict[str, Any] = {"lowvram": "1"}
    for _ in range(50):
        deep = {"lowvram": "1", "in": deep, "many": [0] * 1000}
    assert len(json.dumps(made_with({"comment": json.dumps(deep)}))) < 10_000


def test_damaged_pngs_end_with_an_answer(tmp_path: Path) -> None:
    def chunk(kind: bytes, data: bytes, length: int | None = None) -> bytes:
        return (len(data) if length is None else length).to_bytes(4, "big") + kind + data + bytes(4)

    path, head = tmp_path / "x.png", b"\x89PNG\r\n\x1a\n"
    bomb = zlib.compress(bytes(64 << 20))
    for body, texts in (
        (chunk(b"tEXt", b"a\0b"), {"a": "b"}),
        (chunk(b"tEXt", b"a\0b", 2**31), {}),
        (chunk(b"zTXt", b"a\0\0broken"), {}),
        (chunk(b"iTXt", b"a\0"), {}),
        (b"\xff" * 7, {}),
        (chunk(b"juNK", b"") * 5000 + chunk(b"tEXt", b"a\0b"), {}),
    ):
        path.write_bytes(head + body)
        assert png_texts(path) == texts
    path.write_bytes(head + chunk(b"zTXt", b"a\0\0" + bomb))
    assert len(png_texts(path)["a"]) <= 4 << 20
    path.write_bytes(b"GIF89a")
    with pytest.raises(FileError, match="not a PNG"):
        png_texts(path)


def test_a_lora_says_what_it_fits_and_what_of_it_does_not(tmp_path: Path, cli: Callable[..., Any]) -> None:
    weights = {}
    for name, shape in model_preset("nano").dit.shapes().items():
        if len(shape) == 2 and name.startswith("blocks."):
            module = f"diffusion_model.{name.removesuffix('.weight')}"
            weights[f"{module}.lora_down.weight"] = torch.zeros(4, shape[1])
            weights[f"{module}.lora_up.weight"] = torch.zeros(shape[0], 4)
    total = len(weights) // 2
    weights |= {"stray.lora_down.weight": torch.zeros(4, 8), "stray.lora_up.weight": torch.zeros(8, 4)}
    path = tmp_path / "wan22_lightning_HIGH.safetensors"
    save_file(weights, path, metadata={"ss_base_model": "nano \x1b[31m"})
    (facts,) = cli("inspect", "--json", path).objects
    assert facts["kind"] == "lora" and facts["ranks"] == [4]
    assert facts["fits"]["nano"] == f"{total} of {total + 1}"
    assert facts["unused"] == ["stray.lora_down.weight", "stray.lora_up.weight"]
    assert (facts["expert"], facts["preset"], facts["version"]) == ("high", "lightning-4", "2.2")
    text = cli("inspect", path).out
    assert "\x1b" not in text and f"  nano: {total} of {total + 1}" in text


def test_people_are_told_what_there_is_and_nothing_else() -> None:
    facts = {"none": None, "no list": [], "size": "4x4", "yes": True, "sigmas": (1.0, 0.8333333134651184),
             "loras": [{"file": "a.safetensors", "strength": 1.0}], "no text": ""}  # fmt: skip
    assert list(lines(facts)) == [
        "size: 4x4",
        "yes: yes",
        "sigmas: 1, 0.833333",
        "loras: (file a.safetensors, strength 1)",
    ]


def test_a_picture_says_its_size(tmp_path: Path, cli: Callable[..., Any]) -> None:
    Image.new("RGB", (9, 7)).save(tmp_path / "a.png")
    assert cli("inspect", "--json", tmp_path / "a.png").objects[0]["size"] == "9x7"
    (tmp_path / "b.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    assert cli("inspect", tmp_path / "b.png").code == 3


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e999", "1" + "0" * 400])
def test_numbers_that_json_or_python_do_not_have_are_told_as_they_stand(
    number: str, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    info = PngInfo()
    inputs = f'{{"seed": {number}, "lora_name": "a", "strength_model": {number}}}'
    info.add_text("prompt", f'{{"1": {{"inputs": {inputs}}}}}')
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=info)
    for flags in (("--json",), ()):
        said = cli("inspect", *flags, tmp_path / "a.png")
        assert said.code == 0 and number.lower()[:4] in said.out.lower()
