"""A small transformer stored in every encoding, by the library that owns it where that can write here: identified
from its headers, carved from a slab, decoded, multiplied with."""

from __future__ import annotations

import json
from collections.abc import Callable

import bitsandbytes.functional as bnb
import gguf
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from optimum.quanto import MaxOptimizer, freeze, qint4, qint8, quantize, quantize_weight
from safetensors.torch import save_file
from torch.nn import functional

from lowvram.errors import FileError
from lowvram.offload.slab import as_bytes, build_layout, carve, read_runs
from lowvram.quant.encodings.kquants import BLOCK_SIZES, Blocks
from lowvram.quant.encodings.registry import encoding_by_name, keeps_precision, planned_encoding
from lowvram.quant.files.notes import MAX_NOTE_BYTES
from lowvram.quant.identify import identify, identify_path
from lowvram.quant.linear import Encoded, Params
from lowvram.quant.names import TEXT_GGUF
from lowvram.quant.rows import gather_rows
from lowvram.quant.spec import DitSpec, TextSpec

SPEC = DitSpec(dim=256, ffn=512, layers=1, in_channels=16, out_channels=16, text_dim=256, freq_dim=64)
LAYERS = [n.removesuffix(".weight") for n, s in SPEC.shapes().items() if not keeps_precision(n, s)]
MATRICES = [f"{layer}.weight" for layer in LAYERS]

State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def state() -> State:
    generator = torch.Generator().manual_seed(0)
    return {n: torch.randn(s, generator=generator) * 0.05 for n, s in SPEC.shapes().items()}


def json_bytes(note) -> torch.Tensor:
    return torch.frombuffer(bytearray(json.dumps(note).encode()), dtype=torch.uint8)


def ours(name: str, names: dict[str, str], note=None) -> Callable[[State], State]:
    """A writer for formats whose owner cannot write here: our encoder, under the names of the owner's files."""

    def write(state: State) -> State:
        stored = {n: t for n, t in state.items() if n not in MATRICES}
        for layer in LAYERS:
            parts = encoding_by_name(name).encode(state[f"{layer}.weight"])
            stored |= {f"{layer}.{names.get(role, role)}": part for role, part in parts.items()}
            if note is not None:
                stored[f"{layer}.comfy_quant"] = json_bytes(note)
        return stored

    return write


def quanto_int8(state: State) -> State:
    stored = {n: t for n, t in state.items() if n not in MATRICES}
    for layer in LAYERS:
        weight, bias = state[f"{layer}.weight"], state[f"{layer}.bias"]
        module = torch.nn.Sequential(torch.nn.Linear(*weight.shape[::-1]))
        module.load_state_dict({"0.weight": weight, "0.bias": bias})
        quantize(module, weights=qint8)
        freeze(module)
        stored |= {f"{layer}.{k.removeprefix('0.')}": v.contiguous() for k, v in module.state_dict().items()}
    return stored


def quanto_int4(state: State) -> State:
    stored = {n: t for n, t in state.items() if n not in MATRICES}
    for layer in LAYERS:
        weight = state[f"{layer}.weight"].bfloat16()
        scale, shift = MaxOptimizer()(weight, qint4, 0, 128)
        owned = quantize_weight(weight, qint4, 0, scale, shift, 128, optimized=False)
        owned.save_to_state_dict(stored, f"{layer}.weight.", False)
    return stored


def bitsandbytes(kind: str, nested: bool) -> Callable[[State], State]:
    def write(state: State) -> State:
        stored = {n: t for n, t in state.items() if n not in MATRICES}
        for name in MATRICES:
            packed, quant_state = bnb.quantize_4bit(
                state[name], blocksize=64, quant_type=kind, compress_statistics=nested
            )
            parts = {f"{name}.{key}": part for key, part in quant_state.as_dict(packed=True).items()}
            stored |= {name: packed} | {key: part.clone() for key, part in parts.items()}
        return stored

    return write


CONVROT = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 256}
WRITERS: dict[str, tuple[str, Callable[[State], State]]] = {
    "lightx2v int8": ("int8", ours("int8", {"scale": "weight_scale"})),
    "comfy int8": (
        "int8_tensor",
        ours("int8_tensor", {"scale": "weight_scale"}, {"format": "int8_tensorwise"}),
    ),
    "comfy int8 convrot": ("int8_convrot", ours("int8_convrot", {"scale": "weight_scale"}, CONVROT)),
    "comfy w4a4": (
        "int4_convrot",
        ours("int4_convrot", {"scale": "weight_scale"}, {"format": "convrot_w4a4"}),
    ),
    "comfy nvfp4": (
        "nvfp4",
        ours("nvfp4", {"scale": "weight_scale", "scale_2": "weight_scale_2"}, {"format": "nvfp4"}),
    ),
    "lightx2v nvfp4": (
        "nvfp4_lightx2v",
        ours("nvfp4_lightx2v", {"scale": "weight_scale", "global_scale": "weight_global_scale"}),
    ),
    "lightx2v fp8": ("fp8_row", ours("fp8_row", {"scale": "weight_scale"})),
    "quanto qint8": ("int8", quanto_int8),
    "quanto qint4": ("int4", quanto_int4),
    **{
        f"bitsandbytes {kind}{' nested' * nested}": (
            f"{kind}{'_nested' * nested}",
            bitsandbytes(kind, nested),
        )
        for kind in ("nf4", "fp4")
        for nested in (False, True)
    },
}
LOSS = {"int8": 0.01, "int8_tensor": 0.016, "int8_convrot": 0.01, "fp8_row": 0.03}


