"""The preset data: sizes, defaults and few-step rules against published numbers."""

from __future__ import annotations

import math

import pytest

from lowvram.errors import UsageError
from lowvram.quant.spec import LATENT_MEAN_22, numel
from lowvram.sampling.presets import few_step, load_few_step, load_models, model_preset
from lowvram.sampling.schedules import few_step_schedule, make_schedule

DIT_PARAMETERS = {
    "wan2.2-t2v-a14b": 14_288_491_584,
    "wan2.2-i2v-a14b": 14_288_901_184,
    "wan2.2-ti2v-5b": 4_999_787_712,
    "wan2.1-t2v-1.3b": 1_418_996_800,
    "wan2.1-t2v-14b": 14_288_491_584,
    "wan2.1-i2v-14b": 16_394_878_784,
    "wan2.1-flf2v-14b": 16_395_536_704,
    "wan2.2-animate-14b": 17_274_816_884,
}


@pytest.mark.parametrize("name", DIT_PARAMETERS)
def test_transformer_sizes_add_up_to_the_published_parameter_count(name: str) -> None:
    assert sum(numel(s) for s in model_preset(name).dit.shapes().values()) == DIT_PARAMETERS[name]


@pytest.mark.parametrize("name", DIT_PARAMETERS)
def test_the_text_encoder_adds_up_to_the_published_parameter_count(name: str) -> None:
    assert sum(numel(s) for s in model_preset(name).text.shapes().values()) == 5_680_910_336


def test_the_named_models_are_the_documented_ones() -> None:
    assert set(load_models()) == {"nano", "nano-animate", *DIT_PARAMETERS}


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("wan2.2-t2v-a14b", 75_600),
        ("wan2.2-i2v-a14b", 75_600),
        ("wan2.2-ti2v-5b", 27_280),
        ("wan2.1-t2v-1.3b", 32_760),
    ],
)
def test_default_sizes_give_the_published_sequence_length(name: str, tokens: int) -> None:
    model = model_preset(name)
    assert model.tokens(model.width, model.height, model.frames) == tokens


@pytest.mark.parametrize(
    ("name", "defaults"),
    [
        ("wan2.2-t2v-a14b", ("t2v", 2, 0.875, 16, 81, 40, 12.0, (4.0, 3.0))),
        ("wan2.2-i2v-a14b", ("i2v", 2, 0.9, 16, 81, 40, 5.0, (3.5, 3.5))),
        ("wan2.2-ti2v-5b", ("ti2v", 1, 0.0, 24, 121, 50, 5.0, (5.0, 5.0))),
        ("wan2.1-t2v-1.3b", ("t2v", 1, 0.0, 16, 81, 50, 5.0, (5.0, 5.0))),
        ("wan2.1-t2v-14b", ("t2v", 1, 0.0, 16, 81, 50, 5.0, (5.0, 5.0))),
        ("wan2.1-i2v-14b", ("i2v", 1, 0.0, 16, 81, 40, 5.0, (5.0, 5.0))),
        ("wan2.1-flf2v-14b", ("i2v", 1, 0.0, 16, 81, 50, 16.0, (5.0, 5.0))),
        ("nano", ("t2v", 2, 0.875, 8, 9, 20, 3.0, (3.0, 3.0))),
    ],
)
def test_defaults_are_the_authors(name: str, defaults: tuple[object, ...]) -> None:
    m = model_preset(name)
    assert (m.variant, m.experts, m.boundary, m.fps, m.frames, m.steps, m.shift, m.guidance) == defaults


@pytest.mark.parametrize("name", load_models())
def test_every_model_is_consistent_and_can_be_scheduled(name: str) -> None:
    m = model_preset(name)
    assert (m.frames - 1) % 4 == 0
    assert m.width % (2 * m.vae.stride[2]) == 0
    assert m.height % (2 * m.vae.stride[1]) == 0
    assert m.dit.dim % 128 == 0
    assert m.dit.text_dim == m.text.dim
    assert m.dit.out_channels == m.vae.z == len(m.vae.mean) == len(m.vae.std)
    assert m.dit.in_channels == (36 if m.variant in ("i2v", "animate") else m.vae.z)
    schedule = make_schedule(
        solver="unipc",
        steps=m.steps,
        shift=m.shift,
        boundary=m.boundary,
        experts=m.experts,
        guidance=m.guidance,
    )
    assert len(set(schedule.experts)) == m.experts


def test_the_5b_model_uses_the_22_autoencoder_and_its_statistics() -> None:
    vae = model_preset("wan2.2-ti2v-5b").vae
    assert (vae.version, vae.base, vae.decoder_base, vae.z, vae.mean) == ("2.2", 160, 256, 48, LATENT_MEAN_22)


