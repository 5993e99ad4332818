"""A Runtime that keeps weights: the next job, with other LoRAs, reads what the last one did not, and makes the same bits."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowvram import Pipeline, Runtime
from lowvram.errors import UsageError
from lowvram.job import Job, LoraChoice
from lowvram.offload.io import FileReader
from lowvram.offload.kept import KeptBytes
from lowvram.offload.slab import build_layout
from lowvram.planning.visits import layouts_of

GB = 10**9
PROMPT = "a red circle moves left on a black background"
SETTINGS: dict[str, Any] = {"seed": 5, "steps": 2, "shift": 3.0, "guidance": (1.0, 1.0)}
LORAS = Path(__file__).parents[2] / "lowvram" / "assets" / "nano" / "loras"
EXPERTS = ("high_noise_model.safetensors", "low_noise_model.safetensors")


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Bytes that came from each file, by its name."""
    counts: Counter[str] = Counter()
    plain = FileReader.read_some

    def counted(self: FileReader, *given: Any) -> int:
        nbytes = plain(self, *given)
        counts[self.path.name] += nbytes
        return nbytes

    monkeypatch.setattr(FileReader, "read_some", counted)
    return counts


@pytest.fixture
def loras(tmp_path: Path) -> tuple[Path, Path]:
    """Two LoRAs for both experts, of another rank each."""
    made = []
    for name, rank in (("one", 32), ("two", 8)):
        tensors = load_file(LORAS / "lightning-4-high.safetensors")
        cut = {
            n: t[:rank] if ".lora_down" in n or ".lora_A" in n else t[:, :rank] if t.ndim == 2 else t
            for n, t in tensors.items()
        }
        made.append(tmp_path / f"{name}.safetensors")
        save_file({n: t.contiguous() for n, t in cut.items()}, made[-1])
    return made[0], made[1]


def job_with(pipe: Pipeline, lora: Path | None) -> Job:
    chosen = () if lora is None else (LoraChoice(path=str(lora), strength=0.7),)
    return pipe.job(PROMPT, loras=chosen, **SETTINGS)


@pytest.mark.parametrize("tight", [False, True])
def test_another_lora_reads_no_byte_of_the_base_again(
    tight: bool, tiny_model: Path, loras: tuple[Path, Path], read: Counter[str]
) -> None:
    pipe = Runtime(GB, 3 * GB, "cpu", keep="1GB").load(str(tiny_model))
    if tight:  # nothing is resident: every step reads every block
        plan = pipe.plan_job(job_with(pipe, loras[0]))
        low = min(s.vram for s in plan.stages if s.name != "denoise") + 10**6
        pipe.runtime.budget = replace(pipe.runtime.budget, vram=max(low, plan.vram // 2))
    read.clear()
    pipe.run(job_with(pipe, loras[0]))
    first = Counter(read)
    sizes = {name: (tiny_model / name).stat().st_size for name in EXPERTS}
    headers = 1 << 20
    for name, size in sizes.items():
        assert 0.9 * size < first[name] < size + headers
    for lora in (loras[1],) if tight else (loras[1], None):
        read.clear()
        warm = pipe.run(job_with(pipe, lora))
        for name in EXPERTS:
            assert read[name] < headers and read[name] < 0.05 * sizes[name], (name, read[name])
        assert lora is None or read[lora.name] > lora.stat().st_size // 2
        moved = {r.name: r.disk_bytes for r in warm.reports}
        factors = 0 if lora is None else lora.stat().st_size
        assert moved["prepare"] + moved["denoise"] <= 4 * factors
        cold = Runtime(GB, 3 * GB, "cpu").load(str(tiny_model))
        assert torch.equal(warm.latent, cold.run(job_with(cold, lora)).latent)


def test_what_is_kept_is_bounded_and_part_of_the_budget(tiny_model: Path, read: Counter[str]) -> None:
    some = 4 * 10**6
    pipe = Runtime(GB, 3 * GB, "cpu", keep=some).load(str(tiny_model))
    assert pipe.runtime.budget.ram == 3 * GB - some
    whole = pipe.run(job_with(pipe, None)).latent
    kept = pipe.runtime.kept
    assert kept is not None and 0 < kept.used <= some
    read.clear()
    assert torch.equal(pipe.run(job_with(pipe, None)).latent, whole)
    total = sum((tiny_model / name).stat().st_size for name in EXPERTS)
    assert 0 < sum(read[name] for name in EXPERTS) < total - kept.used + (1 << 20)
    with pytest.raises(UsageError, match="to be kept"):
        Runtime(GB, GB, "cpu", keep=GB)


def test_a_file_that_was_written_anew_is_read_anew(tmp_path: Path) -> None:
    path, kept = tmp_path / "a", KeptBytes(100)
    target = bytearray(8)
    for data in (b"12345678", b"abcdefgh"):
        path.unlink(missing_ok=True)
        path.write_bytes(data)
        with FileReader(path) as reader:
            assert not kept.fetch(reader, 0, memoryview(target))
            reader.read_into(0, memoryview(target))
            kept.keep(reader, 0, memoryview(target))
            target[:] = bytes(8)
            assert kept.fetch(reader, 0, memoryview(target)) and bytes(target) == data
    kept.next_job()
    assert kept.used == 16
    kept.next_job()
    assert kept.used == 0


def test_the_base_lies_in_the_same_pieces_beside_any_lora(tiny_model: Path, loras: tuple[Path, Path]) -> None:
    """What makes the swap free: runs of the base's file begin and end where they did."""
    from lowvram.model_files import with_loras
    from lowvram.offload.slab import read_runs

    pipe = Runtime(GB, 2 * GB, "cpu").load(str(tiny_model))
    found = []
    for lora in (*loras, None):
        model = with_loras(pipe.model, job_with(pipe, lora).loras)
        groups = model.transformers["high"].groups()
        layouts = [build_layout(groups["outer"].refs), *layouts_of(groups, "high").values()]
        runs = {
            (r.file_offset, r.nbytes)
            for each in layouts
            for r in read_runs(each)
            if r.file.name == EXPERTS[0]
        }
        found.append(runs)
    assert found[0] == found[1] == found[2]
