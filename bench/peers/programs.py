"""How each program is asked to move the weights of one transformer. Imports nothing of lowvram.

A mode takes the work and gives back a forward that is ready to run. Those that only run on a GPU go, on a CPU, as far
as they can: the program is imported, the model built and the call compared with the signature that it meets.
"""

from __future__ import annotations

import inspect
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from sizes import Work
from torch import Tensor, nn

Forward = Callable[[], Tensor]
Mode = Callable[[Work, ExitStack], Forward]


class NeedsGpu(Exception):
    """The program does nothing without one."""


def model(work: Work) -> Any:
    """diffusers' transformer in host memory."""
    from diffusers import WanTransformer3DModel

    kwargs = {"subfolder": "transformer", "torch_dtype": work.dtype}
    return WanTransformer3DModel.from_pretrained(work.folder, **kwargs).eval()


def forward_of(net: Any, work: Work) -> Forward:
    latent, time, text = work.inputs()
    return lambda: net(latent, time, text, return_dict=False)[0]


def on_gpu(work: Work, call: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """The result of the call; NeedsGpu on a CPU, once it is known that the program takes these arguments."""
    inspect.signature(call).bind(*arguments, **named)
    if work.device.type != "cuda":
        raise NeedsGpu
    return call(*arguments, **named)


# ---- diffusers and accelerate


def resident(work: Work, stack: ExitStack) -> Forward:
    return forward_of(model(work).to(work.device), work)


def group(work: Work, stack: ExitStack, level: str, disk: bool = False) -> Forward:
    from diffusers.hooks import apply_group_offloading

    net, settings = model(work), dict[str, Any](offload_type=level)
    if level == "block_level":
        settings["num_blocks_per_group"] = 1
    if disk:
        settings["offload_to_disk_path"] = stack.enter_context(tempfile.TemporaryDirectory(dir=work.folder))
    if work.device.type == "cuda":
        settings |= {"use_stream": True, "non_blocking": True, "record_stream": True}
    apply_group_offloading(net, onload_device=work.device, offload_device=torch.device("cpu"), **settings)
    return forward_of(net, work)


def layerwise(work: Work, stack: ExitStack) -> Forward:
    net = model(work)
    net.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=work.dtype)
    return forward_of(net.to(work.device), work)


def accelerate(work: Work, stack: ExitStack, disk: bool) -> Forward:
    from accelerate import cpu_offload, disk_offload

    net = model(work)
    if disk:
        there = stack.enter_context(tempfile.TemporaryDirectory(dir=work.folder))
        disk_offload(net, there, execution_device=work.device, offload_buffers=True)
    else:
        cpu_offload(net, execution_device=work.device)
    return forward_of(net, work)


# ---- others


def aircanvas(work: Work, stack: ExitStack, residents: int) -> Forward:
    from aircanvas.runtime.orchestrator import meta_transformer
    from aircanvas.sharding.splitter import split_model
    from aircanvas.streaming.engine import StreamingEngine
    from diffusers import WanTransformer3DModel

    there = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=work.folder)))
    dtype = str(work.dtype).removeprefix("torch.")
    manifest = split_model(str(work.folder), cache_dir=there, compression=None, compute_dtype=dtype)
    net = meta_transformer(WanTransformer3DModel, work.size.config, work.device)
    stack.enter_context(
        StreamingEngine(net, manifest, there, device=work.device, prefetch=True, resident_blocks=residents)
    )
    return forward_of(net, work)


