"""Prompts -> token ids, with the sentencepiece model that belongs to the text encoder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lowvram.errors import FileError
from lowvram.model import Model
from lowvram.offload.io import FileReader
from lowvram.quant.refs import Part
from lowvram.quant.vocabulary import Vocabulary, sentencepiece_model, sentencepieces

END = 1
"""Id of </s>, which closes every prompt; the empty prompt is this one token."""
MAX_BYTES = 64 << 20


def tokenize(model: Model, prompts: Sequence[str]) -> list[list[int]]:
    """Token ids of each prompt, ended by </s> and cut to the model's text length.

    FileError if there is no tokenizer, if it is not a sentencepiece model, or if it is of another vocabulary.
    """
    source = model.tokenizer
    if source is None:
        raise FileError(
            "no tokenizer was found",
            where=model.name,
            expected="spiece.model (the sentencepiece model of google/umt5-xxl)",
            advice="give it with --tokenizer FILE, or use a text encoder file that carries it (ComfyUI's and GGUF ones do)",
        )
    path, data = _serialized(source)
    processor = sentencepieces(data)
    if processor is None:
        raise _refused(str(path))
    length = model.spec.dit.text_len
    ids = [[*processor.encode(text)[: length - 1], END] for text in prompts]
    if any(i >= model.spec.text.vocab for row in ids for i in row):
        raise FileError(
            f"it knows more than the text encoder's {model.spec.text.vocab:,} tokens",
            where=str(path),
            advice="give the tokenizer that belongs to this text encoder",
        )
    return ids


def _serialized(source: Path | Part | Vocabulary) -> tuple[Path, bytes]:
    """The file that holds it, and the sentencepiece model itself."""
    path = source if isinstance(source, Path) else source.file
    with FileReader(path) as reader:
        if isinstance(source, Vocabulary):
            return path, sentencepiece_model(source, reader)
        offset, nbytes = (source.offset, source.nbytes) if isinstance(source, Part) else (0, reader.size)
        if not 0 < nbytes <= MAX_BYTES:
            raise _refused(str(path))
        return path, reader.read_at(offset, nbytes)


def _refused(path: str) -> FileError:
    return FileError(
        "not a sentencepiece model",
        where=path,
        expected="spiece.model of google/umt5-xxl",
        advice="download it again, or take it from the model's tokenizer/ folder",
    )
