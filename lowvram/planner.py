"""Job + model + budget + machine -> Plan: what will be claimed, moved and waited for, before anything is loaded.

Every large buffer is a named claim, made here and taken by the stages under the same name. What the networks
allocate besides comes from running their own code on fake tensors (`lowvram.footprint`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from lowvram import footprint
from lowvram.errors import BudgetError
from lowvram.job import Job
from lowvram.machine import Machine
from lowvram.model import Group, Model
from lowvram.models import dit, vae
from lowvram.models.vae_tiles import Tiling
from lowvram.offload.budget import Budget, allocated_size, format_bytes, segment_size
from lowvram.offload.placement import BlockId, Placement, Where, plan_traffic, spread
from lowvram.offload.slab import BlockLayout, build_layout
from lowvram.quant.spec import HEAD_DIM, ModelSpec, numel
from lowvram.sampling.guidance import needs_uncond
from lowvram.sampling.solvers import kept_tensors
from lowvram.tiling import Decoding, Decodings
from lowvram.tokenizer import tokenize

PROGRAM_RAM = 700_000_000
"""Host memory of the interpreter with torch and the media libraries; bounds what was seen with torch 2.13."""
WRITER_FRAMES = 16
"""Frames the video encoder may hold."""
SCHEMA = "lowvram.plan/1"


@dataclass(frozen=True, slots=True)
class Lean:
    """How the forward trades time for memory. The default is the fastest."""

    together: bool = True
    """Prompt and negative prompt share every visit of a block; otherwise each goes through all blocks alone."""
    group: int = 0
    """Heads whose keys and values exist at once; 0 for all."""
    chunk: int = dit.CHUNK
    """Tokens processed at once."""


@dataclass(frozen=True, slots=True)
class StagePlan:
    """One stage. Bytes; seconds are a forecast."""

    name: str
    steps: int
    """How often it reports progress."""
    claims: Mapping[str, int]
    """Device memory by name, all held at once."""
    ram_claims: Mapping[str, int]
    disk_read: int
    h2d: int
    seconds: float

    @property
    def vram(self) -> int:
        return sum(self.claims.values())

    @property
    def ram(self) -> int:
        return sum(self.ram_claims.values())


@dataclass(frozen=True, slots=True)
class Plan:
    """What a job will do on a machine inside a budget."""

    budget: Budget
    machine: Machine
    dtype: torch.dtype
    """What the networks compute in."""
    stages: tuple[StagePlan, ...]
    text: Placement
    denoise: Placement
    lean: Lean
    tiling: Tiling
    """Of the decoder."""
    choices: Mapping[str, str]
    """Each automatic choice, and why."""
    advice: tuple[str, ...]

    @property
    def vram(self) -> int:
        """Peak of the job."""
        return max(stage.vram for stage in self.stages)

    @property
    def ram(self) -> int:
        return max(stage.ram for stage in self.stages)

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages)

    def stage(self, name: str) -> StagePlan:
        return next(stage for stage in self.stages if stage.name == name)

    def blocks(self) -> dict[str, int]:
        """Transformer blocks (of all experts) by where they live."""
        where = list(self.denoise.where.values())
        return {kind: where.count(kind) for kind in ("resident", "ram", "disk")}  # type: ignore[arg-type]

    def to_json(self) -> dict[str, Any]:
        """The object of `plan --json`: bytes are integers."""
        return {
            "schema": SCHEMA,
            "fits": True,
            "machine": self.machine.name,
            "budget": {"vram": self.budget.vram, "ram": self.budget.ram},
            "peak": {"vram": self.vram, "ram": self.ram},
            "stages": [
                {
                    "name": s.name,
                    "vram": s.vram,
                    "ram": s.ram,
                    "disk_read": s.disk_read,
                    "h2d": s.h2d,
                    "seconds": round(s.seconds, 3),
                    "claims": dict(s.claims),
                    "ram_claims": dict(s.ram_claims),
                }
                for s in self.stages
            ],
            "blocks": self.blocks(),
            "choices": dict(self.choices),
            "advice": list(self.advice),
        }


def text_groups(model: Model) -> dict[str, Group]:
    """The text encoder's layers and what is outside of them, grouped like a transformer's."""
    groups: dict[str, list[Any]] = {}
    for name, ref in model.text.items():
        key, inner = (
            (".".join(name.split(".", 2)[:2]), name.split(".", 2)[2])
            if name.startswith("blocks.")
            else ("outer", name)
        )
        groups.setdefault(key, []).append(replace(ref, name=inner))
    return {key: Group(tuple(refs), {}) for key, refs in groups.items()}


def decoder_group(model: Model) -> Group:
    """The half of the VAE that makes pictures."""
    return Group(tuple(ref for name, ref in model.vae.items() if name.startswith(vae.DECODER)), {})


def layouts_of(groups: Mapping[str, Group], network: str) -> dict[BlockId, BlockLayout]:
    """The slab of every block of a network, by block id."""
    blocks = {int(key.split(".")[1]): group for key, group in groups.items() if key != "outer"}
    return {(network, n): build_layout(group.refs) for n, group in sorted(blocks.items())}


def step_visits(job: Job, spec: ModelSpec, together: bool) -> list[int]:
    """Visits of a transformer block in each step: its layers, twice if two passes do not share them."""
    passes = [2 if needs_uncond(g) and not together else 1 for g in job.schedule.guidance]
    return [n * spec.dit.layers for n in passes]


def visiting_order(job: Job, spec: ModelSpec, together: bool) -> list[BlockId]:
    """Every visit of a transformer block in the whole job: all steps, both experts."""
    names = spec.expert_names()
    visits = zip(job.schedule.experts, step_visits(job, spec, together), strict=True)
    return [(names[e], n % spec.dit.layers) for e, count in visits for n in range(count)]


def make_plan(job: Job, model: Model, budget: Budget, machine: Machine) -> Plan:
    """The plan with the most that fits. BudgetError, naming the true minimum, if nothing does."""
    return _Planner(job, model, machine).plan(budget)


class _Planner:
    """What does not depend on the budget, computed once."""

    def __init__(self, job: Job, model: Model, machine: Machine) -> None:
        self.job, self.model, self.machine, self.spec = job, model, machine, model.spec
        self.dtype = torch.bfloat16 if machine.kind == "cuda" else torch.float32
        self.width = torch.finfo(self.dtype).bits // 8
        self.latent = self.spec.latent_shape(job.width, job.height, job.frames)
        self.grid = (self.latent[1], self.latent[2] // 2, self.latent[3] // 2)
        self.tokens = numel(self.grid)
        self.passes = 1 + any(needs_uncond(g) for g in job.schedule.guidance)
        self.groups = {e: t.groups() for e, t in model.transformers.items()}
        self.layouts: dict[BlockId, BlockLayout] = {}
        for expert, groups in self.groups.items():
            self.layouts |= layouts_of(groups, expert)
        self.text = text_groups(model)
        self.text_layouts = layouts_of(self.text, "text")
        self.orders = {t: visiting_order(job, self.spec, t) for t in (True, False)}
        self.context = {"cuda context": machine.context} if machine.context else {}
        self.lengths = prompt_lengths(job, model, self.passes)
        self.text_stage = self._text()
        self.prepare_stage = self._prepare()
        self.decoder = decoder_group(model)
        self.decodings = Decodings(
            self.spec.vae, self.decoder, self.latent, 3 * job.width * job.height, self.dtype, self._footprint
        )
        self.denoise_claims: dict[Lean, dict[str, int]] = {}
        self.block_seconds = self._block_seconds()

    # ---- stages whose claims do not depend on the budget

    def _text(self) -> StagePlan:
        spec = self.spec.text
        lengths = self.lengths
        rows = max(lengths)
        scratch = footprint.text_scratch(spec, self.text["blocks.0"], rows, self.dtype)
        traffic = plan_traffic(self.text_layouts, self._all_disk(self.text_layouts), list(self.text_layouts))
        claims = traffic.device_claims(self._footprint) | {
            "text rows": 2 * sum(allocated_size(n * spec.dim * self.width) for n in lengths),
            "text scratch": scratch,
        }
        nbytes = sum(layout.nbytes for layout in self.text_layouts.values())
        flops = 2 * sum(lengths) * sum(numel(s) for s in spec.layer_shapes().values()) * spec.layers
        seconds = max(flops / self.machine.matmul, nbytes / self.machine.link, nbytes / self.machine.disk)
        return StagePlan(
            "text",
            spec.layers,
            self.context | claims,
            self._host(traffic.host_claims()),
            nbytes,
            nbytes,
            seconds,
        )

    def _prepare(self) -> StagePlan:
        """Everything outside the blocks is used once, before the first step: time rows, text contexts."""
        sizes = [build_layout(groups["outer"].refs).nbytes for groups in self.groups.values()]
        steps = max(self.job.schedule.experts.count(e) for e in range(len(self.groups)))
        first = next(iter(self.groups.values()))["outer"]
        one = sum(n for name, n in self._kept_claims(experts=1, steps=steps).items() if name != "texts")
        peak = footprint.prepare_scratch(
            self.spec.dit, first, self.lengths, steps, self.time_rows(), self.dtype
        )
        claims = {"outer weights": self._footprint(max(sizes)), "outer scratch": max(0, peak - one)}
        nbytes = sum(sizes)
        return StagePlan(
            "prepare",
            len(self.groups),
            self.context | claims | self._kept_claims(),
            self._host({"ring 0": max(sizes)}),
            nbytes,
            nbytes,
            nbytes / min(self.machine.disk, self.machine.link),
        )

    def _kept_claims(self, experts: int = 0, steps: int = 0) -> dict[str, int]:
        """What the preparation leaves behind for the steps; of one expert with so many steps, or of all."""
        spec = self.spec.dit
        experts, steps = experts or len(self.groups), steps or len(self.job.schedule)
        rows = [footprint.context_rows(spec, n) for n in self.lengths]
        contexts = sum(allocated_size(n * spec.dim * self.width) + allocated_size(4 * n) for n in rows)
        time = allocated_size(4 * spec.dim * self.time_rows()) + allocated_size(
            24 * spec.dim * self.time_rows()
        )
        first = next(iter(self.groups.values()))["outer"]
        ends = sum(
            allocated_size(r.nbytes) for r in first.refs if r.name.startswith(("patch_embedding.", "head."))
        )
        texts = sum(allocated_size(n * spec.text_dim * self.width) for n in self.lengths)
        return {
            "texts": texts,
            "contexts": experts * contexts,
            "time rows": steps * time,
            "ends": experts * ends,
        }

    def time_rows(self) -> int:
        """Rows of a time embedding: one per latent frame where frames may differ in noise."""
        return self.latent[1] if self.spec.variant == "ti2v" else 1

    def _claims_of(self, lean: Lean) -> dict[str, int]:
        """Claims of the denoise stage that do not move, computed once for each way of running the forward."""
        if lean not in self.denoise_claims:
            self.denoise_claims[lean] = self._denoise_claims(lean)
        return self.denoise_claims[lean]

    def _denoise_claims(self, lean: Lean) -> dict[str, int]:
        spec, t = self.spec.dit, self.tokens
        stream = allocated_size(t * spec.dim * self.width)
        heads = allocated_size(t * (lean.group or spec.heads) * HEAD_DIM * self.width)
        first = next(iter(self.groups.values()))
        per_frame = t // self.latent[1] if self.time_rows() > 1 else 0
        block = footprint.block_scratch(
            spec,
            first["blocks.0"],
            t,
            per_frame,
            max(self.lengths),
            self.dtype,
            group=lean.group,
            chunk=lean.chunk,
        )
        head = footprint.head_scratch(spec, first["outer"], self.grid, self.dtype, chunk=lean.chunk)
        latent = allocated_size(4 * numel(self.latent))
        claims = {
            "residual": (self.passes if lean.together else 1) * stream,
            "keys": heads,
            "values": heads,
            "rotary table": allocated_size(4 * t * HEAD_DIM),
            "latents": (3 + self.passes + kept_tensors(self.job.schedule.solver)) * latent,
            "scratch": max(block, head + latent),
        }
        return self._kept_claims() | claims | ({"attention output": stream} if lean.group else {})

    def _ladder(self) -> list[Lean]:
        """Ways to run the forward, each slower and smaller than the one before."""
        groups = [g for g in (8, 4, 2, 1) if g < self.spec.dit.heads and self.spec.dit.heads % g == 0]
        shared = [Lean()] + ([Lean(together=False)] if self.passes == 2 else [])
        together = self.passes == 1
        tightest = (
            [Lean(together, g, chunk) for g, chunk in ((groups[-1], 2048), (groups[-1], 1024))]
            if groups
            else []
        )
        return shared + [Lean(together, g) for g in groups] + tightest

    def _decode(self, budget: Budget) -> tuple[StagePlan, Decoding]:
        """The fastest tiling that fits; the smallest, too large for the budget, if none does."""
        nbytes = build_layout(self.decoder.refs).nbytes
        device = self.context | {"vae weights": self._footprint(nbytes)}
        host = self._host({"ring 0": nbytes, "frames": WRITER_FRAMES * 3 * self.job.width * self.job.height})
        # 2.1: 31 TFLOP per latent at 1280x720 (wan-models 6.6); other widths and sizes in proportion
        flops = 31.1e12 * numel(self.latent[1:]) / (90 * 160) * (self.spec.vae.decoder_base / 96) ** 2

        def seconds(decoding: Decoding) -> float:
            return decoding.work * flops / self.machine.matmul + 2 * decoding.moved / self.machine.link

        found = self.decodings.choose(
            budget.vram - sum(device.values()), budget.ram - sum(host.values()), seconds
        )
        host["frames"] += found.frames
        stage = StagePlan(
            "decode",
            self.job.frames,
            device | {"vae histories": found.slab, "vae scratch": found.scratch},
            host | {k: n for k, n in (("vae middle", found.waiting), ("ram histories", found.shelf)) if n},
            nbytes,
            nbytes + found.moved,
            nbytes / self.machine.disk + seconds(found),
        )
        return stage, found

    # ---- the stage whose blocks are placed

    def _denoise(
        self, lean: Lean, slots: int, ring: int, residents: int, in_ram: int
    ) -> tuple[StagePlan, Placement]:
        placement = self._place(residents, in_ram, slots, ring)
        order = self.orders[lean.together]
        traffic = plan_traffic(self.layouts, placement, order)
        claims = self.context | self._claims_of(lean) | traffic.device_claims(self._footprint)
        disk = sum(self.layouts[load.block].nbytes for load in traffic.loads)
        moved = [block for block in order if placement.where[block] != "resident"]
        h2d = sum(self.layouts[b].nbytes for b in moved) + sum(
            layout.nbytes for b, layout in self.layouts.items() if placement.where[b] == "resident"
        )
        compute = self.block_seconds * self.spec.dit.layers
        if lean.group:  # q and k are projected twice
            d, f, t = self.spec.dit.dim, self.spec.dit.ffn, self.tokens
            compute *= 1 + 2 * d * d / (6 * d * d + 2 * d * f + 2 * t * d)
        seconds = sum(compute * (1 + needs_uncond(g)) for g in self.job.schedule.guidance)
        copies = h2d / self.machine.link
        seconds = (
            seconds + copies if slots == 1 else max(seconds, copies)
        )  # one slot leaves nothing to overlap with
        seconds = max(seconds, disk / self.machine.disk)
        stage = StagePlan(
            "denoise",
            len(self.job.schedule),
            claims,
            self._host(traffic.host_claims()),
            disk,
            h2d,
            seconds,
        )
        return stage, placement

    def _place(self, residents: int, in_ram: int, slots: int, ring: int) -> Placement:
        where: dict[BlockId, Where] = {}
        for expert in self.groups:
            depth = self.spec.dit.layers
            fixed = spread(depth, residents)
            moving = [n for n in range(depth) if n not in fixed]
            held = {moving[i] for i in spread(len(moving), min(in_ram, len(moving)))}
            for n in range(depth):
                where[expert, n] = "resident" if n in fixed else "ram" if n in held else "disk"
        return Placement(where, slots=slots, ring=ring)

    def _block_seconds(self) -> float:
        """One block, one pass: linears on tokens, text keys and values, both attentions (wan-models 1.8)."""
        d, f, t, n = self.spec.dit.dim, self.spec.dit.ffn, self.tokens, self.spec.dit.text_len
        linears, attention = 2 * t * (6 * d * d + 2 * d * f) + 4 * n * d * d, 4 * t * t * d + 4 * t * n * d
        return linears / self.machine.matmul + attention / self.machine.attention

    # ---- fitting

    def plan(self, budget: Budget) -> Plan:
        depth = self.spec.dit.layers
        decode_stage, decoding = self._decode(budget)
        others = (self.text_stage, self.prepare_stage, decode_stage)
        fixed = max(others, key=lambda s: s.vram)
        ladder = self._ladder()
        ways = (
            (lean, slots) for slots in (2, 1) for lean in ladder if self._fits(budget, lean, slots, 1, 0, 0)
        )
        lean, slots = next(ways, (ladder[-1], 1))
        least, _ = self._denoise(lean, slots, 1, 0, 0)
        need_ram = max(s.ram for s in (*others, least))
        self._check(
            budget, max(fixed.vram, least.vram), need_ram, fixed if fixed.vram >= least.vram else least
        )
        ring = 2 if self._fits(budget, lean, slots, 2, 0, 0) else 1
        residents = _most(depth, lambda n: self._fits(budget, lean, slots, ring, n, 0))
        in_ram = _most(depth - residents, lambda n: self._fits(budget, lean, slots, ring, residents, n))
        stage, placement = self._denoise(lean, slots, ring, residents, in_ram)
        return Plan(
            budget,
            self.machine,
            self.dtype,
            (self.text_stage, self.prepare_stage, stage, decode_stage),
            self._all_disk(self.text_layouts),
            placement,
            lean,
            decoding.tiling,
            self._choices(budget, stage, lean, residents, in_ram, slots, ring)
            | {"decode": decoding.explain()},
            self._advice(budget, stage, lean, residents),
        )

    def _fits(self, budget: Budget, lean: Lean, slots: int, ring: int, residents: int, in_ram: int) -> bool:
        stage, _ = self._denoise(lean, slots, ring, residents, in_ram)
        return stage.vram <= budget.vram and stage.ram <= budget.ram

    def _check(self, budget: Budget, need: int, need_ram: int, stage: StagePlan) -> None:
        job = self.job
        what = f"{job.width}x{job.height}, {job.frames} frames"
        if need > budget.vram:
            largest = max(stage.claims, key=lambda name: stage.claims[name])
            raise BudgetError(
                f"{what} needs {format_bytes(need)} of VRAM in stage {stage.name} (most of it {largest}), "
                f"the budget is {format_bytes(budget.vram)}",
                expected=f"--vram {_up(need)} or more",
                advice=f"raise --vram to {_up(need)}, or make the video smaller or shorter",
                minimum_vram=need,
            )
        if need_ram > budget.ram:
            raise BudgetError(
                f"{what} needs {format_bytes(need_ram)} of RAM, the budget is {format_bytes(budget.ram)}",
                expected=f"--ram {_up(need_ram)} or more",
                advice=f"raise --ram to {_up(need_ram)}",
                minimum_ram=need_ram,
            )

    def _choices(
        self, budget: Budget, stage: StagePlan, lean: Lean, residents: int, in_ram: int, slots: int, ring: int
    ) -> dict[str, str]:
        depth = self.spec.dit.layers
        block = max(layout.nbytes for layout in self.layouts.values())
        rest = stage.vram - sum(n for name, n in stage.claims.items() if name.startswith("resident "))
        small = f"for all {self.spec.dit.heads} heads at once, the fastest"
        if lean.group:
            small = f"{lean.group} of {self.spec.dit.heads} heads at a time: more do not fit beside the rest"
        if self.passes == 1:
            passes = "1 a step: guidance 1 needs no second"
        elif lean.together:
            passes = "2 a step, prompt and negative prompt share every visit of a block"
        else:
            passes = "2 a step, one after the other: two residual streams do not fit at once"
        chunk = f"{lean.chunk} tokens at once"
        if lean.chunk == dit.CHUNK:
            chunk += (
                ", the same under every budget that allows it, so that a budget does not change the result"
            )
        else:
            chunk += f": {dit.CHUNK} do not fit"
        return {
            "dtype": f"{str(self.dtype).removeprefix('torch.')}, the "
            + ("tensor cores' format" if self.machine.kind == "cuda" else "fastest on this processor"),
            "blocks": f"{residents} of {depth} resident per expert: what {format_bytes(budget.vram)} leaves beside "
            f"{format_bytes(rest)} of buffers, at {format_bytes(block)} a block",
            "ram": f"{in_ram} of the others held in RAM, {depth - residents - in_ram} read from disk every time",
            "slots": f"{slots} on the device, {ring} between disk and device",
            "passes": passes,
            "attention": f"keys and values {small}",
            "chunk": chunk,
        }

    def _advice(self, budget: Budget, stage: StagePlan, lean: Lean, residents: int) -> tuple[str, ...]:
        depth = self.spec.dit.layers
        if residents == depth:
            return ("everything is resident: more memory would not make it faster",)
        more = replace(budget, vram=budget.vram + 10**9)
        better_lean = next((x for x in self._ladder() if self._fits(more, x, 2, 1, 0, 0)), lean)
        better = _most(depth, lambda n: self._fits(more, better_lean, 2, 1, n, 0))
        faster, _ = self._denoise(better_lean, 2, 1, better, 0)
        saved = max(0.0, stage.seconds - faster.seconds)
        gain = (
            f"saves about {saved:.0f} s"
            if saved >= 1
            else "saves no time: copies already hide behind compute"
        )
        kept = f"{better} instead of {residents} blocks resident"
        return (f"1 GB more VRAM: {kept}, {gain}",)

    # ---- small things

    def _footprint(self, nbytes: int) -> int:
        return segment_size(nbytes) if self.machine.kind == "cuda" else nbytes

    def _host(self, claims: Mapping[str, int]) -> dict[str, int]:
        return {"program": PROGRAM_RAM} | dict(claims)

    @staticmethod
    def _all_disk(layouts: Mapping[BlockId, BlockLayout]) -> Placement:
        return Placement(dict.fromkeys(layouts, "disk"))


def prompt_lengths(job: Job, model: Model, passes: int) -> list[int]:
    """Tokens of each prompt of the job; the most that are possible where there is no tokenizer to count them."""
    if model.tokenizer is None:
        return [model.spec.dit.text_len] * passes
    return [len(ids) for ids in tokenize(model, [job.prompt, job.negative][:passes])]


def _most(limit: int, fits: Any) -> int:
    """The largest n in 0..limit for which `fits(n)`, which holds for 0 and for all below one for which it holds."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _up(nbytes: int) -> str:
    """A size to type that is not less than `nbytes`."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if nbytes >= size:
            tenths = -(-nbytes * 10 // size)
            return f"{tenths // 10}.{tenths % 10}{unit}" if tenths % 10 else f"{tenths // 10}{unit}"
    return f"{nbytes}B"
