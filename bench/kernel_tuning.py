"""From what `kernels.py tune` timed on a card to its row of the table that dispatch reads."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from lowvram.triton_kernels.modes import MODES
from lowvram.triton_kernels.tuned import Tuned

Row = Mapping[str, Any]


def tuned(rows: Iterable[Row]) -> dict[str, Tuned]:
    """A row of the table for every architecture in `rows`, each of them with arch, card, software and kernel.

    ValueError where attention or products were not timed.
    """
    by_arch: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_arch[row["arch"]].append(row)
    return {arch: _tuned(arch, some) for arch, some in by_arch.items()}


def _tuned(arch: str, rows: list[Row]) -> Tuned:
    products = _totals([r for r in rows if "out" in r and "tile" not in r], _kernel)
    gemm = _totals([r for r in rows if r["kernel"] in ("int8_linear", "int8_linear_gated_")], _tile)
    modes = _totals([r for r in rows if r["kernel"] in MODES and "tile" not in r], _kernel)
    if not gemm or "sdpa" not in modes or "bf16 cuBLAS" not in products:
        raise ValueError(f"the rows of {arch} do not time products and attention beside those of torch")
    attention: dict[str, tuple[int, ...]] = {}
    for mode in MODES.values():
        tiles = _totals([r for r in rows if r["kernel"] == mode.name and "tile" in r], _tile)
        if tiles:
            attention[mode.v_format] = _fastest(tiles)[0]
            modes[mode.name] = min(tiles.values())
    tile = _fastest(gemm)[0]
    kernel = _totals([r for r in rows if r["kernel"] == "int8_linear" and _tile(r) == tile], _kernel)
    int8 = {"triton": kernel["int8_linear"], "torch": products.get("_int_mm and epilogue", float("inf"))}
    forms = {"int8": min(int8.values()) + products["quantise, kernel"]}
    if "fp8_linear" in products:
        forms["fp8"] = products["fp8_linear"] + products["quantise, fp8"]
    return Tuned(
        rows[0]["card"], rows[0]["software"], attention, tile, _fastest(int8)[0], _fastest(modes),
        tuple(form for form in _fastest(forms) if forms[form] < products["bf16 cuBLAS"]),
    )  # fmt: skip


def _kernel(row: Row) -> str:
    return str(row["kernel"])


def _tile(row: Row) -> tuple[int, ...]:
    return tuple(row["tile"])


def _totals(rows: Iterable[Row], key: Callable[[Row], Any]) -> dict[Any, float]:
    """Milliseconds over all sizes, of what was timed at every size and refused at none."""
    sums: dict[Any, float] = defaultdict(float)
    timed: Counter[Any] = Counter()
    for row in rows:
        if "ms" in row:
            sums[key(row)] += row["ms"]
            timed[key(row)] += 1
    most = max(timed.values(), default=0)
    return {name: ms for name, ms in sums.items() if timed[name] == most}


def _fastest(totals: Mapping[Any, float]) -> tuple[Any, ...]:
    return tuple(sorted(totals, key=lambda name: totals[name]))
