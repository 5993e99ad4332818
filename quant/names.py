"""Every key style -> the native Wan name, and back.

Tables list modules; a parameter's own name (`weight`, `bias`, `gamma`) is kept. Sources: checkpoint-formats 2.1
(transformer), 7 (text encoder) and 8.3 (VAE); checked in the tests against the diffusers and transformers
classes. Quantised files add side tensors beside a weight: `split_side` tells them apart.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from lowvram.quant.face_spec import FACE_STAGES, MOTION_LAYERS
from lowvram.quant.renames import Renames

NetKind = Literal["dit", "vae", "text", "clip"]
Style = Literal["native", "diffusers", "hf", "gguf"]


@dataclass(frozen=True, slots=True)
class KeyStyle:
    """How a file names the tensors of one network."""

    kind: NetKind
    style: Style
    prefix: str
    """In front of every name: "" or "model.diffusion_model.", "vae.", ..."""
    hits: int
    """Names it explains."""


FUSED_QKV = "attn.qkv"
"""Query, key and value rows in one matrix, as the authors' CLIP stores them."""

_ATTENTION: Mapping[str, str] = {
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "o": "to_out.0",
    "norm_q": "norm_q",
    "norm_k": "norm_k",
}

_DIT = Renames.of(
    {
        "patch_embedding": "patch_embedding",
        "text_embedding.0": "condition_embedder.text_embedder.linear_1",
        "text_embedding.2": "condition_embedder.text_embedder.linear_2",
        "time_embedding.0": "condition_embedder.time_embedder.linear_1",
        "time_embedding.2": "condition_embedder.time_embedder.linear_2",
        "time_projection.1": "condition_embedder.time_proj",
        "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
        "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
        "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
        "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
        "img_emb.emb_pos": "condition_embedder.image_embedder.pos_embed",
        "head.modulation": "scale_shift_table",
        "head.head": "proj_out",
    },
    {
        "modulation": "scale_shift_table",
        # Only the middle norm has parameters; native counts it third, diffusers second.
        "norm3": "norm2",
        "ffn.0": "ffn.net.0.proj",
        "ffn.2": "ffn.net.2",
        **{f"self_attn.{native}": f"attn1.{other}" for native, other in _ATTENTION.items()},
        **{f"cross_attn.{native}": f"attn2.{other}" for native, other in _ATTENTION.items()},
        "cross_attn.k_img": "attn2.add_k_proj",
        "cross_attn.v_img": "attn2.add_v_proj",
        "cross_attn.norm_k_img": "attn2.norm_added_k",
    },
    ("blocks.", "blocks."),
    frozenset({"modulation", "head.modulation", "img_emb.emb_pos"}),
)

_CONVS = "motion_encoder.enc.net_app.convs"
_MOTION: Mapping[str, str] = {
    f"{_CONVS}.0.0": "motion_encoder.conv_in",
    f"{_CONVS}.0.1": "motion_encoder.conv_in.act_fn",
    **{
        f"{_CONVS}.{n}.{native}": f"motion_encoder.res_blocks.{n - 1}.{other}"
        for n in range(1, FACE_STAGES + 1)
        for native, other in (
            ("conv1.0", "conv1"), ("conv1.1", "conv1.act_fn"),
            ("conv2.1", "conv2"), ("conv2.2", "conv2.act_fn"), ("skip.1", "conv_skip"),
        )
    },
    f"{_CONVS}.{FACE_STAGES + 1}": "motion_encoder.conv_out",
    **{f"motion_encoder.enc.fc.{n}": f"motion_encoder.motion_network.{n}" for n in range(MOTION_LAYERS)},
    "motion_encoder.dec.direction.weight": "motion_encoder.motion_synthesis_weight",
}  # fmt: skip

