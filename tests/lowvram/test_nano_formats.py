"""nano, its LoRA pair on top, in formats of every family: a video is made, the same bits resident and streamed.

`bench/nano/encodings.py` does it for every format that is read, and says what each does to the video."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from readable import readable

from lowvram import Runtime
from lowvram.conversion import plan_conversion, run_conversion
from lowvram.offload.placement import Placement
from lowvram.quant.encodings.kquants import MIXES
from lowvram.quant.encodings.registry import encoding_by_name, encoding_names

ROOT = Path(__file__).parents[2]
NANO = ROOT / "lowvram" / "assets" / "nano"
FORMATS = ["int8_convrot", "nf4", "nvfp4", "q4_k_m"]


@pytest.mark.parametrize("to", FORMATS)
def test_resident_and_streamed_are_the_same_bits(to: str, tmp_path: Path) -> None:
    suffix = "gguf" if to.startswith("q") else "safetensors"
    files = {}
    for expert in ("high", "low"):
        out = tmp_path / f"{expert}_noise.{suffix}"
        list(run_conversion(plan_conversion(NANO / f"{expert}_noise_model.safetensors", out, to)))
        files[expert] = str(out)
    runtime = Runtime(10**9, 2 * 10**9, "cpu", cache=False)
    pipe = runtime.load("nano", **files)
    job = pipe.job("a red circle moves left", preset="lightning-4", width=32, height=32, frames=5, seed=2)
    assert len(job.loras) == 2
    plan = pipe.plan_job(job)
    assert plan.blocks()["resident"] == len(plan.denoise.where)
    streamed = replace(plan, denoise=Placement(dict.fromkeys(plan.denoise.where, "disk"), slots=1, ring=1))
    latent = pipe.run(job, plan=plan).latent
    assert torch.isfinite(latent).all()
    assert torch.equal(pipe.run(job, plan=streamed).latent, latent)


WITHOUT_A_ROW = {
    "fp8_e5m2_row": "the numbers of fp8_e5m2 with the scales of fp8_row",
    "fp8_e5m2_block128": "the numbers of fp8_e5m2 with the scales of fp8_block128",
    "fp8_e5m2_tile128": "the numbers of fp8_e5m2 with the scales of fp8_tile128",
    "int8_tensor_zero": "int8_zero with one scale and one zero point for all rows",
}
"""Encodings that combine what other rows measure, and why they have none."""


def test_every_encoding_that_is_read_has_a_row() -> None:
    rows = json.loads((ROOT / "bench" / "nano" / "encodings.json").read_text())
    formats = {row["format"] for row in rows}
    known = set(encoding_names())
    measured = {encoding_by_name(name).name if name in known else name for name in formats}
    assert readable().keys() - measured == WITHOUT_A_ROW.keys()
    assert formats >= MIXES.keys() | {"gguf_f16", "gguf_bf16", "gguf_f32"}


def test_the_table_of_all_formats_is_whole() -> None:
    """What was measured of every format: size, weight error, PSNR, score, and the same bits streamed."""
    rows = json.loads((ROOT / "bench" / "nano" / "encodings.json").read_text())
    assert len({row["prompts"] for row in rows}) == 1
    assert all(row["streamed_equal"] and 0 <= row["error"] < 0.3 and row["right"] > 0.9 for row in rows)
    table = (ROOT / "bench" / "nano" / "encodings.md").read_text()
    assert all(f"| `{row['format']}` |" in table for row in rows)
    assert "encodings.png" in table and (ROOT / "bench" / "nano" / "encodings.png").is_file()
