"""The 2.1 VAE's decode at 720p beside diffusers', untiled and tiled: seconds and peak, random weights, in one run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from math import prod
from typing import Any

import torch
from torch import Tensor

from lowvram.bench.results import Fact
from lowvram.codings import Decodings
from lowvram.footprint import with_holes
from lowvram.imagined import imagined_model
from lowvram.model import vae_group
from lowvram.models import vae, vae_clip
from lowvram.models.vae_tiles import Tiling
from lowvram.offload.allocator import ROOM
from lowvram.offload.budget import Ledger, segment_size
from lowvram.offload.device import CpuDevice, Device
from lowvram.offload.estimate import track
from lowvram.quant.names import vae_renames
from lowvram.quant.spec import VaeSpec
from lowvram.sampling.presets import model_preset
from lowvram.stages.outbox import Outbox
from lowvram.stages.tiles import Shelf, settled
from lowvram.survey import CONTEXT, WORKSPACES, identify
from lowvram.tiling_search import forecast
from lowvram.triton_kernels.dispatch import ops_obstacle
from lowvram.triton_kernels.ops import ops_for

GB = 10**9
LENGTHS = (81, 121)
PLANE = (90, 160)
BUDGET = 3 * GB
"""CUDA context and weights included."""
TIMES = 2
"""The first decode also loads kernels."""


def compare(kind: str, *, small: bool) -> Iterator[dict[str, Fact]]:
    """Seconds of a decode to frames in bf16, and its peak beside the weights in bytes: ours whole and inside 3 GB,
    diffusers' untiled and tiled; all that is known after each. `small`: few frames of a small decoder in float32.
    ImportError without diffusers."""
    from diffusers import AutoencoderKLWan

    plane, lengths, dtype = (PLANE, LENGTHS, torch.bfloat16) if not small else ((4, 32), (5,), torch.float32)
    spec = VaeSpec("2.1", 8, 8, 16, 2) if small else VaeSpec()
    torch.manual_seed(0)
    reference: Any = AutoencoderKLWan(base_dim=spec.base)  # type: ignore[no-untyped-call]
    reference.eval().to(kind, dtype)
    rename, shapes = vae_renames(spec.version, spec.res_blocks).to_native, spec.shapes()
    w = {str(rename(k)): v.detach() for k, v in reference.state_dict().items()}
    w = {name: value.reshape(shapes[name]) for name, value in w.items()}
    facts: dict[str, Fact] = {}
    with torch.inference_mode():
        for frames in lengths:
            latents = (frames - 1) // vae_clip.FRAMES + 1
            z = torch.randn(1, spec.z, latents, *plane)
            mean, std = vae.statistics(spec, z)
            scaled = (z * std + mean).to(kind, dtype)
            ways: dict[str, Callable[[], object]] = {
                f"ours, {tiling.words}": lambda t=tiling, z=z: _decode(spec, w, z, t, kind, dtype)  # type: ignore[misc]
                for tiling in _tilings(spec, z.shape, kind, dtype)
            }
            ways["diffusers untiled"] = lambda x=scaled: _whole(reference, x)  # type: ignore[misc]
            ways["diffusers tiled"] = lambda x=scaled: _tiled(reference, x)  # type: ignore[misc]
            for name, work in ways.items():
                refused = _refused(kind)
                with settled() if name.startswith("ours") else nullcontext():
                    seconds, peak = _measured(work, kind)
                size = f"{plane[1] * 8}x{plane[0] * 8}x{frames}"
                facts[f"{size} {name}: seconds"] = seconds
                facts[f"{size} {name}: peak bytes"] = peak
                facts[f"{size} {name}: allocations refused"] = _refused(kind) - refused
                yield dict(facts)


def _tilings(spec: VaeSpec, shape: tuple[int, ...], kind: str, dtype: torch.dtype) -> Iterator[Tiling]:
    """Whole frames, and the fastest inside the budget; a dry run has to be told to cut."""
    yield Tiling()
    if kind == "cpu":
        yield Tiling(1, 2, visit=1, kept=False, banded=True, ahead=True)
        return
    model = imagined_model("wan2.2-t2v-a14b", model_preset("wan2.2-t2v-a14b"), "bf16")
    group, (_, z, latents, rows, columns) = vae_group(model, vae.DECODER), shape
    frame = 3 * 64 * rows * columns
    ways = Decodings(spec, group, (z, latents, rows, columns), frame, dtype, segment_size)
    fixed = CONTEXT + WORKSPACES + ROOM + sum(ref.nbytes for ref in group.refs)
    with with_holes():  # as jobs are planned for a card
        yield ways.choose(BUDGET - fixed, 32 * GB, lambda cost: forecast(cost, 8, 20 * GB)).tiling


def _device(kind: str, fixed: int | None) -> Device:
    """With the cap of the budget, beside what is held already, if `fixed`: bytes of our weights, which are among that."""
    ram = Ledger(None, "RAM")
    if kind == "cpu":
        return CpuDevice(ram=ram)
    from lowvram.offload.cuda import CudaDevice

    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    room = free if fixed is None else BUDGET - fixed
    return CudaDevice(0, min(free, room) + torch.cuda.memory_reserved(), ram=ram)


def _decode(
    spec: VaeSpec, w: dict[str, Tensor], z: Tensor, tiling: Tiling, kind: str, dtype: torch.dtype
) -> None:
    """As the decode stage has it, frames converted and copied to the host."""
    plane, arch = (z.shape[3], z.shape[4]), identify(kind).arch
    memories = vae_clip.decoder(spec).memories(tiling, plane, spec.shapes())
    ours = sum(v.nbytes for name, v in w.items() if name.startswith(vae.DECODER))
    visits, device = -(-z.shape[2] // tiling.visit), _device(kind, ours if tiling.count > 1 else None)
    norm = ops_for(arch, ops_obstacle(device.torch_device, arch)).rms_silu
    try:
        with (
            Outbox(device, 3 * 64 * prod(plane)) as outbox,
            Shelf(device, memories, dtype, visits, kept=tiling.kept, ahead=tiling.ahead, norm=norm) as shelf,
        ):
            sent = None
            for piece in vae_clip.decode(spec, w, z, tiling, shelf, device.torch_device, dtype):
                arriving = outbox.send(vae.to_uint8(piece.pixels))
                if sent is not None:
                    sent.arrived()
                sent = arriving
    finally:
        device.close()


def _whole(reference: Any, x: Tensor) -> None:
    reference.disable_tiling()
    reference.decode(x)


def _tiled(reference: Any, x: Tensor) -> None:
    reference.enable_tiling()
    reference.decode(x)


def _refused(kind: str) -> int:
    """Allocations so far that found no room. Nobody is told of the workspace of a convolution: cuDNN takes another algorithm,
    which is slower and may give other last bits."""
    return int(torch.cuda.memory_stats().get("num_ooms", 0)) if kind == "cuda" else 0


def _measured(work: Callable[[], object], kind: str) -> tuple[Fact, Fact]:
    """The least seconds of a few times, and the peak of what was allocated; why not, if memory runs out."""
    if kind == "cpu":
        with track() as tracker:
            began = time.perf_counter()
            work()
            return time.perf_counter() - began, tracker.peak().peak_bytes
    took = []
    try:
        before = torch.cuda.memory_allocated()
        for _ in range(TIMES):
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
            began = time.perf_counter()
            work()
            torch.cuda.synchronize()
            took.append(time.perf_counter() - began)
        return min(took), torch.cuda.max_memory_allocated() - before
    except torch.OutOfMemoryError as error:
        return f"out of memory: {str(error).splitlines()[0]}", None
