"""A model of which not all files are here: the shapes are known, and how each part would be stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from lowvram.model import NOWHERE, Model, Transformer
from lowvram.model_files import check_fit, check_pair
from lowvram.offload.io import Opener
from lowvram.quant.encodings.registry import planned_encoding
from lowvram.quant.identify import Kind, identify_path
from lowvram.quant.refs import Part, Shape, TensorRef
from lowvram.quant.spec import DitSpec, ModelSpec, TextSpec, VaeSpec

_KINDS: Mapping[str, Kind] = MappingProxyType(
    {"high": "dit", "low": "dit", "single": "dit", "vae": "vae", "text": "text", "clip": "clip"}
)
"""What the file of a part holds."""


def imagined_model(name: str, spec: ModelSpec, weights: str) -> Model:
    """A model of `spec` stored in the encoding `weights`, without files: for plans."""
    nowhere = Path(f"{NOWHERE}{name} in {weights}>")
    refs = _imagined(spec.dit.shapes(), weights, nowhere)
    transformer = Transformer(refs, face_blocks=spec.dit.face_blocks)
    return Model(
        name,
        spec,
        dict.fromkeys(spec.expert_names(), transformer),
        _imagined(spec.vae.shapes(), "bf16", nowhere),
        _imagined(spec.text.shapes(), "bf16", nowhere),
        None,
        {} if spec.clip is None else _imagined(spec.clip.shapes(), "fp16", nowhere),
    )


def with_parts(model: Model, files: Mapping[str, str]) -> Model:
    """The model with these parts as their headers say that they are stored; the others stay as they were imagined.

    One of two transformers stands for both. FileError for a part that is not what it should be.
    """
    opener, spec = Opener(), model.spec
    kinds = {part: kind for part, kind in _KINDS.items() if part in files}
    found = {part: identify_path(Path(files[part]), opener, kind) for part, kind in kinds.items()}
    specs = {kinds[part]: checkpoint.spec for part, checkpoint in found.items()}
    dit, vae, text = specs.get("dit", spec.dit), specs.get("vae", spec.vae), specs.get("text", spec.text)
    assert isinstance(dit, DitSpec) and isinstance(vae, VaeSpec) and isinstance(text, TextSpec)
    experts = {part: checkpoint for part, checkpoint in found.items() if kinds[part] == "dit"}
    check_pair(experts, files)
    check_fit(spec, dit, vae, text, files)
    transformers = dict(model.transformers)
    if experts:
        stored = {part: Transformer(c.refs, face_blocks=dit.face_blocks) for part, c in experts.items()}
        transformers = {expert: stored.get(expert, next(iter(stored.values()))) for expert in transformers}
    refs = {part: checkpoint.refs for part, checkpoint in found.items()}
    return replace(
        model,
        transformers=transformers,
        opener=opener,
        vae=refs.get("vae", model.vae),
        text=refs.get("text", model.text),
        clip=refs.get("clip", model.clip),
    )


def _imagined(shapes: Mapping[str, Shape], weights: str, file: Path) -> dict[str, TensorRef]:
    refs, offset = {}, 0
    for name, shape in shapes.items():
        encoding = planned_encoding(name, shape, weights)
        parts = []
        for part in encoding.layout(shape):
            parts.append(Part(part.role, file, offset, part.nbytes, part.dtype, part.shape))
            offset += part.nbytes
        refs[name] = TensorRef(name, shape, encoding, tuple(parts))
    return refs
