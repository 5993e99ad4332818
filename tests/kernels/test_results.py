"""The committed results of `bench/kernels.py` are inside their bounds and are what the command prints."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from lowvram.triton_kernels.modes import MODES

BENCH = Path(__file__).parents[2] / "bench"


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (BENCH / name).read_text(encoding="utf-8").splitlines()]


def test_errors_are_inside_their_bounds_and_are_what_is_printed() -> None:
    every = rows("kernels-accuracy.jsonl")
    stored = {(row["mode"], row["data"]): row for row in every if row["op"] == "attention"}
    data = {"gaussian", "offsets", "channels", "tokens", "sink"}
    assert set(stored) == {(m, d) for m in ("int8", "int8-fp16", "int8-fp8") for d in data}
    for (mode, name), row in stored.items():
        limit = {"tokens": 0.025, "sink": 0.01}.get(name, 0.012)
        assert mode == "int8-fp8" or row["relative_error"] <= row["bound"] == limit
    done = subprocess.run(
        [sys.executable, "kernels.py", "accuracy", "--quick", "--json"],
        cwd=BENCH, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    printed = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(printed) == 11
    known_errors = {(row["op"], row["mode"], row["data"]): row["relative_error"] for row in every}
    for row in printed:
        known = known_errors[row["op"], row["mode"], row["data"]]
        assert abs(row["relative_error"] - known) <= 0.01 * known


def test_int8_multiplication_is_inside_its_bound_on_all_data() -> None:
    stored = {(r["mode"], r["data"]): r for r in rows("kernels-accuracy.jsonl") if r["op"] == "linear"}
    data = ("gaussian", "modulated", "activated", "tokens")
    assert {d for _, d in stored} == set(data)
    for name in data:
        rotated = stored["int8_convrot", name]
        assert rotated["relative_error"] <= rotated["bound"] == 0.02
        lora = stored["int8_convrot, its LoRA", name]
        assert lora["relative_error"] <= lora["bound"] == 0.02
        assert stored["int8_convrot, exact activations", name]["relative_error"] < rotated["relative_error"]


def test_the_order_of_tokens_is_compared_at_equal_shares_of_tiles() -> None:
    every = rows("kernels-sparse.jsonl")
    mass = {(r["case"], r["keep"], r["order"]): r["mass"] for r in every}
    shares = {"local": (0.05, 0.025), "mass": (0.5, 0.25), "score": (0.5, 0.25)}
    orders = ("raster", "framewise", "compact")
    assert {key for key in mass if key[2] != "sdpa"} == {
        (case, keep, order) for case, keeps in shares.items() for keep in keeps for order in orders
    }
    assert (
        mass["local", 0.025, "compact"] > mass["local", 0.025, "framewise"] > mass["local", 0.025, "raster"]
    )


def test_every_mode_needs_less_than_bf16_at_720p() -> None:
    peaks = {(r["mode"], r["matmul"], r["ops"]): r["peak_bytes"] for r in rows("kernels-peak.jsonl")}
    assert {matmul for _, matmul, _ in peaks} == {"exact", "int8", "fp8"}
    for (mode, matmul, ops), peak in peaks.items():
        assert peak <= peaks["sdpa", matmul, ops] and peak <= peaks[mode, matmul, "torch"]
        assert mode == "sdpa" or peak < 0.88 * peaks["sdpa", matmul, ops]
        assert ops == "torch" or peak <= peaks[mode, "exact", ops]


def test_the_page_says_what_the_tables_say() -> None:
    page = (BENCH / "kernels.md").read_text(encoding="utf-8")
    errors = {
        (r["op"], r["mode"], r["data"]): f"{100 * r['relative_error']:.2f} %"
        for r in rows("kernels-accuracy.jsonl")
    }
    data = ("gaussian", "offsets", "channels", "tokens", "sink")
    for label, mode in (("R1", "int8"), ("R2", "int8-fp16"), ("R3", "int8-fp8")):
        assert (
            f"| {label} `{mode}` | {' | '.join(errors['attention', mode, name] for name in data)} |" in page
        )
    data = ("gaussian", "modulated", "activated", "tokens")
    for label, mode in (
        ("rotated weights, exact", "int8_convrot, exact activations"),
        ("rotated weights, int8 activations", "int8_convrot"),
        ("rotated weights, what a LoRA of rank 64 adds", "int8_convrot, its LoRA"),
    ):
        assert f"| {label} | {' | '.join(errors['linear', mode, name] for name in data)} |" in page
    scores = [row for row in rows("kernels-nano.jsonl") if row["psnr"] is not None]
    assert {row["mode"] for row in scores} >= {mode.name for mode in MODES.values() if mode.quantised}
    for row in scores:
        mode = row["mode"].replace(", --matmul", "`, `--matmul")
        assert f"| `{mode}` | {row['median_psnr']:.1f} dB | {row['psnr']:.1f} dB |" in page
        assert row["median_psnr"] > 45 and row["colour"] == row["direction"] == 1 and row["shape"] >= 0.75
