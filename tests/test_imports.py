"""Who may import whom, what an import does (nothing), and what the package shows."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lowvram

ROOT = Path(__file__).parent.parent
ORDER = ("triton_kernels", "quant", "offload", "lowvram", "bench")
"""A room may import itself and the rooms before it."""

OPEN = {"lowvram.errors"}
"""Modules that every room may import."""

SCRIPTS = re.compile(r"bench/(.*/|kernel|vae_|decode|fuzz)")
"""Files of bench/ that are run by hand and are no part of the package."""

PURE = (
    "lowvram.errors",
    "lowvram.quant.linear",
    "lowvram.quant.spec",
    "lowvram.quant.face_spec",
    "lowvram.triton_kernels",
)
"""What networks and samplers may import of lowvram, besides their own folder."""

READ_ONLY = re.compile(r"(Mapping|Sequence|Collection|Iterable|tuple|frozenset|Final|Set)\b")
MUTABLE_NODES = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)
MUTABLE_CALLS = {"list", "dict", "set", "bytearray", "defaultdict", "deque", "Counter", "OrderedDict"}


def modules() -> dict[str, ast.Module]:
    """Syntax tree of every module of the product by import name; rooms through their own folders."""
    found = {}
    for room in ORDER:
        for file in sorted((ROOT / room).rglob("*.py")):
            parts = file.relative_to(ROOT).with_suffix("").parts
            if (parts[0] == "lowvram" and parts[1] in ORDER) or SCRIPTS.match("/".join(parts)):
                continue
            name = ".".join(parts if parts[0] == "lowvram" else ("lowvram", *parts)).removesuffix(".__init__")
            found[name] = ast.parse(file.read_text(encoding="utf-8"))
    return found


MODULES = modules()


def names_of_torch(tree: ast.Module) -> Iterator[str]:
    """What a module takes of torch by attribute, the longest chains."""
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and id(node) not in inner:
            name = ast.unparse(node)
            if re.fullmatch(r"torch(\.\w+)+", name) and not name.startswith("torch.ops."):
                yield name


def test_what_is_taken_of_torch_is_there() -> None:
    """On a CPU too, where nothing runs that only a card reaches. `torch._C` is another in every build and version."""
    import torch.nn.attention

    for name, tree in MODULES.items():
        for taken in names_of_torch(tree):
            value: object = torch
            for part in taken.split(".")[1:]:
                assert part != "_C" and hasattr(value, part), f"{name}: {taken}"
                value = getattr(value, part)


def room_of(name: str) -> str:
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in ORDER else "lowvram"


def imports(tree: ast.AST) -> Iterator[str]:
    """Every module of lowvram that is imported anywhere in `tree`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "lowvram")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lowvram":
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in MODULES else str(node.module)


def test_every_room_is_looked_at() -> None:
    assert {room_of(name) for name in MODULES} == set(ORDER) and len(MODULES) > 50
    assert "lowvram.offload.budget" in set(imports(MODULES["lowvram.planning.choose"]))


@pytest.mark.parametrize("name", MODULES)
def test_rooms_import_downwards_only(name: str) -> None:
    room = "bench" if name == "lowvram.cli.bench" else room_of(name)  # the verb may import what it starts
    allowed = ORDER[: ORDER.index(room) + 1]
    wrong = [other for other in imports(MODULES[name]) if room_of(other) not in allowed and other not in OPEN]
    assert not wrong, f"{name} imports {wrong}"


@pytest.mark.parametrize(
    "name", [name for name in MODULES if name.startswith(("lowvram.models", "lowvram.sampling"))]
)
def test_networks_and_samplers_know_nothing_of_files_devices_and_flags(name: str) -> None:
    own = ".".join(name.split(".")[:2])
    wrong = [other for other in imports(MODULES[name]) if not other.startswith((own, *PURE))]
    assert not wrong, f"{name} imports {wrong}"


def test_errors_import_nothing() -> None:
    statements = [
        n for n in ast.walk(MODULES["lowvram.errors"]) if isinstance(n, ast.Import | ast.ImportFrom)
    ]
    assert [getattr(n, "module", None) for n in statements] == ["__future__"]


@pytest.mark.parametrize("name", MODULES)
def test_no_module_holds_state(name: str) -> None:
    """Tables have constant names and a type that offers no way of writing; nothing is cached behind one's back."""
    tree = MODULES[name]
    for node in tree.body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None and is_mutable(node.value):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [ast.unparse(target) for target in targets]
            annotation = ast.unparse(node.annotation) if isinstance(node, ast.AnnAssign) else ""
            constant = all(n == "__all__" or n.strip("_").isupper() for n in names)
            assert constant and (names == ["__all__"] or READ_ONLY.match(annotation)), f"{name}: {names}"
    for inner in ast.walk(tree):
        assert not isinstance(inner, ast.Global), f"{name}, line {inner.lineno}"
        if isinstance(inner, ast.FunctionDef):
            remembered = {"cache", "lru_cache"} & set(
                re.findall(r"\w+", " ".join(map(ast.unparse, inner.decorator_list)))
            )
            assert not remembered, f"{name}.{inner.name}"


def is_mutable(value: ast.expr) -> bool:
    called = value.func if isinstance(value, ast.Call) else None
    return isinstance(value, MUTABLE_NODES) or (
        isinstance(called, ast.Name | ast.Attribute)
        and ast.unparse(called).rpartition(".")[2] in MUTABLE_CALLS
    )


@pytest.mark.parametrize("name", MODULES)
def test_every_module_says_what_it_is(name: str) -> None:
    assert ast.get_docstring(MODULES[name])


def test_all_names_are_there_sorted_and_complete() -> None:
    assert lowvram.__all__ == sorted(set(lowvram.__all__)) and dir(lowvram) == lowvram.__all__
    for name in lowvram.__all__:
        assert getattr(lowvram, name) is not None
    errors = importlib.import_module("lowvram.errors")
    defined = {name for name, value in vars(errors).items() if isinstance(value, type)}
    assert defined <= set(lowvram.__all__)
    with pytest.raises(AttributeError, match="Pipelin"):
        lowvram.Pipelin  # noqa: B018


@pytest.mark.parametrize(
    "statement", ["import lowvram", "import lowvram.cli.main", "import lowvram.sampling.presets"]
)
def test_an_import_touches_neither_torch_nor_files(statement: str) -> None:
    code = f"import sys; {statement}; print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(ast.literal_eval(done.stdout))
    assert "lowvram" in loaded
    heavy = {"torch", "numpy", "av", "transformers", "diffusers", "safetensors", "sentencepiece"}
    assert not heavy & loaded
