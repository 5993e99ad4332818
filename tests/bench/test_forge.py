"""Forged checkpoints: random numbers in files that open, decode and run like real ones, the same every time."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lowvram import Runtime
from lowvram.bench import forge as forge_module
from lowvram.bench import forge_speed
from lowvram.bench.forge import forge, forge_model, forged_files
from lowvram.errors import UsageError
from lowvram.machine import machine_profile
from lowvram.offload.io import FileReader
from lowvram.offload.slab import as_bytes, build_layout, carve, read_runs
from lowvram.quant.encodings.plain import Plain
from lowvram.quant.encodings.registry import encoding_by_name, encoding_names, planned_encoding
from lowvram.quant.identify import identify_path
from lowvram.quant.refs import Shape
from lowvram.quant.spec import ClipSpec, DitSpec, TextSpec
from lowvram.sampling.presets import load_models, model_preset

SPEC = DitSpec(dim=256, ffn=512, layers=2, in_channels=16, out_channels=16, text_dim=256, freq_dim=64)
NAME = "blocks.1.ffn.0.weight"


@pytest.mark.parametrize(
    "weights",
    ["bf16", "fp32", "fp8", "fp8_row", "int8", "int8_convrot", "int4", "nf4", "nvfp4", "q8_0", "q4_k_m"],
)
def test_a_forged_file_opens_as_what_it_was_asked_to_be(weights: str, tmp_path: Path) -> None:
    path = tmp_path / "x"
    nbytes = forge(SPEC.shapes(), path, weights, seed=3)
    found = identify_path(path, FileReader, "dit")
    assert found.spec == SPEC and path.stat().st_size == nbytes
    for name, ref in found.refs.items():
        assert ref.encoding == planned_encoding(name, ref.shape, weights), name
    ref = found.refs[NAME]
    layout = build_layout([ref])
    slab = torch.empty(layout.nbytes, dtype=torch.uint8)
    with FileReader(path) as reader:
        for run in read_runs(layout):
            reader.read_into(run.file_offset, as_bytes(slab)[run.slab_offset : run.slab_offset + run.nbytes])
    values = ref.encoding.decode(carve(layout, slab)[NAME], ref.shape, torch.float32)
    assert values.isfinite().all()
    assert 0.8 < float(values.std()) * 256**0.5 < 1.2  # one over the root of the inputs


def test_the_same_seed_makes_the_same_file_and_another_another(tmp_path: Path) -> None:
    files = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        forge(SPEC.shapes(), tmp_path / name, "fp8", seed)
        files.append((tmp_path / name).read_bytes())
    assert files[0] == files[1] != files[2]
    assert len(files[0]) == len(files[2])


def test_a_tall_matrix_is_its_sample_over_and_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowvram.bench.forge.SAMPLE_ELEMENTS", 512 * 64)
    forge({"a.weight": (1300, 64)}, tmp_path / "x", "fp32")
    rows = torch.frombuffer(bytearray((tmp_path / "x").read_bytes()[-1300 * 64 * 4 :]), dtype=torch.float32)
    rows = rows.view(1300, 64)
    distinct = torch.unique(rows, dim=0)
    assert distinct.shape[0] == 512 and rows.std() > 0.1


def test_a_forged_model_makes_a_video(tmp_path: Path) -> None:
    spec = model_preset("nano")
    with pytest.raises(UsageError, match="no part"):
        forge_model(spec, tmp_path, "fp8", parts=("single",))
    forge_model(spec, tmp_path, "fp8")
    pipe = Runtime("64MB", "4GB", "cpu").load("nano", **forged_files(spec, tmp_path, "fp8"))
    video = pipe("a red circle", steps=2, width=32, height=32, frames=5)
    assert video.latent.isfinite().all() and sum(1 for _ in video.frames()) == 5


@pytest.fixture
def hollow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forged files are headers before holes of the true size: no number is made and no disk is filled. Not for formats
    that keep notes beside the numbers."""
    real = forge_module.forge

    def forge(shapes: Mapping[str, Shape], path: Path, weights: str, seed: int = 0) -> int:
        nbytes = real(shapes, path, weights, seed)
        os.truncate(path, nbytes)
        return nbytes

    monkeypatch.setattr(forge_module, "forge", forge)
    monkeypatch.setattr(forge_module, "write_large", lambda path, data: path.write_bytes(next(iter(data))))


@pytest.mark.parametrize("name", [name for name in load_models() if not name.startswith("nano")])
def test_every_model_at_its_true_size_is_found_in_its_folder_and_planned(
    hollow: None, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lowvram.caps.this_machine", lambda device: machine_profile("rtx4090"))
    spec = model_preset(name)
    weights = "q4_k_m" if name == "wan2.2-t2v-a14b" else "fp8"
    made = forge_model(spec, tmp_path, weights)
    pipe = Runtime("16GB", "64GB", "cpu").load(str(tmp_path))
    found = pipe.model.spec
    assert (found.variant, found.dit, found.vae, found.text) == (spec.variant, spec.dit, spec.vae, spec.text)
    assert found.clip == spec.clip and ("clip" in made) == (spec.clip is not None)
    if found.variant == "ti2v":
        plan = pipe.plan("a red circle")
        assert sum(plan.blocks().values()) == spec.dit.layers and plan.stage("denoise").vram <= 16 * 10**9


@pytest.mark.parametrize("weights", encoding_names())
def test_text_encoders_and_towers_come_in_every_encoding_that_is_read(weights: str, tmp_path: Path) -> None:
    tiny = replace(
        model_preset("wan2.2-animate-14b"),
        text=TextSpec(vocab=64, dim=256, heads=4, ffn=512, layers=1),
        clip=ClipSpec(dim=320, ffn=512, layers=2),
    )
    files = forge_model(tiny, tmp_path, weights, parts=("text",))
    if weights != "int4":
        files |= forge_model(tiny, tmp_path, "fp8", parts=("clip",), others={"clip": weights})
    for part, path in files.items():
        found = identify_path(path, FileReader, part)  # type: ignore[arg-type]
        assert found.spec == getattr(tiny, part)
        for name, ref in found.refs.items():
            if isinstance(encoding_by_name(weights), Plain):
                assert part == "clip" or ref.encoding == encoding_by_name(weights), name


def test_forging_is_measured_beside_plain_writes_and_a_block_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def child(way: str, folder: Path, options: argparse.Namespace, nbytes: int = 0) -> dict[str, float]:
        if way == "forged":
            forge_model(spec, folder, options.weights, parts=spec.expert_names())
        else:
            forge_speed.write(folder / "plain", nbytes, past=False)
            assert (folder / "plain").stat().st_size == forge_speed.PIECE  # in whole pieces
        return {"seconds": 2.0 if way == "forged" else 1.0, "rss": 10**9}

    monkeypatch.setattr(forge_speed, "child", child)
    spec = forge_speed.model("nano", 1)
    assert spec.dit.layers == 1
    forge_speed.compare(
        spec, tmp_path, forge_speed.parser().parse_args(["--rounds", "2", "--weights", "q8_0"])
    )
    said = capsys.readouterr().out
    assert "high_noise_model.gguf: 1 blocks of width 256" in said and "q8_0, ran on 64 tokens" in said
    assert said.count("forged at 0.50 of its rate") == 2
