"""Grids, times and experts against the values of the authors' own schedulers."""

from __future__ import annotations

import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch

from lowvram.errors import InternalError, UsageError
from lowvram.sampling.presets import few_step
from lowvram.sampling.schedules import SOLVERS, Schedule, few_step_schedule, make_schedule


def head_tail(schedule: Schedule, head: int, tail: int) -> tuple[list[float], list[float]]:
    return list(schedule.timesteps[:head]), list(schedule.timesteps[-tail:])


@pytest.mark.parametrize(
    ("solver", "steps", "shift", "first", "last"),
    [
        ("unipc", 40, 12.0, [999, 997, 995, 993], [571, 492, 386, 235]),
        ("dpm++", 40, 12.0, [1000, 997, 995, 993], [571, 493, 387, 235]),
        ("unipc", 40, 5.0, [999, 994, 989, 983], [356, 288, 208, 113]),
        ("dpm++", 40, 5.0, [1000], [357, 288, 208, 113]),
        ("unipc", 50, 5.0, [999, 995, 991, 987, 982], [356, 302, 241, 172, 92]),
    ],
)
def test_official_solvers_give_the_published_whole_times(
    solver: str, steps: int, shift: float, first: list[int], last: list[int]
) -> None:
    schedule = make_schedule(solver=solver, steps=steps, shift=shift)
    assert len(schedule) == steps
    assert head_tail(schedule, len(first), len(last)) == (first, last)


def test_twenty_steps_of_shift_five_are_the_published_list() -> None:
    expected = [
        999,
        989,
        978,
        965,
        952,
        937,
        920,
        902,
        882,
        859,
        833,
        803,
        768,
        728,
        681,
        624,
        555,
        468,
        356,
        208,
    ]
    assert list(make_schedule(solver="unipc", steps=20, shift=5.0).timesteps) == expected


@pytest.mark.parametrize("steps", [1, 4, 7, 20, 40, 50, 333])
@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 12.0, 16.0])
@pytest.mark.parametrize(("solver", "start"), [("unipc", float(np.float32(0.999))), ("dpm++", 1.0)])
def test_official_grids_equal_numpy_bit_for_bit(solver: str, start: float, steps: int, shift: float) -> None:
    u = np.linspace(start, 0, steps + 1)[:-1]
    sigma = shift * u / (1 + (shift - 1) * u)
    schedule = make_schedule(solver=solver, steps=steps, shift=shift)
    assert schedule.sigmas == tuple(np.append(sigma, 0).astype(np.float32).tolist())
    assert schedule.timesteps == tuple((sigma * 1000).astype(np.int64).astype(float).tolist())


@pytest.mark.parametrize("steps", [1, 3, 4, 6, 8, 20, 50])
@pytest.mark.parametrize("shift", [1.0, 3.3, 5.0, 8.0, 16.0])
@pytest.mark.parametrize("solver", ["euler", "renoise"])
def test_fractional_grids_equal_torch_in_float32_bit_for_bit(solver: str, steps: int, shift: float) -> None:
    u = torch.from_numpy(np.linspace(1000, 0, steps + 1, dtype=np.float32)) / 1000
    sigma = shift * u / (1 + (shift - 1) * u)
    schedule = make_schedule(solver=solver, steps=steps, shift=shift)
    assert schedule.sigmas == tuple(sigma.tolist())
    assert schedule.timesteps == tuple((sigma * 1000)[:-1].tolist())


@pytest.mark.parametrize(
    ("solver", "shift", "boundary", "high"),
    [
        ("unipc", 12.0, 0.875, 26),
        ("dpm++", 12.0, 0.875, 26),
        ("unipc", 5.0, 0.9, 15),
        ("dpm++", 5.0, 0.9, 15),
        ("unipc", 3.0, 0.9, 10),
        ("dpm++", 3.0, 0.9, 11),
    ],
)
def test_forty_steps_switch_experts_where_upstream_does(
    solver: str, shift: float, boundary: float, high: int
) -> None:
    schedule = make_schedule(
        solver=solver, steps=40, shift=shift, boundary=boundary, experts=2, guidance=(4.0, 3.0)
    )
    assert schedule.experts == (0,) * high + (1,) * (40 - high)
    assert schedule.guidance == (4.0,) * high + (3.0,) * (40 - high)


def test_a_time_equal_to_the_boundary_belongs_to_the_high_noise_expert() -> None:
    schedule = make_schedule(solver="dpm++", steps=40, shift=3.0, boundary=0.9, experts=2)
    assert schedule.timesteps[10] == 900.0
    assert schedule.experts[10:12] == (0, 1)


