"""Noise -> latent: blocks come from the stream, the lean forward runs in the workspace, the solver steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lowvram.conditions.contract import Condition
from lowvram.errors import NonFiniteError
from lowvram.job import Job
from lowvram.matmul import as_multiplied
from lowvram.model import Model
from lowvram.models import animate, dit
from lowvram.models.rows import Rows
from lowvram.models.self_attention import Workspace
from lowvram.models.token_order import TokenOrder, compact_order
from lowvram.offload.placement import BlockId
from lowvram.offload.rows import HostRows
from lowvram.offload.slab import BlockLayout
from lowvram.offload.stream import BlockStream, Views
from lowvram.phases import outer_phase, outer_phases, phase
from lowvram.planning.facts import residual_dtype
from lowvram.planning.visits import layouts_of, step_visits, visiting_order
from lowvram.quant.linear import Params
from lowvram.quant.spec import DitSpec
from lowvram.sampling import guidance, solvers
from lowvram.sampling.solvers import SolverState
from lowvram.stages.moving import moved
from lowvram.stages.run import Run, Traffic
from lowvram.stages.weights import Dense
from lowvram.triton_kernels.dispatch import half_of
from lowvram.triton_kernels.keys import carve, sample_stride, stored_bytes
from lowvram.triton_kernels.ops import ops_for


@dataclass(frozen=True, slots=True)
class State:
    """A denoise between two steps. Everything else follows from the job."""

    x: Tensor
    """Latent [C, F, H, W], float32."""
    solver: SolverState = field(default_factory=SolverState)

    @property
    def step(self) -> int:
        """The step that comes next."""
        return self.solver.step


@dataclass(frozen=True, slots=True)
class _Outside:
    """What a step needs of the weights outside the blocks, made before the first step."""

    ends: Params
    """patch embedding and head"""
    contexts: tuple[dit.Context, ...]
    """of the prompt and, if any step guides, of the negative prompt"""
    time: dit.Time


def initial_state(job: Job, model: Model) -> State:
    """Gaussian noise from the job's seed, drawn on the CPU: a seed means the same on every machine."""
    shape = model.spec.denoised_shape(job.width, job.height, job.frames)
    generator = torch.Generator().manual_seed(job.seed)
    return State(torch.randn(shape, generator=generator) * job.schedule.noise_scale)


def fresh_noise(job: Job, like: Tensor, step: int) -> Tensor:
    """The noise a re-noising solver adds after `step`: its own generator per step, so a resumed job draws the same."""
    generator = torch.Generator().manual_seed((job.seed + 0x9E3779B97F4A7C15 * (step + 1)) % 2**63)
    return torch.randn(like.shape, generator=generator).to(like.device)


