"""What the lean forward asks of a residual stream, wherever it lies."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Rows(Protocol):
    """A matrix [L, dim] that is read and written by slices of rows: a tensor, or one that passes by chunk."""

    @property
    def shape(self) -> torch.Size: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    def __getitem__(self, rows: slice, /) -> Tensor: ...

    def __setitem__(self, rows: slice, value: Tensor, /) -> None: ...


def watch(finite: Tensor | None, part: int, x: Tensor) -> None:
    """Make truth `part` of `finite`, if there are any, false if x holds NaN or infinity. Nothing waits for the device, and
    nothing of the size of x is made."""
    if finite is not None:
        for extreme in torch.aminmax(x):
            finite[part].logical_and_(torch.isfinite(extreme))