_FACE = Renames.of(
    {
        **_MOTION,
        **{f"face_encoder.{conv}.conv": f"face_encoder.{conv}" for conv in ("conv1_local", "conv2", "conv3")},
        "face_encoder.out_proj": "face_encoder.out_proj",
        "face_encoder.padding_tokens": "face_encoder.padding_tokens",
        "pose_patch_embedding": "pose_patch_embedding",
    },
    {
        "linear1_q": "to_q",
        # One matrix in the authors' files, two in diffusers': the second form has native names of our own.
        "linear1_kv": "to_kv",
        "linear1_k": "to_k",
        "linear1_v": "to_v",
        "linear2": "to_out",
        "q_norm": "norm_q",
        "k_norm": "norm_k",
    },
    ("face_adapter.fuser_blocks.", "face_adapter."),
    frozenset({"face_encoder.padding_tokens", "motion_encoder.dec.direction.weight"}),
)
"""What Wan-Animate adds."""

DIT = _DIT | _FACE
"""Transformer: native <-> diffusers."""

BLUR_FILTER = ".kernel"
"""How the names of constants end that the authors' Wan-Animate files store with the motion encoder."""

TEXT = Renames.of(
    {"token_embedding": "shared", "norm": "encoder.final_layer_norm"},
    {
        "norm1": "layer.0.layer_norm",
        **{f"attn.{leaf}": f"layer.0.SelfAttention.{leaf}" for leaf in "qkvo"},
        "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
        "norm2": "layer.1.layer_norm",
        "ffn.gate.0": "layer.1.DenseReluDense.wi_0",
        "ffn.fc1": "layer.1.DenseReluDense.wi_1",
        "ffn.fc2": "layer.1.DenseReluDense.wo",
    },
    ("blocks.", "encoder.block."),
    frozenset(),
)
"""Text encoder: native <-> Hugging Face (which ComfyUI uses too)."""

TEXT_GGUF = Renames.of(
    {"token_embedding": "token_embd", "norm": "enc.output_norm"},
    {
        "norm1": "attn_norm",
        **{f"attn.{leaf}": f"attn_{leaf}" for leaf in "qkvo"},
        "pos_embedding.embedding": "attn_rel_b",
        "norm2": "ffn_norm",
        "ffn.gate.0": "ffn_gate",
        "ffn.fc1": "ffn_up",
        "ffn.fc2": "ffn_down",
    },
    ("blocks.", "enc.blk."),
    frozenset(),
)
"""Text encoder: native <-> llama.cpp's t5encoder (checkpoint-formats 4.4)."""

_CLIP_LAYER: Mapping[str, str] = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "mlp.0": "mlp.fc1",
    "mlp.2": "mlp.fc2",
}

CLIP = Renames.of(
    {
        "class_embedding": "embeddings.class_embedding",
        "patch_embedding": "embeddings.patch_embedding",
        "position_embedding": "embeddings.position_embedding",
        "pre_norm": "pre_layrnorm",
        "post_norm": "post_layernorm",
    },
    {
        **_CLIP_LAYER,
        **{f"attn.{leaf}": f"self_attn.{leaf}_proj" for leaf in "qkv"},
        "attn.o": "self_attn.out_proj",
    },
    ("blocks.", "encoder.layers."),
    frozenset({"class_embedding"}),
)
"""Picture half of CLIP: our names, which keep query, key and value apart, <-> Hugging Face."""

CLIP_OPEN = Renames.of(
    {
        "class_embedding": "cls_embedding",
        "patch_embedding": "patch_embedding",
        "position_embedding.weight": "pos_embedding",
        "pre_norm": "pre_norm",
        "post_norm": "post_norm",
    },
    {
        "norm1": "norm1",
        "norm2": "norm2",
        "mlp.0": "mlp.0",
        "mlp.2": "mlp.2",
        FUSED_QKV: "attn.to_qkv",
        "attn.o": "attn.proj",
    },
    ("blocks.", "transformer."),
    frozenset({"class_embedding", "position_embedding.weight"}),
)
"""Picture half of CLIP: our names, but for `FUSED_QKV`, <-> the authors' own (checkpoint-formats 9)."""

TIED_EMBEDDING = "encoder.embed_tokens.weight"
"""The Hugging Face second name of `shared.weight`; a file may hold either or both."""

