"""How fast weights are decoded where no kernel does it: a matrix 5120 x 13824 in every encoding, to bfloat16.

    python bench/decode_by_torch.py [--device cuda] [--against CHECKOUT] [ENCODING...]

Times are the best of several rounds, as multiples of copying the same matrix in bfloat16. With --against the same is
measured with another checkout of lowvram, in turns with this one, and the ratio of both is printed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

ENCODINGS = [
    "fp8",
    "int8",
    "int8_convrot",
    "int4",
    "nf4",
    "nvfp4",
    "q8_0",
    "q4_0",
    "q4_1",
    "q5_0",
    "q5_1",
    "q2_k",
    "q3_k",
    "q4_k",
    "q5_k",
    "q6_k",
    "iq4_nl",
    "iq4_xs",
]
SHAPE = (5120, 13824)
ROUNDS, REPEATS = 2, 2
HERE = Path(__file__).resolve().parents[1]


def measure(names: list[str], device: str) -> dict[str, float]:
    """Seconds of one decode by name of the encoding; "copy" is the copy in bfloat16."""
    import time

    import torch

    from lowvram.quant.encodings.registry import encoding_by_name

    def best(work) -> float:  # type: ignore[no-untyped-def]
        times = []
        for _ in range(REPEATS):
            if device == "cuda":
                torch.cuda.synchronize()
            began = time.process_time() if device == "cpu" else time.perf_counter()
            work()
            if device == "cuda":
                torch.cuda.synchronize()
            times.append((time.process_time() if device == "cpu" else time.perf_counter()) - began)
        return min(times)

    torch.set_num_threads(1)
    out = torch.empty(SHAPE, dtype=torch.bfloat16, device=device)
    source = torch.ones_like(out)
    found = {"copy": best(lambda: out.copy_(source))}
    strip = torch.randn(64, SHAPE[1], generator=torch.Generator().manual_seed(0)) * 0.02
    for name in names:
        encoding = encoding_by_name(name)
        # One strip again and again: what the numbers are makes no difference. Formats whose parts are no rows take it all.
        if encoding.by_rows and len(encoding.layout((64, SHAPE[1]))) == 1:
            parts = {r: p.repeat(SHAPE[0] // 64, 1) for r, p in encoding.encode(strip).items()}
        else:
            parts = encoding.encode(strip.repeat(SHAPE[0] // 64, 1))
        parts = {role: part.to(device) for role, part in parts.items()}
        found[name] = best(lambda e=encoding, p=parts: e.decode(p, SHAPE, torch.bfloat16, out))  # type: ignore[misc]
    return found


def worker(checkout: Path, names: list[str], device: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--worker", "--device", device, *names]
    environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--against", type=Path, help="another checkout of lowvram")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("encodings", nargs="*", default=ENCODINGS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(measure(args.encodings, args.device)))
        return
    checkouts = [HERE, *([args.against.resolve()] if args.against else [])]
    best: list[dict[str, float]] = [{} for _ in checkouts]
    for _ in range(ROUNDS):
        for checkout, times in zip(checkouts, best, strict=True):
            for name, seconds in worker(checkout, args.encodings, args.device).items():
                times[name] = min(seconds, times.get(name, seconds))
    print(f"{'':12}  {'ms':>8}  {'copies':>7}" + ("   other ms   faster" if args.against else ""))
    for name in ("copy", *args.encodings):
        line = f"{name:12}  {best[0][name] * 1e3:8.1f}  {best[0][name] / best[0]['copy']:7.1f}"
        if args.against:
            line += f"  {best[1][name] * 1e3:9.1f}  {best[1][name] / best[0][name]:6.2f}x"
        print(line)


if __name__ == "__main__":
    main()
