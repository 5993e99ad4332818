"""The kernels build for cards that are not here, every configuration: most were built before they were committed, by
`python bench/kernels.py aot --changed`, and the table of that knows the code it was made from."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lowvram.triton_kernels.modes import ARCHS

ROOT = Path(__file__).parent.parent.parent

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed here"
)


def table() -> dict[str, dict[str, Any]]:
    lines = (ROOT / "bench" / "kernels-aot.jsonl").read_text(encoding="utf-8").splitlines()
    return {row["key"]: row for row in map(json.loads, lines)}


def test_every_configuration_was_built_from_the_code_as_it_is() -> None:
    from lowvram.bench.kernel_builds import builds, key

    every, stored = {key(build): build for build in builds()}, table()
    changed = [f"{b.kernel.__name__} {b.config} {b.arch}" for k, b in every.items() if k not in stored]
    assert not changed, f"python bench/kernels.py aot --changed ({len(changed)}: {changed[0]}, ...)"
    assert stored.keys() == every.keys() and {b.arch for b in every.values()} == set(ARCHS)
    for k, build in every.items():
        row = stored[k]
        assert (row["config"], row["arch"]) == (build.config, build.arch)
        assert row["shared_bytes"] <= (232_448 if build.arch == "sm_90" else 101_376), row
        assert row["spill_bytes"] == 0 and 0 < row["registers"] <= 255, row
        assert set(row["instructions"]) == set(build.instructions), row


def test_what_makes_a_build_what_it_is_is_in_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    from lowvram.bench.kernel_builds import builds, key
    from lowvram.triton_kernels import gemm_triton

    build = next(build for build in builds() if build.kernel is gemm_triton.linear_kernel)
    keys = {
        key(b)
        for b in (
            build,
            replace(build, arch="sm_86"),
            replace(build, warps=16),
            replace(build, constants={**build.constants, "BLOCK_M": 16}),
            replace(build, pointers={**build.pointers, "out": "*fp16"}),
        )
    }
    source = gemm_triton.add_gated.src
    for other, same in (
        (source.replace('"""Add', '"""Put') + "    # a comment", True),
        (source.replace("+=", "-="), False),
    ):
        assert other != source
        monkeypatch.setattr(gemm_triton.add_gated, "_src", other)  # a function that the kernel calls
        assert (key(build) in keys) == same
    assert len(keys) == 5


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
    stored = table()
    for row in rows:
        if row["triton"] == stored[row["key"]]["triton"]:
            assert row == stored[row["key"]]
        assert row["spill_bytes"] == 0 and 0 < row["registers"] <= 255
        assert row["shared_bytes"] <= 101_376
        if row["kernel"] in ("attend", "linear"):
            assert set(row["instructions"]) >= {"int8 mma", "ldmatrix", "cp.async"}
