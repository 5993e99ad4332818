"""Attention modes through the product: settled with the job, planned, stored, and left for a step that ends in NaN."""

from __future__ import annotations

import gc
import re
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lowvram import NonFiniteError, Runtime
from lowvram.job import Job, describe
from lowvram.models import animate, self_attention
from lowvram.offload.budget import allocated_size
from lowvram.planning.plan import Plan
from lowvram.quant.linear import Params
from lowvram.stages import denoise
from lowvram.stages.denoise import State
from lowvram.state import Saved, list_jobs
from lowvram.triton_kernels.keys import Keys, attend, stored_bytes
from lowvram.triton_kernels.modes import MODES, Choice
from lowvram.triton_kernels.ops import TORCH, Ops

PROMPT = "a red circle moves left on a black background"
SMALL = {"steps": 3, "seed": 1, "frames": 1, "width": 48, "height": 48}


@pytest.fixture(scope="module")
def pipe() -> Any:
    return Runtime(vram="2GB", ram="4GB", device="cpu").load("nano")


def latent(pipe: Any, **settings: Any) -> Tensor:
    return pipe(PROMPT, **(SMALL | settings)).latent


def test_a_mode_changes_a_little_and_sdpa_nothing(pipe: Any) -> None:
    plain = latent(pipe)
    for name, ends in (("int8-fp16", None), ("int8-fp8", "sdpa")):
        error = (latent(pipe, attention=name, attention_ends=ends) - plain).norm() / plain.norm()
        assert 0 < error < 0.1
    assert torch.equal(latent(pipe, attention="sdpa"), plain)


def test_the_choice_is_in_the_plan_the_saved_job_and_the_video(
    cli: Callable[..., Any], jobs: Path, tmp_path: Path
) -> None:
    flags = ("--steps", 2, "--frames", 1, "--size", "32x32", "--vram", "2GB", "--attention", "int8-fp8")
    planned = cli("plan", PROMPT, *flags, "--json")
    assert planned.code == 0 and "int8-fp8 (int8 Q K, fp8 P V), as asked" in str(
        planned.objects[0]["choices"]
    )
    made = cli("generate", PROMPT, *flags, "-o", tmp_path / "a.mp4")
    assert made.code == 0, made.err
    saved: Saved = list_jobs(jobs)[-1].load()
    assert (saved.job.attention.mode, saved.job.attention.ends) == ("int8-fp8", "int8")
    shown = cli("inspect", tmp_path / "a.mp4", "--json")
    assert '"attention":"int8-fp8","attention_ends":"int8"' in shown.out
    assert cli("generate", PROMPT, "--attention", "sage", "-o", tmp_path / "b.mp4").code == 2


def test_the_command_line_knows_every_mode_and_says_what_it_took_or_why_it_cannot(
    cli: Callable[..., Any],
) -> None:
    shown = cli("plan", "--help").out
    for name in ("auto", *MODES):
        assert name in shown
        made = cli(
            "plan", PROMPT, "--steps", 2, "--frames", 1, "--size", "32x32", "--attention", name, "--json"
        )
        if name in MODES and MODES[name].package:
            assert (
                made.code == 2 and f"--attention {name}: {MODES[name].what} needs an NVIDIA card" in made.err
            )
        else:
            took = "sdpa (scaled_dot_product_attention of torch), chosen for a processor"
            expected = took if name == "auto" else f"{name} ({MODES[name].what}), as asked"
            assert made.objects[0]["choices"]["attention"].startswith(expected)


def test_a_plan_for_a_card_prices_what_its_mode_keeps(cli: Callable[..., Any]) -> None:
    flags = ("--model", "wan2.2-t2v-a14b", "--weights", "fp8", "--frames", 17, "--size", "832x480",
             "--vram", "24GB", "--machine", "rtx4090", "--json")  # fmt: skip
    tokens = 5 * 30 * 52
    seen = {}
    for name in ("auto", "sdpa", "int8-fp8"):
        ends = ("--attention-ends", name) if name == "int8-fp8" else ()
        (plan,) = cli("plan", *flags, "--attention", name, *ends).objects
        (stage,) = (s for s in plan["stages"] if s["name"] == "denoise")
        mode = MODES["int8-fp16" if name == "auto" else name]
        keys, values = stored_bytes(mode, 40, tokens, torch.bfloat16)
        assert stage["claims"]["keys"] == allocated_size(keys)
        assert stage["claims"]["values"] == allocated_size(values)
        seen[name] = stage["seconds"], plan["choices"]["attention"]
    assert seen["int8-fp8"][0] < seen["auto"][0] < seen["sdpa"][0]
    assert "nobody has timed it on sm_89 yet" in seen["auto"][1]


