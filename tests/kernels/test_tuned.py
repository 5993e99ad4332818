"""What a tuning run printed becomes the table that dispatch reads; an architecture that is not in it has defaults."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lowvram.triton_kernels.modes import ARCHS, AUTO, MODES, auto_modes
from lowvram.triton_kernels.tiles import CANDIDATES, GEMM_CANDIDATES, attention_tiles, gemm_tiles
from lowvram.triton_kernels.tuned import FILE, TUNED, Tuned, read, written

ROOT = Path(__file__).parents[2]
A_CARD = {"arch": "sm_89", "card": "a card", "software": "torch 2, triton 3", "ok": True}
ROW = Tuned(
    "a card", "torch 2, triton 3", {"bf16": (64, 64, 4, 2), "fp16": (128, 32, 8, 3)}, (128, 128, 64, 4, 4),
    "triton", ("flash", "int8-fp8", "int8", "sdpa", "int8-fp16"), ("int8",),
)  # fmt: skip


def timed() -> list[dict[str, Any]]:
    """As a card might print: the second int8 tile is fastest by far but does not run at every size, and torch has a faster
    backend than the one it is asked for."""
    rows: list[dict[str, Any]] = []
    for out, width in ((64, 32), (32, 64)):
        size = A_CARD | {"out": out, "in": width}
        for kernel, ms in (("bf16 cuBLAS", 9), ("_int_mm and epilogue", 8), ("quantise, kernel", 1),
                           ("fp8_linear", 8.5), ("quantise, fp8", 1)):  # fmt: skip
            rows.append(size | {"kernel": kernel, "ms": ms})
        for kernel in ("int8_linear", "int8_linear_gated_"):
            rows.append(size | {"kernel": kernel, "tile": [128, 256, 128, 8, 3], "ms": 6})
            rows.append(size | {"kernel": kernel, "tile": list(ROW.gemm), "ms": 5})
            end = {"ms": 1} if out == 64 else {"refused": "too much shared memory"}
            rows.append(size | {"kernel": kernel, "tile": [256, 128, 64, 8, 4]} | end)
    for kernel, ms in (("sdpa", 5), ("sdpa cudnn_attention", 2.5), ("flash", 1)):
        rows.append(A_CARD | {"kernel": kernel, "tokens": 99, "ms": ms})
    for kernel, tile, ms in (("int8", [64, 64, 4, 2], 3), ("int8", [128, 64, 8, 3], 4), ("int8-fp16", [128, 32, 8, 3], 7),
                             ("int8-fp8", [128, 64, 8, 2], 2)):  # fmt: skip
        rows.append(A_CARD | {"kernel": kernel, "tokens": 99, "tile": tile, "ms": ms})
    return rows


def test_the_command_makes_a_table_from_what_was_printed(tmp_path: Path) -> None:
    printed, table = tmp_path / "rows.jsonl", tmp_path / FILE
    printed.write_text("".join(json.dumps(row) + "\n" for row in timed()))
    table.write_text(written({"sm_86": ROW, "sm_89": ROW}))
    command = [sys.executable, "bench/kernels.py", "tune", "--json", "--rows", printed, "--table", table]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [json.loads(line) for line in done.stdout.splitlines()] == timed()
    found = read(table.read_text())
    assert found["sm_86"] == ROW
    fp8 = {**ROW.attention, "fp8": (128, 64, 8, 2)}
    assert found["sm_89"] == Tuned(ROW.card, ROW.software, fp8, ROW.gemm, "triton", ROW.modes, ROW.products)


def test_dispatch_takes_what_was_measured_and_defaults_elsewhere() -> None:
    table = {"sm_89": ROW}
    attention, gemm = attention_tiles(table), gemm_tiles(table)
    assert (attention["bf16"]["sm_89"].m, attention["fp16"]["sm_89"].n, gemm["sm_89"].k) == (64, 32, 64)
    assert attention["fp8"]["sm_89"] == attention["bf16"]["sm_86"] == CANDIDATES[0]
    assert {gemm[arch] for arch in ARCHS if arch != "sm_89"} == {GEMM_CANDIDATES[0]}
    modes = auto_modes(table)
    # the fastest of those that are exact or promise their error
    assert modes["sm_89"] == ("flash", "int8", "sdpa", "int8-fp16")
    assert modes["sm_86"] == ("int8-fp16", "int8", "sdpa") and "sm_90" not in modes


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"sm_89": {}}', "must have attention, card"),
        (written({"sm_89": ROW}).replace("[128, 128, 64, 4, 4]", "[128]"), "5 numbers"),
        (written({"sm_89": ROW}).replace('"triton", "modes"', '"cutlass", "modes"'), "triton"),
    ],
)
def test_a_table_that_is_damaged_is_refused_by_name(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=rf"{FILE}: .*sm_89.*{says}|{FILE}: sm_89 {says}"):
        read(text)


def test_the_stored_table_is_what_the_command_writes() -> None:
    assert (ROOT / "triton_kernels" / FILE).read_text(encoding="utf-8") == written(TUNED)
    assert set(TUNED) <= set(ARCHS) and all(name in MODES for names in AUTO.values() for name in names)
