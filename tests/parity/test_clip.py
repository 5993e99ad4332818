"""The CLIP vision tower against transformers' CLIPVisionModel, and the names of both file styles."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from lowvram.models import clip
from lowvram.quant import names
from lowvram.quant.linear import Params
from lowvram.quant.spec import ClipSpec

Error = Callable[[Tensor, Tensor], float]


@dataclass(frozen=True)
class Case:
    spec: ClipSpec
    reference: Any
    params: Params

    def truth(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            out: Tensor = self.reference(x[None], output_hidden_states=True).hidden_states[-2][0]
        return out

    def ours(self, x: Tensor) -> Tensor:
        layers = list(self.params.blocks(clip.layers_used(self.spec)))
        return clip.encode(self.params, layers, self.spec, x, torch.float32)


@pytest.fixture(scope="module")
def case() -> Case:
    transformers = importlib.import_module("transformers")
    spec = ClipSpec(dim=160, ffn=320, layers=4, patch=14, tokens=17)
    config = transformers.CLIPVisionConfig(
        hidden_size=spec.dim,
        intermediate_size=spec.ffn,
        num_hidden_layers=spec.layers,
        num_attention_heads=spec.heads,
        image_size=spec.side,
        patch_size=spec.patch,
        hidden_act="gelu",
        layer_norm_eps=clip.EPS,
    )
    model = transformers.CLIPVisionModel(config).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                p.uniform_(0.5, 1.5, generator=generator)
            else:
                p.normal_(0, 0.3 if p.ndim == 1 else 1 / p[0].numel() ** 0.5, generator=generator)
    stored = {k.removeprefix("vision_model."): v.detach() for k, v in model.state_dict().items()}
    weights = {names.CLIP.to_native(k): v for k, v in stored.items() if not k.endswith("position_ids")}
    assert None not in weights
    return Case(spec, model, Params({str(k): v for k, v in weights.items()}))


def test_names_and_shapes_are_those_of_the_reference_class(case: Case) -> None:
    assert {k: tuple(v.shape) for k, v in case.params.tensors.items()} == case.spec.shapes()


def test_the_tokens_are_those_of_the_reference_before_its_last_layer(
    case: Case, noise: Callable[..., Tensor], error: Error
) -> None:
    x = noise(3, case.spec.side, case.spec.side, seed=4)
    assert case.ours(x).shape == (17, 160)
    assert error(case.ours(x), case.truth(x)) <= 1e-5


def test_a_picture_is_seen_as_the_reference_processor_sees_it(error: Error) -> None:
    """At the tower's own size nothing is resized: the colours alone are compared."""
    transformers = importlib.import_module("transformers")
    pixels = torch.randint(
        0, 256, (3, 224, 224), generator=torch.Generator().manual_seed(5), dtype=torch.uint8
    )
    processor = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": 224}, crop_size=224, image_mean=clip.MEAN, image_std=clip.STD
    )
    expected = processor(images=pixels.permute(1, 2, 0).numpy(), return_tensors="pt").pixel_values[0]
    assert error(clip.preprocess(ClipSpec(), pixels / 127.5 - 1), expected) <= 1e-5


def test_the_published_tower_has_its_published_size() -> None:
    spec = ClipSpec()
    assert (spec.heads, spec.side, spec.tokens) == (16, 224, 257)
    # 392 tensors in the authors' file, one of them the head; ours keeps query, key and value apart
    assert len(spec.shapes()) == 391 + 32 * 4
