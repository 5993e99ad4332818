"""What Triton builds the launchers of its kernels with: a C compiler, and the headers of this Python."""

from __future__ import annotations

import os
import shutil
import sysconfig
from pathlib import Path


def lack() -> str:
    """What is missing of it here and what to do about it; "" if nothing. On Windows Triton brings its own."""
    if os.name == "nt":
        return ""
    if not (os.environ.get("CC") or any(shutil.which(name) for name in ("gcc", "clang"))):
        return "no C compiler is here: install gcc, or name one in CC"
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")  # as Triton does on Debian
    given = [
        path for name in ("CPATH", "C_INCLUDE_PATH") for path in os.environ.get(name, "").split(":") if path
    ]
    if not any(
        Path(folder, "Python.h").exists() for folder in (sysconfig.get_paths(scheme)["include"], *given)
    ):
        return "the C headers of this Python are not here: install python3-dev, or name their folder in CPATH"
    return ""
