"""The sizes of a network, read off the shapes of its tensors; and the derived models we cannot run yet.

Shapes come from untrusted headers: nothing here may grow with a number that a file merely claims.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from lowvram.errors import FileError
from lowvram.quant.face_spec import FACE_STAGES, FaceSpec
from lowvram.quant.names import NetKind
from lowvram.quant.refs import Shape
from lowvram.quant.spec import (
    CLIP_HEAD_DIM,
    CLIP_TOKENS,
    HEAD_DIM,
    LATENT_MEAN_22,
    LATENT_STD_22,
    ClipSpec,
    DitSpec,
    TextSpec,
    VaeSpec,
)

Shapes = Mapping[str, Shape]
Spec = DitSpec | VaeSpec | TextSpec | ClipSpec

MASK_CHANNELS = 4
"""Channels that say which of a latent's four frames are given."""

_MAX_STATISTICS = 65_536
"""Characters of JSON a file may spend on its latent statistics."""

_DERIVED: tuple[tuple[str, Callable[[Collection[str]], bool]], ...] = (
    ("VACE", lambda names: "vace_patch_embedding.weight" in names),
    ("Fun camera-control", lambda names: "control_adapter.conv.weight" in names),
    ("speech-to-video (S2V)", lambda names: "casual_audio_encoder.encoder.final_linear.weight" in names),
    ("HuMo", lambda names: "audio_proj.audio_proj_glob_1.layer.bias" in names),
    (
        "SCAIL",
        lambda names: any(n.startswith(("patch_embedding_pose", "patch_embedding_mask")) for n in names),
    ),
    ("Wan-Dancer", lambda names: "patch_embedding_global.weight" in names),
    ("Wan-Animate-2", lambda names: any(name.startswith("blocks.0.block.") for name in names)),
    ("MultiTalk or InfiniteTalk", lambda names: any(".audio_cross_attn." in name for name in names)),
    ("SteadyDancer", lambda names: any(name.startswith("condition_embedding_") for name in names)),
    ("ReCamMaster", lambda names: any(".cam_encoder." in name for name in names)),
    ("Fun control (reference)", lambda names: "ref_conv.weight" in names),
    ("TurboDiffusion", lambda names: any(".attn_op.local_attn." in name for name in names)),
)
"""Models derived from Wan that have tensors of their own, in the order in which they must be asked for."""


def derived_family(names: Collection[str]) -> str | None:
    """The derived model that tensors of these names (prefix removed) belong to; None if none is known."""
    return next((family for family, matches in _DERIVED if matches(names)), None)


def deduce(kind: NetKind, shapes: Shapes, metadata: Mapping[str, str], where: Path) -> tuple[Spec, str]:
    """(sizes, variant) of a network from its native names and logical shapes.

    Variants: "t2v", "i2v" (36 channels), "ti2v" (48), "i2v-clip" (2.1, CLIP tokens), "flf2v", "animate"; "2.1",
    "2.2" for a VAE; "umt5"; "clip". FileError if a tensor that sizes are read from is missing or of a shape no Wan model has.
    """
    source = _Source(shapes, where)
    if kind == "dit":
        return _dit(source)
    if kind == "clip":
        return _clip(source)
    return _vae(source, metadata) if kind == "vae" else _text(source)


class _Source:
    """Shapes of a file; asking for what is not there is an error that names it."""

    def __init__(self, shapes: Shapes, where: Path) -> None:
        self.shapes, self.where = shapes, where

    def shape(self, name: str, dims: int) -> Shape:
        shape = self.shapes.get(name)
        if shape is None:
            self.refuse(f"tensor {name} is missing", "every tensor of the network in the file")
        if len(shape) != dims or 0 in shape:
            self.refuse(f"tensor {name} has shape {list(shape)}", f"{dims} dimensions, none of them 0")
        return shape

    def count(self, prefix: str) -> int:
        """Number of different numbers that follow `prefix` in the names: 0, 1, ... without a gap."""
        numbers = {name[len(prefix) :].partition(".")[0] for name in self.shapes if name.startswith(prefix)}
        gap = next((n for n in range(len(numbers)) if str(n) not in numbers), None)
        if gap is not None:
            self.refuse(f"{prefix}{gap} is missing", "every tensor of the network in the file")
        return len(numbers)

    def refuse(self, found: str, expected: str) -> NoReturn:
        advice = "check that the file is whole and is a Wan 2.1 or 2.2 model"
        raise FileError(found, where=str(self.where), expected=expected, advice=advice)


