"""Which noise levels a video passes through, and which expert and guidance serve each step.

Plain Python: a plan needs a schedule, and a plan must not need torch. Where the originals compute in float32, every
operation here is rounded to float32, so the numbers are theirs to the last bit.

Flow matching: x_sigma = (1 - sigma) * x0 + sigma * noise, the model predicts v = noise - x0 at time 1000 * sigma.
"""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from lowvram.errors import InternalError, UsageError
from lowvram.sampling.presets import FewStep, unknown_name

SOLVERS = ("unipc", "dpm++", "euler", "renoise")
"""`euler` steps deterministically; `renoise` predicts x0 and noises it again, as consistency models do."""

MAX_STEPS = 1000
"""The models were trained on this many noise levels; a finer grid asks for levels they never told apart."""

MIN_SHIFT, MAX_SHIFT = 0.001, 1000.0
"""Beyond these nearly the whole grid lies within a thousandth of no noise or of pure noise."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """The whole plan of a denoise: N steps from the first noise level down to 0."""

    sigmas: tuple[float, ...]
    """N + 1 noise levels, strictly falling from at most 1, the last one 0. Each is a float32 value."""
    timesteps: tuple[float, ...]
    """N times given to the model, on its 0..1000 scale. Whole numbers where the authors truncate."""
    experts: tuple[int, ...]
    """N expert indices: 0 is the high-noise or only transformer, 1 the low-noise one."""
    guidance: tuple[float, ...]
    """N guidance scales; exactly 1 means one pass (see `guidance.needs_uncond`)."""
    solver: str
    """One of `SOLVERS`."""
    noise_scale: float = 1.0
    """What unit Gaussian noise is multiplied by to become the first sample."""

    def __post_init__(self) -> None:
        n = len(self.timesteps)
        falling = all(a > b for a, b in itertools.pairwise(self.sigmas))
        if (
            n < 1
            or len(self.sigmas) != n + 1
            or len(self.experts) != n
            or len(self.guidance) != n
            or self.sigmas[-1] != 0.0
            or self.sigmas[0] > 1.0
            or not falling
            or self.solver not in SOLVERS
        ):
            raise InternalError(
                f"a schedule of {n} steps does not hold together: {self}",
                where="sampling",
                expected="N + 1 noise levels falling from at most 1 to 0 and N of everything else",
                advice="please report this with the command that led here",
            )

    def __len__(self) -> int:
        """Number of steps N (a step is one or two passes of the transformer)."""
        return len(self.timesteps)


def make_schedule(
    *,
    solver: str,
    steps: int,
    shift: float,
    boundary: float = 0.0,
    experts: int = 1,
    guidance: tuple[float, float] = (1.0, 1.0),
) -> Schedule:
    """The schedule that the authors of Wan use for `solver`.

    The base grid u runs evenly from 1 (unipc: 0.999) to 0 and is warped by S(u) = shift * u / (1 + (shift - 1) * u).
    unipc and dpm++ compute in float64, truncate times to whole numbers and keep sigmas in float32 (Wan2.2
    `wan/utils/fm_solvers_unipc.py`, `wan/utils/fm_solvers.py`). euler and renoise compute in float32 and give the
    model fractional times (Wan2.2-Lightning `wan/utils/fm_solvers_euler.py`).

    solver    one of `SOLVERS`
    steps     1..1000
    shift     0.001..1000; larger spends more steps at high noise
    boundary  0..1, used with two experts: times >= boundary * 1000 belong to the high-noise expert
    experts   1 or 2
    guidance  scales of the (high, low) expert; with one expert the first counts

    Raises UsageError for values outside these.
    """
    if solver not in SOLVERS:
        raise unknown_name("solver", solver, SOLVERS, where="--solver")
    _check_usage(steps, shift, boundary, experts, guidance)
    if solver in ("unipc", "dpm++"):
        exact = [_shifted(u, shift) for u in _even_grid(_f32(0.999) if solver == "unipc" else 1.0, steps)]
        timesteps = tuple(float(int(1000.0 * sigma)) for sigma in exact)
        levels = [_f32(sigma) for sigma in exact]
    else:
        levels = _euler_levels(steps, shift)
        timesteps = _float_times(levels)
    sigmas = _to_zero(levels, steps, shift)
    owners = _experts_by_time(timesteps, boundary, experts)
    return Schedule(sigmas, timesteps, owners, tuple(guidance[e] for e in owners), solver)


def few_step_schedule(
    preset: FewStep,
    *,
    experts: int = 1,
    boundary: float = 0.0,
    guidance: tuple[float, float] | None = None,
) -> Schedule:
    """The schedule a distilled model was trained for.

    experts, boundary  of the model it runs on (1 or 2; 0..1); the preset's own switch rule, if it has one, wins
    guidance           scales of the (high, low) expert instead of the preset's, which is 1 for both

    Raises UsageError for values outside their range.
    """
    scales = (preset.guidance, preset.guidance) if guidance is None else guidance
    switch_at = boundary if preset.boundary is None else preset.boundary
    _check_usage(preset.steps, 1.0, switch_at, experts, scales)
    if preset.sigmas is not None:
        levels = [_f32(sigma) for sigma in preset.sigmas]
    elif preset.shift is not None:
        levels = _euler_levels(preset.steps, preset.shift)
    else:
        raise InternalError(
            f'preset "{preset.name}" has neither noise levels nor a shift',
            where="lowvram/presets/fewstep.toml",
            advice="please report this",
        )
    timesteps = _float_times(levels) if preset.timesteps is None else preset.timesteps
    if experts == 2 and preset.switch_step is not None:
        owners = tuple(0 if i < preset.switch_step else 1 for i in range(preset.steps))
    else:
        owners = _experts_by_time(timesteps, switch_at, experts)
    return Schedule(
        sigmas=(*levels, 0.0),
        timesteps=timesteps,
        experts=owners,
        guidance=tuple(scales[e] for e in owners),
        solver=preset.solver,
        noise_scale=levels[0] if preset.scale_noise else 1.0,
    )


def _f32(value: float) -> float:
    """The float32 nearest to `value`. Rounding each float64 operation this way equals float32 arithmetic."""
    rounded: float = struct.unpack("<f", struct.pack("<f", value))[0]
    return rounded


def _even_grid(start: float, steps: int) -> list[float]:
    """`steps` even float64 values from `start` towards 0, 0 left out.

    Written as numpy.linspace computes it: i * width + start. Another order of operations moves a value by one
    unit in the last place, and truncation then turns 900 into 899: one step more or less for an expert.
    """
    width = (0.0 - start) / steps
    return [i * width + start for i in range(steps)]


def _shifted(u: float, shift: float) -> float:
    """S(u) in float64."""
    return shift * u / (1 + (shift - 1) * u)


def _euler_levels(steps: int, shift: float) -> list[float]:
    """S(u) of an even grid from 1, every operation in float32."""
    levels = []
    for time in _even_grid(1000.0, steps):
        u = _f32(_f32(time) / 1000.0)
        above = _f32(_f32(shift) * u)
        below = _f32(1.0 + _f32(_f32(shift - 1) * u))
        levels.append(_f32(above / below))
    return levels


def _float_times(levels: Sequence[float]) -> tuple[float, ...]:
    """1000 * sigma in float32: what distilled models are given."""
    return tuple(_f32(1000.0 * sigma) for sigma in levels)


def _experts_by_time(timesteps: Sequence[float], boundary: float, experts: int) -> tuple[int, ...]:
    """Expert of each step: 0 while the time is at least boundary * 1000, then 1. All 0 with one expert."""
    if experts == 1:
        return (0,) * len(timesteps)
    return tuple(0 if t >= boundary * 1000 else 1 for t in timesteps)


def _to_zero(levels: list[float], steps: int, shift: float) -> tuple[float, ...]:
    """The levels and a final 0, refused if two neighbours have become the same float32."""
    sigmas = (*levels, 0.0)
    if any(a <= b for a, b in itertools.pairwise(sigmas)):
        raise UsageError(
            f"shift {shift:g} squeezes {steps} steps so close together that some coincide",
            where="--shift",
            expected="a shift between 1 and 20",
            advice="choose a shift nearer to 5, or fewer steps",
        )
    return sigmas


def _check_usage(
    steps: int, shift: float, boundary: float, experts: int, guidance: tuple[float, float]
) -> None:
    """UsageError for the first value that cannot be meant."""
    if not 1 <= steps <= MAX_STEPS:
        raise UsageError(
            f"{steps} steps",
            where="--steps",
            expected=f"1 to {MAX_STEPS}",
            advice="40 to 50 suit a base model, 4 to 8 a distilled one",
        )
    if not MIN_SHIFT <= shift <= MAX_SHIFT:
        raise UsageError(
            f"shift {shift:g}",
            where="--shift",
            expected=f"a number from {MIN_SHIFT:g} to {MAX_SHIFT:g}, usually 3 to 16",
            advice="leave --shift out for the model's own value",
        )
    if experts not in (1, 2):
        raise UsageError(
            f"{experts} experts",
            where="model",
            expected="1 or 2",
            advice="give one transformer, or a high and a low one",
        )
    if experts == 2 and not 0.0 <= boundary <= 1.0:
        raise UsageError(
            f"expert boundary {boundary:g}",
            where="model",
            expected="a noise level from 0 to 1",
            advice="use 0.875 for text-to-video, 0.9 for image-to-video",
        )
    if len(guidance) != 2 or not all(math.isfinite(g) for g in guidance):
        raise UsageError(
            f"guidance {guidance}",
            where="--guidance",
            expected="one or two numbers (high, low)",
            advice="leave --guidance out for the model's own values",
        )
