"""nano in every format that is read: size, weight error, and what that does to its videos.

    python bench/nano/encodings.py [--prompts 4] [--formats bf16,fp8,...]     measure, then write table and picture
    python bench/nano/encodings.py --draw                                     table and picture of the last measurement

With `--formats` the rows of those formats are measured and the others stay as they were recorded. `lowvram quantize`
writes the formats of `FORMATS`; `layouts.py` those that are only read.

Every format runs twice on the first prompt, with its blocks resident and streamed: the latents must be equal bit for
bit. All runs are 4 steps with the LoRA pair on top of the quantised experts (`--preset lightning-4`).
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from data import Scene, score, split
from layouts import LAYOUTS
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import load_file

from lowvram import Runtime
from lowvram.api import Pipeline
from lowvram.conversion import plan_conversion, run_conversion
from lowvram.offload.io import FileReader
from lowvram.offload.placement import Placement
from lowvram.planning.plan import Plan
from lowvram.quant.encodings.base import TORCH_DTYPES
from lowvram.quant.encodings.kquants import Blocks
from lowvram.quant.encodings.registry import encoding_by_name, keeps_precision
from lowvram.quant.identify import identify_path
from lowvram.quant.refs import TensorRef

HERE = Path(__file__).parent
NANO = HERE.parents[1] / "lowvram" / "assets" / "nano"
FORMATS = [
    "bf16",
    "fp16",
    "fp32",
    "fp8",
    "fp8_row",
    "fp8_e4m3",
    "fp8_e5m2",
    "fp8_tile128",
    "mxfp8",
    "int8",
    "int8_tensor",
    "int8_convrot",
    "q8_0",
    "q6_k",
    "q5_k_m",
    "q5_k_s",
    "q5_1",
    "q5_0",
    "q4_k_m",
    "q4_k_s",
    "q4_1",
    "q4_0",
    "iq4_nl",
    "iq4_xs",
    "nvfp4",
    "nvfp4_lightx2v",
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


def store(to: str, source: dict[str, Path], folder: Path) -> dict[str, str]:
    """Both experts in the format `to`: their paths."""
    layout = LAYOUTS.get(to)
    files = {}
    for expert, path in source.items():
        out = folder / f"{expert}-{to}{'.gguf' if is_gguf(to) else '.safetensors'}"
        if layout is not None:
            layout.write(load_file(path), out)
            found = {ref.encoding.name for ref in matrices(out).values()}
            assert found == {layout.encoding}, found
        else:
            list(run_conversion(plan_conversion(path, out, to)))
        files[expert] = str(out)
    return files


def is_gguf(to: str) -> bool:
    if to in LAYOUTS:
        return LAYOUTS[to].suffix == ".gguf"
    return isinstance(encoding_by_name(to), Blocks)


def matrices(path: Path) -> dict[str, TensorRef]:
    """What may lose precision in the transformer at `path`."""
    refs = identify_path(path, FileReader).refs
    return {name: ref for name, ref in refs.items() if not keeps_precision(name, ref.shape)}


def weight_error(files: dict[str, str], source: dict[str, Path]) -> float:
    """|new - old| / |old|, root of the mean square over the matrices of both experts."""
    errors = []
    for expert, path in source.items():
        new = matrices(Path(files[expert]))
        for name, ref in matrices(path).items():
            old = decoded(ref)
            errors.append(float((decoded(new[name]) - old).norm() / old.norm()))
    return math.sqrt(sum(e * e for e in errors) / len(errors))


def decoded(ref: TensorRef) -> torch.Tensor:
    """float64, from where it lies."""
    parts = {}
    for part in ref.parts:
        with FileReader(part.file) as reader:
            data = bytearray(reader.read_at(part.offset, part.nbytes))
        parts[part.role] = torch.frombuffer(data, dtype=TORCH_DTYPES[part.dtype]).view(part.shape)
    return ref.encoding.decode(parts, ref.shape, torch.float64)


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


def measure(formats: list[str], prompts: int) -> Iterator[Row]:
    """A row for each format, as it is measured. bf16 runs in any case: its frames are what the others are held to."""
    scenes = split()[1][:: max(1, 48 // prompts)][:prompts]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shipped = {e: NANO / f"{e}_noise_model.safetensors" for e in ("high", "low")}
        whole = store("bf16", shipped, folder)
        base = {e: Path(path) for e, path in whole.items()}
        runtime = Runtime(2 * GB, 4 * GB, "cpu")
        reference: list[np.ndarray] = []
        for to in ["bf16", *(f for f in formats if f != "bf16")]:
            files = whole if to == "bf16" else store(to, base, folder)
            pipe = runtime.load("nano", **files)
            plan = pipe.plan(scenes[0].caption(), preset="lightning-4")
            made = videos(pipe, plan, scenes)
            reference = reference or made
            if to not in formats:
                continue
            right = [score(video, scene) for video, scene in zip(made, scenes, strict=True)]
            yield {
                "format": to,
                "bytes": sum(Path(path).stat().st_size for path in files.values()),
                "bits": _bits(pipe),
                "error": weight_error(files, base),
                "psnr": psnr(made, reference),
                "right": float(np.mean([(s.colour + s.direction + s.shape) / 3 for s in right])),
                "streamed_equal": equal_when_streamed(pipe, plan),
                "prompts": prompts,
            }


def _bits(pipe: Pipeline) -> float:
    """Stored bits per weight of the matrices of the blocks."""
    refs = [r for t in pipe.model.transformers.values() for n, r in t.refs.items() if n.startswith("blocks.")]
    matrices = [r for r in refs if len(r.shape) == 2]
    return 8 * sum(r.nbytes for r in matrices) / sum(math.prod(r.shape) for r in matrices)


# ---- table and picture


def table(rows: list[Row]) -> str:
    lines = [
        "| format | written by | both experts | bits a weight | weight error | PSNR to bf16 | right | streamed = resident |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        writer = LAYOUTS[r["format"]].writer if r["format"] in LAYOUTS else "`quantize`"
        decibels = "same frames" if math.isinf(r["psnr"]) else f"{r['psnr']:.1f} dB"
        equal = "yes" if r["streamed_equal"] else "NO"
        lines.append(
            f"| `{r['format']}` | {writer} | {r['bytes'] / 1e6:.2f} MB | {r['bits']:.2f} | {r['error']:.2%} | {decibels} "
            f"| {r['right']:.0%} | {equal} |"
        )
    return "\n".join(lines)


def document(rows: list[Row]) -> str:
    return f"""# nano in every format

