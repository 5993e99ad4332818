"""A denoise that goes on from its last step: after NaN from 8-bit arithmetic, and when memory runs out or short."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from lowvram.conditions.contract import Condition
from lowvram.errors import BudgetError, NonFiniteError, OutOfMemoryError
from lowvram.job import Job
from lowvram.model import Model
from lowvram.offload.budget import Budget, format_bytes
from lowvram.planning.choose import make_plan, plan_segment, plan_steps
from lowvram.stages.denoise import State, denoise
from lowvram.stages.room import SqueezedError, check_vram, without_frames
from lowvram.stages.run import Run
from lowvram.triton_kernels.modes import EXACT, SDPA


def denoise_steadfastly(
    run: Run,
    model: Model,
    job: Job,
    texts: list[Tensor],
    made: Condition,
    state: State,
    save: Callable[[State], None],
) -> Tensor:
    """The finished latent, as `denoise` gives it.

    A step that ends in NaN or infinity is done once more by torch alone: its attention, exact multiplication, no fused
    kernels. It is the whole step, not the block that is to blame: a block works in place, and neither a copy of what it
    began from (1.1 GB at 1280x720 with 121 frames) nor a wait for every block's verdict is worth it. The steps after it
    are as before: each follows from the state before it alone, so a job that is killed and resumed makes the same.

    When memory runs out (another program took it, or a plan was wrong), everything is freed and the step begins anew
    by a plan for what is left. If that step runs out of memory again, or nothing smaller fits, the error is raised.
    Memory that is found to be short between two steps (`lowvram.stages.room`) is met in the same way.
    """
    last, failed = state, -1

    def remember(state: State) -> None:
        nonlocal last
        last = state
        save(state)

    while True:
        try:
            return denoise(run, model, job, texts, made, last, remember)
        except NonFiniteError as error:
            if not _unsafe(run, job):
                raise
            problem: NonFiniteError | OutOfMemoryError = without_frames(error)
        except OutOfMemoryError as error:
            if last.step == failed:
                raise
            if not isinstance(error, SqueezedError):
                failed = last.step
            problem = without_frames(error)
        if isinstance(problem, OutOfMemoryError):
            run = _smaller(run, model, job, last.step, problem)
            continue
        safe = replace(job, attention=SDPA, matmul=EXACT)
        once = _safe(run, model, safe, problem)
        again = ", ".join(_unsafe(run, job))
        run.tell(f"{problem.where}: {problem.found}; the step was done again with {again}")
        denoise(once, model, safe, texts, made, last, remember, stop=last.step + 1)


def _unsafe(run: Run, job: Job) -> tuple[str, ...]:
    """What is done otherwise where a step of the job is done again; nothing if torch alone did it."""
    ways = (
        ("sdpa", job.attention.mode != "sdpa"),
        ("exact multiplication", not job.matmul.exact),
        ("torch's kernels", not run.plan.machine.unfused),
    )
    return tuple(name for name, otherwise in ways if otherwise)


def _safe(run: Run, model: Model, safe: Job, problem: NonFiniteError) -> Run:
    """The run with a plan for a step of the job `safe` by torch alone; `problem` if that does not fit the budget."""
    machine = replace(run.plan.machine, unfused=run.plan.machine.unfused or "numbers were not finite")
    try:
        plan = make_plan(safe, model, run.plan.budget, machine, preview=run.decoder)
    except BudgetError:
        raise problem from None
    return replace(run, plan=plan)


def _smaller(run: Run, model: Model, job: Job, step: int, lack: OutOfMemoryError) -> Run:
    """The run with a plan for the memory that is left; `lack` if none fits. At most 7/8 of the VRAM that the one before
    took, if that was not there when it was needed."""
    run.device.release_unused()
    was = run.plan.stage("denoise")
    vram, ram = run.device.memory_left(), run.plan.budget.ram
    if isinstance(lack, SqueezedError):
        what, ram = f"before step {step + 1}, {lack.found}", was.ram - lack.excess if lack.excess else ram
    else:
        what, vram = f"memory ran out in step {step + 1}", min(vram, was.vram * 7 // 8)
    try:
        left = Budget(max(1, vram), max(1, ram))
        plan = plan_steps(job, model, left, run.plan.machine, run.decoder)
    except BudgetError:
        raise lack from None
    now = plan.stage("denoise")
    run.tell(
        f"{what} (of {len(job.schedule)} steps): planned again, {format_bytes(now.vram)} of VRAM and {format_bytes(now.ram)} of RAM "
        f"instead of {format_bytes(was.vram)} and {format_bytes(was.ram)}"
    )
    return replace(run, plan=plan)


def for_segment(run: Run, model: Model, job: Job, number: int) -> Run:
    """The run with a plan for the VRAM that is free now, before segment `number` of a driven video, if that is less than
    its plan counts on. SqueezedError if none fits: what was made before is kept."""
    run.device.release_unused()
    most = max((stage for stage in run.plan.stages if stage.name != "text"), key=lambda stage: stage.vram)
    try:
        check_vram(run.device, most)
    except SqueezedError as lack:
        left = Budget(max(1, run.device.memory_left()), run.plan.budget.ram)
        try:
            plan = plan_segment(job, model, left, run.plan.machine)
        except BudgetError:
            raise lack from None
        run.tell(
            f"before segment {number + 1}, {lack.found}: planned again, {format_bytes(plan.vram)} of VRAM"
        )
        return replace(run, plan=plan)
    return run