def _dit(source: _Source) -> tuple[DitSpec, str]:
    dim = source.shape("head.modulation", 3)[2]
    if dim % HEAD_DIM:
        source.refuse(f"a transformer of width {dim}", f"a multiple of {HEAD_DIM}")
    rows = source.shape("head.head.bias", 1)[0]
    inputs = source.shape("patch_embedding.weight", 5)[1]
    spec = DitSpec(
        dim=dim,
        ffn=source.shape("blocks.0.ffn.0.bias", 1)[0],
        layers=source.count("blocks."),
        in_channels=inputs,
        out_channels=rows // 4,
        text_dim=source.shape("text_embedding.0.weight", 2)[1],
        freq_dim=source.shape("time_embedding.0.weight", 2)[1],
    )
    if "img_emb.proj.0.bias" in source.shapes:
        tokens = 2 * CLIP_TOKENS if "img_emb.emb_pos" in source.shapes else CLIP_TOKENS
        spec = replace(spec, image_tokens=tokens, image_dim=source.shape("img_emb.proj.0.bias", 1)[0])
    if any(name.startswith(("face_adapter.", "face_encoder.", "motion_encoder.")) for name in source.shapes):
        spec = replace(spec, face=_face(spec.layers, source))
    return spec, _dit_variant(spec, source)


def _face(layers: int, source: _Source) -> FaceSpec:
    convs = "motion_encoder.enc.net_app.convs"
    widths = [source.shape(f"{convs}.0.0.weight", 4)[0]]
    widths += [source.shape(f"{convs}.{n}.skip.1.weight", 4)[0] for n in range(1, FACE_STAGES + 1)]
    adapters = source.count("face_adapter.fuser_blocks.")
    if adapters == 0 or layers % adapters:
        source.refuse(f"{adapters} face adapters for {layers} blocks", "an adapter after every fifth block")
    motion, directions = source.shape("motion_encoder.dec.direction.weight", 2)
    wide, hidden = (source.shape(f"face_encoder.{conv}.conv.bias", 1)[0] for conv in ("conv1_local", "conv2"))
    if wide % hidden:
        source.refuse(f"a face encoder of {wide} channels over {hidden}", "a whole number of heads")
    return FaceSpec(
        widths=tuple(widths),
        style=source.shape("motion_encoder.enc.fc.0.bias", 1)[0],
        directions=directions,
        motion=motion,
        hidden=hidden,
        heads=wide // hidden,
        every=layers // adapters,
        split_kv="face_adapter.fuser_blocks.0.linear1_k.weight" in source.shapes,
    )


def _dit_variant(spec: DitSpec, source: _Source) -> str:
    channels = (spec.in_channels, spec.out_channels)
    if spec.face and spec.image_tokens == CLIP_TOKENS and channels[0] == 2 * channels[1] + MASK_CHANNELS:
        return "animate"
    if spec.image_tokens and channels == (36, 16):
        return "i2v-clip" if spec.image_tokens == CLIP_TOKENS else "flf2v"
    variant = {(16, 16): "t2v", (36, 16): "i2v", (48, 48): "ti2v"}.get(channels)
    if variant and not spec.image_tokens:
        return variant
    advice = "use a text-to-video or image-to-video model of Wan 2.1 or 2.2"
    if channels[1] == 16 and channels[0] in (32, 48, 52):
        found = "this is a Fun control checkpoint: not supported yet"
        raise FileError(found, where=str(source.where), advice=advice)
    found = f"a transformer with {channels[0]} input and {channels[1]} output channels"
    if spec.image_tokens:
        found += " and an image branch"
    expected = "16 to 16 (text to video), 36 to 16 (image to video) or 48 to 48 (5B)"
    raise FileError(found, where=str(source.where), expected=expected, advice=advice)


