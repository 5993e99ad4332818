"""The faces of a clip -> keys and values of every face adapter, for Wan-Animate."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from lowvram import footprint
from lowvram.conditions.contract import resting
from lowvram.model import Group, Model
from lowvram.models import animate
from lowvram.offload.budget import allocated_size
from lowvram.offload.placement import BlockId, Traffic, plan_traffic
from lowvram.offload.slab import BlockLayout, build_layout
from lowvram.planning.facts import Facts
from lowvram.planning.plan import StagePlan
from lowvram.planning.visits import all_on_disk
from lowvram.quant.face_spec import FACE_PIXELS, FaceSpec
from lowvram.quant.spec import HEAD_DIM, DitSpec, numel
from lowvram.stages.run import Run

FACE_BYTES = 3 * FACE_PIXELS**2
"""Of a face crop."""


def face_groups(model: Model) -> list[Group]:
    """The encoders, then what makes keys and values, adapter by adapter."""
    (transformer,) = model.transformers.values()
    groups = transformer.groups()
    return [groups["face"], *(groups[f"face.{n}"] for n in range(len(model.spec.dit.face_blocks)))]


def kv_shape(spec: DitSpec, passes: int, slots: int) -> tuple[int, ...]:
    """Of all keys and values: see `Condition.faces`."""
    assert spec.face is not None
    return (passes, len(spec.face_blocks), 2, slots, spec.heads, spec.face.tokens, HEAD_DIM)


def plan_faces(facts: Facts, made: Mapping[str, int]) -> StagePlan:
    """The stage "faces": both encoders and what makes keys and values of each adapter, one after the other.

    made: see `held`; the keys and values are among it.
    """
    spec, frames = facts.spec.dit, facts.job.frames
    assert spec.face is not None
    groups, traffic, nbytes = facts.of_model(_streamed)
    encode = partial(footprint.faces_scratch, spec, groups[0], groups[1], frames, facts.dtype)
    scratch = facts.measured(encode, "faces", groups[0].kind, groups[1].kind, frames, facts.dtype)
    # what the second pass adds: a second clip of vectors and of tokens
    kept = numel((facts.latent[1], spec.face.tokens, spec.dim)) * facts.dtype.itemsize
    second = (facts.passes - 1) * (allocated_size(kept) + allocated_size(4 * frames * spec.face.motion))
    machine = facts.machine
    return StagePlan(
        "faces",
        frames + len(groups),
        resting(facts) | traffic.device_claims(facts.footprint) | {"face scratch": scratch + second},
        facts.host(facts.state | traffic.host_claims() | {**made, "driving frames": frames * FACE_BYTES}),
        nbytes,
        nbytes,
        max(frames * _motion_flops(spec.face) / machine.matmul, nbytes / machine.link, nbytes / machine.disk),
        {"segments": _segments(facts)},
    )


def _layouts(groups: Sequence[Group]) -> dict[BlockId, BlockLayout]:
    return {("faces", n): build_layout(group.refs) for n, group in enumerate(groups)}


def _streamed(model: Model) -> tuple[list[Group], Traffic, int]:
    groups = face_groups(model)
    layouts = _layouts(groups)
    traffic = plan_traffic(layouts, all_on_disk(layouts), list(layouts))
    return groups, traffic, sum(layout.nbytes for layout in layouts.values())


def _segments(facts: Facts) -> str:
    """How a video is cut, in words."""
    job = facts.job
    if job.driving is None:
        return (
            f"any number, of {job.frames} frames; memory is the same for all of them, times are of the first"
        )
    many = job.driving.segments(job.frames)
    return f"{many} of {job.frames} frames; memory is the same for all of them, times are of the first"


def _motion_flops(face: FaceSpec) -> float:
    """Of one face crop through the convolutions of the motion encoder."""
    flops, pixels = 0.0, float(FACE_PIXELS**2)
    for before, after in pairwise(face.widths):
        flops += 2 * pixels * 9 * before * before + pixels / 2 * (9 + 1) * before * after
        pixels /= 4
    return flops


@torch.inference_mode()
def encode_faces(run: Run, model: Model, faces: Iterable[Tensor], frames: int, passes: int) -> Tensor:
    """Face crops [3, 512, 512] in -1..1 on the host, one a frame -> keys and values on the host.

    With two passes the second is for a face that does not move: all pixels -1, as upstream. Motion and tokens are
    computed in float32 whatever the transformer computes in: it costs little, and the linear layers are sensitive.
    """
    spec, dtype, device = model.spec.dit, run.plan.dtype, run.device.torch_device
    groups = face_groups(model)
    layouts = _layouts(groups)
    out: list[Tensor] = []
    with run.stage("faces") as (_, traffic), run.streamed(layouts, traffic) as stream:
        tokens: list[Tensor] = []
        for (_, n), views in stream:
            run.check_ram()
            p = run.params(groups[n], views)
            if n == 0:
                basis = animate.directions(p)
                vectors = torch.empty(frames, basis.shape[0], device=device)
                for i, face in enumerate(faces):
                    run.check_ram()
                    vectors[i] = animate.motion_vectors(p, face[None].to(device), basis)[0]
                    run.step("faces")
                tokens.append(animate.face_tokens(p, vectors).to(dtype))
                if passes == 2:
                    still = torch.full((1, 3, FACE_PIXELS, FACE_PIXELS), -1.0, device=device)
                    vectors[:] = animate.motion_vectors(p, still, basis)
                    tokens.append(animate.face_tokens(p, vectors).to(dtype))
                del basis, vectors
            else:
                made = [animate.keys_values(p, each) for each in tokens]
                out.append(torch.stack([torch.stack([kv.k.cpu(), kv.v.cpu()]) for kv in made]))
            run.step("faces")
    kv = torch.stack(out, dim=1)
    assert kv.shape == kv_shape(spec, passes, kv.shape[3])
    return kv
