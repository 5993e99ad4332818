"""What a plan knows before it is asked for a budget: sizes, counts and layouts, gathered once."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

import torch

from lowvram.footprint import with_holes
from lowvram.job import Job
from lowvram.machine import Machine
from lowvram.model import Group, Model, kinds
from lowvram.offload import allocator
from lowvram.offload.budget import segment_size
from lowvram.offload.placement import BlockId
from lowvram.offload.slab import BlockLayout, build_layout
from lowvram.planning.once import Once
from lowvram.planning.visits import layouts_of
from lowvram.preview import Decoder
from lowvram.quant.spec import ModelSpec, numel
from lowvram.sampling.guidance import needs_uncond
from lowvram.sampling.solvers import kept_tensors
from lowvram.tokenizer import tokenize

_T = TypeVar("_T")

PROGRAM_RAM = 700_000_000
"""Host memory of the interpreter with torch and the media libraries; bounds what was seen with torch 2.13."""


@dataclass(frozen=True, slots=True)
class Transformers:
    """The experts of a model, cut into what travels together."""

    groups: Mapping[str, Mapping[str, Group]]
    """Tensors by expert and block."""
    layouts: Mapping[BlockId, BlockLayout]
    """Of all blocks."""
    depth: int
    """Blocks of an expert."""
    blocks: Sequence[Group]
    """One block of every make."""
    outers: Sequence[Group]
    """What is outside the blocks, one of every make."""
    outer_bytes: Sequence[int]
    """By expert: the slab of what is outside the blocks."""

    @property
    def first(self) -> Mapping[str, Group]:
        """Stands for all experts where shapes are enough: those are the same, encodings may differ."""
        return next(iter(self.groups.values()))


@dataclass(frozen=True)
class Facts:
    """One job on one model and machine. Sizes in bytes unless they say otherwise."""

    job: Job
    of_model: Once[Model]
    """The model, and what plans make of it whatever the job."""
    machine: Machine
    dtype: torch.dtype
    """What the networks compute in."""
    latent: tuple[int, int, int, int]
    """[C, F, H, W]"""
    lengths: tuple[int, ...]
    """Tokens of every prompt: one, or two if any step guides."""
    known: dict[Hashable, Any]
    """Footprints measured so far: a search asks for the same ones often, and each takes a tenth of a second."""
    text_cached: bool = False
    """Whether the features of all prompts are kept from an earlier job."""
    preview: Decoder | None = None
    """What makes previews between the steps, if not a linear map."""

    @cached_property
    def once(self) -> Once[Facts]:
        """What plans make of these facts whatever the budget."""
        return Once(self)

    def sized(self, width: int, height: int, frames: int) -> Facts:
        """The same for another size or length of the video."""
        return self.once(_sized, width, height, frames)

    def measured(self, measure: Callable[[], _T], *what: Hashable) -> _T:
        """A footprint, or what it is made of."""
        if what not in self.known:
            with with_holes() if self.machine.kind == "cuda" else nullcontext():
                self.known[what] = measure()
        found: _T = self.known[what]
        return found

    @property
    def model(self) -> Model:
        return self.of_model.subject

    @property
    def transformers(self) -> Transformers:
        return self.of_transformers.subject

    @property
    def of_transformers(self) -> Once[Transformers]:
        """The transformers, and what plans make of them whatever the size of the video."""
        return self.of_model(_transformers)

    @property
    def spec(self) -> ModelSpec:
        return self.model.spec

    @property
    def grid(self) -> tuple[int, int, int]:
        """Tokens along frames, rows and columns."""
        return self.latent[1], self.latent[2] // 2, self.latent[3] // 2

    @property
    def tokens(self) -> int:
        return numel(self.grid)

    @property
    def residual(self) -> torch.dtype:
        """What the residual streams are in."""
        return residual_dtype(self.job, self.dtype)

    @property
    def passes(self) -> int:
        """Residual streams of a guided step."""
        return len(self.lengths)

    @property
    def state(self) -> dict[str, int]:
        """The host claim of what a job goes on from: the latent and what its solver keeps, in float32."""
        return {"state": 4 * numel(self.latent) * (1 + kept_tensors(self.job.schedule.solver))}

    @property
    def time_rows(self) -> int:
        """Rows of a time embedding: one, and one for the first latent frame if that is given and not denoised."""
        return 2 if self.spec.variant == "ti2v" and self.job.image is not None else 1

    @property
    def context(self) -> dict[str, int]:
        """The claims of the device's own needs, if it has any."""
        own = {"cuda context": self.machine.context, "library workspaces": self.machine.workspaces}
        if self.machine.kind == "cuda":
            own["allocator"] = allocator.ROOM
        return {name: nbytes for name, nbytes in own.items() if nbytes}

    def footprint(self, nbytes: int) -> int:
        """What the device gives up for a long-lived buffer."""
        return segment_size(nbytes) if self.machine.kind == "cuda" else nbytes

    def host(self, claims: Mapping[str, int]) -> dict[str, int]:
        """Host claims of a stage, the program's own included, and what a segment takes over from the one before."""
        own = {"program": PROGRAM_RAM}
        if self.spec.variant == "animate":
            carried = 1 if self.job.driving is None else self.job.driving.carried
            own["carried frames"] = 2 * carried * 12 * self.job.width * self.job.height
        return own | dict(claims)


