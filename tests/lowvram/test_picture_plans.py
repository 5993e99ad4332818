"""Plans of jobs that begin with a picture, at real sizes, without weights and without the picture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lowvram.elsewhere import plan_without_files
from lowvram.imagined import imagined_model
from lowvram.job import make_job
from lowvram.machine import machine_profile
from lowvram.planning.denoise import ways
from lowvram.planning.facts import gather
from lowvram.planning.ways import claims
from lowvram.sampling.presets import model_preset

HD = {"width": 1280, "height": 720, "frames": 121}


def least_of_steps(name: str) -> int:
    """Bytes that denoise holds besides weights, as fast as it gets."""
    spec = model_preset(name)
    job = make_job(spec, model=name, files={}, **HD)  # type: ignore[arg-type]
    facts = gather(job, imagined_model(name, spec, "fp8"), machine_profile("rtx4090"))
    return sum(claims(facts, ways(facts)[0].lean).values())


def test_image_to_video_takes_within_3_percent_of_text_to_video_at_720p() -> None:
    text, picture = least_of_steps("wan2.2-t2v-a14b"), least_of_steps("wan2.2-i2v-a14b")
    assert text < picture <= 1.03 * text


def test_5b_from_a_picture_fits_8_gb_with_all_weights_resident(tmp_path: Path) -> None:
    Image.new("RGB", (1280, 704)).save(tmp_path / "a.png")
    plan = plan_without_files(
        "wan2.2-ti2v-5b", weights="fp8", machine="rtx4090", vram="8GB", ram=None, image=tmp_path / "a.png"
    )
    assert plan.blocks() == {"resident": 30, "ram": 0, "disk": 0} and plan.vram <= 8e9
    assert [s.name for s in plan.stages] == ["text", "encode", "prepare", "denoise", "decode"]
    kept = plan.stage("denoise").claims["condition"]
    assert kept == 4 * 48 * 44 * 80  # one latent frame


@pytest.mark.parametrize(("name", "pictures"), [("wan2.1-i2v-14b", 1), ("wan2.1-flf2v-14b", 2)])
def test_a_plan_without_the_picture_has_the_stages_of_one_with_it(
    name: str, pictures: int, cli: Callable[..., Any]
) -> None:
    said = cli("plan", "--model", name, "--weights", "fp8", "--machine", "rtx4090", "--size", "832x480",
               "--frames", 5, "--json")  # fmt: skip
    stages = {stage["name"]: stage for stage in said.objects[0]["stages"]}
    assert said.code == 0 and list(stages) == ["text", "clip", "encode", "prepare", "denoise", "decode"]
    assert stages["clip"]["claims"]["clip rows"] >= pictures * 257 * 1280 * 2
    assert stages["clip"]["disk_read"] > 1.2e9  # the tower but for its last layer, in 16 bits
    assert stages["denoise"]["claims"]["condition"] == 4 * 20 * 2 * 60 * 104
