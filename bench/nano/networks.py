"""nano's networks as trainable dictionaries of parameters: sizes, initial values, batched forward, weight average.

The forward is the product's own (`lowvram.models`); only what a batch needs is here.
"""

from __future__ import annotations

import io
import math
from pathlib import Path

import sentencepiece
import torch
from data import Scene, all_scenes
from torch import Tensor
from torch.nn import functional

from lowvram.models import dit, umt5
from lowvram.quant.linear import Params
from lowvram.quant.spec import DitSpec, TextSpec

DIT = DitSpec(dim=256, ffn=768, layers=6, in_channels=16, out_channels=16, text_dim=256)
VOCABULARY = 96
TEXT = TextSpec(vocab=VOCABULARY, dim=256, heads=4, ffn=512, layers=2)
GRID = (3, 4, 4)
"""Latent frames, rows and columns of tokens of a 64x64x9 clip."""
NULL = 0.1
"""Share of training samples with an empty prompt."""

Weights = dict[str, Tensor]


def initial(spec: DitSpec | TextSpec, generator: torch.Generator) -> Weights:
    """Xavier for Linears, ones for norms, small normals for modulations, zeros for biases and the head."""
    weights = {}
    for name, shape in spec.shapes().items():
        if name.endswith("norm3.weight") or ".norm_" in name or name.split(".")[-2].startswith("norm"):
            w = torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
        elif name.endswith("modulation"):
            w = torch.randn(shape, generator=generator) / math.sqrt(shape[-1])
        elif name.endswith("bias") or name == "head.head.weight":
            w = torch.zeros(shape)
        elif name.endswith(("pos_embedding.embedding.weight", "token_embedding.weight")):
            w = torch.randn(shape, generator=generator) * (0.1 if "pos" in name else 1.0)
        else:
            fan_in = math.prod(shape[1:])
            w = torch.randn(shape, generator=generator) * math.sqrt(2 / (shape[0] + fan_in))
            if name.startswith("time_embedding"):
                w = torch.randn(shape, generator=generator) * 0.02
        weights[name] = w.requires_grad_()
    return weights


def train_tokenizer(folder: Path) -> Path:
    """A sentencepiece model of the captions' words; ids as in UMT5: pad 0, </s> 1, unknown 2."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(s.caption() for s in all_scenes()),
        model_writer=model,
        vocab_size=VOCABULARY,
        model_type="unigram",
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        normalization_rule_name="nmt_nfkc_cf",
        minloglevel=2,
    )
    path = folder / "spiece.model"
    path.write_bytes(model.getvalue())
    return path


class Text:
    """Token ids of every scene, and the batched text context of the transformer."""

    def __init__(self, model: Path) -> None:
        processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
        self.scenes = {s: i for i, s in enumerate(all_scenes())}
        ids = [[*processor.encode(s.caption()), 1] for s in self.scenes]
        self.longest = max(len(x) for x in ids)
        self.ids = torch.zeros(len(ids) + 1, self.longest, dtype=torch.int64)
        self.length = torch.tensor([len(x) for x in ids] + [1])
        for row, x in zip(self.ids, ids, strict=False):
            row[: len(x)] = torch.tensor(x)
        self.ids[-1, 0] = 1  # the empty prompt is one </s>

    def rows(self, scenes: list[Scene | None]) -> Tensor:
        return torch.tensor([len(self.scenes) if s is None else self.scenes[s] for s in scenes])

    def features(self, weights: Weights, rows: Tensor) -> tuple[Tensor, Tensor]:
        """(features [B, longest, 256] with zeros past the prompt, lengths [B])"""
        params, length = Params(weights), self.length[rows]
        valid = torch.arange(self.longest) < length[:, None]
        mask = torch.zeros(valid.shape).masked_fill(~valid, torch.finfo(torch.float32).min)[:, None, None]
        x = weights["token_embedding.weight"][self.ids[rows]]
        x = umt5.encode(x, params.blocks(TEXT.layers), weights["norm.weight"], TEXT, mask)
        return x * valid[..., None], length

    def context(self, dit_params: Params, features: Tensor, length: Tensor) -> dit.Context:
        """As `dit.embed_text`, batched: rows past a prompt get no weight, a last zero row stands for the padding."""
        rows = functional.pad(features, (0, 0, 0, 1))
        position = torch.arange(self.longest)
        bias = torch.where(position < length[:, None], 0.0, -math.inf)
        bias = torch.cat([bias, torch.log(DIT.text_len - length.float())[:, None]], 1)
        h = functional.gelu(dit_params.linear("text_embedding.0", rows), approximate="tanh")
        return dit.Context(dit_params.linear("text_embedding.2", h), bias)


def velocity(params: Params, blocks: list[Params], latent: Tensor, t: Tensor, context: dit.Context) -> Tensor:
    """latent [B, 16, 3, 8, 8], t [B] on 0..1000 -> [B, 16, 3, 8, 8]"""
    tokens = GRID[0] * GRID[1] * GRID[2]
    time = dit.embed_time(params, DIT, t[:, None], tokens)
    rope = dit.rope_table(*GRID)
    x = dit.embed_latent(params, DIT, latent, torch.float32)
    for p in blocks:
        x = dit.block(p, x, time, context, rope)
    return dit.head(params, DIT, x, time, GRID)


def average(mean: Weights, weights: Weights, decay: float) -> None:
    with torch.no_grad():
        torch._foreach_lerp_(list(mean.values()), [w.detach() for w in weights.values()], 1 - decay)