def write_gguf(path, tensors: State, kinds: dict[str, str]) -> None:
    """A file of gguf-py. K-quants are written from our blocks: gguf-py reads them but does not make them."""
    writer = gguf.GGUFWriter(path, "wan")
    for name, tensor in tensors.items():
        if name in kinds:
            data = Blocks(kinds[name]).encode(tensor)["weight"].numpy()
            writer.add_tensor(name, data, raw_dtype=Type[kinds[name]])
        else:
            writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def loaded(refs) -> dict[str, Encoded]:
    """The tensors of `refs`, read into one slab and carved from it, as the streams do."""
    layout = build_layout(refs.values())
    slab = torch.zeros(layout.nbytes, dtype=torch.uint8)
    memory = as_bytes(slab)
    for run in read_runs(layout):
        with open(run.file, "rb") as file:
            file.seek(run.file_offset)
            file.readinto(memory[run.slab_offset : run.slab_offset + run.nbytes])
    views = carve(layout, slab)
    return {name: Encoded(ref.encoding, ref.shape, views[name]) for name, ref in refs.items()}


def check(found, state: State, loss: float) -> dict[str, Encoded]:
    """Every matrix near the original, every other tensor the original, every size as the encoding says."""
    assert found.spec == SPEC
    tensors = loaded(found.refs)
    for name, ref in found.refs.items():
        decoded = tensors[name].decode(torch.float32)
        assert ref.nbytes == ref.encoding.nbytes(ref.shape)
        if name in MATRICES:
            assert (decoded - state[name]).norm() < loss * state[name].norm()
        else:
            assert torch.equal(decoded, state[name])
    params = Params(tensors)
    for name in LAYERS:
        x = torch.randn(3, state[f"{name}.weight"].shape[1], generator=torch.Generator().manual_seed(1))
        dense = tensors[f"{name}.weight"].decode(torch.float32)
        assert torch.equal(params.linear(name, x), functional.linear(x, dense, state[f"{name}.bias"]))
        out = params.linear(name, x.bfloat16())
        expected = functional.linear(x.bfloat16(), dense.bfloat16(), state[f"{name}.bias"].bfloat16())
        assert torch.equal(out, expected)
    return tensors


@pytest.mark.parametrize("writer", WRITERS)
def test_a_checkpoint_in_any_format_is_read_from_where_it_lies(writer, state, tmp_path, open_file):
    encoding, write = WRITERS[writer]
    save_file({n: t.contiguous() for n, t in write(state).items()}, tmp_path / "model.safetensors")
    found = identify_path(tmp_path / "model.safetensors", open_file)
    assert {found.refs[name].encoding.name for name in MATRICES} == {encoding}
    check(found, state, LOSS.get(encoding, 0.17))


@pytest.mark.parametrize("first", [0, 4])
def test_one_block_may_hold_every_format_at_once(first, state, tmp_path, open_file):
    """Each Linear of the block as another library writes it."""
    names = (list(WRITERS) * 2)[first : first + len(LAYERS)]
    assert len(set(names)) == len(LAYERS) == 10
    stored = {n: t for n, t in state.items() if n not in MATRICES}
    for layer, writer in zip(LAYERS, names, strict=True):
        written = WRITERS[writer][1](state)
        stored |= {n: t.contiguous() for n, t in written.items() if n.startswith(f"{layer}.")}
    save_file(stored, tmp_path / "model.safetensors")
    found = identify_path(tmp_path / "model.safetensors", open_file)
    expected = [WRITERS[writer][0] for writer in names]
    assert [found.refs[f"{layer}.weight"].encoding.name for layer in LAYERS] == expected
    check(found, state, 0.17)


