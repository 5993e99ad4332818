"""A text encoder as llama.cpp and city96 store it (GGUF, t5encoder): the same words, the same numbers, the same video."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import sentencepiece
import torch
from gguf import GGMLQuantizationType as Type
from safetensors.torch import load_file
from torch import Tensor

from lowvram import Runtime
from lowvram.api import Pipeline
from lowvram.conversion import plan_conversion, run_conversion
from lowvram.errors import FileError
from lowvram.library.entries import read_entries
from lowvram.offload.io import FileReader
from lowvram.quant.encodings.kquants import Blocks
from lowvram.quant.encodings.registry import encoding_by_name
from lowvram.quant.identify import identify_path
from lowvram.quant.names import TEXT_GGUF
from lowvram.quant.vocabulary import Vocabulary, sentencepiece_model

NANO = Path(__file__).parents[2] / "lowvram" / "assets" / "nano"
PROMPTS = [
    "a red circle moves left on a black background",
    "",
    "  A  big   blue SQUARE…  ",
    "ﬁve ① ｗｉｄｅ naïve cafe\u0301 ½ ×",
    "красный круг 赤い円 🙂 <extra_id_1> </s>",
    "a\tred\nline \u200b\u00a0 \ufeff",
]


def fields(message: bytes) -> Iterator[tuple[int, bytes | int]]:
    """(number, value) of every field of a protobuf message: what a test needs to see what a model holds."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at, value, shift = at + 1, value | (byte & 0x7F) << shift, shift + 7
            if byte < 0x80:
                return value

    while at < len(message):
        key = varint()
        match key & 7:
            case 0:
                yield key >> 3, varint()
            case 2:
                length = varint()
                at += length
                yield key >> 3, message[at - length : at]
            case kind:
                size = {5: 4, 1: 8}[kind]
                at += size
                yield key >> 3, message[at - size : at]


def vocabulary_keys(writer: gguf.GGUFWriter, model: bytes, size: int) -> None:
    """The keys that llama.cpp's converter writes of a sentencepiece model (`convert_hf_to_gguf.py`, T5Model)."""
    words = sentencepiece.SentencePieceProcessor()
    words.LoadFromSerializedProto(model)
    tokens, scores, kinds = [], [], []
    for n in range(size):
        if n >= words.vocab_size():
            piece, score, kind = f"[PAD{n}]", -10000.0, gguf.TokenType.UNUSED
        else:
            piece, score, kind = words.IdToPiece(n), words.GetScore(n), gguf.TokenType.NORMAL
            for test, other in (
                (words.IsUnknown, gguf.TokenType.UNKNOWN), (words.IsControl, gguf.TokenType.CONTROL),
                (words.IsUnused, gguf.TokenType.UNUSED), (words.IsByte, gguf.TokenType.BYTE),
            ):  # fmt: skip
                kind = other if test(n) else kind
        tokens.append(piece.encode())
        scores.append(score)
        kinds.append(kind)
    normalizer = dict(fields(dict(fields(model))[3]))
    writer.add_tokenizer_model("t5")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(kinds)
    writer.add_add_space_prefix(bool(normalizer.get(3, 1)))
    writer.add_remove_extra_whitespaces(bool(normalizer.get(4, 1)))
    if normalizer.get(2):
        writer.add_precompiled_charsmap(normalizer[2])
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(0)


