"""One step down the noise levels, with everything a later step needs kept in plain sight.

Each step is a pure function of the schedule, the step index, the state, the sample and the velocity. Nothing is
drawn, nothing is hidden: a job that was killed goes on from its saved sample and state with the same bits.

Notation: sigma is the noise level, alpha = 1 - sigma, lambda = ln(alpha) - ln(sigma), h the difference of two
lambdas, m = x - sigma * v the model's prediction of x0. Coefficients are Python floats (float64), tensors float32.
Infinite lambdas are expected: sigma = 1 gives -inf, so h = inf, and a term divided by it is zero. Ratios are
therefore kept as h / h_previous, which is finite, and never the other way round.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lowvram.errors import FileError, InternalError
from lowvram.sampling.schedules import Schedule


@dataclass(frozen=True, slots=True, eq=False)
class SolverState:
    """What a multistep solver remembers between steps. `SolverState()` is the state before the first step."""

    step: int = 0
    """Index of the step that comes next."""
    outputs: tuple[Tensor, ...] = ()
    """Earlier predictions of x0, newest first: float32, each of the latent's shape. At most two."""
    sample: Tensor | None = None
    """unipc: the corrected sample of the previous step, float32, of the latent's shape."""

    def to_tensors(self) -> dict[str, Tensor]:
        """The state as named tensors, ready to be saved: `step` (int64, no dimensions), `output_N`, `sample`."""
        tensors = {"step": torch.tensor(self.step, dtype=torch.int64)}
        tensors |= {f"output_{n}": output for n, output in enumerate(self.outputs)}
        if self.sample is not None:
            tensors["sample"] = self.sample
        return tensors

    @staticmethod
    def from_tensors(tensors: Mapping[str, Tensor]) -> SolverState:
        """The state that `to_tensors` wrote; tensors stay on their device. FileError if it is anything else."""
        outputs = tuple(tensors[name] for name in ("output_0", "output_1") if name in tensors)
        sample = tensors.get("sample")
        state = {"step", "sample"} | {f"output_{n}" for n in range(len(outputs))}
        kept = outputs if sample is None else (*outputs, sample)
        step = tensors.get("step")
        if (
            step is None
            or step.dtype != torch.int64
            or step.ndim != 0
            or not set(tensors) <= state
            or any(t.dtype != torch.float32 or t.shape != kept[0].shape for t in kept)
        ):
            found = ", ".join(f"{name} {t.dtype} {tuple(t.shape)}" for name, t in sorted(tensors.items()))
            raise FileError(
                f"a saved solver state holds {found or 'nothing'}",
                expected="step (int64) and float32 tensors of one shape: output_0, output_1, sample",
                advice="the saved state is damaged: delete it and start the job again",
            )
        return SolverState(int(step.item()), outputs, sample)


def needs_noise(schedule: Schedule, i: int) -> bool:
    """Whether step `i` wants fresh unit Gaussian noise of the latent's shape. The last step never does."""
    return schedule.solver == "renoise" and schedule.sigmas[i + 1] > 0.0


def kept_tensors(solver: str) -> int:
    """How many float32 tensors of the latent's size the state of `solver` holds at most: what a plan must add."""
    return {"unipc": 3, "dpm++": 1}.get(solver, 0)


def step(
    schedule: Schedule, i: int, state: SolverState, x: Tensor, v: Tensor, noise: Tensor | None = None
) -> tuple[Tensor, SolverState]:
    """Go from noise level `i` to `i + 1`.

    x      the sample at sigmas[i], any shape; computed in float32
    v      the model's velocity at (x, timesteps[i]), after guidance, of the same shape
    noise  fresh unit Gaussian noise of that shape where `needs_noise` says so, ignored elsewhere

    Returns the sample at sigmas[i + 1] (float32) and the state for step i + 1. Nothing is written into the
    arguments, but the state may hold `x` itself: do not write into it afterwards.
    Raises InternalError when the state belongs to another step, shapes differ or the noise is missing.
    """
    if not 0 <= i < len(schedule) or state.step != i or x.shape != v.shape:
        raise InternalError(
            f"step {i} of {len(schedule)} with the state for step {state.step}, "
            f"a sample of {tuple(x.shape)} and a velocity of {tuple(v.shape)}",
            where="solver",
            expected="steps in order and one shape",
            advice="please report this",
        )
    x, v = x.to(torch.float32), v.to(torch.float32)
    if schedule.solver == "unipc":
        return _unipc(schedule, i, state, x, v)
    if schedule.solver == "dpm++":
        return _dpmpp(schedule, i, state, x, v)
    if schedule.solver == "euler":
        return _euler(schedule, i, x, v)
    return _renoise(schedule, i, x, v, noise)


