"""Tiny networks with random weights, each as the reference class and as native parameters of ours."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowvram.models import dit
from lowvram.models.self_attention import plain_workspace
from lowvram.quant import names
from lowvram.quant.face_spec import FACE_PIXELS, FaceSpec
from lowvram.quant.linear import Params
from lowvram.quant.spec import LATENT_MEAN_22, LATENT_STD_22, DitSpec, TextSpec, VaeSpec


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def error() -> Callable[[Tensor, Tensor], float]:
    """max|a - b| / max|b| of two tensors of one shape, b the reference."""

    def relative(a: Tensor, b: Tensor) -> float:
        assert a.shape == b.shape
        assert torch.isfinite(a).all() and torch.isfinite(b).all()
        return float((a.double() - b.double()).abs().max() / b.double().abs().max())

    return relative


@pytest.fixture(scope="session")
def noise() -> Callable[..., Tensor]:
    """noise(3, 4, seed=1): standard normal float32, the same for the same seed."""

    def draw(*shape: int, seed: int) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    return draw


def randomise(module: nn.Module, seed: int, gain: float = 1.0) -> None:
    """Fill every parameter so that none is neutral: no zero bias, no unit norm, no empty modulation.

    Matrices keep the variance of their input times gain^2.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if "scale_shift_table" in name or "pos_embed" in name:
                p.normal_(0, 0.5, generator=generator)
            elif "gamma" in name or ("norm" in name and name.endswith("weight")):
                p.uniform_(0.5, 1.5, generator=generator)
            elif p.ndim == 1:
                p.normal_(0, 0.2, generator=generator)
            else:
                p.normal_(0, gain / math.sqrt(math.prod(p.shape[1:])), generator=generator)


@pytest.fixture(scope="session")
def randomised() -> Callable[..., None]:
    """`randomise` for tests."""
    return randomise


# ---- transformer


