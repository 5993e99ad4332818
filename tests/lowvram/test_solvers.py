"""Solver steps against diffusers, against exact solutions, and across a kill."""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from lowvram.errors import FileError, InternalError
from lowvram.sampling.presets import few_step
from lowvram.sampling.schedules import SOLVERS, Schedule, few_step_schedule, make_schedule
from lowvram.sampling.solvers import SolverState, kept_tensors, needs_noise, step

SHAPE = (4, 2, 3, 5)
MEAN, SPREAD = 0.7, 0.5


@pytest.fixture(scope="module")
def diffusers() -> Any:
    return importlib.import_module("diffusers")


def start(seed: int = 0) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def fresh(i: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(1000 + i))


def toy(x: Tensor, t: float) -> Tensor:
    """A velocity field that is neither linear nor constant in time."""
    return torch.tanh(1.3 * x + 0.2) + 0.3 * math.sin(t / 200) * x.cos()


def gaussian(x: Tensor, sigma: float) -> Tensor:
    """The exact velocity when data are normal: x0 ~ N(MEAN, SPREAD^2), for which the ODE has a closed solution."""
    variance = ((1 - sigma) * SPREAD) ** 2 + sigma**2
    centred = x - (1 - sigma) * MEAN
    x0 = MEAN + (1 - sigma) * SPREAD**2 / variance * centred
    return (x - x0) / sigma


def run(schedule: Schedule, x: Tensor, field: Callable[[Tensor, int], Tensor]) -> list[Tensor]:
    state, samples = SolverState(), []
    for i in range(len(schedule)):
        x, state = step(schedule, i, state, x, field(x, i), fresh(i) if needs_noise(schedule, i) else None)
        samples.append(x)
    return samples


def gaussian_error(schedule: Schedule) -> float:
    x = start()
    sigma = schedule.sigmas[0]
    deviation = math.sqrt(((1 - sigma) * SPREAD) ** 2 + sigma**2)
    exact = MEAN + SPREAD * (x - (1 - sigma) * MEAN) / deviation
    got = run(schedule, x, lambda x, i: gaussian(x, schedule.sigmas[i]))[-1]
    return float((got - exact).abs().max())


def diffusers_samples(scheduler: Any, timesteps: Tensor) -> list[Tensor]:
    x, samples = start(), []
    for t in timesteps:
        x = scheduler.step(toy(x, float(t)), t, x, return_dict=False)[0]
        samples.append(x)
    return samples


def assert_close(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 10, 20, 40])
@pytest.mark.parametrize("shift", [3.0, 5.0, 12.0])
def test_unipc_equals_diffusers_at_every_step(diffusers: Any, steps: int, shift: float) -> None:
    theirs = diffusers.UniPCMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=shift
    )
    theirs.set_timesteps(sigmas=np.linspace(float(np.float32(0.999)), 0, steps + 1)[:-1])
    ours = make_schedule(solver="unipc", steps=steps, shift=shift)
    assert ours.timesteps == tuple(theirs.timesteps.tolist())
    assert ours.sigmas == tuple(theirs.sigmas.tolist())
    samples = run(ours, start(), lambda x, i: toy(x, ours.timesteps[i]))
    assert_close(samples, diffusers_samples(theirs, theirs.timesteps))


@pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")
@pytest.mark.parametrize("steps", [1, 2, 3, 10, 40])
@pytest.mark.parametrize("shift", [3.0, 12.0])
def test_dpmpp_equals_diffusers_on_the_same_grid_from_sigma_one(
    diffusers: Any, steps: int, shift: float
) -> None:
    ours = make_schedule(solver="dpm++", steps=steps, shift=shift)
    theirs = diffusers.DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=shift
    )
    theirs.set_timesteps(steps)
    theirs.sigmas = torch.tensor(ours.sigmas)
    theirs.timesteps = torch.tensor(ours.timesteps, dtype=torch.int64)
    theirs.set_begin_index(0)
    samples = run(ours, start(), lambda x, i: toy(x, ours.timesteps[i]))
    assert_close(samples, diffusers_samples(theirs, theirs.timesteps))