_RES_BLOCK: Mapping[str, str] = {
    "residual.0": "norm1",
    "residual.2": "conv1",
    "residual.3": "norm2",
    "residual.6": "conv2",
    "shortcut": "conv_shortcut",
}
_RESAMPLE: Mapping[str, str] = {"resample.1": "resample.1", "time_conv": "time_conv"}


def vae_renames(version: str, res_blocks: int) -> Renames:
    """VAE: native <-> diffusers AutoencoderKLWan, for "2.1" or "2.2" and a number of encoder blocks per stage."""
    table = {"conv1": "quant_conv", "conv2": "post_quant_conv"}
    for half in ("encoder", "decoder"):
        table |= {f"{half}.conv1": f"{half}.conv_in"}
        table |= {f"{half}.head.0": f"{half}.norm_out", f"{half}.head.2": f"{half}.conv_out"}
        for native, other in (("0", "resnets.0"), ("2", "resnets.1")):
            table |= _nested(f"{half}.middle.{native}", f"{half}.mid_block.{other}", _RES_BLOCK)
        for leaf in ("norm", "to_qkv", "proj"):
            table[f"{half}.middle.1.{leaf}"] = f"{half}.mid_block.attentions.0.{leaf}"
    for stage in range(4):
        for half, blocks in (("down", res_blocks), ("up", res_blocks + 1)):
            for n in range(blocks + (stage < 3)):
                native, other = _vae_module(version, half, stage, n, blocks)
                table |= _nested(native, other, _RES_BLOCK if n < blocks else _RESAMPLE)
    return Renames.of(table, {}, ("", ""), frozenset())


def _vae_module(version: str, half: str, stage: int, n: int, blocks: int) -> tuple[str, str]:
    """Native and diffusers name of module `n` of a stage that has `blocks` residual blocks, then a resampler."""
    root = "encoder" if half == "down" else "decoder"
    flat = stage * (blocks + 1) + n
    leaf = f"resnets.{n}" if n < blocks else f"{half}sampler"
    if version == "2.2":
        return f"{root}.{half}samples.{stage}.{half}samples.{n}", f"{root}.{half}_blocks.{stage}.{leaf}"
    if half == "down":
        return f"{root}.downsamples.{flat}", f"{root}.down_blocks.{flat}"
    leaf = leaf if n < blocks else "upsamplers.0"
    return f"{root}.upsamples.{flat}", f"{root}.up_blocks.{stage}.{leaf}"


def _nested(native: str, other: str, leaves: Mapping[str, str]) -> dict[str, str]:
    return {f"{native}.{a}": f"{other}.{b}" for a, b in leaves.items()}


_VAE_NATIVE = re.compile(
    r"(conv[12]|(encoder|decoder)\.(conv1|head\.[02]|middle\.[012]\..+|(down|up)samples\.\d+\..+))"
    r"\.(weight|bias|gamma)"
)
_VAE_DIFFUSERS = re.compile(
    r"((post_)?quant_conv|(encoder|decoder)\.(conv_in|conv_out|norm_out|mid_block\..+|(down|up)_blocks\.\d+\..+))"
    r"\.(weight|bias|gamma)"
)


def is_vae_native(name: str) -> bool:
    """Whether `name` has the form of a native VAE tensor."""
    return _VAE_NATIVE.fullmatch(name) is not None


_PREFIXES = (
    "",
    "model.diffusion_model.",
    "diffusion_model.",
    "model.",
    "net.",
    "module.",
    "transformer.",
    "vae.",
    "first_stage_model.",
    "text_encoder.",
    "text_encoders.umt5xxl.transformer.",
    "text_encoders.umt5xxl.",
    "visual.",
    "vision_model.",
)
_ENOUGH_HITS = 8
"""Fewer known names than this are a coincidence: the smallest network has twice as many."""


