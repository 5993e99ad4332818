"""What every way to condition a video has in common.

A job passes the stages text, condition, prepare, denoise, decode. What a variant needs besides the prompt is made in
between text and prepare, once, and then nothing of what made it is loaded any more. A new variant is one file with
one `Conditioning` in it, and a line in `lowvram.stages.condition.conditioning`:

    plan   the stages it adds to the plan, one for each network it loads, so that no two are loaded at once; each
           claims all it takes, by name, `resting` included: the text features lie on the device meanwhile
    run    those stages, in that order; what it returns is on the host and is all that is kept
    makes  what every tensor of its `Condition` takes: on the host from the first of its stages to the end of the denoise
           (of a driven video: of the decode), and all but `image` on the device too during the steps

What denoise does with each tensor is said in `Condition`. A variant that needs something no field offers adds a field
there (None for all others), its bytes to `makes`, and the place in `prepare` or `dit.forward` that reads it. A resumed
job does not run the stages again: `Condition.to_tensors` is what is saved, so pictures and videos may be gone then.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Protocol

from torch import Tensor

from lowvram.errors import FileError
from lowvram.job import Job
from lowvram.model import Model
from lowvram.offload.budget import Budget, allocated_size
from lowvram.planning.facts import Facts
from lowvram.planning.plan import StagePlan
from lowvram.stages.run import Run


@dataclass(frozen=True, slots=True)
class Condition:
    """What the condition stage hands to prepare and denoise, on the host. None where a variant has none."""

    channels: Tensor | None = None
    """[C, F, h, w] float32: follow the channels of the noisy latent in the input of every pass of every step."""
    image: Tensor | None = None
    """[257 for each picture, image_dim] in the compute dtype: CLIP tokens, embedded by prepare for every expert."""
    fixed: Tensor | None = None
    """[z, n, h, w] float32: the first n latent frames are these before the first and after every step, and their
    time is 0."""
    pose: Tensor | None = None
    """[z, F - 1, h, w] float32: its tokens are added to those of all latent frames but the first."""
    faces: Tensor | None = None
    """[passes, adapters, 2, F, heads, tokens, 128] in the compute dtype: keys and values of every face adapter, for
    the prompt and, if any step guides, for the negative prompt."""

    def to_tensors(self) -> dict[str, Tensor]:
        """The tensors that there are, by name, ready to be saved."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    @staticmethod
    def from_tensors(tensors: Mapping[str, Tensor]) -> Condition:
        """What `to_tensors` gave. FileError for names it does not give."""
        if not set(tensors) <= {f.name for f in fields(Condition)}:
            raise FileError(
                f"a saved condition holds {', '.join(sorted(tensors))}",
                advice="start the job again with `lowvram generate`",
            )
        return Condition(**tensors)


class Conditioning(Protocol):
    """One way to tell a model what to show besides its prompt."""

    def plan(self, facts: Facts, budget: Budget) -> list[StagePlan]:
        """The stages of `run`: the fastest inside the budget, or the smallest. No weights and no pictures are read."""

    def makes(self, facts: Facts) -> Mapping[str, int]:
        """Bytes of every tensor that `run` makes, by the name of its field."""

    def run(self, run: Run, model: Model, job: Job) -> Condition:
        """Do what was planned. Errors as the files it reads raise them."""


def kept(way: Conditioning, facts: Facts) -> int:
    """Bytes of a condition on the device during the steps; of CLIP tokens only what prepare makes of them lies there."""
    return sum(allocated_size(n) for name, n in way.makes(facts).items() if name != "image")


def held(way: Conditioning, facts: Facts) -> dict[str, int]:
    """The claim of a condition on the host."""
    return {"condition": sum(way.makes(facts).values())}


def resting(facts: Facts) -> dict[str, int]:
    """What lies on the device while a condition is made: its context, and the text features."""
    texts = sum(allocated_size(n * facts.spec.dit.text_dim * facts.dtype.itemsize) for n in facts.lengths)
    return facts.context | {"texts": texts}
