"""Few-step presets against their published numbers, and every set of files and settings that contradicts itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lowvram.errors import UsageError
from lowvram.fewstep import check, with_preset
from lowvram.job import Job, LoraChoice, make_job
from lowvram.sampling.presets import few_step, load_few_step, model_preset
from lowvram.sampling.schedules import few_step_schedule

GRID_4 = (1000.0, 937.5, 833.333, 625.0)
TABLE: dict[str, tuple[tuple[float, ...], str, str, tuple[int, ...]]] = {
    # preset: times (wan-models 4), step rule, base, expert of each step
    "lightning-4": (GRID_4, "euler", "wan2.2-t2v-a14b", (0, 0, 1, 1)),
    "lightning-6": ((1000, 961.54, 909.09, 833.33, 714.29, 500), "euler", "wan2.2-i2v-a14b", (0, 0, 0, 1, 1, 1)),
    "lightning-8": ((1000, 972.22, 937.5, 892.86, 833.33, 750, 625, 416.67), "euler", "wan2.2-t2v-a14b",
                    (0, 0, 0, 0, 1, 1, 1, 1)),
    "lightx2v-2.2-4": (GRID_4, "euler", "wan2.2-i2v-a14b", (0, 0, 1, 1)),
    "lightx2v-2.1-4": (GRID_4, "euler", "wan2.1-t2v-14b", (0, 0, 0, 0)),
    "lightx2v-flf2v-4": ((1000, 979.6, 941.2, 842.1), "euler", "wan2.2-i2v-a14b", (0, 0, 1, 1)),
    "nvfp4-sparse-t2v-4": (GRID_4, "euler", "wan2.2-t2v-a14b", (0, 0, 1, 1)),
    "nvfp4-sparse-i2v-4": ((1000, 954.5, 875, 700), "euler", "wan2.2-i2v-a14b", (0, 0, 1, 1)),
    "fastwan-5b-3": ((1000, 757, 522), "renoise", "wan2.2-ti2v-5b", (0, 0, 0)),
    "fastwan-2.1-3": ((1000, 757, 522), "renoise", "wan2.1-t2v-1.3b", (0, 0, 0)),
    "rcm-t2v-4": ((987.65, 933.78, 852.90, 608.98), "renoise", "wan2.1-t2v-14b", (0, 0, 0, 0)),
    "rcm-i2v-4": ((995.02, 933.78, 852.90, 608.98), "euler", "wan2.2-i2v-a14b", (0, 0, 1, 1)),
    "causvid-9": ((999, 934, 862, 756, 603, 410, 250, 140, 74), "euler", "wan2.1-t2v-14b", (0,) * 9),
    "causvid-1.3b-4": ((1000, 750, 500, 250), "renoise", "wan2.1-t2v-1.3b", (0,) * 4),
    "accvid-10": ((1000, 977.9, 951.5, 919.5, 879.7, 829.0, 762.3, 670.5, 536.1, 320.5), "euler", "wan2.1-t2v-14b",
                  (0,) * 10),
}  # fmt: skip
SCALED_NOISE = {"rcm-t2v-4", "rcm-i2v-4"}


def test_every_preset_is_in_the_table() -> None:
    assert TABLE.keys() == load_few_step().keys()


@pytest.mark.parametrize("name", TABLE)
def test_a_preset_is_what_was_published(name: str) -> None:
    times, solver, base, experts = TABLE[name]
    preset, model = few_step(name), model_preset(base)
    schedule = few_step_schedule(preset, experts=model.experts, boundary=model.boundary)
    assert base in preset.bases
    assert schedule.timesteps == pytest.approx(times, abs=0.06)
    assert [1000 * s for s in schedule.sigmas[:-1]] == pytest.approx(times, abs=0.5)
    assert (schedule.solver, schedule.experts) == (solver, experts)
    assert set(schedule.guidance) == {1.0}
    assert schedule.noise_scale == (schedule.sigmas[0] if name in SCALED_NOISE else 1.0)


T2V = model_preset("wan2.2-t2v-a14b")
BASE = {
    "high": "/m/wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors",
    "low": "/m/wan2.2_t2v_low_noise_14B_fp8_scaled.safetensors",
}
HIGH = LoraChoice(path="/l/wan2.2_t2v_lightx2v_4steps_lora_v1.1_high_noise.safetensors", expert="high")
LOW = LoraChoice(path="/l/wan2.2_t2v_lightx2v_4steps_lora_v1.1_low_noise.safetensors", expert="low")
MINE = LoraChoice(path="/l/mine.safetensors")


def job(files: dict[str, str] = BASE, model: str = "wan2.2-t2v-a14b", **settings: Any) -> Job:
    return make_job(model_preset(model), model=model, files=files, **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"loras": (MINE,), "steps": 30},
        {"preset": "lightning-4", "loras": (HIGH, LOW)},
        {"preset": "lightning-8", "loras": (HIGH, LOW, MINE)},
        {"preset": "lightning-4", "loras": (MINE,)},
        {"loras": (LOW,), "steps": 8, "solver": "euler", "shift": 5.0, "guidance": (3.5, 1.0)},
        {"loras": (HIGH, LOW), "steps": 6, "solver": "euler", "guidance": (1.0, 1.0)},
    ],
)
def test_sets_that_go_together_pass(settings: dict[str, Any]) -> None:
    check(job(**settings), T2V)


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"loras": (HIGH, LOW), "steps": 20, "guidance": (1.0, 1.0)}, "20 steps with a file made for 4"),
        ({"loras": (HIGH, LOW), "steps": 8, "guidance": (4.0, 3.0)}, "guidance 4 on a transformer"),
        (
            {"preset": "lightning-4", "loras": (HIGH, LOW), "guidance": (1.0, 3.0)},
            "guidance 3 on a transformer",
        ),
        ({"preset": "lightning-4", "loras": (MINE,), "guidance": (4.0, 1.0)}, "guidance 4 on a transformer"),
        ({"preset": "lightning-4"}, "no LoRA on the high and the low-noise expert"),
        ({"preset": "lightning-4", "loras": (HIGH,)}, "no LoRA on the low-noise expert"),
        ({"preset": "fastwan-5b-3"}, "made for wan2.2-ti2v-5b, not for wan2.2-t2v-a14b"),
        ({"preset": "nvfp4-sparse-t2v-4"}, "dynamic block-sparse attention"),
        (
            {
                "loras": (
                    HIGH,
                    LoraChoice(path="/l/Wan21_AccVid_T2V_14B_lora_rank32_fp16.safetensors", expert="low"),
                ),
                "steps": 8,
                "guidance": (1.0, 1.0),
            },
            "made for accvid-10 and for lightning-4",
        ),
        (
            {
                "loras": (LoraChoice(path="/l/Wan2_2_5B_FastWanFullAttn_lora_rank_128_bf16.safetensors"),),
                "steps": 4,
                "guidance": (1.0, 1.0),
            },
            "made for wan2.2-ti2v-5b, not for wan2.2-t2v-a14b",
        ),
        (
            {
                "loras": tuple(
                    LoraChoice(path=lora.path.replace("t2v", "i2v"), expert=lora.expert)
                    for lora in (HIGH, LOW)
                )
            },
            "made for image to video, not for text to video",
        ),
        (
            {
                "files": {
                    "high": "/m/wan2.2_t2v_A14b_high_noise_lightx2v_4step.safetensors",
                    "low": BASE["low"],
                },
                "steps": 40,
            },
            "40 steps with a file made for 4",
        ),
    ],
)
def test_sets_that_contradict_themselves_are_refused_with_the_reason(
    settings: dict[str, Any], found: str
) -> None:
    with pytest.raises(UsageError) as caught:
        check(job(**settings), T2V)
    assert found in caught.value.found, caught.value
    assert caught.value.advice.endswith("or go on with --force") and str(caught.value).count("\n") <= 2


def test_a_lora_given_to_the_other_expert_is_told_so_and_not_what_follows_from_it() -> None:
    swapped = LoraChoice(path=HIGH.path, expert="low")
    with pytest.raises(UsageError, match="its name says that it is for the high-noise expert") as caught:
        check(job(preset="lightning-4", loras=(swapped,)), T2V)
    assert caught.value.where == HIGH.path and ":high" in caught.value.advice


def test_a_preset_that_a_file_brought_names_the_file() -> None:
    five = model_preset("wan2.2-ti2v-5b")
    settings = with_preset({"loras": (LoraChoice(path=HIGH.path),)}, {})
    with pytest.raises(UsageError, match=r"made for wan2\.2-t2v-a14b") as caught:
        check(job({"single": "/m/wan2.2_ti2v_5B_fp16.safetensors"}, "wan2.2-ti2v-5b", **settings), five)
    assert caught.value.where.endswith("_high_noise.safetensors was made for")


def test_files_that_are_known_bring_their_preset_unless_something_was_set_by_hand() -> None:
    assert with_preset({"loras": (HIGH, LOW)}, BASE)["preset"] == "lightning-4"
    assert with_preset({"loras": (MINE,)}, BASE).get("preset") is None
    assert with_preset({"loras": (HIGH, LOW), "steps": 6}, BASE).get("preset") is None
    distilled = {"single": "/m/wan2.1_t2v_14b_scaled_fp8_e4m3_lightx2v_4step.safetensors"}
    assert with_preset({}, distilled)["preset"] == "lightx2v-2.1-4"


PUBLISHED: dict[str, tuple[str, tuple[str, ...], str]] = {
    # what is run in few steps: base, LoRAs as they are published, preset
    "LightX2V 2.1-I2V on Animate": (
        "wan2.2-animate-14b",
        ("lightx2v_I2V_14B_480p_cfg_step_distill_rank64_bf16.safetensors",),
        "lightx2v-2.1-4",
    ),
    "Lightning pair on I2V": (
        "wan2.2-i2v-a14b",
        tuple(f"wan2.2_i2v_lightx2v_4steps_lora_v1_{e}_noise.safetensors" for e in ("high", "low")),
        "lightning-4",
    ),
    "FastWan on 5B": (
        "wan2.2-ti2v-5b",
        ("Wan2_2_5B_FastWanFullAttn_lora_rank_128_bf16.safetensors",),
        "fastwan-5b-3",
    ),
}


@pytest.mark.parametrize("what", PUBLISHED)
def test_published_loras_bring_the_schedule_they_were_made_for_and_no_other_is_taken(what: str) -> None:
    base, names, preset = PUBLISHED[what]
    spec = model_preset(base)
    experts = spec.expert_names() if len(names) == 2 else ("both",)
    loras = tuple(LoraChoice(path=f"/l/{n}", expert=e) for n, e in zip(names, experts, strict=True))
    files = {expert: f"/m/{base}-{expert}.safetensors" for expert in spec.expert_names()}

    settings = with_preset({"loras": loras}, files)
    assert settings["preset"] == preset
    made = job(files, base, **settings)
    check(made, spec)
    assert made.schedule == few_step_schedule(few_step(preset), experts=spec.experts, boundary=spec.boundary)
    assert set(made.schedule.guidance) == {1.0} and spec.steps > 2 * len(made.schedule)
    with pytest.raises(UsageError, match=f"{spec.steps} steps with a file made for {len(made.schedule)}"):
        check(job(files, base, loras=loras, steps=spec.steps, guidance=(1.0, 1.0)), spec)
    with pytest.raises(UsageError, match=f"made for .*not for {base}|was made for {preset}"):
        check(job(files, base, loras=loras, preset="accvid-10"), spec)


def test_of_models_that_nobody_published_only_the_lora_is_asked_for() -> None:
    nano = model_preset("nano")
    settings: dict[str, Any] = {"model": "nano", "files": BASE, "preset": "lightning-4"}
    check(make_job(nano, loras=(MINE,), **settings), nano)
    with pytest.raises(UsageError, match="no LoRA on the high and the low-noise expert"):
        check(make_job(nano, **settings), nano)


NANO_LORAS = Path(__file__).parents[2] / "lowvram" / "assets" / "nano" / "loras"


@pytest.mark.parametrize(
    ("flags", "found"),
    [
        (["--steps", "20", "--guidance", "1"], "20 steps with a file made for 4"),
        (["--steps", "4", "--guidance", "4"], "guidance 4 on a transformer that has it distilled in"),
        (["--preset", "fastwan-5b-3"], "was made for lightning-4"),
    ],
)
def test_the_command_refuses_and_force_goes_on(
    flags: list[str], found: str, cli: Callable[..., Any], tmp_path: Path
) -> None:
    loras = []
    for expert in ("high", "low"):
        path = tmp_path / f"wan2.2_t2v_lightx2v_4steps_lora_v1.1_{expert}_noise.safetensors"
        path.symlink_to(NANO_LORAS / f"lightning-4-{expert}.safetensors")
        loras += ["--lora", str(path)]
    said = cli("plan", *loras, *flags)
    assert said.code == 2 and found in said.err and "--force" in said.err, said.err
    assert len(said.err.splitlines()) <= 3
    forced = cli("plan", *loras, *flags, "--force")
    assert forced.code == 0, forced.err