@pytest.mark.parametrize("writer", ["quanto qint8", "quanto qint4", "bitsandbytes nf4 nested"])
def test_the_parts_of_a_weight_may_lie_in_different_shards(writer, state, tmp_path, open_file):
    """As a writer of shards cuts that knows nothing of weights: by size, in the order of names."""
    encoding, write = WRITERS[writer]
    stored = {n: t.contiguous() for n, t in write(state).items()}
    names = sorted(stored)
    shards = [f"diffusion_pytorch_model-0000{n + 1}-of-00003.safetensors" for n in range(3)]
    weight_map = {name: shards[i * 3 // len(names)] for i, name in enumerate(names)}
    for i, name in enumerate(n for n in names if n.endswith(("_scale", ".absmax"))):
        weight_map[name] = shards[i % 3]
    for shard in shards:
        save_file({n: stored[n] for n, file in weight_map.items() if file == shard}, tmp_path / shard)
    index = json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map})
    (tmp_path / "diffusion_pytorch_model.safetensors.index.json").write_text(index)
    found = identify_path(tmp_path, open_file)
    assert any(len({part.file for part in found.refs[name].parts}) > 1 for name in MATRICES)
    assert {found.refs[name].encoding.name for name in MATRICES} == {encoding}
    check(found, state, LOSS.get(encoding, 0.17))


@pytest.mark.parametrize("shape", [(-1,), (1, -1), (-1, 1)])
@pytest.mark.parametrize("writer", ["bitsandbytes nf4", "bitsandbytes fp4 nested", "lightx2v nvfp4"])
def test_what_is_only_counted_may_have_any_shape(writer, shape, state, tmp_path, open_file):
    """Scales and tables whose number of elements alone says what they are."""
    stored = {
        n: t.contiguous().reshape(shape) if n.rpartition(".")[0] in MATRICES or n.endswith("scale") else t
        for n, t in WRITERS[writer][1](state).items()
    }
    save_file({n: t.contiguous() for n, t in stored.items()}, tmp_path / "model.safetensors")
    found = identify_path(tmp_path / "model.safetensors", open_file)
    assert {found.refs[name].encoding.name for name in MATRICES} == {WRITERS[writer][0]}
    check(found, state, 0.17)


@pytest.mark.parametrize("kind", BLOCK_SIZES)
def test_a_gguf_checkpoint_decodes_to_what_gguf_py_makes_of_it(kind, state, tmp_path, open_file):
    path = tmp_path / "model.gguf"
    write_gguf(path, state, dict.fromkeys(MATRICES, kind))
    found = identify_path(path, open_file)
    tensors = check(found, state, 0.3)
    for tensor in gguf.GGUFReader(path).tensors:
        if tensor.name in MATRICES:
            expected = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
            assert found.refs[tensor.name].encoding == Blocks(kind)
            assert torch.equal(tensors[tensor.name].decode(torch.float32), expected)


def test_types_may_differ_from_tensor_to_tensor(state, tmp_path, open_file):
    names = {n: planned_encoding(n, state[n].shape, "q4_k_m") for n in MATRICES}
    write_gguf(tmp_path / "m.gguf", state, {n: e.kind for n, e in names.items()})
    found = identify_path(tmp_path / "m.gguf", open_file)
    assert {n: found.refs[n].encoding for n in MATRICES} == names and len(set(names.values())) == 2
    check(found, state, 0.1)


@pytest.mark.parametrize("shape", [(256, 16, 1, 2, 2), (256 * 16, 1, 2, 2), (256, 64)])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_the_patch_embedding_may_have_5_4_or_2_dimensions(shape, prefix, state, tmp_path, open_file):
    stored = state | {"patch_embedding.weight": state["patch_embedding.weight"].reshape(shape)}
    write_gguf(tmp_path / "m.gguf", {prefix + n: t for n, t in stored.items()}, {})
    check(identify_path(tmp_path / "m.gguf", open_file), state, 1e-9)


def test_notes_may_stand_in_the_header(state, tmp_path, open_file):
    stored = ours("int8_convrot", {"scale": "weight_scale"})(state)
    meta = {"format_version": "1.0", "layers": dict.fromkeys(LAYERS, CONVROT)}
    save_file(stored, tmp_path / "m.safetensors", {"_quantization_metadata": json.dumps(meta)})
    found = identify_path(tmp_path / "m.safetensors", open_file)
    assert {found.refs[name].encoding.name for name in MATRICES} == {"int8_convrot"}
    check(found, state, 0.01)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"{'format': 'int8_tensorwise'}", "not JSON"),
        (b'{"format": "int8_tensorwise"} x', "more text"),
        (b'["int8_tensorwise"]', "no object"),
        (b"\xff", "UTF-8"),
        (b"[" * 4000, "not JSON, too long or too deep"),
        (b'{"format": "int8_tensorwise", "format": "nvfp4"}', "twice"),
        (b'{"format": "awq_w4a16"}', "marked 'awq_w4a16'"),
        (b" " * (MAX_NOTE_BYTES + 1), "at most 4,096 bytes"),
    ],
)
def test_a_broken_note_is_refused(text, reason, state, tmp_path, open_file):
    stored = ours("int8", {"scale": "weight_scale"})(state)
    stored[f"{LAYERS[0]}.comfy_quant"] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    save_file(stored, tmp_path / "m.safetensors")
    with pytest.raises(FileError) as caught:
        identify_path(tmp_path / "m.safetensors", open_file)
    assert reason in str(caught.value) and caught.value.advice


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        '{"layers": []}',
        '{"layers": {"a": 1}}',
        '{"layers": {"a": {}, "a": {}}}',
        "{",
        '{"layers": {}} x',
    ],
)
def test_broken_notes_in_the_header_are_refused(text, header_of):
    entries = {name: ("BF16", shape) for name, shape in SPEC.shapes().items()}
    with pytest.raises(FileError, match="_quantization_metadata"):
        identify([header_of(entries, metadata={"_quantization_metadata": text})])