def test_only_21_image_to_video_and_animate_have_clip_tokens() -> None:
    assert {n: m.dit.image_tokens for n, m in load_models().items() if m.dit.image_tokens} == {
        "wan2.1-i2v-14b": 257,
        "wan2.1-flf2v-14b": 514,
        "wan2.2-animate-14b": 257,
        "nano-animate": 257,
    }
    assert all((m.clip is not None) == (m.dit.image_tokens > 0) for m in load_models().values())


def test_negative_prompts_are_the_authors_text() -> None:
    default = model_preset("wan2.2-t2v-a14b").negative
    assert default.startswith("色调艳丽，过曝，静态") and default.endswith("背景人很多，倒着走")
    assert default.count("，") == 27
    assert model_preset("wan2.1-i2v-14b").negative == "镜头晃动，" + default
    assert model_preset("wan2.1-flf2v-14b").negative == "镜头切换，" + default
    assert model_preset("wan2.2-i2v-a14b").negative == default
    assert model_preset("nano").negative == ""


def test_nano_has_the_sizes_the_shipped_model_was_designed_with() -> None:
    m = model_preset("nano")
    assert (m.dit.dim, m.dit.ffn, m.dit.layers, m.dit.in_channels, m.dit.text_dim) == (256, 768, 6, 16, 256)
    assert (m.vae.base, m.vae.decoder_base, m.vae.res_blocks) == (16, 16, 1)
    assert m.text.heads * m.text.head_dim == m.text.dim == 256
    assert m.latent_shape(m.width, m.height, m.frames) == (16, 3, 8, 8)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("wan2.2-t2v", "wan2.2-t2v-a14b"), ("Wan2.2-TI2V-5B", "wan2.2-ti2v-5b"), ("nanoo", "nano")],
)
def test_an_unknown_model_is_answered_with_the_nearest_name(typed: str, meant: str) -> None:
    with pytest.raises(UsageError) as caught:
        model_preset(typed)
    assert f'"{meant}"' in caught.value.advice


def test_a_name_like_nothing_known_lists_the_names_instead() -> None:
    with pytest.raises(UsageError) as caught:
        few_step("qqqq")
    assert caught.value.advice == "choose one of these"
    assert "lightning-4" in caught.value.expected


@pytest.mark.parametrize("name", load_few_step())
def test_every_few_step_preset_is_complete_and_can_be_scheduled(name: str) -> None:
    p = few_step(name)
    assert p.name == name and p.summary and p.source
    assert set(p.bases) <= set(load_models())
    assert (p.shift is None) != (p.sigmas is None)
    assert p.solver in ("euler", "renoise")
    for base in p.bases:
        m = model_preset(base)
        schedule = few_step_schedule(p, experts=m.experts, boundary=m.boundary)
        assert len(schedule) == p.steps
        assert len(set(schedule.experts)) == m.experts
        assert set(schedule.guidance) == {1.0}


def test_rcm_levels_follow_from_their_trigonometric_times() -> None:
    for name, sigma_max in (("rcm-t2v-4", 80.0), ("rcm-i2v-4", 200.0)):
        times = (math.atan(sigma_max), 1.5, 1.4, 1.0)
        expected = [math.sin(t) / (math.sin(t) + math.cos(t)) for t in times]
        assert few_step(name).sigmas == pytest.approx(expected, abs=1e-9)
    assert few_step("rcm-t2v-4").solver == "renoise"
    assert few_step("rcm-i2v-4").solver == "euler"


def test_accvid_levels_are_every_fifth_of_a_grid_warped_twice_at_its_end() -> None:
    end = 5 * 0.001 / (1 + 4 * 0.001)
    u = [1 - (1 - end) * n / 49 for n in range(0, 50, 5)]
    assert few_step("accvid-10").sigmas == pytest.approx([5 * x / (1 + 4 * x) for x in u], abs=1e-7)


def test_fastwan_levels_are_the_nearest_entries_of_the_shift_8_table() -> None:
    p = few_step("fastwan-5b-3")
    table = [8 * n / (1000 + 7 * n) for n in range(1, 1001)]
    assert p.timesteps is not None
    assert p.sigmas == pytest.approx(
        [min(table, key=lambda s: abs(1000 * s - t)) for t in p.timesteps], abs=1e-12
    )


def test_presets_that_need_sparse_attention_say_why() -> None:
    assert {n for n, p in load_few_step().items() if p.attention} == {
        "rcm-t2v-4",
        "rcm-i2v-4",
        "nvfp4-sparse-t2v-4",
        "nvfp4-sparse-i2v-4",
        "fastwan-2.1-3",
        "causvid-1.3b-4",
    }
