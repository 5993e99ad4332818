"""`lowvram quantize`: what it writes is what the format says, for our reader and for those of the formats' owners; a
stopped run goes on; nothing is replaced by accident."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import gguf
import numpy as np
import pytest
import torch
from optimum.quanto import QLinear, freeze, qint4, quantize
from safetensors.torch import load_file, save_file

from lowvram import conversion
from lowvram.cli.quantize import table
from lowvram.conversion import Done, plan_conversion, run_conversion
from lowvram.errors import BusyError, StorageError, UsageError
from lowvram.offload import locks
from lowvram.offload.faults import FaultPlan, Faults
from lowvram.offload.io import FileReader
from lowvram.offload.partial import PartialFile
from lowvram.quant.encodings.base import TORCH_DTYPES
from lowvram.quant.encodings.plain import Plain
from lowvram.quant.encodings.registry import encoding_by_name, keeps_precision, planned_encoding
from lowvram.quant.identify import Checkpoint, identify_path
from lowvram.quant.names import CLIP, DIT, TEXT
from lowvram.quant.spec import ClipSpec, DitSpec, TextSpec

SPEC = DitSpec(dim=256, ffn=512, layers=2, in_channels=16, out_channels=16, text_dim=256, freq_dim=64)
FORMATS = ["bf16", "fp16", "fp32", "fp8", "fp8_row", "fp8_e4m3", "int8", "int8_tensor", "int8_convrot", "int4",
           "int4_convrot", "nf4", "fp4", "nvfp4", "nvfp4_lightx2v", "mxfp8", "fp8_tile128"]  # fmt: skip
GGUF = [
    "q8_0",
    "q4_0",
    "q4_1",
    "q5_0",
    "q5_1",
    "q2_k",
    "q3_k_m",
    "q4_k",
    "q4_k_m",
    "q5_k",
    "q6_k",
    "iq4_nl",
    "iq4_xs",
]

State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def state() -> State:
    generator = torch.Generator().manual_seed(0)
    made = {n: torch.randn(s, generator=generator) * 0.05 for n, s in SPEC.shapes().items()}
    return {n: t if n.endswith("modulation") else t.bfloat16() for n, t in made.items()}


@pytest.fixture
def source(state: State, tmp_path: Path) -> Path:
    """As published: native names in bf16, modulations in float32."""
    save_file(state, tmp_path / "in.safetensors", {"config": "{}"})
    return tmp_path / "in.safetensors"


@pytest.fixture
def sharded(state: State, tmp_path: Path) -> Path:
    """As the authors store it: two shards and an index."""
    folder = tmp_path / "shards"
    folder.mkdir()
    names = [f"diffusion_pytorch_model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    weight_map = {key: names[i % 2] for i, key in enumerate(state)}
    for name in names:
        save_file({k: state[k] for k, file in weight_map.items() if file == name}, folder / name)
    index = json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map})
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(index)
    return folder


def run(source: Path, out: Path, to: str, overwrite: bool = False) -> list[Done]:
    return list(run_conversion(plan_conversion(source, out, to, overwrite)))


def numbers(found: Checkpoint) -> State:
    """Every tensor of a checkpoint, decoded."""
    made: State = {}
    for name, ref in found.refs.items():
        parts = {}
        for part in ref.parts:
            with FileReader(part.file) as reader:
                raw = np.frombuffer(reader.read_at(part.offset, part.nbytes), dtype=np.uint8).copy()
            parts[part.role] = torch.from_numpy(raw).view(TORCH_DTYPES[part.dtype]).view(part.shape)
        made[name] = ref.encoding.decode(parts, ref.shape, torch.float32)
    return made


@pytest.mark.parametrize("to", FORMATS + GGUF)
def test_what_is_written_is_what_the_encoder_makes_of_every_tensor(
    to: str, source: Path, state: State, tmp_path: Path
) -> None:
    out = tmp_path / f"out.{'gguf' if to in GGUF else 'safetensors'}"
    done = {d.name: d for d in run(source, out, to)}
    found = identify_path(out, FileReader)
    assert found.spec == SPEC and found.style == ("diffusers" if to in ("nf4", "fp4") else "native")
    made = numbers(found)
    for name, tensor in state.items():
        shape = tuple(tensor.shape)
        planned = planned_encoding(name, shape, to)
        if not isinstance(planned, Plain) or isinstance(encoding_by_name(to), Plain):
            expected = planned.decode(planned.encode(tensor), shape, torch.float32)
            assert found.refs[name].encoding.name == planned.name
        else:
            expected = tensor.float()  # kept as it was
        assert torch.equal(made[name], expected), name
        before = tensor.double()
        assert done[name].error == pytest.approx(float((expected - before).norm() / before.norm()), rel=1e-6)
        assert done[name].error == 0 or not keeps_precision(name, shape) or to in ("bf16", "fp16")


@pytest.mark.parametrize("to", GGUF)
def test_gguf_py_reads_the_same_numbers(to: str, source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "out.gguf", to)
    ours = numbers(identify_path(tmp_path / "out.gguf", FileReader))
    reader = gguf.GGUFReader(tmp_path / "out.gguf")
    assert reader.fields["general.architecture"].contents() == "wan"
    assert reader.fields["general.quantization_version"].contents() == 2
    kind = gguf.LlamaFileType(reader.fields["general.file_type"].contents()).name
    assert kind.lower().removeprefix("mostly_").removesuffix("_s") == to
    assert {t.name for t in reader.tensors} == set(ours)
    for tensor in reader.tensors:
        theirs = torch.from_numpy(np.asarray(gguf.dequantize(tensor.data, tensor.tensor_type)).copy())
        assert torch.equal(theirs.view(ours[tensor.name].shape), ours[tensor.name]), tensor.name
    patch = next(t for t in reader.tensors if t.name == "patch_embedding.weight")
    assert patch.tensor_type.name == "F32" and tuple(reversed(patch.shape)) == (256, 16, 1, 2, 2)


def test_comfyui_finds_its_markers_and_notes(source: Path, tmp_path: Path) -> None:
    """The names and notes of checkpoint-formats 3.2 and 3.3, spelled out."""
    run(source, tmp_path / "fp8.safetensors", "fp8")
    stored = load_file(tmp_path / "fp8.safetensors")
    assert stored["scaled_fp8"].dtype == torch.float8_e4m3fn and stored["scaled_fp8"].numel() == 0
    assert stored["blocks.1.ffn.0.scale_weight"].dtype == torch.float32
    assert stored["blocks.1.ffn.0.scale_weight"].shape == ()
    notes: dict[str, dict[str, Any]] = {
        "int8": {"format": "int8_tensorwise"},
        "int8_convrot": {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 256},
        "int4_convrot": {"format": "convrot_w4a4", "convrot": True, "convrot_groupsize": 256},
        "nvfp4": {"format": "nvfp4"},
    }
    for to, note in notes.items():
        run(source, tmp_path / f"{to}.safetensors", to)
        stored = load_file(tmp_path / f"{to}.safetensors")
        assert json.loads(bytes(stored["blocks.0.self_attn.q.comfy_quant"].tolist())) == note
        assert {"blocks.0.self_attn.q.weight", "blocks.0.self_attn.q.weight_scale"} <= stored.keys()
        assert not any(key.endswith("comfy_quant") for key in stored if "embedding" in key or "head" in key)
    assert stored["blocks.0.self_attn.q.weight_scale_2"].shape == ()


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_bitsandbytes_reads_what_is_written_for_it(
    kind: str, source: Path, state: State, tmp_path: Path
) -> None:
    run(source, tmp_path / "out.safetensors", kind)
    stored = load_file(tmp_path / "out.safetensors")
    ours = numbers(identify_path(tmp_path / "out.safetensors", FileReader))
    native = "blocks.1.cross_attn.o.weight"
    name = DIT.from_native(native)
    side = {k.removeprefix(f"{name}."): v for k, v in stored.items() if k.startswith(f"{name}.")}
    quant_state = bnb.QuantState.from_dict(side, device=torch.device("cpu"))
    assert quant_state.dtype == torch.bfloat16
    quant_state.dtype = torch.float32
    assert torch.equal(bnb.dequantize_4bit(stored[str(name)], quant_state), ours[native])


def test_quanto_reads_what_is_written_for_it(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "out.safetensors", "int4")
    stored = load_file(tmp_path / "out.safetensors")
    layer = "blocks.0.ffn.0"
    module = torch.nn.Sequential(torch.nn.Linear(256, 512).bfloat16())
    quantize(module, weights=qint4)
    freeze(module)
    theirs = {k.removeprefix("0."): v for k, v in module.state_dict().items()}
    ours = {k.removeprefix(f"{layer}."): v for k, v in stored.items() if k.startswith(f"{layer}.")}
    assert {k: (v.dtype, v.shape) for k, v in ours.items() if "put_scale" not in k} == {
        k: (v.dtype, v.shape) for k, v in theirs.items() if "put_scale" not in k
    }
    assert isinstance(module[0], QLinear) and ours.keys() == theirs.keys()
    with FileReader(tmp_path / "out.safetensors") as reader:
        length = int.from_bytes(reader.read_at(0, 8), "little")
        metadata = json.loads(reader.read_at(8, length))["__metadata__"]
    table = json.loads(base64.b64decode(metadata["quantization_map_base64"]))
    assert metadata["quantization_format"] == "quanto"
    assert table[layer] == {"weights": "qint4", "activations": "none"} and len(table) == 20


def test_shards_stay_shards_and_can_become_one_file(sharded: Path, state: State, tmp_path: Path) -> None:
    run(sharded, tmp_path / "new", "fp8")
    names = sorted(p.name for p in (tmp_path / "new").iterdir())
    assert names == sorted(p.name for p in sharded.iterdir())
    index = json.loads((tmp_path / "new" / "diffusion_pytorch_model.safetensors.index.json").read_text())
    held = {n: set(load_file(tmp_path / "new" / n)) for n in names if n.endswith(".safetensors")}
    assert all(key in held[name] for key, name in index["weight_map"].items())
    assert sum(map(len, held.values())) == len(index["weight_map"])
    together = numbers(identify_path(tmp_path / "new", FileReader))
    run(sharded, tmp_path / "one.safetensors", "fp8")
    alone = numbers(identify_path(tmp_path / "one.safetensors", FileReader))
    assert together.keys() == alone.keys() == state.keys()
    assert all(torch.equal(together[n], alone[n]) for n in state)


@pytest.mark.parametrize("to", ["fp8", "nf4", "q4_k"])
def test_what_is_written_has_every_block_in_one_run_of_bytes(to: str, sharded: Path, tmp_path: Path) -> None:
    """However it was scattered before: a block is then one read."""
    out = tmp_path / f"out.{'gguf' if to in GGUF else 'safetensors'}"
    run(sharded, out, to)
    spans: dict[str, list[int]] = {}
    for name, ref in identify_path(out, FileReader).refs.items():
        block = name.split(".")[1] if name.startswith("blocks.") else "outside"
        spans.setdefault(block, []).extend(n for p in ref.parts for n in (p.offset, p.offset + p.nbytes))
    runs = sorted((min(ends), max(ends)) for ends in spans.values())
    assert len(runs) == SPEC.layers + 1
    assert all(end <= start for (_, end), (start, _) in pairwise(runs))


def test_a_diffusers_folder_gets_the_configuration_that_loads_it(state: State, tmp_path: Path) -> None:
    folder = tmp_path / "transformer"
    folder.mkdir()
    named = {str(DIT.from_native(n)): t for n, t in state.items()}
    save_file(named, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps({"_class_name": "WanTransformer3DModel", "ffn_dim": 512}))
    run(folder, tmp_path / "nf4", "nf4")
    config = json.loads((tmp_path / "nf4" / "config.json").read_text())
    assert config["ffn_dim"] == 512
    assert config["quantization_config"]["quant_method"] == "bitsandbytes"
    assert config["quantization_config"]["bnb_4bit_quant_type"] == "nf4"
    assert sorted(p.name for p in (tmp_path / "nf4").iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    run(folder, tmp_path / "bf16", "fp16")
    assert "quantization_config" not in json.loads((tmp_path / "bf16" / "config.json").read_text())
    assert identify_path(tmp_path / "bf16", FileReader).style == "diffusers"


def test_diffusers_loads_what_is_written_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import GGUFQuantizationConfig, WanTransformer3DModel
    from diffusers.quantizers.bitsandbytes.bnb_quantizer import BnB4BitDiffusersQuantizer as Quantizer

    # It asks for a GPU first; bitsandbytes itself does without.
    monkeypatch.setattr(Quantizer, "validate_environment", lambda *given, **more: None)
    monkeypatch.setattr(Quantizer, "update_device_map", lambda self, places: {"": "cpu"})
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=128, ffn_dim=512, num_layers=1, text_dim=256, freq_dim=64,
        in_channels=16, out_channels=16, rope_max_seq_len=64,
    ).to(torch.bfloat16)  # fmt: skip
    model.save_pretrained(tmp_path / "whole")
    run(tmp_path / "whole", tmp_path / "nf4", "nf4")
    run(tmp_path / "whole", tmp_path / "q8.gguf", "q8_0")
    small = WanTransformer3DModel.from_pretrained(tmp_path / "nf4", torch_dtype=torch.bfloat16)
    blocks = WanTransformer3DModel.from_single_file(
        str(tmp_path / "q8.gguf"),
        quantization_config=GGUFQuantizationConfig(compute_dtype=torch.bfloat16),
        config=str(tmp_path / "whole"),
        torch_dtype=torch.bfloat16,
    )
    given = (torch.randn(1, 16, 1, 4, 4).bfloat16(), torch.tensor([500]), torch.randn(1, 8, 256).bfloat16())
    with torch.no_grad():
        expected, four, eight = (m(*given, return_dict=False)[0].float() for m in (model, small, blocks))
    assert small.blocks[0].attn1.to_q.weight.dtype == torch.uint8
    assert (four - expected).norm() < 0.05 * expected.norm()
    assert (eight - expected).norm() < 0.02 * expected.norm()


def test_a_text_encoder_keeps_its_tokenizer(tmp_path: Path) -> None:
    spec = TextSpec(vocab=64, dim=128, heads=2, head_dim=64, ffn=256, layers=2)
    generator = torch.Generator().manual_seed(1)
    stored = {
        str(TEXT.from_native(n)): torch.randn(s, generator=generator).bfloat16()
        for n, s in spec.shapes().items()
    }
    stored["spiece_model"] = torch.arange(200, dtype=torch.uint8)
    save_file(stored, tmp_path / "umt5.safetensors")
    run(tmp_path / "umt5.safetensors", tmp_path / "fp8.safetensors", "fp8")
    found = identify_path(tmp_path / "fp8.safetensors", FileReader)
    assert found.spec == spec and found.style == "hf" and found.tokenizer is not None
    made = load_file(tmp_path / "fp8.safetensors")
    assert torch.equal(made["spiece_model"], stored["spiece_model"])
    assert torch.equal(made["shared.weight"], stored["shared.weight"])
    assert sum(k.endswith(".scale_weight") for k in made) == 7 * spec.layers


def test_a_quantised_source_is_read_like_any_other(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "q8.gguf", "q8_0")
    run(tmp_path / "q8.gguf", tmp_path / "fp8.safetensors", "fp8")
    first, second = (numbers(identify_path(tmp_path / n, FileReader)) for n in ("q8.gguf", "fp8.safetensors"))
    name = "blocks.0.ffn.0.weight"
    assert 0 < ((first[name] - second[name]).norm() / first[name].norm()) < 0.04


@pytest.mark.parametrize("stop_after", [0, 1, 17, 60])
def test_a_stopped_run_goes_on_and_gives_the_same_bytes(
    stop_after: int, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(source, tmp_path / "whole.safetensors", "int8")
    out = tmp_path / "out.safetensors"
    work = run_conversion(plan_conversion(source, out, "int8"))
    for _ in range(stop_after):
        next(work)
    work.close()
    assert not out.exists()
    journal = tmp_path / ".out.safetensors.journal"
    if journal.exists():
        with journal.open("a") as file:
            file.write("blocks.1.ffn.2.wei")  # a line that a power cut tore
    encoded: list[int] = []
    plain = conversion._transfer
    monkeypatch.setattr(conversion, "_transfer", lambda *given: encoded.append(1) or plain(*given))
    assert run(source, out, "int8") == whole
    assert len(encoded) == len(whole) - stop_after
    assert out.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    assert not list(tmp_path.glob(".*"))


def test_what_was_begun_from_another_source_is_not_gone_on_with(
    source: Path, state: State, tmp_path: Path
) -> None:
    out = tmp_path / "out.safetensors"
    work = run_conversion(plan_conversion(source, out, "int8"))
    next(work)
    work.close()
    save_file({n: t * 2 for n, t in state.items()}, source)
    run(source, out, "int8")
    made = numbers(identify_path(out, FileReader))
    first = next(iter(state))
    assert torch.equal(made[first], (state[first] * 2).float())


def test_only_one_process_makes_a_file(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    work = run_conversion(plan_conversion(source, out, "int8"))
    next(work)
    with pytest.raises(BusyError):
        run(source, out, "int8")
    work.close()


@pytest.mark.skipif(os.name == "nt", reason="Windows removes no open file")
def test_whoever_waited_for_the_end_of_another_run_locks_a_file_that_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first run removes its journal when it is done: a lock on that keeps nobody away."""
    try_lock, ending = locks.try_lock, iter([True])

    def as_the_first_ends(file: Any) -> bool:
        if next(ending, False):
            (tmp_path / ".x.journal").unlink()
        return try_lock(file)

    monkeypatch.setattr(locks, "try_lock", as_the_first_ends)
    with PartialFile(tmp_path / "x", 100, "k"), pytest.raises(BusyError):
        PartialFile(tmp_path / "x", 100, "k")


