"""Multiplication in 8 bits through the product: settled with the job, refused where it cannot be, planned, and the same bits
wherever the weights lie."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from strict_device import StrictRuntime

from lowvram import Pipeline, Runtime
from lowvram.errors import UsageError
from lowvram.job import describe
from lowvram.offload.placement import Placement, Where
from lowvram.quant import linear
from lowvram.stages.denoise import State
from lowvram.state import Saved, list_jobs

GB = 10**9
PROMPT = "a red circle moves left on a black background"
SMALL: dict[str, Any] = {"steps": 3, "seed": 1, "frames": 1, "width": 48, "height": 48, "shift": 3.0}
WITH_LORAS = SMALL | {"preset": "lightning-4", "steps": None, "shift": None}
NANO = Path(__file__).parents[2] / "lowvram" / "assets" / "nano"


@pytest.fixture(scope="module")
def pipe(int8_nano: dict[str, str]) -> Pipeline:
    return Runtime("2GB", "4GB", "cpu", cache=False).load("nano", **int8_nano)


def test_int8_activations_change_a_little_and_auto_nothing(pipe: Pipeline) -> None:
    exact, auto, int8 = (pipe(PROMPT, matmul=how, **SMALL).latent for how in ("exact", "auto", "int8"))
    assert torch.equal(auto, exact) and 0 < (int8 - exact).norm() < 0.1 * exact.norm()


def test_loras_are_multiplied_beside_the_weights(pipe: Pipeline) -> None:
    exact, int8 = (pipe(PROMPT, matmul=how, **WITH_LORAS).latent for how in ("exact", "int8"))
    assert 0 < (int8 - exact).norm() < 0.1 * exact.norm()


@pytest.mark.parametrize("lean", [{}, {"group": 1, "together": False}, {"unpacked": False}], ids=str)
def test_placement_never_changes_bits(pipe: Pipeline, lean: dict[str, Any]) -> None:
    job = pipe.job(PROMPT, matmul="int8", **SMALL)
    plan = pipe.plan_job(job)
    resident = pipe.run(job, plan=plan).latent
    kinds: tuple[Where, ...] = ("resident", "ram", "disk")
    for where in (lambda n: "disk", lambda n: kinds[n * 2 % 3]):
        placed = {block: where(n) for n, block in enumerate(plan.denoise.where)}
        other = replace(plan, denoise=Placement(placed, slots=1, ring=2), lean=replace(plan.lean, **lean))
        latent = pipe.run(job, plan=other).latent
        if "group" in lean:  # attention of fewer heads, and the norm's factor on its own, round otherwise
            assert (latent - resident).norm() < 0.03 * resident.norm()
        else:
            assert torch.equal(latent, resident)


def test_fp8_weights_with_loras_wherever_they_lie() -> None:
    fp8 = Runtime("2GB", "4GB", "cpu", cache=False).load("nano")
    exact, job = fp8(PROMPT, matmul="exact", **WITH_LORAS).latent, fp8.job(PROMPT, matmul="fp8", **WITH_LORAS)
    plan = fp8.plan_job(job)
    latent = fp8.run(job, plan=plan).latent
    assert 0 < (latent - exact).norm() < 0.2 * exact.norm()
    placed: dict[Any, Where] = dict.fromkeys(plan.denoise.where, "disk")
    streamed = replace(plan, denoise=Placement(placed, slots=1, ring=2))
    assert torch.equal(fp8.run(job, plan=streamed).latent, latent)
    strict = StrictRuntime(GB, 2 * GB, "cpu").load("nano")
    assert torch.equal(strict.run(job).latent, latent)
    with pytest.raises(UsageError, match="transformer are fp8_scaled"):
        fp8.job(PROMPT, matmul="int8", **SMALL)


@pytest.mark.parametrize("settings", [SMALL | {"steps": 1}, WITH_LORAS], ids=["plain", "loras"])
def test_on_a_strict_device(pipe: Pipeline, int8_nano: dict[str, str], settings: dict[str, Any]) -> None:
    job = pipe.job(PROMPT, matmul="int8", **settings)
    plain, strict = (p.run(job) for p in (pipe, StrictRuntime(GB, 2 * GB, "cpu").load("nano", **int8_nano)))
    assert torch.equal(strict.latent, plain.latent)


def test_the_choice_is_in_the_plan_the_saved_job_and_the_video(
    cli: Callable[..., Any], jobs: Path, tmp_path: Path, int8_nano: dict[str, str]
) -> None:
    flags = ("--high", int8_nano["high"], "--low", int8_nano["low"], "--steps", 2, "--frames", 1, "--size", "32x32",
             "--vram", "2GB", "--matmul", "int8")  # fmt: skip
    planned = cli("plan", PROMPT, *flags, "--json")
    assert planned.code == 0, planned.err
    assert planned.objects[0]["choices"]["matmul"].startswith("int8 (int8 weights as they are stored")
    made = cli("generate", PROMPT, *flags, "-o", tmp_path / "a.mp4")
    assert made.code == 0, made.err
    saved: Saved = list_jobs(jobs)[-1].load()
    assert saved.job.matmul.mode == "int8"
    assert '"matmul":"int8"' in cli("inspect", tmp_path / "a.mp4", "--json").out


def test_weights_that_are_not_int8_are_refused(cli: Callable[..., Any], int8_nano: dict[str, str]) -> None:
    mixed = {"high": int8_nano["high"], "low": str(NANO / "low_noise_model.safetensors")}
    with pytest.raises(UsageError, match="low-noise transformer are ") as refused:
        Runtime("2GB", "4GB", "cpu", cache=False).load("nano", **mixed).job(PROMPT, matmul="int8", **SMALL)
    text = str(refused.value)
    assert "--matmul int8" in text and "quantize" in text and len(text.splitlines()) <= 3
    assert cli("plan", "--matmul", "int8", "--model", "nano").code == 2
    assert cli("plan", "--matmul", "fast").code == 2


def test_a_plan_for_a_card_prices_it(cli: Callable[..., Any]) -> None:
    flags = ("--model", "wan2.2-t2v-a14b", "--weights", "int8_convrot", "--frames", 17, "--size", "832x480",
             "--vram", "24GB", "--machine", "rtx4090", "--json")  # fmt: skip
    seen = {}
    for how in ("auto", "exact", "int8"):
        (plan,) = cli("plan", *flags, "--matmul", how).objects
        (seen[how],) = (s for s in plan["stages"] if s["name"] == "denoise")
        seen[how]["why"] = plan["choices"]["matmul"]
    assert "nobody has timed --matmul int8 on sm_89 yet" in seen["auto"]["why"]
    assert seen["int8"]["seconds"] < seen["exact"]["seconds"] == seen["auto"]["seconds"]
    assert "unpacked block" in seen["exact"]["claims"] and "unpacked block" not in seen["int8"]["claims"]
    assert seen["int8"]["claims"]["scratch"] <= seen["exact"]["claims"]["scratch"]


def test_fp8_on_a_card_that_has_it_and_on_one_that_has_not(cli: Callable[..., Any]) -> None:
    flags = ("--model", "wan2.2-t2v-a14b", "--weights", "fp8", "--frames", 17, "--size", "832x480", "--vram", "24GB",
             "--json")  # fmt: skip
    found = {}
    for card in ("rtx4090", "rtx3090"):
        for how in ("exact", "fp8"):
            (plan,) = cli("plan", *flags, "--machine", card, "--matmul", how).objects
            (found[card, how],) = (s for s in plan["stages"] if s["name"] == "denoise")
            found[card, how]["why"] = plan["choices"].get("matmul", "")
    assert found["rtx4090", "fp8"]["seconds"] < found["rtx4090", "exact"]["seconds"]
    assert "unpacked block" not in found["rtx4090", "fp8"]["claims"]
    assert found["rtx4090", "fp8"]["claims"]["scratch"] <= found["rtx4090", "exact"]["claims"]["scratch"]
    assert "there is no fp8 multiplication for sm_86" in found["rtx3090", "fp8"]["why"]
    assert found["rtx3090", "fp8"]["seconds"] == found["rtx3090", "exact"]["seconds"]


def test_a_step_that_ends_in_nan_is_done_again_exactly(
    pipe: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[State] = []
    whole = linear.Multiplied.linear

    def broken(self: linear.Multiplied, x: Any, bias: Any) -> Any:
        return whole(self, x, bias) * (torch.nan if len(steps) == 1 else 1)

    monkeypatch.setattr(linear.Multiplied, "linear", broken)
    job = pipe.job(PROMPT, matmul="int8", **SMALL)
    video = pipe.run(job, save=steps.append)
    assert [state.step for state in steps] == [1, 2, 3] and torch.isfinite(video.latent).all()
    assert "step 2 of 3" in video.notes[-1] and "exact multiplication" in video.notes[-1]
    assert describe(job, "0")["matmul"] == "int8"