def test_groups_without_a_bias_to_tell_their_rows_are_refused(state, tmp_path, open_file):
    stored = quanto_int4(state)
    stored[f"{LAYERS[0]}.bias"] = torch.zeros(77)
    save_file(stored, tmp_path / "m.safetensors")
    with pytest.raises(FileError, match="cannot be told"):
        identify_path(tmp_path / "m.safetensors", open_file)


TEXT_SPEC = TextSpec(vocab=300, dim=64, heads=4, head_dim=16, ffn=96, layers=2)


@pytest.fixture(scope="module")
def text_state() -> State:
    generator = torch.Generator().manual_seed(2)
    return {n: torch.randn(s, generator=generator) * 0.05 for n, s in TEXT_SPEC.shapes().items()}


def test_a_text_encoder_of_llama_cpp_is_read_under_its_own_names(text_state, tmp_path, open_file):
    assert all(TEXT_GGUF.from_native(n) for n in text_state)
    tensors = {TEXT_GGUF.from_native(n): t for n, t in text_state.items()}
    assert {"token_embd.weight", "enc.blk.1.attn_rel_b.weight", "enc.blk.0.ffn_gate.weight"} <= tensors.keys()
    assert "enc.output_norm.weight" in tensors
    kinds = {
        TEXT_GGUF.from_native(n): "Q8_0" for n, s in TEXT_SPEC.shapes().items() if not keeps_precision(n, s)
    }
    kinds["token_embd.weight"] = "Q8_0"
    unused = {"dec.blk.0.attn_q.weight": torch.zeros(2, 2), "output.weight": torch.zeros(2, 2)}
    write_gguf(tmp_path / "m.gguf", tensors | unused, kinds)
    found = identify_path(tmp_path / "m.gguf", open_file)
    assert (found.kind, found.style, found.spec) == ("text", "gguf", TEXT_SPEC)
    for name, tensor in loaded(found.refs).items():
        assert (tensor.decode(torch.float32) - text_state[name]).norm() < 0.007 * text_state[name].norm()


@pytest.mark.parametrize(
    "name", ["bf16", "fp8_scaled", "fp8_row", "fp8_e4m3", "int8", "int8_tensor", "q8_0", "q4_0"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_a_vocabulary_are_read_alone(name, dtype, tmp_path, open_file, text_state):
    table = text_state["token_embedding.weight"]
    parts = encoding_by_name(name).encode(table)
    stored = {n: t for n, t in text_state.items() if n != "token_embedding.weight"}
    path = tmp_path / ("m.gguf" if name in ("q8_0", "q4_0") else "m.safetensors")
    if path.suffix == ".gguf":
        write_gguf(
            path,
            {TEXT_GGUF.from_native(n): t for n, t in text_state.items()},
            {"token_embd.weight": name.upper()},
        )
    else:
        side = {"weight": "token_embedding.weight", "scale": "token_embedding.weight_scale"}
        save_file(stored | {side[role]: part for role, part in parts.items()}, path)
    ref = identify_path(path, open_file).refs["token_embedding.weight"]
    ids = [299, 0, 7, 7, 128]
    rows = gather_rows(ref, ids, open_file, dtype)
    assert torch.equal(rows, encoding_by_name(name).decode(parts, tuple(table.shape), dtype)[ids])


def test_rows_that_do_not_lie_apart_are_refused(tmp_path, open_file, text_state):
    packed, state = bnb.quantize_4bit(text_state["token_embedding.weight"], blocksize=64, quant_type="nf4")
    side = {f"token_embedding.weight.{k}": v for k, v in state.as_dict(packed=True).items()}
    save_file(text_state | {"token_embedding.weight": packed} | side, tmp_path / "m.safetensors")
    ref = identify_path(tmp_path / "m.safetensors", open_file).refs["token_embedding.weight"]
    with pytest.raises(FileError, match="stored as nf4"):
        gather_rows(ref, [1], open_file, torch.float32)