def test_a_full_disk_leaves_what_was_done(tmp_path: Path) -> None:
    # The first line of the journal and the first piece come before the write that fails.
    faults = Faults(FaultPlan("write", 3))
    with PartialFile(tmp_path / "x", 100, "k", faults=faults) as file:
        file.write_at(0, b"1" * 50)
        file.note("half")
        with pytest.raises(StorageError, match="full"):
            file.write_at(50, b"2" * 50)
    with PartialFile(tmp_path / "x", 100, "k") as file:
        assert file.notes == ["half"]
        file.write_at(50, b"2" * 50)
        file.commit()
    assert (tmp_path / "x").read_bytes() == b"1" * 50 + b"2" * 50
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("to", "out", "says"),
    [
        ("q4_k", "out.safetensors", ".gguf"),
        ("fp8", "out.gguf", ".safetensors"),
        ("bf17", "out.safetensors", "bf16"),
        ("fp8", "in.safetensors", "exists"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_is_written(
    to: str, out: str, says: str, source: Path, tmp_path: Path
) -> None:
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(UsageError) as caught:
        plan_conversion(source, tmp_path / out, to)
    assert says in str(caught.value)
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("made", "to", "says"),
    [
        ({CLIP.from_native(n): s for n, s in ClipSpec(160, 320, 2, 1).shapes().items()}, "fp8", "a CLIP encoder is not quantised"),
        (TextSpec(300, 64, 4, 16, 96, 2).shapes(), "int4", "nothing in this network may be stored as int4"),
    ],
    ids=["clip", "no matrix fits"],
)  # fmt: skip
def test_what_would_be_written_for_nobody_is_refused(
    made: dict[str, tuple[int, ...]], to: str, says: str, tmp_path: Path
) -> None:
    save_file({n: torch.zeros(s, dtype=torch.bfloat16) for n, s in made.items()}, tmp_path / "in.safetensors")
    with pytest.raises(UsageError, match=says):
        plan_conversion(tmp_path / "in.safetensors", tmp_path / "out.safetensors", to)


def test_a_disk_without_room_is_told_before_anything_is_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversion, "free_bytes", lambda path: 1000)
    with pytest.raises(StorageError) as caught:
        plan_conversion(source, tmp_path / "out.safetensors", "fp8")
    assert "1.00 KB" in str(caught.value) and caught.value.exit_code == 6
    assert not (tmp_path / "out.safetensors").exists()


