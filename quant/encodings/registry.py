"""Every family of encodings in one table, and the rule for which tensors keep their precision.

A new family is one file with a `FAMILY` and one line in `_FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Mapping

from lowvram.errors import UsageError
from lowvram.quant.encodings import fp8, plain
from lowvram.quant.encodings.base import Encoding, Family, Recognised, StoredPart
from lowvram.quant.encodings.plain import Plain
from lowvram.quant.refs import Shape

_FAMILIES: tuple[Family, ...] = (plain.FAMILY, fp8.FAMILY)
"""Asked in this order; at most one family recognises a given set of stored parts."""

_SENSITIVE = frozenset(
    {
        "modulation", "patch_embedding", "text_embedding", "time_embedding", "time_projection", "head", "img_emb",
        "token_embedding", "pos_embedding", "norm", "norm1", "norm2", "norm3", "norm_q", "norm_k", "norm_k_img",
    }
)  # fmt: skip
"""Parts of a native name that mark a tensor no quantiser touches (checkpoint-formats 4.1, 5)."""


def encoding_names() -> tuple[str, ...]:
    """Every name `encoding_by_name` takes, in the order of the families."""
    return tuple(name for family in _FAMILIES for name in family.names)


def encoding_by_name(name: str) -> Encoding:
    """The encoding behind a `--weights` name; UsageError if there is none."""
    for family in _FAMILIES:
        if name in family.names:
            return family.names[name]
    raise UsageError(
        f"no weight format is called {name!r}",
        expected="one of " + ", ".join(encoding_names()),
        advice="choose one of them with --weights",
    )


def recognise(stored: Mapping[str, StoredPart]) -> Recognised | None:
    """What the stored tensors of one weight, by role, are; None if no family knows them."""
    for family in _FAMILIES:
        found = family.recognise(stored)
        if found is not None:
            return found
    return None


def keeps_precision(native_name: str, shape: Shape) -> bool:
    """Whether a tensor is left in high precision when a model is quantised.

    True for all that is not a matrix, and for the embeddings, the time path, the modulation, the head and the
    norms: small, and upstream computes most of them in float32.
    """
    return len(shape) != 2 or not _SENSITIVE.isdisjoint(native_name.split("."))


def planned_encoding(name: str, shape: Shape, weights_encoding: str, high: str = "bf16") -> Encoding:
    """The encoding that `--weights weights_encoding` gives the tensor `name` of `shape`.

    A plain format holds for every tensor; any other for the tensors that may lose precision and fit it, the
    rest being stored as `high`.
    """
    chosen = encoding_by_name(weights_encoding)
    if isinstance(chosen, Plain) or (not keeps_precision(name, shape) and chosen.fits(shape)):
        return chosen
    return encoding_by_name(high)
