"""The peers' table: the same small Wan transformer, the same inputs, float32 on one processor core.

    python bench/peers/run.py [-o bench/results/peers-cpu.json] [--extra FOLDER]

Every program and mode runs in a process of its own, one after the other. --extra: a folder with packages that are
measured only, such as aircanvas, installed there with `pip install --no-deps --target FOLDER aircanvas==0.1.0`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path
from typing import Any

import torch

from lowvram import __version__
from lowvram.bench.results import Peer, new_results, save
from lowvram.survey import identify

HERE = Path(__file__).parent
MODES = (
    "lowvram resident", "diffusers resident", "aircanvas disk", "lowvram disk", "diffusers group disk",
    "diffusers group block", "accelerate disk_offload", "lowvram ram", "diffusers layerwise fp8",
    "diffusers group leaf", "accelerate cpu_offload", "aircanvas disk, 2 resident",
)  # fmt: skip
"""In the order in which they run: a run that is stopped leaves what came first."""
RESIDENT = {"lowvram": "lowvram resident"}
"""What a program is compared with: itself, or diffusers, whose module the others move."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-o", "--output", type=Path, default=Path("bench/results/peers-cpu.json"))
    parser.add_argument("--extra", type=Path, default=None)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lowvram-peers-") as folder:
        write_model(Path(folder))
        results = new_results(identify("cpu"), datetime.now(UTC).strftime("%Y-%m-%d"))
        options.output.parent.mkdir(parents=True, exist_ok=True)
        found: dict[str, dict[str, Any]] = {}
        for mode in MODES:
            found[mode] = measure(mode, folder, options.extra)
            results.peers = [row(m, found, options.extra) for m in sorted(found)]
            save(options.output, results)
    for peer in results.peers:
        print(
            peer.name, peer.mode, peer.seconds, peer.overhead, peer.rss, peer.disk_read, peer.exact, peer.note
        )


def write_model(folder: Path) -> None:
    """6 blocks of width 768: 57 million parameters, 230 MB in float32."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=6, attention_head_dim=128, in_channels=16, out_channels=16, text_dim=512,
        freq_dim=256, ffn_dim=3072, num_layers=6,
    )  # fmt: skip
    model.save_pretrained(folder / "transformer")


def measure(mode: str, folder: str, extra: Path | None) -> dict[str, Any]:
    paths = [str(p) for p in (extra, os.environ.get("PYTHONPATH")) if p]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(
        [sys.executable, str(HERE / "forward.py"), mode, folder],
        capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    if done.returncode == 0:
        return dict(json.loads(done.stdout.splitlines()[-1]))
    last = (done.stderr.strip().splitlines() or [""])[-1]
    return {"note": "not installed" if done.returncode == 3 else f"failed: {last[:200]}"}


def row(mode: str, found: dict[str, dict[str, Any]], extra: Path | None) -> Peer:
    name, _, way = mode.partition(" ")
    here, whole = found[mode], found.get(RESIDENT.get(name, "diffusers resident"), {})
    measured = "seconds" in here and "seconds" in whole
    return Peer(
        name=name,
        version=version_of(name, extra),
        mode=way,
        seconds=here.get("seconds"),
        overhead=here["seconds"] / whole["seconds"] if measured else None,
        rss=here.get("rss"),
        disk_read=here.get("disk_read"),
        exact=here["checksum"] == whole["checksum"] if measured else None,
        note=here.get("note", ""),
    )


def version_of(name: str, extra: Path | None) -> str:
    if name == "lowvram":
        return __version__
    try:
        return version(name)
    except PackageNotFoundError:
        found = distributions(path=[str(extra)]) if extra else ()
        return next((d.version for d in found if d.name == name), "")


if __name__ == "__main__":
    main()