@torch.inference_mode()
def denoise(
    run: Run,
    model: Model,
    job: Job,
    texts: list[Tensor],
    condition: Condition,
    state: State,
    save: Callable[[State], None],
    stop: int | None = None,
) -> Tensor:
    """The latent of the finished video [C, F, H, W] float32, from `state` on; `save` is called after every step.

    texts: features of the prompt and, if any step guides, of the negative prompt. stop: the step to end before, if
    not all are wanted. NonFiniteError, naming block and operation, if a step makes NaN or infinity.
    """
    stop = len(job.schedule) if stop is None else stop
    schedule, spec, lean = job.schedule, model.spec, run.plan.lean
    names = spec.expert_names()
    outside = _prepare(run, model, job, texts, condition)
    transformers = tuple(model.transformers.values())
    phases = [phase(job, transformers, i) for i in range(len(schedule))]
    groups = {p: transformers[p.expert].groups(p.strengths) for p in phases}
    layouts = {k: v for p, found in groups.items() for k, v in layouts_of(found, names[p.expert]).items()}
    device = run.device.torch_device
    x, memory = state.x.to(device), _solver_to(state.solver, device)
    fixed, channels = (None if t is None else t.to(device) for t in (condition.fixed, condition.channels))
    x = _imposed(x, fixed)
    grid = (x.shape[1], x.shape[2] // 2, x.shape[3] // 2)
    tokens = grid[0] * grid[1] * grid[2]
    with run.stage("denoise", state.step) as (stack, traffic):
        # What stays is allocated first, and what is large before what is small: the allocator leaves no holes.
        works = _workspaces(run, stack, job, spec.dit, tokens, len(texts) if lean.together else 1)
        stream = _open_stream(run, stack, traffic, layouts, job, model, state.step, stop)
        shown = _preview_weights(run, stack)
        driving = _driving(condition, spec.dit, len(texts), device)
        outside = moved(outside, device)
        order = _order(job, spec.dit, grid, device)
        rope = dit.rope_table(*grid, device=device, order=order)
        for i in range(state.step, stop):
            finite = torch.ones(spec.dit.layers, len(dit.PARTS), dtype=torch.bool, device=device)
            work, first = works[job.attention.of_step(i, len(schedule)).name], works[job.attention.ends]
            around, inside = outside[i], groups[phases[i]]
            passes = 2 if guidance.needs_uncond(schedule.guidance[i]) else 1
            contexts = [
                replace(c, driving=d) for c, d in zip(around.contexts[:passes], driving[:passes], strict=True)
            ]
            velocities: list[Tensor] = []
            for shared in [contexts] if lean.together else [[c] for c in contexts]:
                blocks = (
                    as_multiplied(run.params(inside[f"blocks.{n}"], v), job.matmul, work.ops, work.dtype)
                    for (_, n), v in _take(stream, spec.dit.layers)
                )
                velocities += dit.forward(
                    around.ends,
                    blocks,
                    spec.dit,
                    x,
                    around.time,
                    shared,
                    rope,
                    work,
                    channels,
                    first,
                    finite,
                    order,
                )
            v = guidance.combine(velocities[0], velocities[1] if passes == 2 else None, schedule.guidance[i])
            if run.preview is not None:
                run.preview.step(i + 1, x, v, schedule.sigmas[i], shown)
            noise = fresh_noise(job, x, i) if solvers.needs_noise(schedule, i) else None
            x, memory = solvers.step(schedule, i, memory, x, v, noise)
            x = _imposed(x, fixed)
            del v, velocities, noise  # not held beside the blocks of the next step
            step = f"step {i + 1} of {len(schedule)}, {names[schedule.experts[i]]}"
            _check_finite(x, finite, step, first.keys.mode.name, work.keys.mode.name)
            save(State(x.cpu(), _solver_to(memory, torch.device("cpu"))))
            run.step("denoise")
            if i + 1 < stop:
                run.check_room("denoise")
        return x.cpu()


def _imposed(x: Tensor, fixed: Tensor | None) -> Tensor:
    """x with its first latent frames as they are given. Never written into: the solver may hold x."""
    return x if fixed is None else torch.cat([fixed, x[:, fixed.shape[1] :]], dim=1)


def _order(job: Job, spec: DitSpec, grid: tuple[int, int, int], device: torch.device) -> TokenOrder | None:
    """In which order tokens pass through the blocks; None for that of rows and columns, which dense attention keeps."""
    if not job.attention.selects:
        return None
    return compact_order(grid, framewise=bool(spec.face_blocks), device=device)


def _workspaces(
    run: Run, stack: ExitStack, job: Job, spec: DitSpec, tokens: int, streams: int
) -> dict[str, Workspace]:
    """The same buffers as each mode of the job uses them; the residual streams are where the plan says."""
    lean, dtype, arch = run.plan.lean, run.plan.dtype, run.plan.machine.arch
    heads = lean.group or spec.heads
    modes = job.attention.modes()
    like = torch.empty(0, dtype=torch.uint8, device=run.device.torch_device)
    keys, values = (
        like.new_empty(max(n))
        for n in zip(*(stored_bytes(m, heads, tokens, dtype) for m in modes), strict=True)
    )
    out = like.new_empty(tokens, spec.dim, dtype=dtype) if lean.group else None
    decoded = run.plan.stage("denoise").claims.get("unpacked block", 0)
    unpacked = like.new_empty(decoded) if lean.unpacked else None
    ops = ops_for(arch, run.plan.machine.unfused)
    residuals, kind = list[Rows](), residual_dtype(job, dtype)
    sampled = sample_stride(tokens) if any(m.quantised for m in modes) else 0
    for n in range(streams):
        if lean.away:
            rows = HostRows(run.device, f"ram residual {n}", tokens, spec.dim, kind, lean.chunk, kept=sampled)
            stack.callback(rows.close)
            residuals.append(rows)
        else:
            residuals.append(like.new_empty(tokens, spec.dim, dtype=kind))
    return {
        m.name: Workspace(
            carve(m, heads, tokens, dtype, keys, values, half=half_of(m, arch)),
            dtype,
            out,
            lean.chunk,
            ops,
            unpacked,
            tuple(residuals),
        )
        for m in modes
    }


def _open_stream(
    run: Run,
    stack: ExitStack,
    traffic: Traffic,
    layouts: dict[BlockId, BlockLayout],
    job: Job,
    model: Model,
    step: int,
    stop: int,
) -> BlockStream | None:
    together = run.plan.lean.together
    visits = step_visits(job, model.spec, together)
    order = visiting_order(job, model.spec, together)[: sum(visits[:stop])]
    start = sum(visits[:step])
    if start == len(order):
        return None
    stream = BlockStream(
        layouts,
        run.plan.denoise,
        run.device,
        run.open_reader,
        order,
        start=start,
        clock=run.clock,
        kept=run.kept,
    )
    stack.callback(traffic.add, stream)  # once it is closed
    return stack.enter_context(stream)


def _preview_weights(run: Run, stack: ExitStack) -> Dense | None:
    """Those of the decoder that makes previews, on the device while the stage lasts."""
    if run.decoder is None:
        return None
    return Dense(stack.enter_context(run.resident("preview", run.decoder.weights)), run.plan.dtype)


def _take(stream: BlockStream | None, n: int) -> Iterator[tuple[BlockId, Views]]:
    assert stream is not None
    for _ in range(n):
        yield next(stream)


def _prepare(
    run: Run, model: Model, job: Job, texts: list[Tensor], condition: Condition
) -> dict[int, _Outside]:
    """Use what lies outside the blocks once, and keep only what every step needs of it, by step, on the host."""
    spec, device = model.spec.dit, run.device.torch_device
    _, frames, h, w = model.spec.denoised_shape(job.width, job.height, job.frames)
    fixed = 0 if condition.fixed is None else condition.fixed.shape[1]
    transformers = tuple(model.transformers.values())
    wanted = [outer_phase(job, transformers, i) for i in range(len(job.schedule))]
    outside: dict[int, _Outside] = {}
    host = torch.device("cpu")  # on the device, small tensors would stay where large ones were around them
    with run.stage("prepare") as (_, traffic):
        for number, (name, transformer) in enumerate(model.transformers.items()):
            with run.carried(f"{name} outer", transformer.groups()["outer"], traffic) as views:
                run.check_ram()
                for now in outer_phases(job, transformers, number):
                    outer = run.params(transformer.groups(now.strengths)["outer"], views)
                    image = None
                    if condition.image is not None:
                        image = dit.embed_image(outer, condition.image.to(device))
                    contexts = tuple(
                        replace(dit.embed_text(outer, spec, text), image=image) for text in texts
                    )
                    times = {}
                    for i in (i for i, each in enumerate(wanted) if each == now):
                        # the given frames are clean
                        t = [0.0] * fixed + [job.schedule.timesteps[i]]
                        rows = torch.tensor(t, dtype=torch.float64, device=device)
                        times[i] = dit.embed_time(outer, spec, rows, h * w // 4 * (1 if fixed else frames))
                    ends = outer.copied(dit.ENDS)
                    made = {i: _Outside(ends, contexts, time) for i, time in times.items()}
                    outside |= moved(made, host)
            run.step("prepare")
    return outside


def _driving(
    condition: Condition, spec: DitSpec, passes: int, device: torch.device
) -> list[animate.Driving | None]:
    """What drives the character, for every pass."""
    if condition.pose is None or condition.faces is None:
        return [None] * passes
    pose, faces = condition.pose.to(device), condition.faces.to(device)
    return [
        animate.Driving(
            pose, {b: animate.FaceKV(kv[0], kv[1]) for b, kv in zip(spec.face_blocks, one, strict=True)}
        )
        for one in faces
    ]


def _solver_to(state: SolverState, device: torch.device) -> SolverState:
    sample = None if state.sample is None else state.sample.to(device)
    return replace(state, outputs=tuple(o.to(device) for o in state.outputs), sample=sample)


def _check_finite(x: Tensor, finite: Tensor, step: str, first: str, others: str) -> None:
    """finite: [blocks, PARTS] of `dit.forward`. first, others: modes of self attention, in the first block and after it."""
    bad = [n for n, good in enumerate(finite.flatten().tolist()) if not good]
    if bad or not bool(torch.isfinite(x).all()):
        after = "after the last block"
        if bad:  # behind the first, all are
            block, part = divmod(bad[0], len(dit.PARTS))
            mode = "" if part else f" ({others if block else first})"
            after = f"block {block}, {dit.PARTS[part]}{mode}"
        raise NonFiniteError(
            "NaN or infinity",
            where=f"denoise, {step}, {after}",
            expected="finite numbers",
            advice="check the model files with `lowvram inspect`; another --weights or a lower --guidance may help",
        )
