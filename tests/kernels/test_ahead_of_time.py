"""The kernels build for cards that are not here. All of them: `python bench/kernels.py aot`."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed here"
)


def test_the_default_configurations_build_without_spills_and_with_their_instructions(tmp_path: Path) -> None:
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "bench/kernels.py", "aot", "--quick", "--json"],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert {(row["kernel"], row["arch"]) for row in rows} == {
        ("attend", "sm_86"), ("attend", "sm_89"), ("attend", "sm_120"), ("norm_rope", "sm_86"),
        ("scaled", "sm_86"), ("rotated", "sm_86"), ("blocks", "sm_86"), ("rms_silu", "sm_86"),
        ("linear", "sm_86"), ("linear", "sm_120"), ("quantise", "sm_86"), ("modulate_quantise", "sm_120"),
        ("modulate_quantise", "sm_89"),
    }  # fmt: skip
    for row in rows:
        assert row["spill_bytes"] == 0 and 0 < row["registers"] <= 255
        assert row["shared_bytes"] <= 101_376
        if row["kernel"] in ("attend", "linear"):
            assert set(row["instructions"]) >= {"int8 mma", "ldmatrix", "cp.async"}
