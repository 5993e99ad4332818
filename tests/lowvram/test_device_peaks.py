"""What a job holds on the device, measured where nothing of the host is among it, is what its plan said: every stage of
every kind of model."""

from __future__ import annotations

from pathlib import Path

import pytest
from device_peaks import Peaks, check, with_residual_in_ram
from strict_device import StrictRuntime, metered

from lowvram.planning.facts import gather


@pytest.mark.parametrize("kind", ["t2v", "tiny-i2v-a14b", "tiny-flf2v-14b", "tiny-ti2v-5b"])
def test_a_job_from_text_to_frames(
    kind: str, tiny_model: Path, pictured_models: dict[str, Path], picture_files: tuple[Path, Path]
) -> None:
    folder = tiny_model if kind == "t2v" else pictured_models[kind]
    pipe = StrictRuntime("1GB", "2GB", "cpu", cache=False).load(str(folder))
    job = pipe.job(
        "a red circle", width=64, height=64, steps=2, shift=3.0,
        image=None if kind == "t2v" else picture_files[0],
        last_image=picture_files[1] if "flf2v" in kind else None,
    )  # fmt: skip
    plan = pipe.plan_job(job)
    with metered() as tracker:
        stages = Peaks(tracker)
        list(pipe.run(job, plan=plan, listener=stages).frames())
    check(plan, stages)


def test_attention_in_int8_with_the_residual_in_ram(tiny_model: Path) -> None:
    pipe = StrictRuntime("1GB", "2GB", "cpu", cache=False).load(str(tiny_model))
    job = pipe.job("a red circle", frames=5, steps=2, shift=3.0, attention="int8-fp16")
    plan = with_residual_in_ram(pipe.plan_job(job), gather(job, pipe.model, pipe.runtime.machine))
    assert plan.stage("denoise").claims["residual sample"] > 0
    with metered() as tracker:
        stages = Peaks(tracker)
        list(pipe.run(job, plan=plan, listener=stages).frames())
    check(plan, stages)
