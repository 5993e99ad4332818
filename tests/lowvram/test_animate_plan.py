"""What Wan-Animate needs, from its real sizes and no weights: 1280x720, any length, fp8."""

from __future__ import annotations

import pytest

from lowvram.api import plan_without_files
from lowvram.planning.plan import Plan


def plan(vram: str) -> Plan:
    return plan_without_files(
        "wan2.2-animate-14b", weights="fp8", machine="rtx4090", vram=vram, ram="32GB", width=1280, height=720
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


def test_eight_gigabytes_are_enough_for_every_stage() -> None:
    found = plan("8GB")
    assert found.vram <= 8 * 10**9
    assert found.lean.group == 0
    assert found.blocks()["resident"] >= 4