def _euler(schedule: Schedule, i: int, x: Tensor, v: Tensor) -> tuple[Tensor, SolverState]:
    """x + (sigma_next - sigma) * v."""
    now, then = schedule.sigmas[i], schedule.sigmas[i + 1]
    return x + (then - now) * v, SolverState(i + 1)


def _renoise(
    schedule: Schedule, i: int, x: Tensor, v: Tensor, noise: Tensor | None
) -> tuple[Tensor, SolverState]:
    """(1 - sigma_next) * m + sigma_next * noise: the multistep consistency step (Song et al. 2023, algorithm 1)."""
    now, then = schedule.sigmas[i], schedule.sigmas[i + 1]
    m = x - now * v
    if not needs_noise(schedule, i):
        return m, SolverState(i + 1)
    if noise is None or noise.shape != x.shape:
        found = "none" if noise is None else f"of shape {tuple(noise.shape)}"
        raise InternalError(
            f"the fresh noise of step {i} is {found}",
            where="solver renoise",
            expected=f"shape {tuple(x.shape)}",
            advice="please report this",
        )
    return (1.0 - then) * m + then * noise.to(torch.float32), SolverState(i + 1)


def _dpmpp(
    schedule: Schedule, i: int, state: SolverState, x: Tensor, v: Tensor
) -> tuple[Tensor, SolverState]:
    """DPM-Solver++(2M), midpoint form (Lu et al. 2022), order 1 at both ends, as Wan2.2 `wan/utils/fm_solvers.py`."""
    now, then = schedule.sigmas[i], schedule.sigmas[i + 1]
    m = x - now * v
    if then == 0.0:
        return m, SolverState(i + 1)
    h = _lambda(then) - _lambda(now)
    gain = -(1.0 - then) * math.expm1(-h)
    x_next = (then / now) * x + gain * m
    if state.outputs:
        # A first level of sigma = 1 makes the previous width infinite: the slope then counts for nothing.
        ratio = h / (_lambda(now) - _lambda(schedule.sigmas[i - 1]))
        x_next = x_next + (0.5 * gain * ratio) * (m - state.outputs[0])
    return x_next, SolverState(i + 1, (m,))


def _unipc(
    schedule: Schedule, i: int, state: SolverState, x: Tensor, v: Tensor
) -> tuple[Tensor, SolverState]:
    """UniPC of order 2, B(h) = expm1(-h) (Zhao et al. 2023, "bh2"), as Wan2.2 `wan/utils/fm_solvers_unipc.py`.

    The velocity was taken at the uncorrected sample; with it the corrector first improves that sample, then the
    predictor goes on. The first and the last step are of order 1; the last lands exactly on the prediction of x0.
    """
    now, then = schedule.sigmas[i], schedule.sigmas[i + 1]
    m = x - now * v
    if then == 0.0:
        return m, SolverState(i + 1)
    if state.outputs and state.sample is not None:
        x = _corrected(schedule, i, state.outputs, state.sample, m)
    h = _lambda(then) - _lambda(now)
    gain = -(1.0 - then) * math.expm1(-h)
    x_next = (then / now) * x + gain * m
    if state.outputs:
        slope = h / (_lambda(schedule.sigmas[i - 1]) - _lambda(now))
        x_next = x_next + (0.5 * gain * slope) * (state.outputs[0] - m)
    return x_next, SolverState(i + 1, (m, *state.outputs[:1]), x)


def _corrected(schedule: Schedule, i: int, outputs: tuple[Tensor, ...], sample: Tensor, m: Tensor) -> Tensor:
    """UniC: the sample at level i again, from the corrected sample at i - 1, now that m at level i is known.

    Its order is the predictor's at i - 1, which is the number of predictions it had: two from the second step on.
    """
    before, now = schedule.sigmas[i - 1], schedule.sigmas[i]
    h = _lambda(now) - _lambda(before)
    e = math.expm1(-h)
    gain = -(1.0 - now) * e
    m_before = outputs[0]
    base = (now / before) * sample + gain * m_before
    if len(outputs) == 1:
        return base + (0.5 * gain) * (m - m_before)
    # Two unknown weights: they sum to b1, and sum to b2 when the older one is scaled by 1 / slope.
    slope = h / (_lambda(schedule.sigmas[i - 2]) - _lambda(before))
    phi1 = e / -h - 1.0
    b1 = phi1 / e
    b2 = 2.0 * (phi1 / -h - 0.5) / e
    older = (b1 - b2) * slope / (slope - 1.0)
    return base + (gain * older * slope) * (outputs[1] - m_before) + (gain * (b1 - older)) * (m - m_before)


def _lambda(sigma: float) -> float:
    """ln((1 - sigma) / sigma): half the log signal-to-noise ratio. -inf at sigma = 1; sigma must be above 0."""
    return math.log(1.0 - sigma) - math.log(sigma) if sigma < 1.0 else -math.inf
