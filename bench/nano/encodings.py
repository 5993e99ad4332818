"""nano in every format that `lowvram quantize` writes: size, weight error, and what that does to its videos.

    python bench/nano/encodings.py [--prompts 4] [--formats bf16,fp8,...]     measure, then write table and picture
    python bench/nano/encodings.py --draw                                     table and picture of the last measurement

Every format runs twice on the first prompt, with its blocks resident and streamed: the latents must be equal bit for
bit. All runs are 4 steps with the LoRA pair on top of the quantised experts (`--preset lightning-4`).
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from data import Scene, score, split
from PIL import Image, ImageDraw, ImageFont

from lowvram import Runtime
from lowvram.api import Pipeline
from lowvram.conversion import plan_conversion, run_conversion
from lowvram.offload.placement import Placement
from lowvram.planning.plan import Plan
from lowvram.quant.encodings.kquants import Blocks
from lowvram.quant.encodings.registry import encoding_by_name

HERE = Path(__file__).parent
NANO = HERE.parents[1] / "lowvram" / "assets" / "nano"
FORMATS = [
    "bf16",
    "fp8",
    "fp8_row",
    "fp8_e4m3",
    "fp8_e5m2",
    "int8",
    "int8_tensor",
    "int8_convrot",
    "q8_0",
    "q6_k",
    "q5_k_m",
    "q5_1",
    "q5_0",
    "q4_k_m",
    "q4_k_s",
    "q4_1",
    "q4_0",
    "iq4_nl",
    "iq4_xs",
    "nvfp4",
    "nf4",
    "fp4",
    "int4",
    "int4_convrot",
    "q3_k_l",
    "q3_k_m",
    "q3_k_s",
    "q2_k",
]
GB = 10**9

Row = dict[str, Any]


def quantise(to: str, source: dict[str, Path], folder: Path) -> tuple[dict[str, str], int, float]:
    """Both experts in the format `to`: their paths, bytes of both, and the error of what was quantised."""
    suffix = ".gguf" if isinstance(encoding_by_name(to), Blocks) else ".safetensors"
    files, nbytes, errors = {}, 0, []
    for expert, path in source.items():
        out = folder / f"{expert}-{to}{suffix}"
        done = list(run_conversion(plan_conversion(path, out, to)))
        files[expert], nbytes = str(out), nbytes + out.stat().st_size
        errors += [d.error for d in done if d.error]
    return files, nbytes, math.sqrt(sum(e * e for e in errors) / len(errors)) if errors else 0.0


def videos(pipe: Pipeline, plan: Plan, scenes: list[Scene]) -> list[np.ndarray]:
    made = []
    for i, scene in enumerate(scenes):
        job = pipe.job(scene.caption(), seed=i, preset="lightning-4")
        made.append(np.stack(list(pipe.run(job, plan=plan).frames())))
    return made


def equal_when_streamed(pipe: Pipeline, plan: Plan) -> bool:
    """Whether the latent of the first prompt has the same bits with every block streamed from disk."""
    job = pipe.job(split()[1][0].caption(), preset="lightning-4")
    assert plan.blocks()["resident"] == 12
    streamed = replace(plan, denoise=Placement(dict.fromkeys(plan.denoise.where, "disk"), slots=1, ring=1))
    return torch.equal(pipe.run(job, plan=plan).latent, pipe.run(job, plan=streamed).latent)


def psnr(found: list[np.ndarray], expected: list[np.ndarray]) -> float:
    """dB over all frames of all videos; infinite for the same frames."""
    error = np.mean([np.mean((a.astype(np.float64) - b) ** 2) for a, b in zip(found, expected, strict=True)])
    return float(10 * np.log10(255**2 / error)) if error else math.inf


def measure(formats: list[str], prompts: int) -> list[Row]:
    rows, scenes = [], split()[1][:: max(1, 48 // prompts)][:prompts]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shipped = {e: NANO / f"{e}_noise_model.safetensors" for e in ("high", "low")}
        whole, _, _ = quantise("bf16", shipped, folder)
        base = {e: Path(path) for e, path in whole.items()}
        runtime = Runtime(2 * GB, 4 * GB, "cpu")
        reference: list[np.ndarray] = []
        for to in ["bf16", *(f for f in formats if f != "bf16")]:
            if to == "bf16":
                files, nbytes, error = whole, sum(p.stat().st_size for p in base.values()), 0.0
            else:
                files, nbytes, error = quantise(to, base, folder)
            pipe = runtime.load("nano", **files)
            plan = pipe.plan(scenes[0].caption(), preset="lightning-4")
            made = videos(pipe, plan, scenes)
            reference = reference or made
            right = [score(video, scene) for video, scene in zip(made, scenes, strict=True)]
            row = {
                "format": to,
                "bytes": nbytes,
                "bits": _bits(pipe),
                "error": error,
                "psnr": psnr(made, reference),
                "right": float(np.mean([(s.colour + s.direction + s.shape) / 3 for s in right])),
                "streamed_equal": equal_when_streamed(pipe, plan),
                "prompts": prompts,
            }
            print(json.dumps(row), flush=True)
            rows.append(row)
    return rows


def _bits(pipe: Pipeline) -> float:
    """Stored bits per weight of the matrices of the blocks."""
    refs = [r for t in pipe.model.transformers.values() for n, r in t.refs.items() if n.startswith("blocks.")]
    matrices = [r for r in refs if len(r.shape) == 2]
    return 8 * sum(r.nbytes for r in matrices) / sum(math.prod(r.shape) for r in matrices)


# ---- table and picture


def table(rows: list[Row]) -> str:
    lines = [
        "| format | both experts | bits a weight | weight error | PSNR to bf16 | right | streamed = resident |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        decibels = "same frames" if math.isinf(r["psnr"]) else f"{r['psnr']:.1f} dB"
        equal = "yes" if r["streamed_equal"] else "NO"
        lines.append(
            f"| `{r['format']}` | {r['bytes'] / 1e6:.2f} MB | {r['bits']:.2f} | {r['error']:.2%} | {decibels} "
            f"| {r['right']:.0%} | {equal} |"
        )
    return "\n".join(lines)


def document(rows: list[Row]) -> str:
    return f"""# nano in every format

