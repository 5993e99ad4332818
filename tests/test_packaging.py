"""What is installed is what lies in the repository, under the names the documents give."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

import lowvram
from lowvram.discovery import find
from lowvram.library.parts import PARTS

ROOT = Path(__file__).parent.parent
ROOMS = ("quant", "offload", "triton_kernels", "bench")
COMPARED = {"diffusers"}
"""What the benchmark compares with if it is there."""
PROBED = {
    "triton_kernels/backends.py": {"sageattention", "flash_attn", "comfy_kitchen"},
    "bench/wheels.py": {"packaging"},  # read on the machine that collects, which has the test extra
}
"""Packages used where somebody has installed them."""


def is_module(file: Path) -> bool:
    """Whether a file of bench/ is part of the package: scripts lie beside it."""
    return file.parent.name == "bench" and not file.name.startswith(("kernel", "vae_", "decode", "fuzz"))


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_the_package_list_is_what_lies_on_disk(project: dict[str, Any]) -> None:
    folders = project["tool"]["setuptools"]["package-dir"]
    on_disk = set()
    for package, folder in folders.items():
        for init in (ROOT / folder).rglob("__init__.py"):
            inside = init.parent.relative_to(ROOT / folder)
            if inside.parts[:1] and inside.parts[0] in ROOMS and package == "lowvram":
                continue  # through the links: counted under its own mapping
            on_disk.add(".".join((package, *inside.parts)))
    assert sorted(on_disk) == sorted(project["tool"]["setuptools"]["packages"])


def test_the_rooms_are_links_that_the_mapping_repeats(project: dict[str, Any]) -> None:
    folders = project["tool"]["setuptools"]["package-dir"]
    assert folders == {"lowvram": "lowvram"} | {f"lowvram.{room}": room for room in ROOMS}
    for room in ROOMS:
        assert (ROOT / "lowvram" / room).resolve() == ROOT / room
        assert importlib.import_module(f"lowvram.{room}").__name__ == f"lowvram.{room}"


def test_a_room_is_never_imported_under_its_bare_name() -> None:
    for room in ROOMS:
        done = subprocess.run(
            [sys.executable, "-c", f"import {room}"], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 1 and "ImportError" in done.stderr, room
        assert f"import lowvram.{room}" in done.stderr


def test_every_file_that_is_read_at_run_time_is_shipped(project: dict[str, Any]) -> None:
    data = project["tool"]["setuptools"]["package-data"]
    shipped = {p for pattern in data["lowvram"] for p in (ROOT / "lowvram").glob(pattern) if p.is_file()}
    rooms = {ROOT / "lowvram" / room for room in ROOMS}
    present = {
        path
        for path in (ROOT / "lowvram").rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc") and not rooms.intersection(path.parents)
    }
    assert data.keys() == {"lowvram", "lowvram.triton_kernels"}
    assert data["lowvram.triton_kernels"] == ["tuned.json"]
    assert (ROOT / "triton_kernels" / "tuned.json").is_file()
    assert {"models.toml", "fewstep.toml", "machines.toml", "py.typed"} <= {path.name for path in shipped}
    assert present == shipped


def test_the_embedded_model_is_whole() -> None:
    parts = find("nano").paths
    assert set(parts) == set(PARTS) - {"single", "clip"}
    assert all(Path(path).parent == ROOT / "lowvram" / "assets" / "nano" for path in parts.values())


def test_the_embedded_model_that_is_driven_takes_the_rest_from_the_other() -> None:
    parts = find("nano-animate").paths
    assert set(parts) == set(PARTS) - {"high", "low"}
    own = {part for part, path in parts.items() if Path(path).parent.name == "nano-animate"}
    assert own == {"single", "clip"}
    assert {Path(parts[part]).parent.name for part in parts.keys() - own} == {"nano"}
    sample = ROOT / "lowvram" / "assets" / "nano-animate" / "sample"
    assert {path.name for path in sample.iterdir()} == {
        *(f"src_{name}.mp4" for name in ("pose", "face", "bg", "mask")),
        "src_ref.png",
    }


def test_the_version_is_one_number(project: dict[str, Any]) -> None:
    assert lowvram.__version__ == project["project"]["version"]
    assert f"## {lowvram.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_command_starts_what_the_project_says(project: dict[str, Any]) -> None:
    module, function = project["project"]["scripts"]["lowvram"].split(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_everything_imported_is_a_declared_dependency(project: dict[str, Any]) -> None:
    names = {"Pillow": "PIL", "PyYAML": "yaml"}
    wanted = project["project"]["dependencies"] + project["project"]["optional-dependencies"]["hub"]
    declared = {d.split(">")[0].split("=")[0].strip() for d in wanted}
    allowed = {names.get(d, d) for d in declared} | set(sys.stdlib_module_names) | {"lowvram", "triton"}
    for folder in ("lowvram", *ROOMS):
        for file in (ROOT / folder).rglob("*.py"):
            if "bench" in file.relative_to(ROOT).parts and not is_module(file):
                continue
            where = file.relative_to(ROOT)
            optional = PROBED.get(where.as_posix(), set()) | (COMPARED if "bench" in where.parts else set())
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                imported = []
                if isinstance(node, ast.Import):
                    imported = [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom):
                    imported = [node.module or ""]
                outside = {name.split(".")[0] for name in imported} - allowed - optional
                assert not outside, f"{file.relative_to(ROOT)} imports {outside}"
