"""What a plan knows before it is asked for a budget: sizes, counts and layouts, gathered once."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch

from lowvram.job import Job
from lowvram.machine import Machine
from lowvram.model import Group, Model, kinds
from lowvram.offload.budget import segment_size
from lowvram.offload.placement import BlockId
from lowvram.offload.slab import BlockLayout
from lowvram.planning.visits import layouts_of
from lowvram.preview import Decoder
from lowvram.quant.spec import ModelSpec, numel
from lowvram.sampling.guidance import needs_uncond
from lowvram.tokenizer import tokenize

_T = TypeVar("_T")

PROGRAM_RAM = 700_000_000
"""Host memory of the interpreter with torch and the media libraries; bounds what was seen with torch 2.13."""


@dataclass(frozen=True, slots=True)
class Facts:
    """One job on one model and machine. Sizes in bytes unless they say otherwise."""

    job: Job
    model: Model
    machine: Machine
    dtype: torch.dtype
    """What the networks compute in."""
    latent: tuple[int, int, int, int]
    """[C, F, H, W]"""
    lengths: tuple[int, ...]
    """Tokens of every prompt: one, or two if any step guides."""
    groups: Mapping[str, Mapping[str, Group]]
    """Tensors by expert and block."""
    layouts: Mapping[BlockId, BlockLayout]
    """Of all transformer blocks."""
    block_kinds: Sequence[Group]
    """One transformer block of every make."""
    known: dict[Hashable, Any]
    """Footprints measured so far: a search asks for the same ones often, and each takes a tenth of a second."""
    text_cached: bool = False
    """Whether the features of all prompts are kept from an earlier job."""
    preview: Decoder | None = None
    """What makes previews between the steps, if not a linear map."""

    def with_job(self, job: Job) -> Facts:
        """The same for another size or length of the video."""
        return replace(self, job=job, latent=self.spec.denoised_shape(job.width, job.height, job.frames))

    def measured(self, measure: Callable[[], _T], *what: Hashable) -> _T:
        """A footprint, or what it is made of."""
        if what not in self.known:
            self.known[what] = measure()
        found: _T = self.known[what]
        return found

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
    def passes(self) -> int:
        """Residual streams of a guided step."""
        return len(self.lengths)

    @property
    def time_rows(self) -> int:
        """Rows of a time embedding: one, and one for the first latent frame if that is given and not denoised."""
        return 2 if self.spec.variant == "ti2v" and self.job.image is not None else 1

    @property
    def first_expert(self) -> Mapping[str, Group]:
        """Stands for all where shapes are enough: those are the same, encodings may differ."""
        return next(iter(self.groups.values()))

    @property
    def context(self) -> dict[str, int]:
        """The claims of the device's own needs, if it has any."""
        own = {"cuda context": self.machine.context, "library workspaces": self.machine.workspaces}
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
    text_cached: bool = False,
    preview: Decoder | None = None,
) -> Facts:
    """The facts of a job. Nothing is read but the tokenizer.

    known: of an earlier plan, which spares this one the same measurements.
    """
    groups = {e: t.groups() for e, t in model.transformers.items()}
    layouts: dict[BlockId, BlockLayout] = {}
    for expert, found in groups.items():
        layouts |= layouts_of(found, expert)
    return Facts(
        job,
        model,
        machine,
        compute_dtype(machine),
        model.spec.denoised_shape(job.width, job.height, job.frames),
        _prompt_lengths(job, model),
        groups,
        layouts,
        kinds(
            group for found in groups.values() for key, group in found.items() if key.startswith("blocks.")
        ),
        {} if known is None else known,
        text_cached,
        preview,
    )


def compute_dtype(machine: Machine) -> torch.dtype:
    """What networks compute in there."""
    return torch.bfloat16 if machine.kind == "cuda" else torch.float32


def prompts_of(job: Job) -> list[str]:
    """The prompt and, if any step guides, the negative prompt."""
    guided = any(needs_uncond(g) for g in job.schedule.guidance)
    return [job.prompt, job.negative] if guided else [job.prompt]


def _prompt_lengths(job: Job, model: Model) -> tuple[int, ...]:
    """Tokens of each prompt of the job; the most that are possible where there is no tokenizer to count them."""
    if model.tokenizer is None:
        return (model.spec.dit.text_len,) * len(prompts_of(job))
    return tuple(len(ids) for ids in tokenize(model, prompts_of(job)))
