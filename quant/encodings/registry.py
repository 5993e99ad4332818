"""Every family of encodings in one table, and the rule for which tensors keep their precision.

A new family is one file with a `FAMILY` and one line in `_FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Mapping

from lowvram.errors import UsageError
from lowvram.quant.encodings import fp8, int4, int8, kquants, mxfp8, nf4, nvfp4, plain
from lowvram.quant.encodings.base import Encoding, Family, Recognised, StoredPart
from lowvram.quant.encodings.kquants import MIXES, Blocks
from lowvram.quant.encodings.notes import rotation_of
from lowvram.quant.encodings.plain import Plain
from lowvram.quant.refs import Shape
from lowvram.quant.spec import numel

_FAMILIES: tuple[Family, ...] = (
    plain.FAMILY,
    fp8.FAMILY,
    int8.FAMILY,
    int4.FAMILY,
    nf4.FAMILY,
    nvfp4.FAMILY,
    mxfp8.FAMILY,
    kquants.FAMILY,
)
"""Asked in this order; at most one family recognises a given set of stored parts."""

_SENSITIVE = frozenset(
    {
        "modulation", "patch_embedding", "text_embedding", "time_embedding", "time_projection", "head", "img_emb",
        "token_embedding", "pos_embedding", "norm", "norm1", "norm2", "norm3", "norm_q", "norm_k", "norm_k_img",
        "motion_encoder", "face_encoder",
    }
)  # fmt: skip
"""Parts of a native name that mark a tensor no quantiser touches (checkpoint-formats 4.1, 5)."""


def encoding_names() -> tuple[str, ...]:
    """Every name `encoding_by_name` takes, in the order of the families."""
    return tuple(name for family in _FAMILIES for name in family.names)


def encoding_by_name(name: str) -> Encoding:
    """The encoding behind a `--weights` name, of a GGUF mix that of most of its tensors; UsageError if there is none."""
    for family in _FAMILIES:
        if name in family.names:
            return family.names[name]
    raise UsageError(
        f"no weight format is called {name!r}",
        expected="one of " + ", ".join(encoding_names()),
        advice="choose one of them",
    )


_UNUSED_ROLES = frozenset(
    {"input_scale", "output_scale", "input_global_scale", "input_absmax", "alpha", "comfy_quant", "quant_state",
     "weight_format"}
)  # fmt: skip
"""Roles that say nothing about the value of a weight, unless its encoding asks for them: scales of activations, and
notes. A weight with any other role that its encoding does not know is not understood."""


def recognise(stored: Mapping[str, StoredPart]) -> Recognised | None:
    """What the stored tensors of one weight, by role, are; None if no family knows them."""
    families, note = _FAMILIES, stored.get("comfy_quant")
    if note is not None and note.note is not None:
        format_ = note.note.get("format")
        turned = rotation_of(note) != 0
        families = tuple(
            f
            for f in _FAMILIES
            if isinstance(format_, str) and format_ in f.formats and f.formats[format_] >= turned
        )
    for family in families:
        found = family.recognise(stored)
        if found is not None:
            return found if stored.keys() <= {*found.roles, *_UNUSED_ROLES} else None
    return None


def keeps_precision(native_name: str, shape: Shape) -> bool:
    """Whether a tensor is left in high precision when a model is quantised.

    True for all that is not a matrix, and for the embeddings, the time path, the modulation, the head and the
    norms: small, and upstream computes most of them in float32.
    """
    return len(shape) != 2 or not _SENSITIVE.isdisjoint(native_name.split("."))


def planned_encoding(name: str, shape: Shape, weights_encoding: str) -> Encoding:
    """The encoding that `--weights weights_encoding` gives the tensor `name` of `shape`.

    A plain format holds for every tensor; any other for the tensors that may lose precision and fit it, the
    rest being stored as bf16. GGUF formats choose a type per matrix as the mix of that name does, and keep what is
    small and the patch embedding in float32, as published files do (checkpoint-formats 4.1).
    """
    chosen = encoding_by_name(weights_encoding)
    if isinstance(chosen, Plain):
        return chosen
    if not keeps_precision(name, shape):
        picked = MIXES[weights_encoding].pick(name) if weights_encoding in MIXES else chosen
        if picked.fits(shape):
            return picked
    if isinstance(chosen, Blocks) and (len(shape) != 2 or numel(shape) <= _GGUF_SMALL):
        return encoding_by_name("fp32")
    return encoding_by_name("bf16")


_GGUF_SMALL = 1024
"""Elements that a GGUF file stores in float32 at most."""
