"""The alphas of a LoRA that its header tells: the peft configuration that diffusers writes as `lora_adapter_metadata`."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lowvram.quant.files.header import Header
from lowvram.quant.files.strict_json import Malformed

_MAX_CHARACTERS = 65_536
_PLAIN = re.compile(r"[\w.-]+", re.ASCII)


@dataclass(frozen=True, slots=True)
class HeaderAlpha:
    """What modules have for alpha that bring none of their own."""

    common: float | None
    by_module: Mapping[str, float]
    """By the end of the module's name."""
    rank_stabilised: bool
    """Whether the factor is alpha / sqrt(rank)."""

    def of(self, module: str, rank: int) -> float | None:
        """Of a module as the file spells it, so that alpha / rank is its factor; None if nothing is told of it."""
        ends = module.split(".")
        names = (".".join(ends[n:]) for n in range(len(ends)))
        alpha = next((self.by_module[name] for name in names if name in self.by_module), self.common)
        return alpha * math.sqrt(rank) if alpha is not None and self.rank_stabilised else alpha


def header_alpha(headers: Sequence[Header]) -> HeaderAlpha | None:
    """None if the header does not tell; Malformed if it tells what cannot be meant."""
    key = "lora_adapter_metadata"
    text = next((header.metadata[key] for header in headers if key in header.metadata), "")
    if not text:
        return None
    try:
        config = json.loads(text) if len(text) <= _MAX_CHARACTERS else None
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise Malformed(f"{key} in the header is not a small JSON object")
    values = {name.rpartition(".")[2]: value for name, value in config.items()}
    common, patterns = values.get("lora_alpha"), values.get("alpha_pattern") or {}
    if not isinstance(patterns, dict) or not all(_PLAIN.fullmatch(name) for name in patterns):
        raise Malformed("alpha_pattern in the header is no list of modules")
    by_module = {name: _number(value, "alpha_pattern") for name, value in patterns.items()}
    common = None if common is None else _number(common, "lora_alpha")
    return HeaderAlpha(common, by_module, values.get("use_rslora") is True)


def _number(value: object, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e6:
        raise Malformed(f"{what} in the header is not a positive number")
    return float(value)
