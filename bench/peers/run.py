"""The peers' table: the same transformer, the same inputs, one process for every program and mode.

    python bench/peers/run.py --make /tmp/peers                  an environment for each program, once
    python bench/peers/run.py --peers /tmp/peers                 the small transformer, float32, one processor core
    python bench/peers/run.py --peers /tmp/peers --device cuda --size 480p --cap 16
                                                                 an expert of A14B, bfloat16, in 16 GB
    python bench/peers/run.py ... --folder /disk --minutes 9.5   what fits in a slot; the same command goes on later
    python bench/peers/run.py --only lowvram --only diffusers    some programs

Without a network, `PIP_NO_INDEX=1 PIP_FIND_LINKS=wheels` before --make takes what `python bench/wheels.py wheels --peers`
has collected.

All run in turn, then all again: a ratio is taken inside each round, and the median of the rounds is written. On a GPU
the rest of the card is taken away, but for what is compared with: with everything resident a program has the whole card.
An expert of A14B needs 29 GB of disk and of RAM, twice that for aircanvas.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import torch
from environments import PINNED, make, python_of, version_of
from sizes import SIZES, Size

from lowvram import __version__
from lowvram.bench.ballast import ballast
from lowvram.bench.forge import forge
from lowvram.bench.results import Peer, new_results, save
from lowvram.errors import OutOfMemoryError
from lowvram.offload.io import write_atomic
from lowvram.survey import identify

HERE = Path(__file__).parent
MODES = (
    "lowvram resident", "diffusers resident", "lowvram disk", "aircanvas disk", "diffusers group disk", "diffsynth disk",
    "accelerate disk_offload", "lowvram ram", "diffusers group block", "diffusers-dynamic-offloader auto",
    "accelerate cpu_offload", "diffsynth ram", "aircanvas disk, 2 resident", "diffusers group leaf",
    "diffusers layerwise fp8", "cache-dit layerwise", "cache-dit layerwise, 4 resident", "flextensor auto",
    "mmgp budget",
)  # fmt: skip
"""In the order in which they run: a run that is stopped leaves what came first."""
THEIRS = "diffusers resident"
"""What every program but ours is compared with: it is the module that they move."""
WEIGHTS = "diffusion_pytorch_model.safetensors"
ROUNDS = "rounds.json"
"""In the folder of the work: what was measured so far."""
LIMIT = 900.0
"""Seconds that a process may take."""
Facts = dict[str, Any]


def main() -> None:
    options = parser().parse_args()
    if options.make:
        for program in PINNED:
            try:
                make(program, options.make)
            except subprocess.CalledProcessError:  # pip has said why
                print(f"{program}: could not be installed, and is left out", file=sys.stderr)
        return
    modes = [m for m in MODES if not options.only or m.split()[0] in options.only]
    results = new_results(identify(options.device), datetime.now(UTC).strftime("%Y-%m-%d"))
    output = options.output or Path("bench/results") / f"peers-{options.device}-{options.size}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * options.minutes
    with work_folder(options) as folder:
        rounds = begun(folder)
        for n, mode in ((n, mode) for n in range(options.rounds) for mode in modes):
            rounds += [{}] if n == len(rounds) else []
            if mode in rounds[n] or (n and "seconds" not in rounds[0].get(mode, {})):
                continue
            left = end - time.monotonic()
            if left < 10:
                print("no time left in this slot: give the same command again")
                break
            rounds[n][mode] = measure(mode, str(folder), options, min(LIMIT, left))
            write_atomic(folder / ROUNDS, json.dumps(rounds).encode())
            results.peers = rows(rounds, folder, options.peers, options.size)
            save(output, results)
    for peer in results.peers:
        print(line(peer))
    print(output)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("-o", "--output", type=Path, default=None)
    made.add_argument("--make", type=Path, default=None, help="make the environments here, and no more")
    made.add_argument("--peers", type=Path, default=None, help="where the environments are")
    made.add_argument("--only", action="append", default=[], help="program")
    made.add_argument("--size", choices=tuple(SIZES), default="small")
    made.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    made.add_argument("--cap", type=float, default=0, help="GB of the GPU; all of it without")
    made.add_argument("--rounds", type=int, default=3)
    made.add_argument("--folder", type=Path, default=None, help="where the transformer is written and kept")
    made.add_argument("--minutes", type=float, default=600, help="when to stop starting programs")
    return made


@contextmanager
def work_folder(options: argparse.Namespace) -> Iterator[Path]:
    """Where the transformer and every output are: kept under --folder for the next slot, else removed in the end."""
    with ExitStack() as stack:
        if options.folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lowvram-peers-")))
        else:
            folder = options.folder / f"lowvram-peers-{options.device}-{options.size}"
            folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "transformer" / WEIGHTS).exists():
            write_model(folder, SIZES[options.size], "bf16" if options.device == "cuda" else "fp32")
        yield folder


def begun(folder: Path) -> list[dict[str, Facts]]:
    """What earlier slots measured, a dictionary by mode for each round; what ran out of time then is tried again."""
    try:
        rounds: list[dict[str, Facts]] = json.loads((folder / ROUNDS).read_text())
    except FileNotFoundError:
        return []
    return [{m: f for m, f in each.items() if not f.get("note", "").startswith("stopped")} for each in rounds]


def write_model(folder: Path, size: Size, weights: str) -> None:
    """Random weights in diffusers' layout."""
    from diffusers import WanTransformer3DModel

    with torch.device("meta"):
        net = WanTransformer3DModel(**size.config)
    there = folder / "transformer"
    there.mkdir(exist_ok=True)
    net.save_config(there)
    shapes = {name: tuple(value.shape) for name, value in net.state_dict().items()}
    forge(shapes, there / WEIGHTS, weights)