def detect_styles(names: Iterable[str]) -> list[KeyStyle]:
    """The networks that tensors of these names belong to, each in its best style, the surest first.

    Decided by counting the names each style explains, never by the first key. One file may hold several.
    """
    hits: Counter[tuple[NetKind, Style, str]] = Counter()
    for name in names:
        for prefix in _PREFIXES:
            if name.startswith(prefix):
                hits.update((kind, style, prefix) for kind, style in _known_as(name[len(prefix) :]))
    found = [KeyStyle(*key, count) for key, count in hits.most_common() if count >= _ENOUGH_HITS]
    # Two networks never share a prefix, but their styles share a few names.
    by_prefix: dict[str, KeyStyle] = {}
    for style in found:
        by_prefix.setdefault(style.prefix, style)
    by_kind: dict[NetKind, KeyStyle] = {}
    for style in by_prefix.values():
        by_kind.setdefault(style.kind, style)
    return list(by_kind.values())


def _known_as(name: str) -> list[tuple[NetKind, Style]]:
    if name.startswith("blocks."):
        if DIT.knows_native(name):
            return [("dit", "native")]
        if TEXT.knows_native(name):
            return [("text", "native")]
        return [("dit", "diffusers")] if DIT.to_native(name) else []
    found: list[tuple[NetKind, Style]] = []
    if DIT.knows_native(name):
        found.append(("dit", "native"))
    if DIT.to_native(name):
        found.append(("dit", "diffusers"))
    if TEXT.knows_native(name):
        found.append(("text", "native"))
    if name == TIED_EMBEDDING or TEXT.to_native(name):
        found.append(("text", "hf"))
    if TEXT_GGUF.to_native(name):
        found.append(("text", "gguf"))
    if CLIP.to_native(name):
        found.append(("clip", "hf"))
    if CLIP_OPEN.to_native(name):
        found.append(("clip", "native"))
    if not found and is_vae_native(name):
        found.append(("vae", "native"))
    if not found and _VAE_DIFFUSERS.fullmatch(name):
        found.append(("vae", "diffusers"))
    return found


_LAYER_SUFFIXES: Mapping[str, str] = MappingProxyType(
    {
        "weight_scale": "scale", "scale_weight": "scale",
        "input_scale": "input_scale", "scale_input": "input_scale", "output_scale": "output_scale",
        "comfy_quant": "comfy_quant", "pre_quant_scale": "pre_quant_scale", "weight_scale_2": "scale_2",
        "weight_global_scale": "global_scale", "input_global_scale": "input_global_scale", "alpha": "alpha",
        "input_absmax": "input_absmax",
        "_weight_qdata": "weight", "_weight_scale": "scale", "weight:qdata": "weight", "weight:scale": "scale",
        "_weight_zero_point": "zero_point",
        "SCB": "scb", "weight_format": "weight_format",
    }
)  # fmt: skip
"""Role of a side tensor that stands beside a weight under the name of its layer: "ffn.0.weight_scale"."""

_WEIGHT_SUFFIXES: tuple[tuple[str, str], ...] = (
    ("._data._data", "packed"), ("._data", "weight"), ("._scale", "scale"), ("._shift", "shift"),
    (".absmax", "absmax"), (".quant_map", "quant_map"), (".nested_absmax", "nested_absmax"),
    (".nested_quant_map", "nested_quant_map"),
    (".quant_state.bitsandbytes__nf4", "quant_state"), (".quant_state.bitsandbytes__fp4", "quant_state"),
)  # fmt: skip
"""Role of a side tensor that is named after the weight itself: "ffn.0.weight._scale"; the first that ends a name."""

NOTE_ROLES = frozenset({"comfy_quant", "quant_state"})
"""Roles of small JSON texts stored as tensors of bytes."""

FILE_MARKERS = frozenset({"scaled_fp8", "spiece_model"})
"""Tensors that speak of the whole file: an fp8 marker, and the sentencepiece model of a ComfyUI text encoder."""


def split_side(name: str) -> tuple[str, str]:
    """(name of the weight, role) of a stored tensor: a side tensor of a quantised weight, or ("...", "weight")."""
    layer, _, last = name.rpartition(".")
    role = _LAYER_SUFFIXES.get(last)
    if role is not None and layer:
        return f"{layer}.weight", role
    if ".weight." in name:
        for suffix, role in _WEIGHT_SUFFIXES:
            if name.endswith(".weight" + suffix):
                return name.removesuffix(suffix), role
    return name, "weight"