def _vae(source: _Source, metadata: Mapping[str, str]) -> tuple[VaeSpec, str]:
    for half in ("encoder", "decoder"):
        if not any(name.startswith(f"{half}.") for name in source.shapes):
            source.refuse(f"a VAE without its {half}", "encoder and decoder in one file")
    z = source.shape("conv2.bias", 1)[0]
    base = source.shape("encoder.conv1.bias", 1)[0]
    decoder_base = source.shape("decoder.head.0.gamma", 4)[0]
    if "decoder.upsamples.0.upsamples.0.residual.2.weight" in source.shapes:
        version, res_blocks = "2.2", source.count("encoder.downsamples.3.downsamples.")
    else:
        modules = source.count("encoder.downsamples.")
        version, res_blocks = "2.1", (modules - 3) // 4
        if modules < 7 or modules % 4 != 3:
            source.refuse(
                f"{modules} modules in encoder.downsamples", "4 stages of equal length: 7, 11, 15, ..."
            )
    mean, std = _statistics(version, z, metadata, source)
    return VaeSpec(version, base, decoder_base, z, res_blocks, mean, std), version


def _statistics(
    version: str, z: int, metadata: Mapping[str, str], source: _Source
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Latent statistics: from the header metadata `latent_mean` and `latent_std` (JSON lists of z numbers), else
    the published ones of the version."""
    if "latent_mean" in metadata or "latent_std" in metadata:
        mean, std = (_numbers(metadata.get(key, ""), z) for key in ("latent_mean", "latent_std"))
        if mean is None or std is None or min(std) <= 0:
            found = "latent_mean and latent_std in the header are not usable"
            source.refuse(found, f"two JSON lists of {z} finite numbers, latent_std positive")
        return mean, std
    known = VaeSpec() if version == "2.1" else VaeSpec("2.2", mean=LATENT_MEAN_22, std=LATENT_STD_22)
    if len(known.mean) != z:
        source.refuse(
            f"a {version} VAE with {z} latent channels", f"{len(known.mean)}, or its own statistics"
        )
    return known.mean, known.std


def _numbers(text: str, count: int) -> tuple[float, ...] | None:
    if len(text) > _MAX_STATISTICS:
        return None
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(values, list) or len(values) != count:
        return None
    if any(isinstance(v, bool) or not isinstance(v, int | float) or not abs(v) < 1e6 for v in values):
        return None
    numbers = tuple(float(v) for v in values)
    return numbers if all(math.isfinite(v) for v in numbers) else None


def _text(source: _Source) -> tuple[TextSpec, str]:
    vocab, dim = source.shape("token_embedding.weight", 2)
    layers = source.count("blocks.")
    _, heads = source.shape("blocks.0.pos_embedding.embedding.weight", 2)
    if layers > 1 and "blocks.1.pos_embedding.embedding.weight" not in source.shapes:
        found = "a T5 encoder with one position table for all layers"
        source.refuse(found, "UMT5, which has a table in every layer (umt5_xxl)")
    inner = source.shape("blocks.0.attn.q.weight", 2)[0]
    if inner % heads:
        source.refuse(f"{heads} heads over {inner} channels", "a whole number of channels per head")
    ffn = source.shape("blocks.0.ffn.fc1.weight", 2)[0]
    spec = TextSpec(vocab=vocab, dim=dim, heads=heads, head_dim=inner // heads, ffn=ffn, layers=layers)
    return spec, "umt5"


def _clip(source: _Source) -> tuple[ClipSpec, str]:
    dim, _, patch, _ = source.shape("patch_embedding.weight", 4)
    tokens = source.shape("position_embedding.weight", 2)[0]
    if dim % CLIP_HEAD_DIM:
        source.refuse(f"a CLIP vision encoder of width {dim}", "ViT-H/14, which has 1280")
    if math.isqrt(tokens - 1) ** 2 != tokens - 1:
        source.refuse(f"a CLIP vision encoder of {tokens} tokens", "a square of patches and one token")
    ffn, layers = source.shape("blocks.0.mlp.0.bias", 1)[0], source.count("blocks.")
    return ClipSpec(dim, ffn, layers, patch, tokens), "clip"