@pytest.mark.parametrize("steps", [1, 4, 8, 20])
def test_euler_equals_diffusers_given_unshifted_levels(diffusers: Any, steps: int) -> None:
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0)
    theirs.set_timesteps(sigmas=np.linspace(1, 0, steps + 1)[:-1])
    ours = make_schedule(solver="euler", steps=steps, shift=5.0)
    samples = run(ours, start(), lambda x, i: toy(x, ours.timesteps[i]))
    assert_close(samples, diffusers_samples(theirs, theirs.timesteps))


def test_renoise_equals_diffusers_with_the_same_noise(diffusers: Any) -> None:
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0, stochastic_sampling=True)
    theirs.set_timesteps(sigmas=np.linspace(1, 0, 5)[:-1])
    x, expected = start(), []
    for i, t in enumerate(theirs.timesteps):
        draws = torch.Generator().manual_seed(1000 + i)
        x = theirs.step(toy(x, float(t)), t, x, generator=draws, return_dict=False)[0]
        expected.append(x)
    ours = make_schedule(solver="renoise", steps=4, shift=5.0)
    assert_close(run(ours, start(), lambda x, i: toy(x, ours.timesteps[i])), expected)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("killed_after", range(6))
def test_a_job_killed_after_any_step_goes_on_with_the_same_bits(solver: str, killed_after: int) -> None:
    schedule = make_schedule(solver=solver, steps=6, shift=5.0)
    whole = run(schedule, start(), lambda x, i: toy(x, schedule.timesteps[i]))
    x, state = start(), SolverState()
    for i in range(len(schedule)):
        if i == killed_after:
            saved = load(save({**state.to_tensors(), "x": x}))
            x = saved.pop("x")
            state = SolverState.from_tensors(saved)
        x, state = step(schedule, i, state, x, toy(x, schedule.timesteps[i]), fresh(i))
    assert torch.equal(x, whole[-1])


def test_the_state_survives_a_round_trip_at_every_step() -> None:
    schedule = make_schedule(solver="unipc", steps=5, shift=5.0)
    x, state = start(), SolverState()
    for i in range(len(schedule)):
        again = SolverState.from_tensors(state.to_tensors())
        assert again.step == state.step == i
        assert len(again.outputs) == len(state.outputs) == min(2, i)
        assert again.to_tensors().keys() == state.to_tensors().keys()
        x, state = step(schedule, i, again, x, toy(x, schedule.timesteps[i]))
    assert state.to_tensors().keys() == {"step"}


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_state_never_holds_more_than_the_plan_counts(solver: str) -> None:
    schedule = make_schedule(solver=solver, steps=6, shift=5.0)
    x, state, most = start(), SolverState(), 0
    for i in range(len(schedule)):
        x, state = step(schedule, i, state, x, toy(x, schedule.timesteps[i]), fresh(i))
        most = max(most, len(state.to_tensors()) - 1)
    assert most == kept_tensors(solver)


@pytest.mark.parametrize("solver", ["unipc", "dpm++", "euler"])
def test_error_falls_with_the_number_of_steps(solver: str) -> None:
    errors = [gaussian_error(make_schedule(solver=solver, steps=n, shift=3.0)) for n in (5, 10, 20, 40)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0] / 4


@pytest.mark.parametrize("solver", ["unipc", "dpm++"])
def test_second_order_solvers_beat_euler_at_equal_cost(solver: str) -> None:
    for steps, at_least in ((10, 1.3), (20, 4.0), (40, 8.0)):
        euler = gaussian_error(make_schedule(solver="euler", steps=steps, shift=3.0))
        assert gaussian_error(make_schedule(solver=solver, steps=steps, shift=3.0)) * at_least < euler


@pytest.mark.parametrize(
    ("solver", "least", "most"), [("unipc", 4.0, 9.0), ("dpm++", 4.0, 9.0), ("euler", 1.7, 2.3)]
)
def test_twice_the_steps_divide_the_error_as_the_order_says(solver: str, least: float, most: float) -> None:
    ten, twenty = (gaussian_error(make_schedule(solver=solver, steps=n, shift=3.0)) for n in (10, 20))
    assert least < ten / twenty < most


def test_renoise_keeps_the_noise_level_it_claims() -> None:
    # With data at a single point the prediction is that point, so what is left is exactly the fresh noise.
    schedule = few_step_schedule(few_step("fastwan-5b-3"))
    samples = run(schedule, start(), lambda x, i: (x - MEAN) / schedule.sigmas[i])
    for i, x in enumerate(samples[:-1]):
        sigma = schedule.sigmas[i + 1]
        torch.testing.assert_close(x, (1 - sigma) * MEAN + sigma * fresh(i))
    torch.testing.assert_close(samples[-1], torch.full(SHAPE, MEAN))


