"""How fast checkpoints are forged, beside plain writes of as many bytes; and that a block runs from what was forged.

    python bench/forge_speed.py [--folder FOLDER] [--model wan2.2-t2v-a14b] [--weights fp8] [--layers 4] [--rounds 3]

Forged are the transformers of a model, all of them, with their first --layers blocks. The plain writes put one buffer of
16 MiB to the disk again and again, past the system's cache and through it. All ways wait until the disk has the bytes;
they take turns, each time in a process of its own, whose peak of memory is told. Ratios are taken inside a round.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch

from lowvram.bench.forge import forge_model, forged_files
from lowvram.bench.measure import peak_rss
from lowvram.model import Group
from lowvram.models import dit
from lowvram.models.self_attention import plain_workspace
from lowvram.offload.budget import format_bytes
from lowvram.offload.io import FileReader
from lowvram.offload.slab import as_bytes, build_layout, carve, read_runs
from lowvram.quant.identify import identify_path
from lowvram.quant.spec import HEAD_DIM, DitSpec, ModelSpec
from lowvram.sampling.presets import model_preset
from lowvram.stages.weights import to_params

PIECE = 16 << 20
TOKENS = 64


def model(name: str, layers: int) -> ModelSpec:
    """The named model, cut after its first `layers` blocks."""
    spec = model_preset(name)
    return replace(spec, dit=replace(spec.dit, layers=min(layers, spec.dit.layers)))


def write(path: Path, nbytes: int, *, past: bool) -> None:
    """One buffer again and again, until the disk has `nbytes` rounded up to whole pieces."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | (getattr(os, "O_DIRECT", 0) if past else 0)
    number = os.open(path, flags)
    try:
        with mmap.mmap(-1, PIECE) as memory:
            memory.write(secrets.token_bytes(PIECE))
            for _ in range(-(-nbytes // PIECE)):
                os.write(number, memory)
        os.fsync(number)
    finally:
        os.close(number)


def seconds_of(run: Callable[[], object]) -> dict[str, float]:
    """Time and peak of memory of this process, in seconds and bytes."""
    began = time.perf_counter()
    run()
    return {"seconds": time.perf_counter() - began, "rss": peak_rss()}


def one_block(path: Path) -> str:
    """Open a forged transformer as any other, read its last block, run it on a few tokens; what was seen."""
    found = identify_path(path, FileReader, "dit")
    spec = found.spec
    assert isinstance(spec, DitSpec)
    prefix = f"blocks.{spec.layers - 1}."
    group = Group(
        tuple(replace(r, name=n.removeprefix(prefix)) for n, r in found.refs.items() if n.startswith(prefix)),
        {},
    )
    layout = build_layout(group.refs)
    slab = torch.empty(layout.nbytes, dtype=torch.uint8)
    with FileReader(path) as reader:
        for run in read_runs(layout):
            reader.read_into(run.file_offset, as_bytes(slab[run.slab_offset : run.slab_offset + run.nbytes]))
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(TOKENS, spec.dim, generator=generator)
    before = x.clone()
    row = torch.randn(1, 6, spec.dim, generator=generator) * 0.1
    text = torch.randn(32, spec.dim, generator=generator)
    k, v = (x.new_empty(spec.heads, TOKENS, HEAD_DIM) for _ in "kv")
    began = time.perf_counter()
    with torch.inference_mode():
        dit.block_(
            to_params(group, carve(layout, slab)), x, dit.Time(row[:, 0].contiguous(), row, TOKENS),
            dit.Context(text, torch.zeros(text.shape[0])), dit.rope_table(1, 1, TOKENS), plain_workspace(k, v),
        )  # fmt: skip
    took = time.perf_counter() - began
    if not x.isfinite().all() or torch.equal(x, before):
        raise SystemExit(f"{path}: its block does not make numbers of numbers")
    parts = sorted({ref.encoding.name for ref in group.refs})
    return (
        f"{path.name}: {spec.layers} blocks of width {spec.dim}; the last, {format_bytes(layout.nbytes)} in"
        f" {' and '.join(parts)}, ran on {TOKENS} tokens in {took:.1f} s, spread {float(x.std()):.2f}"
    )


def main() -> None:
    options = parser().parse_args()
    spec, folder = model(options.model, options.layers), options.folder
    if options.way == "forged":
        run: Callable[[], object] = lambda: forge_model(spec, folder, options.weights, 0, spec.expert_names())  # noqa: E731
        print(json.dumps(seconds_of(run)))
    elif options.way:
        print(
            json.dumps(seconds_of(lambda: write(folder / "plain", options.bytes, past=options.way == "past")))
        )
    else:
        with tempfile.TemporaryDirectory(prefix="lowvram-forge-", dir=folder) as inside:
            compare(spec, Path(inside), options)


def compare(spec: ModelSpec, folder: Path, options: argparse.Namespace) -> None:
    """All ways in turn, and then what was forged."""
    rounds: list[Mapping[str, Mapping[str, float]]] = []
    nbytes = 0
    for _ in range(options.rounds):
        files = [Path(forged_files(spec, folder, options.weights)[part]) for part in spec.expert_names()]
        forged = child("forged", folder, options)
        nbytes = sum(file.stat().st_size for file in files)
        if len(rounds) + 1 == options.rounds:
            for file in files:
                print(one_block(file), flush=True)
        for file in files:
            file.unlink()
        found = {"forged": forged}
        for way in ("past", "through"):
            found[way] = child(way, folder, options, nbytes)
            (folder / "plain").unlink()
        rounds.append(found)
    for way in ("forged", "past", "through"):
        label = way if way == "forged" else f"plain write, {way} the cache"
        took, rss = median(each[way]["seconds"] for each in rounds), max(each[way]["rss"] for each in rounds)
        ratio = median(each[way]["seconds"] / each["forged"]["seconds"] for each in rounds)
        told = "" if way == "forged" else f"  forged at {ratio:.2f} of its rate"
        print(
            f"{label:30}  {took:6.1f} s  {nbytes / took / 1e9:5.2f} GB/s  {format_bytes(int(rss))} of RAM{told}"
        )


def child(way: str, folder: Path, options: argparse.Namespace, nbytes: int = 0) -> Mapping[str, float]:
    """What a process that writes in this way says."""
    command = [sys.executable, __file__, "--way", way, "--bytes", str(nbytes), "--folder", str(folder)]
    command += ["--model", options.model, "--weights", options.weights, "--layers", str(options.layers)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout))


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    made.add_argument("--model", default="wan2.2-t2v-a14b")
    made.add_argument("--weights", default="fp8")
    made.add_argument("--layers", type=int, default=4)
    made.add_argument("--rounds", type=int, default=3)
    made.add_argument("--way", choices=("forged", "past", "through"), help=argparse.SUPPRESS)
    made.add_argument("--bytes", type=int, default=0, help=argparse.SUPPRESS)
    return made


if __name__ == "__main__":
    main()