def poisoned(
    pipe: Any, monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...]
) -> tuple[Any, list[State], Job]:
    """A job of int8 attention in which the modes of these names make NaN, in the second step."""
    steps: list[State] = []

    def broken(ops: Ops, keys: Keys, *rest: Any) -> Tensor:
        y = attend(ops, keys, *rest)
        return y * torch.nan if len(steps) == 1 and keys.mode.name in names else y

    monkeypatch.setattr(self_attention, "attend", broken)
    job = pipe.job(PROMPT, attention="int8", **SMALL)
    return pipe.run(job, save=steps.append), steps, job


def test_a_step_that_ends_in_nan_is_done_again_by_torch(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    video, steps, job = poisoned(pipe, monkeypatch, ("int8",))
    assert [state.step for state in steps] == [1, 2, 3] and torch.isfinite(video.latent).all()
    note = video.notes[-1]
    assert "step 2 of 3" in note and "block 0, self attention (int8)" in note and "again with sdpa" in note
    monkeypatch.undo()
    by_torch = replace(job, attention=Choice())
    second: list[State] = []
    pipe.run(by_torch, state=steps[0], save=second.append)
    assert torch.equal(second[0].x, steps[1].x)  # the step of sdpa, and
    assert torch.equal(pipe.run(job, state=steps[1]).latent, video.latent)  # int8 again after it


def test_the_step_that_is_done_again_has_the_memory_of_the_one_that_failed(
    pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, made, alive = denoise._workspaces, list[weakref.ref[Tensor]](), list[int]()

    def watched(*given: Any) -> Any:
        alive.append(sum(each() is not None for each in made))
        works = make(*given)
        made.extend(weakref.ref(work.keys.k) for work in works.values())
        return works

    monkeypatch.setattr(denoise, "_workspaces", watched)
    gc.disable()  # what a cycle holds would be held on a card too
    try:
        poisoned(pipe, monkeypatch, ("int8",))
    finally:
        gc.enable()
    assert alive == [0, 0, 0]  # two int8 attempts, and sdpa between them


def test_nan_on_the_safe_path_too_names_step_block_and_operation(
    pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(NonFiniteError) as refused:
        poisoned(pipe, monkeypatch, ("int8", "sdpa"))
    assert refused.value.exit_code == 8
    assert "step 2 of 3" in str(refused.value) and "block 0, self attention (sdpa)" in str(refused.value)


@pytest.mark.parametrize(
    ("broken", "named"),
    [("self_attn.o", "self attention (sdpa)"), ("cross_attn.o", "cross attention"), ("ffn.2", "FFN")],
)
def test_the_block_and_the_operation_that_made_nan_are_named(
    pipe: Any, monkeypatch: pytest.MonkeyPatch, broken: str, named: str
) -> None:
    whole, calls = Params.linear, 0

    def linear(self: Params, name: str, x: Any) -> Tensor:
        nonlocal calls
        calls += name == broken
        y = whole(self, name, x)
        return y * torch.inf if name == broken and calls == 4 else y  # the second block, without the prompt

    monkeypatch.setattr(Params, "linear", linear)
    with pytest.raises(NonFiniteError, match=re.escape(f"step 1 of 3, high, block 1, {named}")):
        pipe.run(pipe.job(PROMPT, attention="sdpa", guidance=5.0, **SMALL))


def test_a_face_adapter_that_makes_nan_says_so() -> None:
    square, finite = torch.eye(128), torch.ones(4, dtype=torch.bool)
    p = {"linear1_q.weight": square, "q_norm.weight": torch.ones(128), "linear2.weight": square}
    kv = animate.FaceKV(*torch.ones(2, 3, 1, 5, 128))
    for bad in (0.0, torch.nan):
        animate.attend_(Params(p), torch.ones(6, 128), replace(kv, v=kv.v + bad), 4, finite)
        assert finite.tolist() == [True, True, True, bad == 0]


def test_fused_kernels_that_make_nan_are_replaced_for_a_step(
    pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def ops_for(arch: str, unfused: str) -> Ops:
        asked.append(unfused)
        return TORCH if unfused else replace(TORCH, gelu=lambda x: x * torch.nan)

    job = pipe.job(PROMPT, attention="sdpa", **SMALL)
    plan, plain = pipe.plan_job(job), pipe.run(job).latent
    monkeypatch.setattr(denoise, "ops_for", ops_for)
    video = pipe.run(job, plan=replace(plan, machine=replace(plan.machine, unfused="")))
    assert torch.equal(video.latent, plain) and not any(asked[::2]) and all(asked[1::2])
    told = [note for note in video.notes if "done again" in note]
    assert len(told) == 3 and all("block 0, FFN: NaN" in note for note in told)
    assert all(note.endswith("with torch's kernels") for note in told)


def test_what_describes_a_job_says_its_attention(pipe: Any) -> None:
    facts = describe(pipe.job(PROMPT, attention="int8", **SMALL), "0")
    assert (facts["attention"], facts["attention_ends"]) == ("int8", "int8")
    plan: Plan = pipe.plan(PROMPT, **SMALL)
    assert plan.choices["kernels"] == "those of torch: no NVIDIA card"