def diffsynth(work: Work, stack: ExitStack, disk: bool) -> Forward:
    from diffusers.models.transformers.transformer_wan import WanTransformerBlock

    net = model(work)
    # Imported by what loads its layers, used by nothing here, and built for one torch only: an empty module will do.
    sys.modules.setdefault("torchvision", ModuleType("torchvision"))
    from diffsynth.core.vram.disk_map import DiskMap
    from diffsynth.core.vram.layers import (
        AutoWrappedLinear,
        AutoWrappedModule,
        AutoWrappedNonRecurseModule,
        enable_vram_management,
    )

    kinds = {
        WanTransformerBlock: AutoWrappedNonRecurseModule, nn.Linear: AutoWrappedLinear,
        nn.Conv3d: AutoWrappedModule, nn.LayerNorm: AutoWrappedModule, nn.RMSNorm: AutoWrappedModule,
    }  # fmt: skip
    asleep: tuple[Any, str] = ("disk", "disk") if disk else (work.dtype, "cpu")
    states = {"offload": asleep, "onload": asleep}
    states |= dict.fromkeys(("preparing", "computation"), (work.dtype, str(work.device)))
    config = {f"{state}_dtype": dtype for state, (dtype, _) in states.items()}
    config |= {f"{state}_device": device for state, (_, device) in states.items()}
    net.scale_shift_table.data = net.scale_shift_table.data.to(work.device)
    files = [str(p) for p in sorted((work.folder / "transformer").glob("*.safetensors"))]
    # Its limit is read from the card's memory: there is none on a CPU, where every layer is fetched for each use.
    limit = work.cap / 1024**3 - 2 if work.device.type == "cuda" and work.cap else None
    enable_vram_management(net, kinds, config, limit, DiskMap(files, "cpu") if disk else None)
    for layer in net.modules() if limit is not None else ():
        if hasattr(layer, "onload"):
            layer.onload()
    return forward_of(net, work)


def ddo(work: Work, stack: ExitStack) -> Forward:
    from diffusers_dynamic_offloader import enable_offload

    net = model(work)
    enable_offload(net, preset="auto", execution_device=str(work.device), offload_device="cpu")
    return forward_of(net, work)


def cache_dit(work: Work, stack: ExitStack, persistent: int) -> Forward:
    from cache_dit import layerwise_offload

    net = model(work)
    names = [f"blocks.{n}" for n in range(work.size.layers)]
    if work.device.type == "cuda":
        outside(net).to(work.device)
    on_gpu(
        work, layerwise_offload, net, module_names=names, onload_device="cuda", offload_device="cpu",
        async_transfer=True, transfer_buckets=2, persistent_buckets=persistent, persistent_bins=max(1, persistent),
    )  # fmt: skip
    return forward_of(net, work)


def flextensor(work: Work, stack: ExitStack) -> Forward:
    from flextensor import OffloadConfig, offload

    config = OffloadConfig(
        include_patterns=["blocks.*"], max_gpu_mem_fraction=share(work), pinned_memory_mode="host_register",
        profiling_iters=2,
    )  # fmt: skip
    net = model(work)
    if work.device.type == "cuda":
        outside(net).to(work.device)
    net = on_gpu(work, offload, net, config=config)
    run = forward_of(net, work)
    for _ in range(config.discovery_iters + config.profiling_iters):
        run()
    return run


def outside(net: Any) -> nn.ModuleList:
    """All that is not a block, with the parameters of the model itself in it."""
    parts = nn.ModuleList(child for name, child in net.named_children() if name != "blocks")
    return parts.append(nn.ParameterList(net.parameters(recurse=False)))  # type: ignore[arg-type]


def share(work: Work) -> float:
    """The cap as a part of the card."""
    if work.device.type != "cuda" or not work.cap:
        return 0.5
    return min(1.0, work.cap / torch.cuda.get_device_properties(work.device).total_memory)


MODES: Mapping[str, Mode] = {
    "diffusers resident": resident,
    "diffusers group block": lambda w, s: group(w, s, "block_level"),
    "diffusers group leaf": lambda w, s: group(w, s, "leaf_level"),
    "diffusers group disk": lambda w, s: group(w, s, "block_level", disk=True),
    "diffusers layerwise fp8": layerwise,
    "accelerate cpu_offload": lambda w, s: accelerate(w, s, False),
    "accelerate disk_offload": lambda w, s: accelerate(w, s, True),
    "aircanvas disk": lambda w, s: aircanvas(w, s, 0),
    "aircanvas disk, 2 resident": lambda w, s: aircanvas(w, s, 2),
    "diffsynth ram": lambda w, s: diffsynth(w, s, False),
    "diffsynth disk": lambda w, s: diffsynth(w, s, True),
    "diffusers-dynamic-offloader auto": ddo,
    "cache-dit layerwise": lambda w, s: cache_dit(w, s, 0),
    "cache-dit layerwise, 4 resident": lambda w, s: cache_dit(w, s, 4),
    "flextensor auto": flextensor,
}
"""By program and way."""