def gather(
    job: Job,
    model: Model,
    machine: Machine,
    known: dict[Hashable, Any] | None = None,
    *,
    of_model: Once[Model] | None = None,
    text_cached: bool = False,
    preview: Decoder | None = None,
) -> Facts:
    """The facts of a job. Nothing is read but the tokenizer.

    known, of_model: of an earlier plan, on any model and on this one, which spare this one the same work.
    """
    return Facts(
        job,
        of_model or Once(model),
        machine,
        compute_dtype(machine),
        model.spec.denoised_shape(job.width, job.height, job.frames),
        _prompt_lengths(job, model),
        {} if known is None else known,
        text_cached,
        preview,
    )


def _sized(facts: Facts, width: int, height: int, frames: int) -> Facts:
    job = replace(facts.job, width=width, height=height, frames=frames)
    return replace(facts, job=job, latent=facts.spec.denoised_shape(width, height, frames))


def _transformers(model: Model) -> Once[Transformers]:
    # both experts of an imagined model are the same one
    groups = {id(t): t.groups() for t in model.transformers.values()}
    by_expert = {expert: groups[id(t)] for expert, t in model.transformers.items()}
    layouts: dict[BlockId, BlockLayout] = {}
    for expert, found in by_expert.items():
        layouts |= layouts_of(found, expert)
    blocks = [g for found in groups.values() for key, g in found.items() if key.startswith("blocks.")]
    outer = [found["outer"] for found in by_expert.values()]
    outer_bytes = [build_layout(group.refs).nbytes for group in outer]
    return Once(
        Transformers(by_expert, layouts, model.spec.dit.layers, kinds(blocks), kinds(outer), outer_bytes)
    )


def compute_dtype(machine: Machine) -> torch.dtype:
    """What networks compute in there."""
    return torch.bfloat16 if machine.kind == "cuda" else torch.float32


def residual_dtype(job: Job, dtype: torch.dtype) -> torch.dtype:
    """What the residual streams of a job are in, if networks compute in `dtype`."""
    return torch.float32 if job.residual == "fp32" else dtype


def prompts_of(job: Job) -> list[str]:
    """The prompt and, if any step guides, the negative prompt."""
    guided = any(needs_uncond(g) for g in job.schedule.guidance)
    return [job.prompt, job.negative] if guided else [job.prompt]


def _prompt_lengths(job: Job, model: Model) -> tuple[int, ...]:
    """Tokens of each prompt of the job; the most that are possible where there is no tokenizer to count them."""
    if model.tokenizer is None:
        return (model.spec.dit.text_len,) * len(prompts_of(job))
    return tuple(len(ids) for ids in tokenize(model, prompts_of(job)))
