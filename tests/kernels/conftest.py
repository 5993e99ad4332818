"""Triton's interpreter, for the tests of kernels: they run on a CPU, tensor by tensor, in NumPy.

Triton chooses it when it is imported, and a process that has chosen it cannot compile. So the files here named
`interpreted_*.py` run in a child process each, started by `test_interpreter.py`. To run one by hand:

    TRITON_INTERPRET=1 python -m pytest tests/kernels/interpreted_attention.py

What it does wrong, and what is done about that, is in `lowvram/bench/interpreter.py`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lowvram.bench import interpreter

if os.environ.get("TRITON_INTERPRET") == "1":
    interpreter.mend()


@pytest.fixture
def far(tmp_path: Path) -> Callable[[Tensor], Tensor]:
    """A copy of a tensor [3 or more, ...] whose first index goes in steps of 2^30 elements, in a file of holes: what 32 bits count
    to does not reach its last rows."""

    def copied(x: Tensor) -> Tensor:
        step, file = 2**30, tmp_path / str(len(list(tmp_path.iterdir())))
        size = step * (x.shape[0] - 1) + x[0].numel()
        room = torch.from_file(str(file), shared=True, size=size, dtype=x.dtype)
        return room.as_strided(x.shape, (step, *x[0].contiguous().stride())).copy_(x)

    return copied
