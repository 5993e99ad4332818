"""The packages that a machine without a network lacks, as wheels: what to carry, and how large it is.

    python bench/wheels.py wheels                        everything that lowvram imports, for Python 3.12 on Linux
    python bench/wheels.py wheels --there numpy --there pillow     less what is there already
    python bench/wheels.py wheels --compared             and what it is only compared with: diffusers, sageattention

and on that machine:

    python3 -m pip install --no-index --no-deps --target site wheels/*.whl
    PYTHONPATH=site python3 -m lowvram.bench.gpu --check
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path
from zipfile import ZipFile

NEEDED = (
    "av", "msgspec", "platformdirs", "psutil", "numpy", "pillow", "safetensors", "sentencepiece", "pyyaml", "rich",
    "markdown-it-py", "mdurl", "pygments", "typer", "shellingham", "annotated-doc", "typing-extensions",
)  # fmt: skip
"""lowvram's dependencies and theirs, but torch with what comes with it."""
COMPARED = (
    "diffusers==0.42.1", "sageattention==1.0.6", "huggingface-hub", "importlib-metadata", "zipp", "requests", "regex",
    "filelock", "packaging", "tqdm", "click", "lazy-importer", "httpx2", "httpcore2", "h11", "anyio", "idna", "truststore",
    "certifi", "urllib3", "charset-normalizer", "fsspec", "hf-xet",
)  # fmt: skip
PLATFORMS = (
    "manylinux_2_28_x86_64",
    "manylinux_2_27_x86_64",
    "manylinux_2_17_x86_64",
    "manylinux2014_x86_64",
)
ROOM = 64 << 20
"""Bytes that are easily carried; more is told."""


def command(folder: Path, python: str, packages: list[str]) -> list[str]:
    """What downloads them, built already and without their dependencies."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    pip += ["--implementation", "cp", "--python-version", python, "--dest", str(folder)]
    return [*pip, *(word for platform in PLATFORMS for word in ("--platform", platform)), *packages]


SPARED = ("torch", "triton", "pydantic")
"""What is not carried: a machine with a card has the first two, and the last is for the command line alone."""


def wanting(folder: Path, python: str, there: Collection[str]) -> dict[str, str]:
    """What the wheels of a folder need and neither they nor the machine bring, each with a wheel that needs it."""
    # No part of the product needs it.
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    system = {"python_version": python, "python_full_version": f"{python}.0", "extra": ""}
    needs: dict[str, str] = {}
    has = {canonicalize_name(name) for name in (*there, *SPARED)}
    for wheel in sorted(folder.glob("*.whl")):
        has.add(canonicalize_name(wheel.name.split("-")[0]))
        with ZipFile(wheel) as archive:
            (about,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
            lines = archive.read(about).decode("utf-8").split("\n\n")[0].splitlines()
        for line in lines:
            if not line.startswith("Requires-Dist: "):
                continue
            need = Requirement(line.removeprefix("Requires-Dist: "))
            if need.marker is None or need.marker.evaluate(system):
                needs.setdefault(canonicalize_name(need.name), wheel.name.split("-")[0])
    return {name: by for name, by in needs.items() if name not in has}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", default="3.12")
    parser.add_argument("--there", action="append", default=[], help="a package that is there already")
    parser.add_argument("--compared", action="store_true", help="what is only compared with, too")
    parser.add_argument("--peers", action="store_true", help="the programs of bench/peers, too")
    asked = parser.parse_args()
    wanted = [*NEEDED, *(COMPARED if asked.compared else ())]
    if asked.peers:
        # A folder of the repository, and no part of the package.
        from lowvram.bench.peers.environments import PINNED

        wanted += [package for packages in PINNED.values() for package in packages]
    packages = [name for name in wanted if name.split("==")[0] not in asked.there]
    subprocess.run(command(asked.folder, asked.python, packages), check=True)
    sizes = {wheel.name: wheel.stat().st_size for wheel in asked.folder.glob("*.whl")}
    for name, nbytes in sorted(sizes.items(), key=lambda item: -item[1]):
        print(f"{nbytes / 1e6:8.2f} MB  {name}")
    for name, by in wanting(asked.folder, asked.python, asked.there).items():
        print(
            f"          and {name}, which {by} needs: neither collected nor named by --there", file=sys.stderr
        )
    total = sum(sizes.values())
    more = "" if total <= ROOM else f", {(total - ROOM) / 1e6:.1f} MB over {ROOM / 1e6:.1f}: see --there"
    print(f"{total / 1e6:8.2f} MB  in {len(sizes)} wheels{more}")


if __name__ == "__main__":
    main()