def measure(mode: str, folder: str, options: argparse.Namespace, limit: float = LIMIT) -> Facts:
    """What a process that does the mode says within `limit` seconds, or a note why it says nothing."""
    python = python_of(mode.split()[0], options.peers)
    cap = 0 if mode.endswith(" resident") else int(options.cap * 1e9)
    command = [str(python), str(HERE / "forward.py"), mode, folder, options.size, options.device, str(cap)]
    with ExitStack() as stack:
        try:
            if options.device == "cuda" and cap:
                stack.enter_context(ballast(cap))
            done = subprocess.run(
                command, capture_output=True, text=True, check=False, timeout=limit,
                env=os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"},
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return {"note": f"stopped after {limit:.0f} s"}
        except OutOfMemoryError as error:
            return {"note": f"failed: {error.found}"}
    if done.returncode == 0:
        return dict(json.loads(done.stdout.splitlines()[-1]))
    last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    said = {3: "not installed", 4: "needs a GPU"}
    return {"note": said.get(done.returncode, f"failed: {last[:200]}")}


def rows(rounds: Sequence[Mapping[str, Facts]], folder: Path, peers: Path | None, size: str) -> list[Peer]:
    """A row a mode, of the rounds so far."""
    found = {m: [r[m] for r in rounds if "seconds" in r.get(m, {})] for m in rounds[0]}
    made = []
    for mode, here in found.items():
        name, _, way = mode.partition(" ")
        whole = "lowvram resident" if name == "lowvram" else THEIRS
        ratios = [
            r[mode]["seconds"] / r[whole]["seconds"]
            for r in rounds
            if "seconds" in r.get(mode, {}) and "seconds" in r.get(whole, {})
        ]
        sums = {facts["checksum"] for m in (mode, whole) for facts in found.get(m, ())}
        made.append(
            Peer(
                name=name,
                version=__version__ if name == "lowvram" else version_of(name, peers),
                mode=way,
                size=size,
                seconds=median(f["seconds"] for f in here) if here else None,
                overhead=median(ratios) if ratios else None,
                overheads=ratios,
                rss=max((f["rss"] for f in here), default=None),
                vram=here[-1]["vram"] if here else None,
                driver=here[-1]["driver"] if here else None,
                disk_read=here[-1]["disk_read"] if here else None,
                exact=len(sums) == 1 if ratios else None,
                difference=difference(folder, mode) if here else None,
                note="" if here else rounds[0][mode]["note"],
            )
        )
    return made


def difference(folder: Path, mode: str) -> float | None:
    """Norm of what differs from diffusers with everything resident, over the norm of that; None without it."""
    with suppress(FileNotFoundError):
        here, theirs = (torch.load(folder / f"{m}.pt") for m in (mode, THEIRS))
        return float((here.double() - theirs.double()).norm() / theirs.double().norm())
    return None


def line(peer: Peer) -> str:
    if peer.seconds is None:
        return f"{peer.name} {peer.mode}: {peer.note}"
    ratio = "" if peer.overhead is None else f", {peer.overhead:.2f} of resident"
    return f"{peer.name} {peer.mode}: {peer.seconds:.2f} s{ratio}, {(peer.rss or 0) / 1e6:.0f} MB, exact: {peer.exact}"


if __name__ == "__main__":
    sys.exit(main())