Both experts of nano, written by `lowvram quantize` in every format that it writes, with the 4-step LoRA pair on top
({rows[0]["prompts"]} held-out prompts, 64x64, 9 frames, float32 arithmetic on a CPU). nano ships as `fp8`; its numbers in
bf16 are the base here, which is why `fp8` loses almost nothing.

{table(rows)}

*Weight error* is |new - old| / |old| of the matrices that were quantised; *PSNR* compares the frames with those of bf16;
*right* is the share of colours, directions and shapes that are what the prompt says. A small model bears less than a
large one: the order of the formats carries over, the decibels do not.

![Bits a weight against PSNR](encodings.png)

    python bench/nano/encodings.py --prompts {rows[0]["prompts"]}
"""


def draw(rows: list[Row], path: Path) -> None:
    """Bits per weight against PSNR, a point and a name for each format."""
    shown = [r for r in rows if not math.isinf(r["psnr"])]
    width, height, left, bottom, top, right = 1500, 900, 110, 90, 70, 40
    low, high = (
        math.floor(min(r["psnr"] for r in shown) / 5) * 5,
        math.ceil(max(r["psnr"] for r in shown) / 5) * 5,
    )
    most = math.ceil(max(r["bits"] for r in shown)) + 1
    least = math.floor(min(r["bits"] for r in shown))

    def x(bits: float) -> float:
        return left + (bits - least) / (most - least) * (width - left - right)

    def y(decibels: float) -> float:
        return height - bottom - (decibels - low) / (high - low) * (height - bottom - top)

    image = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(image)
    small, large = ImageFont.load_default(22), ImageFont.load_default(26)
    for bits in range(least, most + 1):
        pen.line([(x(bits), top), (x(bits), height - bottom)], fill="#e4e4e4", width=2)
        pen.text((x(bits), height - bottom + 12), str(bits), fill="#555", font=small, anchor="mt")
    for decibels in range(low, high + 1, 5):
        pen.line([(left, y(decibels)), (width - right, y(decibels))], fill="#e4e4e4", width=2)
        pen.text((left - 12, y(decibels)), str(decibels), fill="#555", font=small, anchor="rm")
    pen.text((width / 2, height - 18), "bits a weight", fill="#222", font=large, anchor="mb")
    pen.text((left - 80, top - 36), "PSNR to bf16, dB", fill="#222", font=large, anchor="lm")
    places = [(x(r["bits"]), y(r["psnr"])) for r in shown]
    taken = [(px - 8, py - 8, px + 8, py + 8) for px, py in places]
    for r in sorted(shown, key=lambda r: -r["psnr"]):
        at = (x(r["bits"]), y(r["psnr"]))
        colour = "#c0392b" if isinstance(encoding_by_name(r["format"]), Blocks) else "#1f5fa8"
        pen.ellipse([at[0] - 7, at[1] - 7, at[0] + 7, at[1] + 7], fill=colour)
        label = _place(at, pen.textlength(r["format"], font=small), taken, width - right)
        pen.text(label, r["format"], fill=colour, font=small, anchor="lm")
    pen.text((width - right, top - 36), "GGUF", fill="#c0392b", font=large, anchor="rm")
    pen.text((width - right - 90, top - 36), "safetensors", fill="#1f5fa8", font=large, anchor="rm")
    image.save(path, optimize=True)


def _place(
    at: tuple[float, float], length: float, taken: list[tuple[float, float, float, float]], edge: float
) -> tuple[float, float]:
    """Where a label of that length goes: beside its point, moved until it covers no other."""
    for shift in (0, 24, -24, 48, -48, 72, -72, 96, -96, 120, -120):
        for start in (at[0] + 14, at[0] - 14 - length):
            box = (start - 4, at[1] + shift - 11, start + length + 4, at[1] + shift + 11)
            free = all(box[2] < t[0] or t[2] < box[0] or box[3] < t[1] or t[3] < box[1] for t in taken)
            if free and box[2] < edge and box[0] > 110:
                taken.append(box)
                return start, at[1] + shift
    return at[0] + 14, at[1]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--draw", action="store_true", help="do not measure: draw what was measured last")
    args = parser.parse_args()
    results = HERE / "encodings.json"
    if not args.draw:
        rows = measure(args.formats.split(","), args.prompts)
        new = {row["format"] for row in rows}
        old = json.loads(results.read_text()) if results.exists() else []
        rows += [row for row in old if row["format"] not in new and row["prompts"] == args.prompts]
        results.write_text(json.dumps(rows, indent=1) + "\n")
    rows = json.loads(results.read_text())
    rows.sort(key=lambda r: -r["bits"])
    (HERE / "encodings.md").write_text(document(rows))
    draw(rows, HERE / "encodings.png")


if __name__ == "__main__":
    main()
