"""LoRA files of every key style, matched to a transformer; and those that must not be applied."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from lowvram.errors import FileError
from lowvram.quant.lora import is_lora, match_lora
from lowvram.quant.names import DIT
from lowvram.quant.refs import Part
from lowvram.quant.spec import DitSpec

SPEC = DitSpec(256, 768, 2, 16, 16, text_dim=64)
LEAVES = [f"{a}.{x}" for a in ("self_attn", "cross_attn") for x in "qkvo"] + ["ffn.0", "ffn.2"]
MODULES = [f"blocks.{n}.{leaf}" for n in range(2) for leaf in LEAVES]
RANK = 4


def pairs(
    modules=MODULES, down=".lora_A.weight", up=".lora_B.weight", alpha=False, spec=SPEC, named=str, rank=RANK
):
    """The tensors of a LoRA of these native modules, spelled by `named`."""
    entries = {}
    for module in modules:
        out, inner = spec.shapes()[f"{module}.weight"]
        entries[named(module) + down] = ("BF16", (rank, inner))
        entries[named(module) + up] = ("BF16", (out, rank))
        if alpha:
            entries[named(module) + ".alpha"] = ("F32", ())
    return entries


def diffusers(module):
    return DIT.from_native(f"{module}.weight").removesuffix(".weight")


def kohya(module):
    return "lora_unet_" + module.replace(".", "_")


STYLES = {
    "peft": pairs(),
    "native prefix": pairs(named="diffusion_model.{}".format),
    "comfy": pairs(
        down=".lora_down.weight", up=".lora_up.weight", alpha=True, named="diffusion_model.{}".format
    ),
    "diffusers": pairs(named=lambda m: f"transformer.{diffusers(m)}"),
    "low expert": pairs(named=lambda m: f"transformer_2.{diffusers(m)}"),
    "peft model": pairs(
        down=".lora_A.default.weight", up=".lora_B.default.weight", named="base_model.model.{}".format
    ),
    "nested prefixes": pairs(named="base_model.model.diffusion_model.{}".format),
    "musubi": pairs(down=".lora_down.weight", up=".lora_up.weight", alpha=True, named=kohya),
    "flat diffusers": pairs(
        down=".lora_down.weight", up=".lora_up.weight", named=lambda m: kohya(diffusers(m))
    ),
    "diffsynth": pairs(named="pipe.dit.{}".format),
    "bare": pairs(down=".lora_A", up=".lora_B"),
    "old diffusers": pairs(down=".lora.down.weight", up=".lora.up.weight"),
    "linear layer": pairs(down=".lora_linear_layer.down.weight", up=".lora_linear_layer.up.weight"),
}


@pytest.fixture
def match(header_of):
    def run(entries, spec=SPEC, partial=False, metadata=None):
        return match_lora([header_of(entries, "l.safetensors", metadata)], spec, partial)

    return run


@pytest.fixture
def refusal(match):
    def run(entries, **more) -> str:
        with pytest.raises(FileError) as caught:
            match(entries, **more)
        assert caught.value.where == "l.safetensors" and caught.value.advice
        return str(caught.value)

    return run


@pytest.mark.parametrize("style", STYLES)
def test_every_key_style_matches_every_module(match, style):
    found = match(STYLES[style])
    assert {pair.target for pair in found.pairs} == {f"{module}.weight" for module in MODULES}
    assert (found.matched, found.total, found.unused, found.skipped) == (20, 20, (), ())
    assert found.ranks == (RANK,)
    assert is_lora(STYLES[style])
    for pair in found.pairs:
        out, inner = SPEC.shapes()[pair.target]
        assert {factor.role: factor.shape for factor in pair.factors} == {
            "up": (out, RANK),
            "down": (RANK, inner),
        }
        assert isinstance(pair.alpha, Part) == any(".alpha" in name for name in STYLES[style])


def test_factors_point_at_the_right_bytes(header_of):
    header = header_of(pairs(named=kohya, down=".lora_down.weight", up=".lora_up.weight", alpha=True))
    stored = {tensor.name: tensor for tensor in header.tensors}
    for pair in match_lora([header], SPEC).pairs:
        base = kohya(pair.target.removesuffix(".weight"))
        for part, suffix in (
            (pair.factors[0], "lora_up.weight"),
            (pair.factors[1], "lora_down.weight"),
            (pair.alpha, "alpha"),
        ):
            tensor = stored[f"{base}.{suffix}"]
            assert (part.file, part.offset, part.nbytes) == (header.path, tensor.offset, tensor.nbytes)


def test_differences_of_weights_biases_and_modulations_are_found(match):
    entries = pairs(named="diffusion_model.{}".format, down=".lora_down.weight", up=".lora_up.weight")
    entries["diffusion_model.blocks.0.ffn.0.diff_b"] = ("BF16", (768,))
    entries["diffusion_model.blocks.0.norm3.diff"] = ("BF16", (256,))
    entries["diffusion_model.blocks.0.norm3.diff_b"] = ("BF16", (256,))
    entries["diffusion_model.blocks.1.diff_m"] = ("BF16", (1, 6, 256))
    entries["diffusion_model.head.diff_m"] = ("BF16", (1, 2, 256))
    entries["diffusion_model.head.head.diff"] = ("BF16", (64, 256))
    entries["diffusion_model.patch_embedding.diff"] = ("BF16", (256, 16, 1, 2, 2))
    found = match(entries)
    assert {delta.target for delta in found.deltas} == {
        "blocks.0.ffn.0.bias", "blocks.0.norm3.weight", "blocks.0.norm3.bias", "blocks.1.modulation",
        "head.modulation", "head.head.weight", "patch_embedding.weight",
    }  # fmt: skip
    assert found.matched == found.total == 27 and not found.unused


def test_a_bias_of_the_up_factor_is_scaled_with_its_pair(match):
    bias = {"blocks.0.ffn.0.lora_B.bias": ("BF16", (768,)), "blocks.0.norm3.diff_b": ("BF16", (256,))}
    found = match(pairs() | bias)
    assert [(delta.target, delta.pair) for delta in found.deltas] == [
        ("blocks.0.ffn.0.bias", "blocks.0.ffn.0.weight"),
        ("blocks.0.norm3.bias", None),
    ]


def test_a_convolution_has_factors_of_its_own_shape(match):
    entries = pairs() | {
        "patch_embedding.lora_A.weight": ("F32", (RANK, 16, 1, 2, 2)),
        "patch_embedding.lora_B.weight": ("F32", (256, RANK, 1, 1, 1)),
    }
    assert "patch_embedding.weight" in {pair.target for pair in match(entries).pairs}


def test_the_image_branch_of_a_21_lora_is_skipped_without_harm(match):
    i2v = replace(SPEC, in_channels=36, image_tokens=257)
    extra = [f"blocks.{n}.cross_attn.{leaf}" for n in range(2) for leaf in ("k_img", "v_img")]
    entries = pairs([*MODULES, *extra, "img_emb.proj.1"], spec=i2v, named="diffusion_model.{}".format)
    entries["diffusion_model.blocks.0.cross_attn.norm_k_img.diff"] = ("F32", (256,))
    found = match(entries)
    assert (found.matched, found.total, found.unused, len(found.skipped)) == (20, 20, (), 11)
    whole = match(entries, spec=i2v)
    assert (whole.matched, whole.total, whole.skipped) == (26, 26, ())


def test_a_lora_of_another_size_is_refused_with_the_sizes(refusal):
    other = replace(SPEC, dim=128, ffn=256)
    message = refusal(pairs(spec=other))
    assert "0 of 20" in message and "[256, 256] here, but [128, 4] x [4, 128]" in message
    assert refusal(pairs(spec=other), partial=True)


def test_a_lora_that_fits_in_part_is_refused_unless_that_is_allowed(match, refusal):
    entries = pairs() | pairs([f"blocks.7.{x}" for x in LEAVES], spec=replace(SPEC, layers=8))
    message = refusal(entries)
    assert "20 of 30" in message and "blocks.7.self_attn.q" in message and "95%" in message
    found = match(entries, partial=True)
    assert (found.matched, found.total, len(found.unused)) == (20, 30, 20)


def test_up_to_a_twentieth_may_be_unused(match, refusal):
    stray = {"other.lora_A.weight": ("F32", (4, 8)), "other.lora_B.weight": ("F32", (8, 4))}
    found = match(pairs() | stray)
    assert (found.matched, found.total, len(found.unused)) == (20, 21, 2)
    assert "20 of 22" in refusal(pairs() | stray | {"odd.weight": ("F32", (3,))})


def test_a_lone_alpha_is_reported_but_does_not_count(match):
    found = match(pairs() | {"nothing.alpha": ("F32", ())})
    assert (found.total, found.unused) == (20, ("nothing.alpha",))


@pytest.mark.parametrize("half", ["lora_A", "lora_B"])
def test_a_missing_factor_is_refused(refusal, half):
    entries = pairs()
    del entries[f"blocks.0.ffn.0.{half}.weight"]
    assert ("down" if half == "lora_A" else "up") in refusal(entries)


@pytest.mark.parametrize(
    "change",
    [
        {"blocks.0.ffn.0.lora_A.weight": ("BF16", (5, 256))},
        {"blocks.0.ffn.0.lora_A.weight": ("BF16", (4,))},
        {"blocks.0.ffn.0.lora_A.weight": ("BF16", (0, 256))},
        {"blocks.0.ffn.0.lora_A.weight": ("U8", (4, 256))},
        {"blocks.0.ffn.0.alpha": ("F32", (2,))},
        {"blocks.0.ffn.0.alpha": ("BOOL", ())},
        {"blocks.0.ffn.0.diff_b": ("U8", (768,))},
    ],
)
def test_damaged_factors_are_refused(refusal, change):
    assert "0.ffn.0" in refusal(pairs() | change)


@pytest.mark.parametrize(
    ("name", "shape"),
    [("lora_A.weight", (4, 255)), ("lora_B.weight", (700, 4)), ("lora_B.weight", (768, 4, 2))],
)
def test_one_factor_of_the_wrong_shape_makes_the_pair_unused(match, name, shape):
    found = match(pairs() | {f"blocks.0.ffn.0.{name}": ("BF16", shape)})
    assert found.unused == ("blocks.0.ffn.0.lora_A.weight", "blocks.0.ffn.0.lora_B.weight")
    assert (found.matched, found.total) == (19, 20)


@pytest.mark.parametrize(("name", "shape"), [("diff_b", (700,)), ("diff", (256, 768))])
def test_a_difference_of_the_wrong_shape_is_unused(match, name, shape):
    found = match(pairs() | {f"blocks.0.ffn.0.{name}": ("F32", shape)})
    assert found.unused == (f"blocks.0.ffn.0.{name}",) and found.deltas == ()


WHOLE_LOKR = {"lokr_w1": (16, 16), "lokr_w2": (48, 16), "alpha": ()}
LOKR = {"lokr_w1": (16, 16), "lokr_w2_a": (48, RANK), "lokr_w2_b": (RANK, 16), "alpha": ()}
SPLIT_LOKR = {"lokr_w1_a": (8, 2), "lokr_w1_b": (2, 4), "lokr_w2_a": (96, RANK), "lokr_w2_b": (RANK, 64)}
LOHA = {
    "hada_w1_a": (768, RANK),
    "hada_w1_b": (RANK, 256),
    "hada_w2_a": (768, RANK),
    "hada_w2_b": (RANK, 256),
}


def lycoris(factors, module="lycoris_blocks_0_ffn_net_0_proj"):
    return {f"{module}.{role}": ("F16", shape) for role, shape in factors.items()}


@pytest.mark.parametrize(
    ("factors", "ranks"), [(WHOLE_LOKR, ()), (LOKR, (RANK,)), (SPLIT_LOKR, (RANK,)), (LOHA, (RANK,))]
)
@pytest.mark.parametrize(
    "module",
    ["lycoris_blocks_0_ffn_net_0_proj", "lora_unet_blocks_0_ffn_0", "diffusion_model.blocks.0.ffn.0"],
)
def test_the_factors_of_lycoris_are_found(match, factors, ranks, module):
    """As SimpleTuner (with the names of diffusers), musubi-tuner and ai-toolkit write them."""
    found = match(lycoris(factors, module))
    (pair,) = found.pairs
    assert pair.target == "blocks.0.ffn.0.weight" and found.ranks == ranks and not found.unused
    assert {f.role: f.shape for f in pair.factors} == {r: s for r, s in factors.items() if r != "alpha"}
    # The alpha of whole matrices means nothing.
    assert (pair.alpha is not None) == ("alpha" in factors and ranks != ())
    assert is_lora(name for name in lycoris(factors, module) if "alpha" not in name)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (LOKR | {"lokr_w2_b": None}, "the lokr_w2_b factor"),
        (LOKR | {"lokr_w2_a": (48, 5)}, "rank 4 and 5"),
        (LOKR | {"lokr_w1": (16,)}, "lokr_w1"),
        (LOKR | {"lokr_w1": (16, 8)}, "[768, 256] here, but [16, 8] x [48, 4] x [4, 16]"),
        (LOKR | {"lora_up.weight": (768, 4), "lora_down.weight": (4, 256)}, "two kinds"),
        (LOHA | {"hada_w2_a": None}, "the hada_w2_a factor"),
        (LOHA | {"hada_w2_a": (700, 4)}, "different sizes"),
        (LOHA | {"hada_t1": (4, 4, 3, 3)}, "in the middle"),
        (LOKR | {"lokr_t2": (4, 4, 3, 3)}, "in the middle"),
    ],
)
def test_factors_of_lycoris_that_do_not_fit_are_refused(refusal, change, says):
    assert says in refusal(lycoris({role: shape for role, shape in change.items() if shape is not None}))


@pytest.mark.parametrize(
    "suffix", [".dora_scale", ".lora_magnitude_vector", ".lora_magnitude_vector.default.weight"]
)
@pytest.mark.parametrize(
    ("module", "shape", "form"),
    [
        ("blocks.0.ffn.0", (768, 1), (768, 1)),
        ("blocks.0.ffn.0", (768,), (768, 1)),
        ("blocks.0.ffn.0", (1, 256), (1, 256)),
        ("blocks.0.self_attn.q", (256, 1), (256, 1)),
        ("blocks.0.self_attn.q", (1, 256), (1, 256)),
    ],
)
def test_the_magnitudes_of_a_dora_belong_to_rows_or_columns(match, suffix, module, shape, form):
    found = match(pairs() | {f"{module}{suffix}": ("F32", shape)})
    (dora,) = [pair for pair in found.pairs if pair.magnitude is not None]
    assert dora.target == f"{module}.weight" and dora.magnitude.shape == form
    assert dora.of_base == (suffix == ".dora_scale") and found.unused == ()


def test_magnitudes_that_fit_neither_are_refused_and_lonely_ones_are_unused(match, refusal):
    assert "dora_scale" in refusal(pairs() | {"blocks.0.ffn.0.dora_scale": ("F32", (700, 1))})
    assert match(pairs() | {"blocks.0.norm3.dora_scale": ("F32", (256,))}).unused == (
        "blocks.0.norm3.dora_scale",
    )


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16", "F64", "I64", "I32", "I16", "I8", "U8", "F8_E4M3"])
def test_alpha_may_be_of_any_dtype(match, dtype):
    found = match(pairs() | {"blocks.0.ffn.0.alpha": (dtype, ())})
    assert [pair.target for pair in found.pairs if isinstance(pair.alpha, Part)] == ["blocks.0.ffn.0.weight"]


def test_a_file_for_both_experts_is_refused(refusal):
    both = pairs(named=lambda m: f"transformer.{diffusers(m)}") | pairs(
        named=lambda m: f"transformer_2.{diffusers(m)}"
    )
    assert "both experts" in refusal(both)


def test_a_model_is_no_lora(refusal):
    assert not is_lora(SPEC.shapes())
    assert "0 of" in refusal({name: ("BF16", shape) for name, shape in SPEC.shapes().items()})


def peft(**config):
    return {
        "lora_adapter_metadata": json.dumps({f"transformer.{key}": value for key, value in config.items()})
    }


def test_alpha_comes_from_the_header_when_no_tensor_gives_it(match):
    assert {pair.alpha for pair in match(pairs()).pairs} == {None}
    assert {pair.alpha for pair in match(pairs(), metadata=peft(r=4, lora_alpha=8)).pairs} == {8.0}
    stable = peft(r=4, lora_alpha=8, use_rslora=True)
    assert {pair.alpha for pair in match(pairs(), metadata=stable).pairs} == {8.0 * RANK**0.5}
    own = match(pairs(alpha=True), metadata=peft(r=4, lora_alpha=8))
    assert all(isinstance(pair.alpha, Part) for pair in own.pairs)


def test_modules_may_have_alphas_of_their_own_in_the_header(match):
    """peft takes a name of the pattern for the end of a module's."""
    pattern = {"ffn.0": 2, "blocks.1.ffn.0": 3.5, "ffn.2.other": 9, "fn.2": 9}
    found = match(pairs(named="transformer.{}".format), metadata=peft(lora_alpha=8, alpha_pattern=pattern))
    alphas = {pair.target: pair.alpha for pair in found.pairs}
    assert alphas.pop("blocks.0.ffn.0.weight") == 2 and alphas.pop("blocks.1.ffn.0.weight") == 3.5
    assert set(alphas.values()) == {8.0}
    alone = match(pairs(), metadata=peft(alpha_pattern=pattern, use_rslora=True))
    assert {pair.alpha for pair in alone.pairs} == {None, 2 * RANK**0.5, 3.5 * RANK**0.5}


@pytest.mark.parametrize(
    "metadata",
    [peft(lora_alpha=-1), peft(lora_alpha=True), peft(lora_alpha="8"), peft(lora_alpha=float("nan")),
     peft(lora_alpha=8, alpha_pattern={"blocks.0": 0}), peft(lora_alpha=8, alpha_pattern={"(a+)+$": 2}),
     peft(lora_alpha=8, alpha_pattern=[1]), {"lora_adapter_metadata": "[" * 50_000},
     {"lora_adapter_metadata": "[]"}, {"lora_adapter_metadata": " " * 100_000 + "{}"}],
)  # fmt: skip
def test_a_header_alpha_that_cannot_be_meant_is_refused(refusal, metadata):
    assert "header" in refusal(pairs(), metadata=metadata)
