"""Score nano-animate through the product: held-out characters and new tracks in, colour, shape, path and size from pixels.

python bench/nano/score_animate.py [--mode replace] [--frames 25] [--seed 0] [--model FOLDER] [--sheet FILE.png]
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
from driven import combinations, draw, follows, summary, to_bytes, write_folder
from PIL import Image

from lowvram import Runtime
from lowvram.media.video import read_frames


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="nano-animate")
    parser.add_argument("--mode", choices=["animate", "replace"], default="animate")
    parser.add_argument("--frames", type=int, default=25, help="9 are one segment, 25 are three")
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--sheet", type=Path, default=None, help="the picture, then first, middle and last frame"
    )
    args = parser.parse_args()
    pipe = Runtime(device="cpu").load(args.model)
    rng = np.random.default_rng(1000 + args.seed)
    results, rows, started = [], [], time.time()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for n, chosen in enumerate(combinations()[1]):
            scene = draw(rng, chosen, args.frames, replace=args.mode == "replace")
            write_folder(scene, folder)
            animation = pipe.animate(folder, args.mode, seed=args.seed + n, steps=args.steps)
            animation.save(folder / "out.mp4", overwrite=True)
            video = np.stack(list(read_frames(folder / "out.mp4")))
            results.append(follows(video, scene))
            picture = to_bytes(scene.picture()[None])[0]
            rows.append(np.concatenate([picture, video[0], video[len(video) // 2], video[-1]], axis=1))
    if args.sheet:
        Image.fromarray(np.concatenate(rows)).save(args.sheet)
    about = {"videos": len(results), "mode": args.mode, "frames": args.frames}
    print(json.dumps(about | summary(results) | {"seconds": round(time.time() - started)}))


if __name__ == "__main__":
    main()
