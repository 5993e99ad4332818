"""What every kernel keeps to, read from its source: rules whose breach no small test on a CPU would show."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOM = Path(__file__).parents[2] / "triton_kernels"
FILES = sorted(ROOM.glob("*_triton.py"))
GONE = {"make_block_ptr", "advance", "autotune", "heuristics"}
"""Block pointers are not in Triton 3.9; tiles come from a table, never from timing in a run."""


def calls(tree: ast.AST) -> Iterator[tuple[ast.Call, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield node, ast.unparse(node.func)


def breaches(source: str) -> Iterator[str]:
    tree = ast.parse(source)
    for call, name in calls(tree):
        given = {keyword.arg for keyword in call.keywords}
        if name == "tl.load" and "mask" in given and "other" not in given:
            yield f"line {call.lineno}: a masked load without other, which is anything on a card"
        if name == "tl.load" and len(call.args) > 1:
            yield f"line {call.lineno}: the mask of a load without its name"
        if name == "tl.dot" and len(call.args) == 2 and "out_dtype" not in given:
            yield f"line {call.lineno}: a product that does not say how it is summed"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in GONE:
            yield f"line {node.lineno}: {node.attr}"
        if isinstance(node, ast.Call) and ast.unparse(node) in ("float('-inf')", "float('inf')"):
            yield f"line {node.lineno}: an infinity, which a difference makes NaN of"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_kernels_keep_to_the_rules(file: Path) -> None:
    assert list(breaches(file.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "line",
    [
        "tl.load(x, mask=inside)", "tl.load(x, inside, other=0)", "tl.dot(a, b)", "tl.make_block_ptr(x)",
        "top = float('-inf')", "triton.autotune([])",
    ],
)  # fmt: skip
def test_a_breach_is_found(line: str) -> None:
    assert len(list(breaches(line))) == 1


def test_there_are_kernels() -> None:
    assert len(FILES) >= 8
