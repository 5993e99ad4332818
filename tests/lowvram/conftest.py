"""A whole small model of random numbers, and the command line as a function."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from lowvram.cli.main import _run
from lowvram.conversion import plan_conversion, run_conversion
from lowvram.quant.names import CLIP
from lowvram.quant.spec import LATENT_MEAN_22, LATENT_STD_22, ClipSpec, DitSpec, Shape, TextSpec, VaeSpec
from lowvram.sampling import presets
from lowvram.sampling.presets import load_models, model_preset

WORDS = "a red green blue circle square moves left right up down on black teal grey background the very fast and slow"


@pytest.fixture(autouse=True)
def jobs(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the jobs of this test are kept: a folder that does not exist yet."""
    root = tmp_path_factory.mktemp("state") / "jobs"
    monkeypatch.setenv("LOWVRAM_STATE", str(root))
    monkeypatch.setenv("LOWVRAM_CACHE", str(root.parent / "cache"))
    return root


@dataclass(frozen=True)
class Said:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def objects(self) -> list[dict[str, Any]]:
        """stdout as JSON lines."""
        return [json.loads(line) for line in self.out.splitlines()]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    """cli("plan", "--json"): the command in this process."""

    def call(*arguments: object) -> Said:
        texts = [str(a) for a in arguments]
        capsys.readouterr()
        code = _run(texts, debug=False, as_json="--json" in texts)
        return Said(code, *capsys.readouterr())

    return call


def _random(shapes: Mapping[str, Shape], seed: int, gain: float = 1.0) -> dict[str, Tensor]:
    """Weights that keep a signal's size: unit norms, matrices of 1/sqrt(fan in), small biases; bf16."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes.items():
        w = torch.randn(shape, generator=generator)
        if "norm" in f".{name}".rsplit(".", 2)[-2] or name.endswith("gamma"):
            w = w * 0.1 + (0.0 if name.endswith("bias") else 1.0)
        elif len(shape) < 2 or name.endswith("bias"):
            w = w * 0.1
        elif name.endswith(("modulation", "embedding.weight")):
            w = w * 0.5
        else:
            w = w * gain / math.sqrt(math.prod(shape[1:]))
        weights[name] = w.to(torch.bfloat16)
    return weights


@pytest.fixture(scope="session")
def random_weights() -> Callable[..., dict[str, Tensor]]:
    """random_weights(shapes, seed): see `_random`."""
    return _random


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two experts of the embedded model's size, a smaller VAE and text encoder, all random."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    folder.mkdir()
    (folder / "words.txt").write_text("\n".join(WORDS.split() * 3), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "words.txt"),
        model_prefix=str(folder / "spiece"),
        vocab_size=64,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    dit: DitSpec = model_preset("nano").dit
    parts = {
        "high_noise_model": _random(dit.shapes(), 1),
        "low_noise_model": _random(dit.shapes(), 2),
        "vae": _random(VaeSpec("2.1", 8, 8, 16, 1).shapes(), 3, gain=1.5),
        "text_encoder": _random(TextSpec(vocab=96, dim=256, heads=4, ffn=128, layers=2).shapes(), 4),
    }
    for name, weights in parts.items():
        save_file(weights, folder / f"{name}.safetensors", metadata={"format": "pt"})
    return folder


NANO = Path(__file__).parents[2] / "lowvram" / "assets" / "nano"


@pytest.fixture(scope="session")
def int8_nano(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The transformers of the embedded model as rotated int8, by expert."""
    folder = tmp_path_factory.mktemp("int8")
    made = {}
    for expert in ("high", "low"):
        out = folder / f"{expert}.safetensors"
        list(run_conversion(plan_conversion(NANO / f"{expert}_noise_model.safetensors", out, "int8_convrot")))
        made[expert] = str(out)
    return made


# ---- models that begin with a picture

_NANO_DIT = {"dim": 256, "ffn": 512, "layers": 3, "text_dim": 256}
PICTURED: dict[str, dict[str, Any]] = {
    "tiny-i2v-a14b": {"experts": 2, "boundary": 0.9, "dit": {"in_channels": 36, "out_channels": 16}},
    "tiny-i2v-14b": {
        "clip": "nano",
        "dit": {"in_channels": 36, "out_channels": 16, "image_tokens": 257, "image_dim": 160},
    },
    "tiny-flf2v-14b": {
        "clip": "nano",
        "dit": {"in_channels": 36, "out_channels": 16, "image_tokens": 514, "image_dim": 160},
    },
    "tiny-ti2v-5b": {"variant": "ti2v", "vae": "wan22", "dit": {"in_channels": 48, "out_channels": 48}},
}
"""What their presets have that the embedded model's has not."""


@pytest.fixture(scope="module")
def pictured_models(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """Folders of small random models of every kind that takes pictures, each known by its preset meanwhile."""
    original = presets._read

    def read(file: str) -> dict[str, Any]:
        data = original(file)
        if file == "models.toml":
            common = data["model"]["nano"] | {"experts": 1, "boundary": 0.0, "variant": "i2v"}
            for name, table in PICTURED.items():
                data["model"][name] = common | table | {"dit": _NANO_DIT | table["dit"]}
        return data

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(presets, "_read", read)
        yield {name: _pictured(name, tiny_model, tmp_path_factory.mktemp(name)) for name in PICTURED}


def _pictured(name: str, tiny_model: Path, folder: Path) -> Path:
    spec = load_models()[name]
    for part in ("spiece.model", "text_encoder.safetensors", "vae.safetensors"):
        (folder / part).symlink_to(tiny_model / part)
    parts: dict[str, dict[str, Tensor]] = {}
    for n, part in enumerate(
        ("high_noise_model", "low_noise_model") if spec.experts == 2 else ("diffusion_pytorch_model",)
    ):
        parts[part] = _random(spec.dit.shapes(), 11 + n)
    if spec.variant == "ti2v":
        (folder / "vae.safetensors").unlink()
        vae = VaeSpec("2.2", 8, 8, 48, 1, LATENT_MEAN_22, LATENT_STD_22)
        parts["vae"] = _random(vae.shapes(), 13, gain=1.5)
    if spec.dit.image_tokens:
        parts["clip_vision_tiny"] = _random(ClipSpec(160, 320, 3, 1).shapes(), 14)
    for part, weights in parts.items():
        if part.startswith("clip"):
            weights = {f"vision_model.{CLIP.from_native(k)}": v for k, v in weights.items()}
        save_file(weights, folder / f"{part}.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def picture_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two pictures of 96x64 pixels: a red and a blue corner on a gradient."""
    folder = tmp_path_factory.mktemp("pictures")
    across = np.linspace(0, 200, 96, dtype=np.uint8)
    for n, name in enumerate(("first.png", "last.png")):
        pixels = np.repeat(np.repeat(across[None, :, None], 64, axis=0), 3, axis=2)
        pixels[:16, :24] = (255, 0, 0) if n == 0 else (0, 0, 255)
        Image.fromarray(pixels).save(folder / name)
    return folder / "first.png", folder / "last.png"