def write(path: Path, state: dict[str, Tensor], kind: str, model: bytes | None) -> Path:
    """A t5encoder file of gguf-py: matrices and the vocabulary's table in `kind`, the rest as city96 keeps it."""
    writer = gguf.GGUFWriter(path, "t5encoder")
    writer.add_quantization_version(2)
    writer.add_block_count(max(int(n.split(".")[1]) for n in state if n.startswith("blocks.")) + 1)
    if model is not None:
        vocabulary_keys(writer, model, state["token_embedding.weight"].shape[0])
    for name, tensor in state.items():
        stored, wide = TEXT_GGUF.from_native(name), tensor.float().contiguous()
        assert stored is not None
        if wide.ndim < 2 or "pos_embedding" in name:
            writer.add_tensor(stored, wide.numpy())
        elif kind == "BF16":
            writer.add_tensor(stored, tensor.view(torch.uint8).numpy(), raw_dtype=Type.BF16)
        else:
            # gguf-py reads K-quants but does not make them.
            blocks = Blocks(kind).encode(wide)["weight"].reshape(wide.shape[0], -1)
            writer.add_tensor(stored, blocks.numpy(), raw_shape=list(blocks.shape), raw_dtype=Type[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return load_file(NANO / "text_encoder.safetensors")


@pytest.fixture(scope="module")
def spiece() -> bytes:
    return (NANO / "spiece.model").read_bytes()


def runtime() -> Runtime:
    return Runtime(10**9, 2 * 10**9, "cpu", cache=False)


def load(text: Path, tokenizer: Path | None = None) -> Pipeline:
    """nano with another text encoder, as a folder that somebody put together."""
    folder = text.with_name(f"model {text.stem}")
    (folder / "text_encoders").mkdir(parents=True)
    for name in ("high_noise_model", "low_noise_model", "vae"):
        (folder / f"{name}.safetensors").symlink_to(NANO / f"{name}.safetensors")
    (folder / "text_encoders" / text.name).symlink_to(text)
    given = {} if tokenizer is None else {"tokenizer": str(tokenizer)}
    return Runtime(10**9, 2 * 10**9, "cpu", cache=False).load(str(folder), **given)


def latent(pipe: Pipeline) -> Tensor:
    """Of one step: what the text does to a video."""
    return pipe(PROMPTS[0], width=64, height=64, frames=5, steps=1, seed=3).latent


@pytest.fixture(scope="module")
def plain() -> Tensor:
    """The latent with the text encoder in safetensors."""
    return latent(Runtime(10**9, 2 * 10**9, "cpu", cache=False).load("nano"))


@pytest.mark.parametrize("embedded", [True, False])
def test_in_bf16_it_makes_the_same_bits_as_the_safetensors_file(
    embedded: bool, state: dict[str, Tensor], spiece: bytes, plain: Tensor, tmp_path: Path
) -> None:
    path = write(tmp_path / "umt5.gguf", state, "BF16", spiece if embedded else None)
    found = identify_path(path, FileReader)
    assert (found.kind, found.style, len(found.refs)) == ("text", "gguf", len(state))
    (entry,) = read_entries(path)
    assert (entry.kind, entry.has_tokenizer, entry.problem) == ("text", embedded, "")
    pipe = load(path, None if embedded else NANO / "spiece.model")
    assert pipe.files["text"].endswith("umt5.gguf") and ("tokenizer" in pipe.files) != embedded
    assert torch.equal(latent(pipe), plain)


def test_its_own_vocabulary_is_taken_rather_than_one_that_lies_about(
    state: dict[str, Tensor], spiece: bytes, tmp_path: Path
) -> None:
    runtime = Runtime(10**9, 2 * 10**9, "cpu", cache=False)
    for model, own in ((spiece, True), (None, False)):
        path = write(tmp_path / f"{own}.gguf", state, "BF16", model)
        pipe = runtime.load("nano", text=str(path))  # nano has a spiece.model beside it
        assert isinstance(pipe.model.tokenizer, Vocabulary) == own
        given = runtime.load("nano", text=str(path), tokenizer=str(NANO / "spiece.model"))
        assert given.model.tokenizer == NANO / "spiece.model"


def test_without_a_vocabulary_a_tokenizer_is_asked_for(state: dict[str, Tensor], tmp_path: Path) -> None:
    pipe = load(write(tmp_path / "umt5.gguf", state, "BF16", None))
    with pytest.raises(FileError, match="no tokenizer was found"):
        pipe("a red circle")


def test_quantised_with_its_table_it_gives_what_gguf_py_decodes(
    state: dict[str, Tensor], spiece: bytes, plain: Tensor, tmp_path: Path
) -> None:
    path = write(tmp_path / "umt5.gguf", state, "Q4_K", spiece)
    table = identify_path(path, FileReader).refs["token_embedding.weight"]
    assert table.encoding == encoding_by_name("q4_k")
    decoded = dict(state)
    for tensor in gguf.GGUFReader(path).tensors:
        native = TEXT_GGUF.to_native(tensor.name)
        assert native is not None
        numbers = np.asarray(gguf.dequantize(tensor.data, tensor.tensor_type)).copy()
        decoded[native] = torch.from_numpy(numbers).view(state[native].shape).to(torch.bfloat16)
    theirs = write(tmp_path / "decoded.gguf", decoded, "BF16", spiece)
    ours, expected = latent(load(path)), latent(load(theirs))
    assert (ours - expected).norm() < 0.02 * expected.norm()
    assert not torch.equal(ours, plain)
    assert (ours - plain).norm() < 0.3 * plain.norm()


def model_of(path: Path) -> bytes:
    found = identify_path(path, FileReader).tokenizer
    assert isinstance(found, Vocabulary)
    with FileReader(path) as reader:
        return sentencepiece_model(found, reader)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Unigram models with what UMT5's has: a normalisation table, and bytes for what no piece covers."""
    folder = tmp_path_factory.mktemp("words")
    (folder / "text.txt").write_text("\n".join(PROMPTS * 20), encoding="utf-8")
    models = {}
    for name, more in {
        "nfkc, bytes": {"normalization_rule_name": "nmt_nfkc", "byte_fallback": True},
        "folded, spaces kept": {
            "normalization_rule_name": "nfkc_cf", "remove_extra_whitespaces": False, "add_dummy_prefix": False,
        },
        "as it is": {"normalization_rule_name": "identity"},
    }.items():  # fmt: skip
        sentencepiece.SentencePieceTrainer.train(
            input=str(folder / "text.txt"), model_prefix=str(folder / "words"), vocab_size=340,
            hard_vocab_limit=False, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2, **more,
        )  # fmt: skip
        models[name] = (folder / "words.model").read_bytes()
    return models


@pytest.mark.parametrize("name", ["nano", "nfkc, bytes", "folded, spaces kept", "as it is"])
def test_its_words_are_those_of_the_sentencepiece_model(
    name: str, trained: dict[str, bytes], state: dict[str, Tensor], spiece: bytes, tmp_path: Path
) -> None:
    model = spiece if name == "nano" else trained[name]
    words = sentencepiece.SentencePieceProcessor()
    words.LoadFromSerializedProto(model)
    tensors = state | {
        "token_embedding.weight": torch.zeros(words.vocab_size() + 84, 256, dtype=torch.bfloat16)
    }
    path = write(tmp_path / "umt5.gguf", tensors, "BF16", model)
    again = sentencepiece.SentencePieceProcessor()
    again.LoadFromSerializedProto(model_of(path))
    assert [again.encode(p) for p in PROMPTS] == [words.encode(p) for p in PROMPTS]
    assert sum(len(words.encode(p)) for p in PROMPTS) > 40


def test_its_words_are_those_of_transformers(
    state: dict[str, Tensor], trained: dict[str, bytes], tmp_path: Path
) -> None:
    from tokenizers.normalizers import Precompiled
    from transformers import T5Tokenizer

    model = trained["nfkc, bytes"]
    tensors = state | {"token_embedding.weight": torch.zeros(400, 256, dtype=torch.bfloat16)}
    words = sentencepiece.SentencePieceProcessor()
    words.LoadFromSerializedProto(model_of(write(tmp_path / "umt5.gguf", tensors, "BF16", model)))
    pieces = [(words.IdToPiece(n), words.GetScore(n)) for n in range(words.vocab_size())]
    theirs = T5Tokenizer(vocab=pieces, extra_ids=0)
    charsmap = dict(fields(dict(fields(model))[3]))[2]
    theirs._tokenizer.normalizer = Precompiled(charsmap)
    for prompt in PROMPTS[:4]:
        assert theirs(" ".join(prompt.split()))["input_ids"] == [*words.encode(prompt), 1]


def test_a_safetensors_file_made_of_it_carries_the_words_on(
    state: dict[str, Tensor], spiece: bytes, tmp_path: Path
) -> None:
    path = write(tmp_path / "umt5.gguf", state, "Q8_0", spiece)
    out = tmp_path / "umt5_fp8.safetensors"
    list(run_conversion(plan_conversion(path, out, "fp8")))
    carried = bytes(load_file(out)["spiece_model"].numpy())
    assert carried == model_of(path)
    assert torch.isfinite(latent(load(out))).all()


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        ({"scores": [float("nan")]}, "not that of a sentencepiece model"),
        ({"kinds": [2]}, "not that of a sentencepiece model"),
        ({"kinds": [9]}, "not that of a sentencepiece model"),
        ({"tokens": [b""]}, "not that of a sentencepiece model"),
        ({"charsmap": b"\xff\xff\xff\x7f1234"}, "not a sentencepiece model"),
        ({"tokens": [b"\xbe", b"\xbe"]}, "not a sentencepiece model"),
    ],
)
def test_a_vocabulary_that_is_none_is_refused(
    harm: dict[str, Any], told: str, state: dict[str, Tensor], tmp_path: Path
) -> None:
    keys: dict[str, Any] = {
        "tokens": [b"<pad>", b"</s>", b"<unk>"],
        "scores": [0.0] * 3,
        "kinds": [3, 3, 2],
        "charsmap": b"",
    }
    for name, value in harm.items():
        keys[name] = value if name == "charsmap" else [*value, *keys[name][len(value) :]]
    writer = gguf.GGUFWriter(tmp_path / "v.gguf", "t5encoder")
    writer.add_tokenizer_model("t5")
    writer.add_token_list(keys["tokens"])
    writer.add_token_scores(keys["scores"])
    writer.add_token_types(keys["kinds"])
    if keys["charsmap"]:
        writer.add_precompiled_charsmap(keys["charsmap"])
    for name, tensor in state.items():
        writer.add_tensor(TEXT_GGUF.from_native(name), tensor.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    pipe = load(tmp_path / "v.gguf")
    with pytest.raises(FileError, match=told) as caught:
        pipe.plan("a red circle")
    assert str(caught.value).count("\n") <= 2
