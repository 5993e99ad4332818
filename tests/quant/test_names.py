"""Key styles: the maps against the diffusers and transformers classes, and detection by counting."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lowvram.quant.face_spec import FaceSpec
from lowvram.quant.names import DIT, TEXT, TEXT_GGUF, TIED_EMBEDDING, detect_styles, split_side, vae_renames
from lowvram.quant.spec import LATENT_MEAN_22, LATENT_STD_22, DitSpec, TextSpec, VaeSpec

TINY = DitSpec(dim=128, ffn=256, layers=2, in_channels=36, out_channels=16, text_dim=64)
VAES = [
    VaeSpec(base=16, decoder_base=16, res_blocks=1),
    VaeSpec(base=16, decoder_base=16, res_blocks=2),
    VaeSpec("2.2", 8, 16, 48, 2, LATENT_MEAN_22, LATENT_STD_22),
    VaeSpec("2.2", 8, 16, 48, 1, LATENT_MEAN_22, LATENT_STD_22),
]


def shapes_of(build) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in build().state_dict().items()}


def assert_bijective(renames, native, other):
    """Both directions lead from exactly one set of names and shapes to exactly the other."""
    assert {renames.from_native(name): shape for name, shape in native.items()} == other
    assert {renames.to_native(name): shape for name, shape in other.items()} == native


@pytest.mark.parametrize("image_tokens", [0, 257, 514])
def test_transformer_names_are_those_of_diffusers(image_tokens):
    transformer = pytest.importorskip("diffusers.models.transformers.transformer_wan")
    spec = DitSpec(
        **{f: getattr(TINY, f) for f in TINY.__slots__} | {"image_tokens": image_tokens, "image_dim": 32}
    )
    other = shapes_of(
        lambda: transformer.WanTransformer3DModel(
            num_attention_heads=1, attention_head_dim=128, in_channels=36, out_channels=16, text_dim=64,
            ffn_dim=256, num_layers=2, image_dim=32 if image_tokens else None,
            added_kv_proj_dim=128 if image_tokens else None,
            pos_embed_seq_len=514 if image_tokens == 514 else None,
        )
    )  # fmt: skip
    assert_bijective(DIT, spec.shapes(), other)


def test_animate_names_are_those_of_diffusers():
    transformer = pytest.importorskip("diffusers.models.transformers.transformer_wan_animate")
    face = FaceSpec((4, 4, 6, 6, 8, 8, 8, 8), 12, 5, 16, 24, heads=2, every=1, split_kv=True)
    spec = replace(TINY, image_tokens=257, image_dim=32, face=face)
    other = shapes_of(
        lambda: transformer.WanAnimateTransformer3DModel(
            num_attention_heads=1, in_channels=36, text_dim=64, ffn_dim=256, num_layers=2, image_dim=32,
            added_kv_proj_dim=128, motion_style_dim=12, motion_dim=5, motion_encoder_dim=16,
            motion_encoder_channel_sizes={str(512 >> n): c for n, c in enumerate(face.widths)},
            face_encoder_hidden_dim=24, face_encoder_num_heads=2, inject_face_latents_blocks=1,
        )
    )  # fmt: skip
    other = {n: (1, *s, 1, 1) if n.endswith("act_fn.bias") else s for n, s in other.items()}
    assert_bijective(DIT, spec.shapes(), other)


@pytest.mark.parametrize("spec", VAES, ids=lambda v: f"{v.version}-{v.res_blocks}")
def test_vae_names_are_those_of_diffusers(spec):
    vae = pytest.importorskip("diffusers.models.autoencoders.autoencoder_kl_wan")
    late = spec.version == "2.2"
    other = shapes_of(
        lambda: vae.AutoencoderKLWan(
            base_dim=spec.base, decoder_base_dim=spec.decoder_base, z_dim=spec.z, num_res_blocks=spec.res_blocks,
            is_residual=late, in_channels=12 if late else 3, out_channels=12 if late else 3,
            patch_size=2 if late else None, latents_mean=list(spec.mean), latents_std=list(spec.std),
        )
    )  # fmt: skip
    assert_bijective(vae_renames(spec.version, spec.res_blocks), spec.shapes(), other)


def test_text_names_are_those_of_transformers():
    umt5 = pytest.importorskip("transformers.models.umt5.modeling_umt5")
    config = umt5.UMT5Config(
        vocab_size=50, d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"
    )
    other = shapes_of(lambda: umt5.UMT5EncoderModel(config))
    assert other.pop(TIED_EMBEDDING) == other["shared.weight"]
    spec = TextSpec(vocab=50, dim=32, heads=4, head_dim=16, ffn=48, layers=2)
    assert_bijective(TEXT, spec.shapes(), other)


@pytest.mark.parametrize(
    "name",
    ["blocks.x.ffn.0.weight", "blocks..ffn.0.weight", "blocks.01.ffn.0.weight", "blocks.12345.ffn.0.weight",
     "blocks.-1.ffn.0.weight", "blocks.٣.ffn.0.weight", "blocks.0.ffn.0", "blocks.0.ffn.1.weight", "ffn.0.weight",
     "blocks.0", "blocks.0.ffn.0.weight.extra", "", "weight"],
)  # fmt: skip
def test_what_is_no_name_is_not_renamed(name):
    assert DIT.from_native(name) is None and TEXT.from_native(name) is None
    assert DIT.to_native(name) is None


def style_of(names):
    return [(s.kind, s.style, s.prefix) for s in detect_styles(names)]


@pytest.mark.parametrize(
    "prefix", ["", "model.diffusion_model.", "diffusion_model.", "model.", "net.", "module."]
)
def test_transformers_are_detected_under_any_prefix_and_style(prefix):
    native = [prefix + name for name in TINY.shapes()]
    other = [prefix + str(DIT.from_native(name)) for name in TINY.shapes()]
    assert style_of(native) == [("dit", "native", prefix)]
    assert style_of(other) == [("dit", "diffusers", prefix)]


def test_vaes_and_text_encoders_are_detected():
    for vae in VAES:
        renames = vae_renames(vae.version, vae.res_blocks)
        assert style_of(vae.shapes()) == [("vae", "native", "")]
        assert style_of([str(renames.from_native(n)) for n in vae.shapes()]) == [("vae", "diffusers", "")]
    text = TextSpec(layers=2)
    assert style_of(text.shapes()) == [("text", "native", "")]
    assert style_of([str(TEXT.from_native(n)) for n in text.shapes()]) == [("text", "hf", "")]
    assert style_of([str(TEXT_GGUF.from_native(n)) for n in text.shapes()]) == [("text", "gguf", "")]


def test_one_stray_key_does_not_decide():
    names = ["diffusion_model.head.modulation", *TINY.shapes()]
    assert style_of(names)[0] == ("dit", "native", "")
    assert style_of(["head.modulation", "conv1.weight", "norm.weight"]) == []


def test_an_all_in_one_file_holds_several_networks():
    names = ["model.diffusion_model." + name for name in TINY.shapes()]
    names += ["vae." + name for name in VAES[0].shapes()]
    names += [
        "text_encoders.umt5xxl.transformer." + str(TEXT.from_native(n)) for n in TextSpec(layers=1).shapes()
    ]
    assert {kind for kind, _, _ in style_of(names)} == {"dit", "vae", "text"}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("blocks.0.ffn.0.scale_weight", ("blocks.0.ffn.0.weight", "scale")),
        ("blocks.0.ffn.0.weight_scale", ("blocks.0.ffn.0.weight", "scale")),
        ("blocks.0.ffn.0.scale_input", ("blocks.0.ffn.0.weight", "input_scale")),
        ("blocks.0.ffn.0.input_scale", ("blocks.0.ffn.0.weight", "input_scale")),
        ("blocks.0.ffn.0.comfy_quant", ("blocks.0.ffn.0.weight", "comfy_quant")),
        ("blocks.0.ffn.0.weight", ("blocks.0.ffn.0.weight", "weight")),
        ("scaled_fp8", ("scaled_fp8", "weight")),
        ("blocks.0.modulation", ("blocks.0.modulation", "weight")),
        ("a.q.weight_scale_2", ("a.q.weight", "scale_2")),
        ("a.q.weight_global_scale", ("a.q.weight", "global_scale")),
        ("a.q.SCB", ("a.q.weight", "scb")),
        ("a.q.weight._data", ("a.q.weight", "weight")),
        ("a.q.weight._data._data", ("a.q.weight", "packed")),
        ("a.q.weight._shift", ("a.q.weight", "shift")),
        ("a.q.weight.absmax", ("a.q.weight", "absmax")),
        ("a.q.weight.nested_absmax", ("a.q.weight", "nested_absmax")),
        ("a.q.weight.quant_state.bitsandbytes__fp4", ("a.q.weight", "quant_state")),
        ("alpha", ("alpha", "weight")),
        ("a.absmax", ("a.absmax", "weight")),
    ],
)
def test_side_tensors_belong_to_their_weight(name, expected):
    assert split_side(name) == expected
