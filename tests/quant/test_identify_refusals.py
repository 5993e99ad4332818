"""What is no network of ours, or not all of one, is refused from headers alone, by name."""

from __future__ import annotations

import pytest
from headers import (
    A14B,
    ANIMATE,
    I2V,
    NANO,
    NANO_VAE,
    TEXT_TINY,
    authors_clip,
    fp8_scaled,
    plain,
    renamed,
)

from lowvram.quant.names import vae_renames
from lowvram.quant.spec import ClipSpec, DitSpec

FAMILIES = {
    "VACE": {
        "vace_patch_embedding.weight": (5120, 96, 1, 2, 2),
        "vace_blocks.0.before_proj.weight": (5120, 5120),
    },
    "camera": {"control_adapter.conv.weight": (5120, 1536, 2, 2)},
    "S2V": {"casual_audio_encoder.encoder.final_linear.weight": (5120, 5120)},
    "HuMo": {"audio_proj.audio_proj_glob_1.layer.bias": (512,)},
    "SCAIL": {"patch_embedding_pose.weight": (5120, 16, 1, 2, 2)},
    "Wan-Dancer": {"patch_embedding_global.weight": (5120, 16, 1, 2, 2)},
    "Fun control": {"ref_conv.weight": (5120, 16, 2, 2)},
    "MultiTalk": {"blocks.0.audio_cross_attn.kv_linear.weight": (10240, 768)},
    "SteadyDancer": {"condition_embedding_spatial.fc_scale.weight": (16, 16)},
    "ReCamMaster": {"blocks.0.cam_encoder.weight": (5120, 12)},
    "TurboDiffusion": {"blocks.0.self_attn.attn_op.local_attn.proj_l.weight": (128, 128)},
}


def test_a_lost_scale_is_refused(refusal):
    entries = fp8_scaled(NANO.shapes())
    del entries["blocks.1.ffn.2.scale_weight"]
    assert "blocks.1.ffn.2.weight is fp8 without a scale" in refusal(entries)


def test_a_scale_without_its_weight_is_refused(refusal):
    entries = plain(NANO.shapes())
    entries["blocks.1.ffn.2.scale_weight"] = entries.pop("blocks.1.ffn.2.weight")
    assert "without its weight" in refusal(entries)


@pytest.mark.parametrize("dtype", ["I8", "U8", "F4", "I32"])
def test_an_unknown_storage_format_is_named(refusal, dtype):
    entries = plain(NANO.shapes()) | {
        "blocks.0.ffn.0.weight": (dtype, NANO.shapes()["blocks.0.ffn.0.weight"])
    }
    assert f"weight {dtype}" in refusal(entries)


def test_a_t5_that_is_not_umt5_is_refused(refusal):
    entries = plain(TEXT_TINY.shapes())
    del entries["blocks.1.pos_embedding.embedding.weight"]
    assert "UMT5" in refusal(entries)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_derived_models_are_named_as_not_supported(refusal, family, prefix):
    message = refusal(plain(I2V.shapes() | FAMILIES[family], prefix=prefix))
    assert family in message and "not supported yet" in message


def test_a_transformer_with_half_a_face_branch_names_what_is_missing(refusal):
    shapes = {n: s for n, s in ANIMATE.shapes().items() if not n.startswith("motion_encoder.")}
    assert "motion_encoder.enc.net_app.convs.0.0.weight is missing" in refusal(plain(shapes))


def test_animate_2_is_named_by_its_extra_level(refusal):
    shapes = {n.replace("blocks.0.", "blocks.0.block.").replace("blocks.1.", "blocks.1.block."): s
              for n, s in NANO.shapes().items()}  # fmt: skip
    assert "Wan-Animate-2" in refusal(plain(shapes))


@pytest.mark.parametrize("channels", [32, 48, 52])
def test_fun_control_models_are_named_by_their_channels(refusal, channels):
    assert "Fun control" in refusal(plain(DitSpec(**A14B, in_channels=channels).shapes()))


def test_unknown_channels_are_refused_with_the_known_ones(refusal):
    message = refusal(plain(DitSpec(256, 512, 1, 17, 16).shapes()))
    assert "17 input and 16 output" in message and "48 to 48" in message