def test_the_same_again_is_told_and_the_other_way_round_is_no_copy(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "out.safetensors", "fp8")
    with pytest.raises(UsageError, match="already"):
        plan_conversion(source, tmp_path / "out.safetensors", "fp8")
    with pytest.raises(UsageError, match="already"):
        plan_conversion(tmp_path / "out.safetensors", tmp_path / "again.safetensors", "fp8")


def test_the_command_prints_a_table_and_the_file(
    source: Path, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    out = tmp_path / "out.gguf"
    said = cli("quantize", source, out, "--to", "q4_k_m")
    assert said.code == 0 and said.out.strip() == str(out) and out.exists()
    assert "blocks" in said.err and "q6_k" in said.err and "%" in said.err
    lines = cli("quantize", source, tmp_path / "o.safetensors", "--to", "fp8", "--json").objects
    assert [line["schema"] for line in lines[-2:]] == ["lowvram.quantized_tensor/1", "lowvram.quantized/1"]
    errors = {line["name"]: line["error"] for line in lines[:-1]}
    assert 0.02 < errors["blocks.0.ffn.0.weight"] < 0.03 and errors["head.head.weight"] == 0


def test_the_table_names_the_worst_block() -> None:
    done = [Done(f"blocks.{n}.ffn.0.weight", "int8", True, 0.01 + n / 1000, 8) for n in range(3)]
    lines = table([*done, Done("head.head.weight", "bf16", False, 0.0, 8)])
    assert lines[1].split() == ["ffn.0.weight", "int8", "3", "1.100%", "1.200%", "blocks.2"]
    assert lines[-1] == "1 of 4 tensors without any error"