Both experts of nano in every format that is read, with the 4-step LoRA pair on top ({rows[0]["prompts"]} held-out prompts,
64x64, 9 frames, float32 arithmetic on a CPU). nano ships as `fp8`; its numbers in bf16 are the base here, which is why
`fp8` loses almost nothing.

{table(rows)}

*Weight error* is |new - old| / |old| of the matrices that may lose precision; *PSNR* compares the frames with those of
bf16; *right* is the share of colours, directions and shapes that are what the prompt says. A small model bears less than a
large one: the order of the formats carries over, the decibels do not.

*Written by*: `quantize` is `lowvram quantize IN OUT --to FORMAT`. The rows of other writers are only read: the library
that owns the format wrote them, or the formula of its published files did ([layouts.py](layouts.py)). `*_nested` is
bitsandbytes' double quantisation, `int8_bnb` its LLM.int8, `int8_zero` torchao's int8 with zero points,
`nvfp4_lightx2v_alpha` LightX2V's NVFP4 with its scale in two factors, `fp8_block128` Kijai's block scales, `gguf_*`
plain numbers in a GGUF file. Files that only name their parts in another way (quanto's qint8, LightX2V's fp8 and int8,
torchao's fp8) hold the numbers of a row above. Other sizes of blocks and groups, e5m2 with the scales of the other fp8
rows and `int8_zero` with one scale for a tensor are read too and have no row.

![Bits a weight against PSNR, below 16 bits](encodings.png)

    python bench/nano/encodings.py --prompts {rows[0]["prompts"]}
"""


def draw(rows: list[Row], path: Path) -> None:
    """Bits per weight against PSNR, a point and a name for each format of fewer than 16 bits."""
    shown = [r for r in rows if r["bits"] < 16]
    width, height, left, bottom, top, right = 1500, 1100, 110, 90, 70, 40
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
    for r in sorted(shown, key=lambda r: r["psnr"]):
        at = (x(r["bits"]), y(r["psnr"]))
        colour = "#c0392b" if is_gguf(r["format"]) else "#1f5fa8"
        pen.ellipse([at[0] - 7, at[1] - 7, at[0] + 7, at[1] + 7], fill=colour)
        length = pen.textlength(r["format"], font=small)
        label = _place(at, length, taken, (left, top, width - right, height - bottom))
        if _distance(at, label, length) > 20:
            end = label[0] - 4 if label[0] > at[0] else label[0] + length + 4
            pen.line([at, (end, label[1])], fill=colour, width=1)
        pen.text(label, r["format"], fill=colour, font=small, anchor="lm")
    pen.text((width - right, top - 36), "GGUF", fill="#c0392b", font=large, anchor="rm")
    pen.text((width - right - 90, top - 36), "safetensors", fill="#1f5fa8", font=large, anchor="rm")
    image.save(path, optimize=True)


Box = tuple[float, float, float, float]
"""left, top, right, bottom"""


def _place(at: tuple[float, float], length: float, taken: list[Box], inside: Box) -> tuple[float, float]:
    """Where a label of that length goes: the nearest place beside its point where it covers no other."""
    places = [
        (start, at[1] + down)
        for down in range(-288, 289, 24)
        for gap in (14, 40, 80, 130)
        for start in (at[0] + gap, at[0] - gap - length)
    ]
    for x, y in sorted(places, key=lambda p: _distance(at, p, length)):
        box = (x - 4, y - 11, x + length + 4, y + 11)
        fits = inside[0] < box[0] and inside[1] < box[1] and box[2] < inside[2] and box[3] < inside[3]
        if fits and all(box[2] < t[0] or t[2] < box[0] or box[3] < t[1] or t[3] < box[1] for t in taken):
            taken.append(box)
            return x, y
    return at[0] + 14, at[1]


def _distance(at: tuple[float, float], place: tuple[float, float], length: float) -> float:
    """From a point to the nearer end of a label."""
    return math.hypot(min(abs(place[0] - at[0]), abs(place[0] + length - at[0])), place[1] - at[1])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--formats", default=",".join([*FORMATS, *LAYOUTS]))
    parser.add_argument("--draw", action="store_true", help="do not measure: draw what was measured last")
    args = parser.parse_args()
    results = HERE / "encodings.json"
    rows = {row["format"]: row for row in json.loads(results.read_text())} if results.exists() else {}
    rows = {name: row for name, row in rows.items() if args.draw or row["prompts"] == args.prompts}
    if not args.draw:
        for row in measure(args.formats.split(","), args.prompts):
            print(json.dumps(row), flush=True)
            rows[row["format"]] = row
            results.write_text(json.dumps(list(rows.values()), indent=1) + "\n")
    shown = sorted(rows.values(), key=lambda r: (-r["bits"], r["format"]))
    (HERE / "encodings.md").write_text(document(shown))
    draw(shown, HERE / "encodings.png")


if __name__ == "__main__":
    main()
