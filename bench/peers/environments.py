"""A virtual environment for each program that is only measured, thin over this one: what is here is not installed
again, and what a program needs besides is seen by it alone."""

from __future__ import annotations

import os
import site
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path

PINNED: Mapping[str, tuple[str, ...]] = {
    "aircanvas": ("aircanvas==0.1.0",),
    "diffsynth": (
        "diffsynth==2.1.12", "einops==0.8.2", "imageio==2.38.1", "pandas==3.1.1", "modelscope==1.28.0",
        "python-dateutil==2.9.0.post0", "six==1.17.0",
    ),
    "diffusers-dynamic-offloader": ("diffusers-dynamic-offloader==0.1.0rc2",),
    "cache-dit": ("cache-dit==1.5.3",),
    "mmgp": ("mmgp==3.8.2",),
    "flextensor": (
        "flextensor==0.5.0", "beartype==0.23.1", "scipy==1.17.1", "proxytypes3==1.0.2", "posix-ipc==1.3.2",
        "shared-memory-dict==0.7.2",
    ),
}  # fmt: skip
"""What is installed for each, without dependencies: those that this environment has as well (torch, diffusers,
transformers, accelerate, optimum-quanto) are used from here."""


def python_of(program: str, folder: Path | None) -> Path:
    """The interpreter that runs a program: of its environment under `folder`, if it has one there; else this one."""
    if folder is None or program not in PINNED or not (folder / program).exists():
        return Path(sys.executable)
    return folder / program / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def make(program: str, folder: Path) -> None:
    """Make the environment of a program. CalledProcessError if its packages cannot be had."""
    place = folder / program
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(place)], check=True)
    python = str(python_of(program, folder))
    packages = Path(
        subprocess.run(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            check=True, capture_output=True, text=True,
        ).stdout.strip()
    )  # fmt: skip
    here = "".join(f"; site.addsitedir({path!r})" for path in site.getsitepackages())
    (packages / "thin.pth").write_text(f"import site{here}\n")
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps"]
    subprocess.run([*pip, *PINNED[program]], check=True)


@cache
def version_of(program: str, folder: Path | None) -> str:
    """Of the program where it runs; empty if it is not there."""
    code = "import importlib.metadata, sys; print(importlib.metadata.version(sys.argv[1]))"
    done = subprocess.run(
        [str(python_of(program, folder)), "-c", code, program], capture_output=True, text=True, check=False
    )
    return done.stdout.strip()
