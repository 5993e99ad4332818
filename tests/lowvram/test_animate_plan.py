"""What Wan-Animate needs, from its real sizes and no weights: 1280x720, any length, fp8."""

from __future__ import annotations

import pytest

from lowvram.driving import Driving
from lowvram.elsewhere import plan_without_files
from lowvram.errors import BudgetError
from lowvram.imagined import imagined_model
from lowvram.job import make_job
from lowvram.machine import machine_profile
from lowvram.media.clip import Clip
from lowvram.media.picture import Picture
from lowvram.offload.budget import Budget
from lowvram.planning.choose import choose
from lowvram.planning.facts import gather
from lowvram.planning.plan import Plan
from lowvram.sampling.presets import model_preset


def plan(vram: str, steps: int | None = None) -> Plan:
    return plan_without_files(
        "wan2.2-animate-14b",
        weights="fp8",
        machine="rtx4090",
        vram=vram,
        ram="32GB",
        width=1280,
        height=720,
        steps=steps,
    )


@pytest.fixture(scope="module")
def comfortable() -> Plan:
    return plan("16GB")


def test_sixteen_gigabytes_hold_half_of_the_blocks_and_every_stage_once(comfortable: Plan) -> None:
    assert [s.name for s in comfortable.stages] == [
        "text", "clip", "faces", "encode", "prepare", "denoise", "decode",
    ]  # fmt: skip
    assert comfortable.vram <= 16 * 10**9 and comfortable.ram <= 32 * 10**9
    assert comfortable.blocks()["resident"] >= 20 and comfortable.blocks()["disk"] == 0
    assert comfortable.lean.together and comfortable.lean.group == 0


def test_the_weights_that_make_keys_and_values_are_not_there_in_the_steps(comfortable: Plan) -> None:
    """A block with an adapter holds its query and output matrices: 2 x 5120 x 5120 in fp8 more than one without."""
    residents = {n for name, n in comfortable.stage("denoise").claims.items() if name.startswith("resident ")}
    spec = 5120 * 5120
    assert max(residents) - min(residents) < 2.2 * spec
    condition = comfortable.stage("denoise").claims["condition"]
    latents = 4 * 90 * 160 * (20 * 21 + 16 * 20)
    keys = 2 * 8 * 2 * 21 * 5 * 5120
    assert latents + keys <= condition <= 1.03 * (latents + keys)


@pytest.mark.parametrize("steps", [20, 4])
def test_to_read_for_the_next_segment_ahead_of_it_would_save_less_than_a_hundredth(steps: int) -> None:
    """Why `lowvram.stages.segments` does not: the first pass through the blocks hides all reads but that of the first."""
    found, disk = plan("16GB", steps), machine_profile("rtx4090").disk
    denoise = found.stage("denoise")
    assert denoise.disk_read / disk < denoise.seconds / steps
    each = [s for s in found.stages if s.name not in ("text", "clip")]
    waits = (sum(s.disk_read for s in each if s is not denoise) + denoise.claims["slot 0"]) / disk
    assert waits < sum(s.seconds for s in each) / 100


@pytest.mark.parametrize("carried", [1, 5])
def test_what_does_not_fit_is_told_with_the_flags_of_animate(carried: int) -> None:
    """The size is that of the driving videos, and so is the length: segments may be shorter, but not as short as what
    they carry over."""
    clip = Clip(path="/p", sha256="", width=512, height=512, frames=300, rate=(30, 1))
    picture = Picture(path="/r", sha256="", width=512, height=512)
    driving = Driving(mode="animate", pose=clip, face=clip, picture=picture, carried=carried)
    spec = model_preset("nano-animate")
    job = make_job(spec, model="", files={}, driving=driving, width=512, height=512, frames=13)
    facts = gather(job, imagined_model("", spec, "fp8"), machine_profile("rtx4090"))
    with pytest.raises(BudgetError, match="shorter segments do not fit either") as refused:
        choose(facts, Budget(1, 32 * 10**9))
    least = refused.value.minimum_vram
    assert least is not None
    with pytest.raises(BudgetError, match="raise the budget, or take --segment 9") as refused:
        choose(facts, Budget(least - 1, 32 * 10**9))
    assert refused.value.nearest == {"segment": "9"}


def test_eight_gigabytes_are_enough_for_every_stage() -> None:
    found = plan("8GB")
    assert found.vram <= 8 * 10**9
    assert found.lean.group == 0
    assert found.blocks()["resident"] >= 4
