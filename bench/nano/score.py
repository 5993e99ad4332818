"""Score nano through the product: held-out prompts in, videos out, colour, direction and shape read from pixels.

python bench/nano/score.py [--preset lightning-4] [--seed 0] [--model FOLDER] [--sheet FILE.png] [--json]
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
from data import score, split
from PIL import Image

from lowvram import Runtime


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="nano")
    parser.add_argument("--preset", default=None)
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--guidance", type=float, default=None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sheet", type=Path, default=None, help="first, middle and last frame of every clip")
    args = parser.parse_args()
    pipe = Runtime(device="cpu").load(args.model)
    settings = {"preset": args.preset, "steps": args.steps}
    if args.guidance is not None:
        settings["guidance"] = (args.guidance, args.guidance)
    scenes = split()[1]
    results, rows, plan, started = [], [], None, time.time()
    for i, scene in enumerate(scenes):
        job = pipe.job(scene.caption(), seed=args.seed + i, **settings)
        plan = plan or pipe.plan_job(job)
        video = np.stack(list(pipe.run(job, plan=plan).frames()))
        results.append(score(video, scene))
        rows.append(np.concatenate([video[0], video[len(video) // 2], video[-1]], axis=1))
    if args.sheet:
        columns = [np.concatenate(rows[i : i + 12], axis=0) for i in range(0, len(rows), 12)]
        Image.fromarray(np.concatenate(columns, axis=1)).save(args.sheet)
    shares = {k: float(np.mean([getattr(r, k) for r in results])) for k in ("colour", "direction", "shape")}
    print(
        json.dumps(
            {"prompts": len(scenes), "preset": args.preset, **shares, "seconds": round(time.time() - started)}
        )
    )


if __name__ == "__main__":
    main()
