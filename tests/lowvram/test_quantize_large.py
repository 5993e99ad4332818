"""`lowvram quantize` on matrices of real size: what it holds in RAM, and what a run that was killed leaves behind."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lowvram import conversion
from lowvram.quant.encodings.base import CHUNK_ELEMENTS
from lowvram.quant.files.writing import Entry, safetensors_head
from lowvram.quant.spec import DitSpec

SPEC = DitSpec(dim=1536, ffn=8960, layers=2, in_channels=16, out_channels=16)
"""Two layers of Wan 2.1 T2V 1.3B."""
LARGEST = max(map(math.prod, SPEC.shapes().values()))
WHOLE = 4 * sum(map(math.prod, SPEC.shapes().values()))
MEASURED = """
import sys
from pathlib import Path
import torch
from lowvram.conversion import plan_conversion, run_conversion

def kept(what):
    return 1024 * int(next(l for l in open("/proc/self/status") if l.startswith(what)).split()[1])

torch.set_num_threads(1)
for source in sys.argv[1:]:  # a small one first, so that the code is there
    for name, to in (("out.safetensors", "int8"), ("out.gguf", "q8_0")):
        task = plan_conversion(Path(source), Path(source).with_name(name), to)
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = kept("VmRSS")
        for _ in run_conversion(task):
            pass
        print(kept("VmHWM") - before)
"""


def write(path: Path, spec: DitSpec) -> Path:
    """A transformer in bf16: runs of the same random numbers."""
    shapes = spec.shapes()
    head = safetensors_head([Entry(name, "BF16", shape) for name, shape in shapes.items()], {})
    largest = max(map(math.prod, shapes.values())) + len(shapes)
    numbers = torch.randn(largest, generator=torch.Generator().manual_seed(0)).bfloat16()
    path.parent.mkdir()
    with path.open("wb") as file:
        file.write(head.data)
        for n, shape in enumerate(shapes.values()):
            file.write(numbers[n : n + math.prod(shape)].view(torch.uint8).numpy().data)
    return path


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("made") / "large" / "in.safetensors", SPEC)


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of a process from /proc")
def test_it_holds_two_tensors_however_many_there_are(source: Path, tmp_path: Path) -> None:
    small = write(tmp_path / "small" / "in.safetensors", DitSpec(256, 512, 1, 16, 16))
    # What is freed goes back to the system at once: what the C library hoards is not what is held.
    environ = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 20), "MALLOC_ARENA_MAX": "1"}
    command = [sys.executable, "-c", MEASURED, str(small), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environ)
    peaks = list(map(int, done.stdout.split()))[2:]
    chunks = 4 * 4 * CHUNK_ELEMENTS  # what encoders and decoders work in
    assert len(peaks) == 2 and max(peaks) > 4 * LARGEST
    assert max(peaks) < 2 * 4 * LARGEST + chunks < WHOLE / 2, peaks


def test_a_killed_run_goes_on_and_gives_the_same_bytes(
    source: Path, tmp_path: Path, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed as no program can notice, after two thirds of the tensors."""
    out, whole = tmp_path / "out.safetensors", tmp_path / "whole.safetensors"
    run = "import sys; from lowvram.cli.main import run; run(sys.argv[1:])"
    command = [sys.executable, "-c", run, "quantize", str(source), str(out), "--to", "int8", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        for _ in range(len(SPEC.shapes()) * 2 // 3):
            assert process.stdout.readline()
        process.kill()
    assert not out.exists() and (tmp_path / ".out.safetensors.journal").exists()
    encoded: list[int] = []
    plain = conversion._transfer
    monkeypatch.setattr(conversion, "_transfer", lambda *given: encoded.append(1) or plain(*given))
    assert cli("quantize", source, out, "--to", "int8", "--quiet").code == 0
    assert 0 < len(encoded) < len(SPEC.shapes())
    assert cli("quantize", source, whole, "--to", "int8", "--quiet").code == 0
    assert out.read_bytes() == whole.read_bytes()
    assert not list(tmp_path.glob(".*"))