@pytest.mark.parametrize("solver", SOLVERS)
def test_starting_from_pure_noise_gives_finite_samples(solver: str) -> None:
    # Distilled levels start at sigma = 1, where lambda is infinite; any solver may be asked to walk them.
    schedule = dataclasses.replace(few_step_schedule(few_step("lightning-4")), solver=solver)
    samples = run(schedule, start(), lambda x, i: toy(x, schedule.timesteps[i]))
    assert all(bool(x.isfinite().all()) for x in samples)
    if solver != "renoise":
        euler = start() + (schedule.sigmas[1] - 1.0) * toy(start(), 1000.0)
        torch.testing.assert_close(samples[0], euler, rtol=0, atol=1e-6)


def test_unipc_from_pure_noise_is_the_limit_of_levels_close_to_it() -> None:
    at_one = dataclasses.replace(few_step_schedule(few_step("lightning-6")), solver="unipc")
    near = dataclasses.replace(at_one, sigmas=(float(np.float32(1 - 1e-6)), *at_one.sigmas[1:]))
    limit = run(at_one, start(), lambda x, i: toy(x, at_one.timesteps[i]))[-1]
    approached = run(near, start(), lambda x, i: toy(x, at_one.timesteps[i]))[-1]
    # The slope across the first interval fades only like 1 / |lambda|, so the two agree roughly.
    torch.testing.assert_close(limit, approached, rtol=0, atol=0.02)


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_last_step_lands_on_the_prediction_and_needs_no_noise(solver: str) -> None:
    schedule = make_schedule(solver=solver, steps=1, shift=5.0)
    x, v = start(), toy(start(), 0.0)
    assert not needs_noise(schedule, 0)
    torch.testing.assert_close(step(schedule, 0, SolverState(), x, v)[0], x - schedule.sigmas[0] * v)


def test_arguments_are_left_as_they_were_and_half_precision_is_widened() -> None:
    for solver in SOLVERS:
        schedule = make_schedule(solver=solver, steps=4, shift=5.0)
        x, v, state = start().bfloat16(), start(1).bfloat16(), SolverState()
        for i in range(4):
            kept_x, kept_v, kept_state = (
                x.clone(),
                v.clone(),
                {k: t.clone() for k, t in state.to_tensors().items()},
            )
            x_next, next_state = step(schedule, i, state, x, v, fresh(i))
            assert torch.equal(x, kept_x) and torch.equal(v, kept_v)
            assert all(torch.equal(t, kept_state[k]) for k, t in state.to_tensors().items())
            assert x_next.dtype == torch.float32
            x, state = x_next, next_state


def test_misuse_is_reported_as_our_own_bug() -> None:
    schedule = make_schedule(solver="renoise", steps=3, shift=5.0)
    x = start()
    with pytest.raises(InternalError, match="fresh noise"):
        step(schedule, 0, SolverState(), x, x)
    with pytest.raises(InternalError, match="fresh noise"):
        step(schedule, 0, SolverState(), x, x, torch.ones(1))
    with pytest.raises(InternalError, match="state for step 0"):
        step(schedule, 1, SolverState(), x, x, x)
    with pytest.raises(InternalError):
        step(schedule, 3, SolverState(3), x, x, x)
    with pytest.raises(InternalError):
        step(schedule, 0, SolverState(), x, x[:1], x)


@pytest.mark.parametrize(
    "damage",
    [
        {},
        {"output_0": torch.ones(2)},
        {"step": torch.tensor(1.0)},
        {"step": torch.tensor([1])},
        {"step": torch.tensor(1), "output_1": torch.ones(2)},
        {"step": torch.tensor(1), "output_0": torch.ones(2, dtype=torch.float16)},
        {"step": torch.tensor(1), "output_0": torch.ones(2), "sample": torch.ones(3)},
        {"step": torch.tensor(1), "extra": torch.ones(2)},
    ],
)
def test_a_damaged_saved_state_is_refused(damage: dict[str, Tensor]) -> None:
    with pytest.raises(FileError):
        SolverState.from_tensors(damage)
