"""What a checkpoint is, from headers alone: every key style, every known family, and everything that is none."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from headers import (
    ANIMATE,
    FLF,
    I2V,
    I2V_CLIP,
    NANO,
    NANO_VAE,
    T2V,
    TEXT_TINY,
    TI2V,
    VAE_22,
    authors_clip,
    fp8_scaled,
    plain,
    renamed,
)
from work import lines_run

from lowvram.errors import FileError
from lowvram.quant.encodings.fp8 import Fp8
from lowvram.quant.encodings.plain import Plain
from lowvram.quant.encodings.registry import keeps_precision
from lowvram.quant.face_spec import FaceSpec
from lowvram.quant.identify import identify, identify_path, kinds
from lowvram.quant.names import CLIP, DIT, TEXT, vae_renames
from lowvram.quant.spec import ClipSpec, TextSpec, VaeSpec

LINES = 400_000
MODELS = [
    (T2V, "dit", "t2v"), (I2V, "dit", "i2v"), (TI2V, "dit", "ti2v"), (I2V_CLIP, "dit", "i2v-clip"),
    (FLF, "dit", "flf2v"), (ANIMATE, "dit", "animate"), (NANO, "dit", "t2v"), (VaeSpec(), "vae", "2.1"), (VAE_22, "vae", "2.2"),
    (NANO_VAE, "vae", "2.1"), (VaeSpec(base=24, decoder_base=24), "vae", "2.1"), (TextSpec(), "text", "umt5"),
    (TEXT_TINY, "text", "umt5"),
]  # fmt: skip


@pytest.mark.parametrize(("spec", "kind", "variant"), MODELS)
def test_native_files_give_back_the_spec_they_were_made_from(header_of, spec, kind, variant):
    found = identify([header_of(plain(spec.shapes()))])
    assert (found.kind, found.spec, found.variant, found.style) == (kind, spec, variant, "native")
    assert {name: ref.shape for name, ref in found.refs.items()} == spec.shapes()
    assert {ref.encoding for ref in found.refs.values()} == {Plain("BF16")}
    assert kinds([header_of(plain(spec.shapes()))]) == (kind,)


@pytest.mark.parametrize(("spec", "kind", "variant"), MODELS)
def test_other_key_styles_give_the_same_spec(header_of, spec, kind, variant):
    renames = DIT if kind == "dit" else TEXT if kind == "text" else vae_renames(spec.version, spec.res_blocks)
    found = identify([header_of(plain(renamed(spec.shapes(), renames)))])
    assert (found.kind, found.spec, found.variant) == (kind, spec, variant)
    assert found.style == ("hf" if kind == "text" else "diffusers")
    assert found.refs.keys() == spec.shapes().keys()


def test_parts_point_at_the_stored_bytes(header_of):
    header = header_of(plain(renamed(NANO.shapes(), DIT)))
    stored = {tensor.name: tensor for tensor in header.tensors}
    for name, ref in identify([header]).refs.items():
        (part,) = ref.parts
        tensor = stored[DIT.from_native(name)]
        assert (part.role, part.file, part.offset, part.nbytes) == (
            "weight", header.path, tensor.offset, tensor.nbytes,
        )  # fmt: skip
        assert ref.nbytes == tensor.nbytes == ref.encoding.nbytes(ref.shape)


def test_shards_make_one_checkpoint(header_of):
    entries = list(plain(NANO.shapes()).items())
    halves = [
        header_of(dict(entries[:9]), "d/a.safetensors"),
        header_of(dict(entries[9:]), "d/b.safetensors"),
    ]
    found = identify(halves)
    assert (
        found.spec == NANO and [file.name for file in found.files] == ["b.safetensors", "a.safetensors"][::-1]
    )


def test_a_tensor_in_two_files_is_refused(header_of):
    with pytest.raises(FileError, match="every tensor once"):
        identify(
            [
                header_of(plain(NANO.shapes()), "d/a.safetensors"),
                header_of(plain(NANO.shapes()), "d/b.safetensors"),
            ]
        )


@pytest.mark.parametrize("scale", ["scale_weight", "weight_scale"])
def test_comfy_fp8_scaled_is_read_with_its_scales(header_of, scale):
    """1095 tensors + 406 Linears with two scales each + the marker = 1908, as in the released files."""
    entries = fp8_scaled(T2V.shapes(), scale) | {"scaled_fp8": ("F8_E4M3", (2,))}
    assert len(entries) == 1908
    found = identify([header_of(entries)])
    assert found.spec == T2V
    ref = found.refs["blocks.7.ffn.0.weight"]
    assert ref.encoding == Fp8() and [part.role for part in ref.parts] == ["weight", "scale"]
    assert ref.nbytes == 13824 * 5120 + 4
    assert found.refs["blocks.7.norm3.bias"].encoding == Plain("BF16")


@pytest.mark.parametrize(
    ("scale_shape", "encoding"),
    [((1,), Fp8()), (lambda s: (s[0], 1), Fp8("F8_E4M3", "row")), (lambda s: (s[0],), Fp8("F8_E4M3", "row")),
     (lambda s: (s[0], s[1] // 64, 1), Fp8("F8_E4M3", "block", 64))],
)  # fmt: skip
def test_scales_per_row_and_per_block_are_told_apart(header_of, scale_shape, encoding):
    found = identify([header_of(fp8_scaled(NANO.shapes(), scale_shape=scale_shape))])
    assert found.refs["blocks.1.self_attn.q.weight"].encoding == encoding


def test_comfy_quant_layers_of_float8_are_read(header_of):
    entries = fp8_scaled(NANO.shapes(), "weight_scale", extras=("input_scale",))
    entries["blocks.0.ffn.0.comfy_quant"] = ("U8", (27,))
    assert identify([header_of(entries)]).refs["blocks.0.ffn.0.weight"].encoding == Fp8()


def test_plain_fp8_files_are_read_whatever_is_cast(header_of):
    found = identify([header_of(plain(NANO.shapes(), "F8_E5M2"))])
    assert {ref.encoding for ref in found.refs.values()} == {Fp8("F8_E5M2", "none")}


def test_mixed_precision_files_keep_each_tensors_own(header_of):
    entries = {n: ("F32" if keeps_precision(n, s) else "F16", s) for n, s in NANO.shapes().items()}
    found = identify([header_of(entries)])
    assert found.refs["head.modulation"].encoding == Plain("F32")
    assert found.refs["blocks.0.ffn.2.weight"].encoding == Plain("F16")


@pytest.mark.parametrize(
    "prefix", ["model.diffusion_model.", "diffusion_model.", "model.", "net.", "module."]
)
def test_prefixes_are_removed(header_of, prefix):
    assert identify([header_of(plain(NANO.shapes(), prefix=prefix))]).spec == NANO


def test_an_all_in_one_file_gives_the_network_that_is_wanted(header_of):
    text = renamed(TEXT_TINY.shapes(), TEXT)
    entries = plain(NANO.shapes(), prefix="model.diffusion_model.") | plain(NANO_VAE.shapes(), prefix="vae.")
    entries |= plain(text, prefix="text_encoders.umt5xxl.transformer.")
    entries["text_encoders.umt5xxl.spiece_model"] = ("U8", (999,))
    header = header_of(entries)
    assert set(kinds([header])) == {"dit", "vae", "text"}
    assert identify([header]).spec == NANO
    assert identify([header], "vae").spec == NANO_VAE
    found = identify([header], "text")
    assert found.spec == TEXT_TINY and found.tokenizer is not None and found.tokenizer.nbytes == 999


def test_comfy_text_encoders_carry_their_tokenizer(header_of):
    shapes = renamed(TEXT_TINY.shapes(), TEXT)
    linears = {n: s for n, s in shapes.items() if "SelfAttention." in n or "DenseReluDense" in n}
    linears = {n: s for n, s in linears.items() if "relative" not in n}
    entries = plain(shapes, "F16") | fp8_scaled(linears, extras=())
    entries |= {"scaled_fp8": ("F8_E4M3", (0,)), "spiece_model": ("U8", (4_548_313,))}
    found = identify([header_of(entries)])
    assert found.spec == TEXT_TINY and found.tokenizer is not None
    assert found.tokenizer.nbytes == 4_548_313 and "spiece_model" not in found.refs
    assert found.refs["blocks.0.attn.q.weight"].encoding == Fp8()
    assert found.refs["token_embedding.weight"].encoding == Plain("F16")


def test_the_tied_embedding_may_have_either_name_or_both(header_of):
    entries = plain(renamed(TEXT_TINY.shapes(), TEXT))
    tied = {"encoder.embed_tokens.weight": entries["shared.weight"]}
    assert identify([header_of(entries | tied)]).spec == TEXT_TINY
    del entries["shared.weight"]
    assert identify([header_of(entries | tied)]).spec == TEXT_TINY


def test_the_decoder_of_a_full_umt5_is_ignored(header_of):
    entries = plain(renamed(TEXT_TINY.shapes(), TEXT)) | {"lm_head.weight": ("BF16", (300, 64))}
    entries["decoder.block.0.layer.0.SelfAttention.q.weight"] = ("BF16", (64, 64))
    assert identify([header_of(entries)]).spec == TEXT_TINY


def test_a_flattened_patch_embedding_is_the_same_tensor(header_of):
    entries = plain(NANO.shapes()) | {"patch_embedding.weight": ("BF16", (256, 64))}
    found = identify([header_of(entries)])
    assert found.spec == NANO and found.refs["patch_embedding.weight"].parts[0].shape == (256, 64)


def test_ignored_leftovers_of_old_diffusers_files_do_no_harm(header_of):
    entries = plain(renamed(I2V_CLIP.shapes(), DIT)) | {
        "blocks.0.attn2.norm_added_q.weight": ("F32", (5120,))
    }
    assert identify([header_of(entries)]).spec == I2V_CLIP


def test_the_authors_blur_filters_are_ignored(header_of):
    filters = {
        f"motion_encoder.enc.net_app.convs.{n}.{leaf}.0.kernel": (4, 4)
        for n in range(1, 8)
        for leaf in ("conv2", "skip")
    }
    found = identify([header_of(plain(ANIMATE.shapes() | filters))])
    assert (found.spec, found.variant) == (ANIMATE, "animate")
    assert found.refs.keys() == ANIMATE.shapes().keys()


def test_animate_in_diffusers_names_has_its_keys_and_values_apart(header_of):
    """1443 tensors there, 1427 here: each of 8 adapters has one more matrix and one more bias."""
    apart = replace(ANIMATE, face=FaceSpec(split_kv=True))
    names = renamed(apart.shapes(), DIT)
    assert len(names) == 1443 and len(ANIMATE.shapes()) == 1427
    flat = {n: s[1:2] if "act_fn" in n else s for n, s in names.items()}
    found = identify([header_of(plain(flat))])
    assert (found.spec, found.variant, found.style) == (ANIMATE, "animate", "diffusers")
    assert {n: r.shape for n, r in found.refs.items()} == apart.shapes()


def test_a_vae_may_bring_its_own_latent_statistics(header_of, refusal):
    mean, std = tuple(n / 8 for n in range(8)), (0.5,) * 8
    spec = VaeSpec(base=16, decoder_base=16, z=8, res_blocks=1, mean=mean, std=std)
    own = {"latent_mean": json.dumps(mean), "latent_std": json.dumps(std)}
    assert identify([header_of(plain(spec.shapes()), metadata=own)]).spec == spec
    assert "8 latent channels" in refusal(plain(spec.shapes()))
    for bad in (
        "[]",
        "{}",
        "[" * 9999,
        json.dumps([0] * 8),
        json.dumps([True] * 8),
        "[1e999" + ",1" * 7 + "]",
        "[1,",
    ):
        assert "not usable" in refusal(plain(spec.shapes()), metadata=own | {"latent_std": bad})


def test_loras_are_recognised_without_a_spec(header_of, refusal):
    lora = {f"blocks.{n}.ffn.0.lora_{x}.weight": ("BF16", (4, 4)) for n in range(9) for x in "AB"}
    found = identify([header_of(lora)])
    assert (found.kind, found.spec, found.variant) == ("lora", None, "lora")
    assert found.refs.keys() == lora.keys() and kinds([header_of(lora)]) == ("lora",)
    assert "expected a transformer" in refusal(lora, "dit")


def test_every_style_of_a_clip_encoder_is_the_same_network(header_of, refusal):
    spec = ClipSpec(dim=160, ffn=320, layers=3, tokens=5)
    hf = renamed(spec.shapes(), CLIP)
    hf_entries = plain(hf, "F16", "vision_model.") | {"visual_projection.weight": ("F16", (8, 160))}
    for entries in (hf_entries, plain(hf, "F16"), authors_clip(spec)):
        found = identify([header_of(entries)], "clip")
        assert (found.kind, found.spec, found.variant) == ("clip", spec, "clip")
        assert {name: ref.shape for name, ref in found.refs.items()} == spec.shapes()
        assert kinds([header_of(entries)]) == ("clip",)
        assert "this is a CLIP vision encoder\nexpected a transformer" in refusal(entries, "dit")
    assert identify([header_of(authors_clip(ClipSpec()))]).spec == ClipSpec()


def test_fused_query_key_and_value_are_the_thirds_of_what_is_stored(header_of):
    spec = ClipSpec(dim=160, ffn=320, layers=2, tokens=5)
    header = header_of(authors_clip(spec))
    stored = {tensor.name: tensor for tensor in header.tensors}
    refs = identify([header]).refs
    for parameter in ("weight", "bias"):
        whole = stored[f"visual.transformer.1.attn.to_qkv.{parameter}"]
        parts = [refs[f"blocks.1.attn.{leaf}.{parameter}"].parts[0] for leaf in "qkv"]
        assert [p.offset for p in parts] == [whole.offset + n * whole.nbytes // 3 for n in range(3)]
        assert sum(p.nbytes for p in parts) == whole.nbytes


def test_a_path_is_read_and_identified(tmp_path, pack, open_file):
    small = VaeSpec(base=1, decoder_base=2, res_blocks=1)
    (tmp_path / "v.safetensors").write_bytes(pack(plain(small.shapes()), {"format": "pt"}))
    found = identify_path(tmp_path, open_file, "vae")
    assert found.spec == small and found.files == (tmp_path / "v.safetensors",)
    assert found.metadata == {"format": "pt"}


def test_a_14b_file_is_identified_in_little_work(header_of):
    header = header_of(plain(T2V.shapes()))
    assert lines_run(lambda: identify([header]))[1] < LINES