@dataclass(frozen=True, slots=True)
class DitCase:
    """A transformer in both forms. `reference` is a diffusers WanTransformer3DModel in float32."""

    spec: DitSpec
    reference: Any
    outer: Params
    blocks: tuple[Params, ...]

    def cast(self, dtype: torch.dtype) -> tuple[Params, tuple[Params, ...]]:
        """Our parameters in `dtype`: outside the blocks, and per block."""
        return _cast(self.outer, dtype), tuple(_cast(p, dtype) for p in self.blocks)

    def grid(self, latent: Tensor) -> tuple[int, int, int]:
        """Latent frames, and rows and columns of tokens of a latent [C, F, H, W]."""
        return latent.shape[-3], latent.shape[-2] // 2, latent.shape[-1] // 2

    def plain(
        self,
        latent: Tensor,
        t: Tensor,
        text: Tensor,
        image: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Velocity by the reference path `block`. t [1], or one per latent frame; weights as `dtype` if given."""
        outer, blocks = (self.outer, self.blocks) if dtype is None else self.cast(dtype)
        dtype = dtype or torch.float32
        f, h, w = grid = self.grid(latent)
        time = dit.embed_time(outer, self.spec, t, h * w if len(t) > 1 else f * h * w)
        context = dit.embed_text(outer, self.spec, text.to(dtype), None if image is None else image.to(dtype))
        rope = dit.rope_table(*grid)
        x = dit.embed_latent(outer, self.spec, latent, dtype)
        for p in blocks:
            x = dit.block(p, x, time, context, rope)
        return dit.head(outer, self.spec, x, time, grid)

    def lean(
        self,
        latent: Tensor,
        t: Tensor,
        text: list[Tensor],
        chunk: int,
        image: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> list[Tensor]:
        """Velocities by the chunked in-place path, one per text, in a workspace full of garbage."""
        outer, blocks = self.cast(dtype)
        f, h, w = grid = self.grid(latent)
        time = dit.embed_time(outer, self.spec, t, h * w if len(t) > 1 else f * h * w)
        image = None if image is None else image.to(dtype)
        contexts = [dit.embed_text(outer, self.spec, rows.to(dtype), image) for rows in text]
        garbage = torch.full((2, self.spec.heads, f * h * w, 128), float("nan"), dtype=dtype)
        work = plain_workspace(garbage[0], garbage[1], chunk=chunk)
        return dit.forward(outer, blocks, self.spec, latent, time, contexts, dit.rope_table(*grid), work)

    def truth(self, latent: Tensor, t: Tensor, text: Tensor, image: Tensor | None = None) -> Tensor:
        """Velocity by diffusers, which is given the text with its zero padding, and a timestep per token."""
        text = torch.cat([text, text.new_zeros(self.spec.text_len - len(text), text.shape[1])])
        if len(t) > 1:
            _, h, w = self.grid(latent)
            t = t.repeat_interleave(h * w)[None]
        if image is not None:  # the class takes a pair of images as two batch entries
            image = image.view(-1, 257, self.spec.image_dim)
        with torch.no_grad():
            out: Tensor = self.reference(latent[None], t, text[None], image).sample[0]
        return out


def _cast(params: Params, dtype: torch.dtype) -> Params:
    return Params({k: v.to(dtype) for k, v in params.tensors.items() if isinstance(v, Tensor)})


def native(state: Mapping[str, Tensor], rename: Callable[[str], str | None]) -> dict[str, Tensor]:
    """A reference state dict under native names; every tensor must have one."""
    renamed = {rename(k): v for k, v in state.items()}
    assert None not in renamed and len(renamed) == len(state)
    return {str(k): v for k, v in renamed.items()}


SPECS = {
    "t2v": DitSpec(256, 512, 2, 16, 16, text_dim=64),
    "i2v": DitSpec(256, 512, 2, 36, 16, text_dim=64),
    "i2v-clip": DitSpec(256, 512, 2, 36, 16, text_dim=64, image_tokens=257, image_dim=160),
    "flf2v-clip": DitSpec(256, 512, 2, 36, 16, text_dim=64, image_tokens=514, image_dim=160),
    "ti2v": DitSpec(256, 512, 2, 48, 48, text_dim=64),
}


@pytest.fixture(scope="session")
def dit_case() -> Callable[[str], DitCase]:
    """dit_case("t2v"): one of the variants of `SPECS`, built once."""

    @cache
    def build(variant: str) -> DitCase:
        spec = SPECS[variant]
        clip = spec.image_tokens > 0
        model = importlib.import_module("diffusers").WanTransformer3DModel(
            num_attention_heads=spec.heads,
            attention_head_dim=128,
            in_channels=spec.in_channels,
            out_channels=spec.out_channels,
            text_dim=spec.text_dim,
            freq_dim=spec.freq_dim,
            ffn_dim=spec.ffn,
            num_layers=spec.layers,
            image_dim=spec.image_dim if clip else None,
            added_kv_proj_dim=spec.dim if clip else None,
            pos_embed_seq_len=spec.image_tokens if spec.image_tokens == 514 else None,
        )
        model = model.eval()
        randomise(model, seed=11)
        weights = native({k: v.detach() for k, v in model.state_dict().items()}, names.DIT.to_native)
        params = Params(weights)
        return DitCase(spec, model, params, tuple(params.blocks(spec.layers)))

    return build


@pytest.fixture(scope="session")
def animate_reference() -> tuple[DitSpec, Any]:
    """A diffusers WanAnimateTransformer3DModel in float32, and its sizes."""
    face = FaceSpec((4, 4, 6, 6, 8, 8, 8, 8), style=12, directions=5, motion=16, hidden=24, heads=2, every=2)
    spec = DitSpec(256, 512, 4, 36, 16, text_dim=64, image_tokens=257, image_dim=160, face=face)
    model = importlib.import_module("diffusers").WanAnimateTransformer3DModel(
        num_attention_heads=spec.heads,
        in_channels=36,
        latent_channels=16,
        out_channels=16,
        text_dim=64,
        ffn_dim=512,
        num_layers=4,
        image_dim=160,
        added_kv_proj_dim=256,
        motion_encoder_channel_sizes={str(FACE_PIXELS >> n): width for n, width in enumerate(face.widths)},
        motion_style_dim=face.style,
        motion_dim=face.directions,
        motion_encoder_dim=face.motion,
        face_encoder_hidden_dim=face.hidden,
        face_encoder_num_heads=face.heads,
        inject_face_latents_blocks=face.every,
    )
    model = model.eval()
    generator = torch.Generator().manual_seed(21)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.startswith("motion_encoder."):  # equalised: stored with unit variance
                p.normal_(0, 0.2 if name.endswith("bias") else 1.0, generator=generator)
            elif "scale_shift_table" in name or "padding_tokens" in name:
                p.normal_(0, 0.5, generator=generator)
            elif "norm" in name and name.endswith("weight"):
                p.uniform_(0.5, 1.5, generator=generator)
            elif p.ndim == 1:
                p.normal_(0, 0.2, generator=generator)
            else:
                p.normal_(0, 1 / math.sqrt(math.prod(p.shape[1:])), generator=generator)
    return spec, model


# ---- autoencoder


@dataclass(frozen=True, slots=True)
class VaeCase:
    """An autoencoder in both forms. `reference` is a diffusers AutoencoderKLWan in float32."""

    spec: VaeSpec
    reference: Any
    weights: Mapping[str, Tensor]

    @property
    def mean(self) -> Tensor:
        return torch.tensor(self.spec.mean).view(1, -1, 1, 1, 1)

    @property
    def std(self) -> Tensor:
        return torch.tensor(self.spec.std).view(1, -1, 1, 1, 1)

    @property
    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents in float64, not rounded before."""
        mean, std = torch.tensor([self.spec.mean, self.spec.std], dtype=torch.float64).view(2, 1, -1, 1, 1, 1)
        return mean, std

    def double(self) -> dict[str, Tensor]:
        """The weights in float64."""
        return {k: v.double() for k, v in self.weights.items()}


@pytest.fixture(scope="session")
def vae_case() -> Callable[[str], VaeCase]:
    """vae_case("2.1" or "2.2"), built once; "2.1-small" has one residual block per stage, as the embedded model."""

    @cache
    def build(version: str) -> VaeCase:
        diffusers = importlib.import_module("diffusers")
        if version == "2.2":
            spec = VaeSpec("2.2", 8, 12, 48, 2, LATENT_MEAN_22, LATENT_STD_22)
            model = diffusers.AutoencoderKLWan(
                base_dim=8,
                decoder_base_dim=12,
                z_dim=48,
                num_res_blocks=2,
                is_residual=True,
                in_channels=12,
                out_channels=12,
                patch_size=2,
                scale_factor_spatial=16,
                latents_mean=list(spec.mean),
                latents_std=list(spec.std),
            )
        else:
            spec = VaeSpec("2.1", 8, 8, 16, 1 if version == "2.1-small" else 2)
            model = diffusers.AutoencoderKLWan(base_dim=8, num_res_blocks=spec.res_blocks)
        model = model.eval()
        randomise(model, seed=12, gain=1.5)
        with torch.no_grad():  # more than half of the pixels inside diffusers' clamp, many outside
            model.decoder.conv_out.weight.mul_(1.5)
        rename = names.vae_renames(spec.version, spec.res_blocks).to_native
        return VaeCase(spec, model, native({k: v.detach() for k, v in model.state_dict().items()}, rename))

    return build


# ---- text encoder


@dataclass(frozen=True, slots=True)
class TextCase:
    """A text encoder in both forms. `reference` is a transformers UMT5EncoderModel in float32."""

    spec: TextSpec
    reference: Any
    params: Params


@pytest.fixture(scope="session")
def text_case() -> TextCase:
    transformers = importlib.import_module("transformers")
    spec = TextSpec(vocab=60, dim=48, heads=3, head_dim=20, ffn=80, layers=3)
    config = transformers.UMT5Config(
        vocab_size=spec.vocab,
        d_model=spec.dim,
        d_kv=spec.head_dim,
        d_ff=spec.ffn,
        num_layers=spec.layers,
        num_heads=spec.heads,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    model = transformers.UMT5EncoderModel(config).eval()
    randomise(model, seed=13)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(14)
        for name, p in model.named_parameters():
            if "relative_attention_bias" in name or "shared" in name:
                p.normal_(0, 1, generator=generator)
            elif name.endswith(("q.weight", "k.weight")):
                p.mul_(spec.head_dim**-0.25)  # logits of unit variance: softmax neither flat nor one-hot
    state = {k: v.detach() for k, v in model.state_dict().items() if k != names.TIED_EMBEDDING}
    return TextCase(spec, model, Params(native(state, names.TEXT.to_native)))