def test_missing_tensors_are_counted_and_named(refusal):
    entries = plain(NANO.shapes())
    del entries["blocks.0.cross_attn.k.bias"], entries["blocks.1.ffn.2.weight"]
    message = refusal(entries)
    assert "2 tensors are missing" in message and "'blocks.0.cross_attn.k.bias'" in message


@pytest.mark.parametrize("name", ["head.modulation", "patch_embedding.weight", "blocks.0.ffn.0.bias"])
def test_a_missing_tensor_that_sizes_are_read_from_is_named(refusal, name):
    entries = plain(NANO.shapes())
    del entries[name]
    assert name in refusal(entries)


def test_a_missing_block_is_named(refusal):
    shapes = DitSpec(256, 512, 4, 16, 16).shapes()
    assert "blocks.2" in refusal(plain({n: s for n, s in shapes.items() if not n.startswith("blocks.2.")}))


def test_a_block_number_does_not_make_a_model_large(refusal):
    entries = plain(NANO.shapes()) | {"blocks.9999.ffn.0.bias": ("BF16", (768,))}
    assert "blocks.2 is missing" in refusal(entries)
    entries = plain(NANO.shapes()) | {"blocks.999999999999.ffn.0.bias": ("BF16", (768,))}
    assert "1 tensors belong to no Wan model" in refusal(entries)


def test_wrong_shapes_are_named_with_the_right_one(refusal):
    entries = plain(NANO.shapes()) | {"blocks.1.ffn.2.weight": ("BF16", (768, 256))}
    assert "blocks.1.ffn.2.weight is [768, 256] instead of [256, 768]" in refusal(entries)


def test_extra_tensors_are_named(refusal):
    entries = plain(NANO.shapes()) | {f"extra.{n}.weight": ("BF16", (4, 4)) for n in range(5)}
    message = refusal(entries)
    assert "5 tensors belong to no Wan model" in message and "'extra.2.weight', ..." in message


@pytest.mark.parametrize("shape", [(1, 2, 0), (1, 2, 100), (2, 256), ()])
def test_impossible_sizes_are_refused(refusal, shape):
    assert refusal(plain(NANO.shapes()) | {"head.modulation": ("BF16", shape)})


@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_half_a_vae_is_refused_by_name(refusal, half):
    shapes = {n: s for n, s in NANO_VAE.shapes().items() if not n.startswith(half)}
    assert f"without its {half}" in refusal(plain(shapes))


def test_a_vae_of_odd_stages_is_refused(refusal):
    shapes = {n.replace("downsamples.6.", "downsamples.7."): s for n, s in NANO_VAE.shapes().items()}
    assert "encoder.downsamples.6 is missing" in refusal(plain(shapes))


def test_a_diffusers_vae_whose_names_end_early_is_refused(refusal):
    shapes = renamed(NANO_VAE.shapes(), vae_renames("2.1", NANO_VAE.res_blocks))
    assert "'encoder.down_blocks.3.resnets'" in refusal(plain(shapes | {"encoder.down_blocks.3.resnets": ()}))


def test_a_fused_projection_that_is_one_number_is_refused(refusal):
    entries = authors_clip(ClipSpec(160, 320, 2)) | {"visual.transformer.1.attn.to_qkv.bias": ("F16", ())}
    assert "blocks.1.attn.qkv.bias is fp16 []" in refusal(entries)


def test_the_wrong_kind_of_file_is_named(refusal):
    assert "this is a VAE\nexpected a text encoder" in refusal(plain(NANO_VAE.shapes()), "text")
    assert "this is a text encoder" in refusal(plain(TEXT_TINY.shapes()), "dit")


@pytest.mark.parametrize(
    "entries", [{}, {"a": ("F32", (1,))}, {f"layers.{n}.weight": ("F32", (2, 2)) for n in range(99)}]
)
def test_files_of_other_models_are_refused(refusal, entries):
    assert "not a model that lowvram knows" in refusal(entries)
    assert "not a model that lowvram knows" in refusal(entries, "vae")


def test_tiny_decoders_and_lone_modules_are_named(refusal):
    tiny = {"decoder.22.weight": ("F32", (3, 64, 3, 3)), "encoder.17.weight": ("F32", (16, 64, 3, 3))}
    assert "TAEHV" in refusal(tiny)
    assert "VACE" in refusal(plain(FAMILIES["VACE"]))
