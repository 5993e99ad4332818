"""A whole small model of random numbers, and the command line as a function."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from safetensors.torch import save_file
from torch import Tensor

from lowvram.cli.main import _run
from lowvram.quant.spec import DitSpec, Shape, TextSpec, VaeSpec
from lowvram.sampling.presets import model_preset

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
        if "norm" in name.rsplit(".", 2)[-2] or name.endswith("gamma"):
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
