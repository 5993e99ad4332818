"""One program, one mode, one transformer on disk: a few forwards in this process, their cost as JSON on stdout.

    python bench/peers/forward.py MODE FOLDER

FOLDER holds `transformer/` in diffusers' layout, as `bench/peers/run.py` writes it. Modes of programs that are not
installed end with exit code 3.
"""

from __future__ import annotations

import hashlib
import json
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROUNDS = 3
Forward = Callable[[], Tensor]


def inputs(folder: Path) -> tuple[Tensor, Tensor, Tensor]:
    """Latent [1, 16, 3, 16, 16], time, text [1, 24, text_dim]: the same for everyone."""
    config = json.loads((folder / "transformer" / "config.json").read_text())
    generator = torch.Generator().manual_seed(7)
    latent = torch.randn(1, 16, 3, 16, 16, generator=generator)
    return latent, torch.tensor([700]), torch.randn(1, 24, config["text_dim"], generator=generator)


def diffusers_model(folder: Path) -> Any:
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel.from_pretrained(
        folder, subfolder="transformer", torch_dtype=torch.float32
    ).eval()


def of_diffusers(model: Any, folder: Path) -> Forward:
    latent, t, text = inputs(folder)
    return lambda: model(latent, t, text, return_dict=False)[0]


def diffusers_resident(folder: Path, stack: ExitStack) -> Forward:
    return of_diffusers(diffusers_model(folder), folder)


def diffusers_group(folder: Path, stack: ExitStack, level: str, disk: bool) -> Forward:
    from diffusers.hooks import apply_group_offloading

    model, cpu = diffusers_model(folder), torch.device("cpu")
    settings: dict[str, Any] = {"offload_type": level}
    if level == "block_level":
        settings["num_blocks_per_group"] = 1
    if disk:
        settings["offload_to_disk_path"] = stack.enter_context(tempfile.TemporaryDirectory(dir=folder))
    apply_group_offloading(model, onload_device=cpu, offload_device=cpu, **settings)
    return of_diffusers(model, folder)


def diffusers_layerwise(folder: Path, stack: ExitStack) -> Forward:
    model = diffusers_model(folder)
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    return of_diffusers(model, folder)


def accelerate_offload(folder: Path, stack: ExitStack, disk: bool) -> Forward:
    from accelerate import cpu_offload, disk_offload

    model, cpu = diffusers_model(folder), torch.device("cpu")
    if disk:
        there = stack.enter_context(tempfile.TemporaryDirectory(dir=folder))
        disk_offload(model, there, execution_device=cpu, offload_buffers=True)
    else:
        cpu_offload(model, execution_device=cpu)
    return of_diffusers(model, folder)


def aircanvas(folder: Path, stack: ExitStack, resident: int) -> Forward:
    from aircanvas.runtime.orchestrator import meta_transformer
    from aircanvas.sharding.splitter import split_model
    from aircanvas.streaming.engine import StreamingEngine
    from diffusers import WanTransformer3DModel

    there = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=folder)))
    manifest = split_model(str(folder), cache_dir=there, compression=None, compute_dtype="float32")
    config = json.loads((folder / "transformer" / "config.json").read_text())
    model = meta_transformer(WanTransformer3DModel, config, torch.device("cpu"))
    stack.enter_context(
        StreamingEngine(model, manifest, there, device="cpu", prefetch=True, resident_blocks=resident)
    )
    return of_diffusers(model, folder)


def lowvram(folder: Path, stack: ExitStack, where: str) -> Forward:
    from lowvram.model import Transformer
    from lowvram.models import dit
    from lowvram.models.self_attention import plain_workspace
    from lowvram.offload.device import CpuDevice
    from lowvram.offload.io import FileReader
    from lowvram.offload.placement import Placement
    from lowvram.offload.slab import build_layout
    from lowvram.offload.stream import BlockStream
    from lowvram.quant.identify import identify_path
    from lowvram.quant.spec import HEAD_DIM, DitSpec
    from lowvram.stages.weights import to_params

    found = identify_path(folder / "transformer", FileReader, "dit")
    spec = found.spec
    assert isinstance(spec, DitSpec)
    groups, device = Transformer(found.refs).groups(), CpuDevice()
    layouts = {("x", n): build_layout(groups[f"blocks.{n}"].refs) for n in range(spec.layers)}
    place = Placement(dict.fromkeys(layouts, where), slots=2, ring=2)  # type: ignore[arg-type]
    order = list(layouts) * (ROUNDS + 1)
    stream = stack.enter_context(BlockStream(layouts, place, device, FileReader, order))
    outer_layout = {("x", 0): build_layout(groups["outer"].refs)}
    outside = stack.enter_context(
        BlockStream(outer_layout, Placement({("x", 0): "resident"}), CpuDevice(), FileReader, [("x", 0)])
    )
    outer = to_params(groups["outer"], next(outside)[1])
    latent, t, text = inputs(folder)
    _, _, f, height, width = latent.shape
    tokens = f * height * width // 4
    row = dit.embed_time(outer, spec, t.double(), tokens)
    # diffusers attends to the rows it is given and no others
    rows = outer.linear("text_embedding.0", text[0])
    rows = outer.linear("text_embedding.2", torch.nn.functional.gelu(rows, approximate="tanh"))
    context = dit.Context(rows, torch.zeros(rows.shape[0]))
    rope = dit.rope_table(f, height // 2, width // 2)
    k, v = (torch.empty(spec.heads, tokens, HEAD_DIM) for _ in "kv")
    work = plain_workspace(k, v)

    def forward() -> Tensor:
        blocks = (to_params(groups[f"blocks.{n}"], next(stream)[1]) for n in range(spec.layers))
        return dit.forward(outer, blocks, spec, latent[0], row, (context,), rope, work)[0][None]

    return forward


MODES: dict[str, Callable[[Path, ExitStack], Forward]] = {
    "lowvram resident": lambda f, s: lowvram(f, s, "resident"),
    "lowvram ram": lambda f, s: lowvram(f, s, "ram"),
    "lowvram disk": lambda f, s: lowvram(f, s, "disk"),
    "diffusers resident": diffusers_resident,
    "diffusers group block": lambda f, s: diffusers_group(f, s, "block_level", False),
    "diffusers group leaf": lambda f, s: diffusers_group(f, s, "leaf_level", False),
    "diffusers group disk": lambda f, s: diffusers_group(f, s, "block_level", True),
    "diffusers layerwise fp8": diffusers_layerwise,
    "accelerate cpu_offload": lambda f, s: accelerate_offload(f, s, False),
    "accelerate disk_offload": lambda f, s: accelerate_offload(f, s, True),
    "aircanvas disk": lambda f, s: aircanvas(f, s, 0),
    "aircanvas disk, 2 resident": lambda f, s: aircanvas(f, s, 2),
}


def bytes_read() -> int:
    """Bytes this process has asked files for, from the disk or from the system's cache."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("rchar"))


def main() -> None:
    mode, folder = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    with ExitStack() as stack, torch.inference_mode():
        try:
            forward = MODES[mode](folder, stack)
        except ImportError as missing:
            print(missing, file=sys.stderr)
            sys.exit(3)
        forward()
        before, spent = bytes_read(), []
        for _ in range(ROUNDS):
            began = time.process_time()
            out = forward()
            spent.append(time.process_time() - began)
        facts = {
            "seconds": statistics.median(spent),
            "disk_read": (bytes_read() - before) // ROUNDS,
            "rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "checksum": hashlib.sha256(out.float().contiguous().numpy().tobytes()).hexdigest()[:16],
            "norm": float(out.norm()),
        }
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
