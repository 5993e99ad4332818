"""What tuning runs have measured, by architecture: `tuned.json`, which `bench/kernels.py tune --table` writes.

Dispatch reads it when it is imported and measures nothing itself. An architecture that is not in the table has the defaults
of `tiles` and `modes`. Torch is not imported here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from importlib.resources import files

FILE = "tuned.json"


@dataclass(frozen=True, slots=True)
class Tuned:
    """The fastest of what was tried on a card of one architecture."""

    card: str
    software: str
    """Versions of torch and triton."""
    attention: Mapping[str, tuple[int, ...]]
    """Queries, keys, warps and stages of a tile, by format of V."""
    gemm: tuple[int, ...]
    """Rows of activations, rows of the weight, columns, warps and stages of a tile of int8 products."""
    int8_by: str
    """What multiplies int8: "triton" or "torch"."""
    modes: tuple[str, ...]
    """Attention modes that were timed, the fastest first."""
    products: tuple[str, ...]
    """Forms of multiplication in 8 bits that were faster than bf16, their rows included, the fastest first."""


def read(text: str) -> dict[str, Tuned]:
    """The table by architecture. ValueError for text that is no table."""
    names = {field.name for field in fields(Tuned)}
    table = {}
    for arch, row in json.loads(text).items():
        if not isinstance(row, dict) or set(row) != names:
            raise ValueError(f"{FILE}: {arch} must have {', '.join(sorted(names))}")
        tuples = {name: tuple(row[name]) for name in ("gemm", "modes", "products")}
        attention = {v_format: tuple(tile) for v_format, tile in row["attention"].items()}
        if len(tuples["gemm"]) != 5 or any(len(tile) != 4 for tile in attention.values()):
            raise ValueError(f"{FILE}: tiles of {arch} must have 5 numbers for products and 4 for attention")
        if row["int8_by"] not in ("triton", "torch"):
            raise ValueError(f'{FILE}: int8_by of {arch} must be "triton" or "torch"')
        table[arch] = Tuned(**{**row, **tuples, "attention": attention})
    return table


def written(table: Mapping[str, Tuned]) -> str:
    """The text that `read` reads: an architecture a line."""
    lines = (f"{json.dumps(arch)}: {json.dumps(asdict(table[arch]))}" for arch in sorted(table))
    return "{\n" + ",\n".join(lines) + "\n}\n"


TUNED: Mapping[str, Tuned] = read(files(__package__).joinpath(FILE).read_text(encoding="utf-8"))