def test_one_expert_ignores_the_boundary_and_takes_the_first_guidance() -> None:
    schedule = make_schedule(solver="unipc", steps=5, shift=5.0, boundary=0.9, guidance=(5.0, 2.0))
    assert set(schedule.experts) == {0}
    assert set(schedule.guidance) == {5.0}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("lightning-4", [1000, 937.5, 833.333, 625]),
        ("lightning-6", [1000, 961.54, 909.09, 833.33, 714.29, 500]),
        ("lightning-8", [1000, 972.22, 937.5, 892.86, 833.33, 750, 625, 416.67]),
        ("lightx2v-2.1-4", [1000, 937.5, 833.333, 625]),
        ("lightx2v-2.2-4", [1000, 937.5, 833.333, 625]),
        ("lightx2v-flf2v-4", [1000, 979.6, 941.2, 842.1]),
        ("fastwan-5b-3", [1000, 757, 522]),
        ("rcm-t2v-4", [987.65, 933.78, 852.90, 608.98]),
        ("rcm-i2v-4", [995.02, 933.78, 852.90, 608.98]),
        ("accvid-10", [1000, 977.9, 951.5, 919.5, 879.7, 829.0, 762.3, 670.5, 536.1, 320.5]),
    ],
)
def test_few_step_times_are_the_published_ones_and_not_truncated(name: str, expected: list[float]) -> None:
    schedule = few_step_schedule(few_step(name))
    assert schedule.timesteps == pytest.approx(expected, abs=0.05)
    assert set(schedule.guidance) == {1.0}


@pytest.mark.parametrize("boundary", [0.875, 0.9])
@pytest.mark.parametrize("name", ["lightning-4", "lightx2v-2.2-4", "lightx2v-flf2v-4", "rcm-i2v-4"])
def test_four_step_presets_give_each_expert_two_steps(name: str, boundary: float) -> None:
    assert few_step_schedule(few_step(name), experts=2, boundary=boundary).experts == (0, 0, 1, 1)


def test_only_rcm_starts_from_scaled_noise() -> None:
    assert few_step_schedule(few_step("rcm-t2v-4")).noise_scale == pytest.approx(80 / 81)
    assert few_step_schedule(few_step("rcm-i2v-4")).noise_scale == pytest.approx(200 / 201)
    assert few_step_schedule(few_step("lightning-4")).noise_scale == 1.0
    assert make_schedule(solver="unipc", steps=4, shift=5.0).noise_scale == 1.0


def test_guidance_of_a_few_step_preset_can_be_overridden_per_expert() -> None:
    schedule = few_step_schedule(few_step("lightning-4"), experts=2, boundary=0.9, guidance=(3.5, 1.0))
    assert schedule.guidance == (3.5, 3.5, 1.0, 1.0)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("steps", [1, 2, 1000])
def test_every_solver_makes_valid_grids_from_one_step_to_a_thousand(solver: str, steps: int) -> None:
    schedule = make_schedule(solver=solver, steps=steps, shift=5.0)
    assert schedule.sigmas[-1] == 0.0
    assert all(a > b for a, b in itertools.pairwise(schedule.sigmas))


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 0},
        {"steps": -3},
        {"steps": 1001},
        {"shift": 0.0},
        {"shift": -1.0},
        {"shift": float("nan")},
        {"shift": float("inf")},
        {"shift": 1e30},
        {"shift": 1e-44},
        {"experts": 3},
        {"experts": 2, "boundary": 1.5},
        {"guidance": (float("nan"), 1.0)},
        {"guidance": (1.0,)},
    ],
)
@pytest.mark.parametrize("solver", SOLVERS)
def test_values_that_cannot_be_meant_are_usage_errors(solver: str, change: dict[str, object]) -> None:
    arguments: dict[str, object] = {"solver": solver, "steps": 4, "shift": 5.0}
    with pytest.raises(UsageError):
        make_schedule(**(arguments | change))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("typed", "meant"), [("unipcc", "unipc"), ("DPM++", "dpm++"), ("dpmpp", "dpm++"), ("eular", "euler")]
)
def test_an_unknown_solver_is_answered_with_the_nearest_name(typed: str, meant: str) -> None:
    with pytest.raises(UsageError, match=r"did you mean") as caught:
        make_schedule(solver=typed, steps=4, shift=5.0)
    assert f'"{meant}"' in caught.value.advice


def test_a_few_step_schedule_refuses_values_out_of_range() -> None:
    with pytest.raises(UsageError):
        few_step_schedule(few_step("lightning-4"), experts=0)
    with pytest.raises(UsageError):
        few_step_schedule(few_step("lightning-4"), experts=2, boundary=-0.1)


@pytest.mark.parametrize(
    "broken",
    [
        {"sigmas": (1.0, 0.5, 0.1)},
        {"sigmas": (0.5, 0.5, 0.0)},
        {"sigmas": (1.0, 0.0)},
        {"sigmas": (1.5, 0.5, 0.0)},
        {"experts": (0,)},
        {"guidance": (1.0,)},
        {"solver": "heun"},
    ],
)
def test_a_schedule_that_does_not_hold_together_cannot_be_built(broken: dict[str, object]) -> None:
    good: dict[str, object] = {
        "sigmas": (1.0, 0.5, 0.0),
        "timesteps": (1000.0, 500.0),
        "experts": (0, 0),
        "guidance": (1.0, 1.0),
        "solver": "euler",
    }
    assert len(Schedule(**good)) == 2  # type: ignore[arg-type]
    with pytest.raises(InternalError):
        Schedule(**(good | broken))  # type: ignore[arg-type]


def test_schedules_and_presets_do_not_import_torch() -> None:
    code = "import sys, lowvram.sampling.schedules; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
