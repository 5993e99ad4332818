"""A device without memory, for stages at the sizes of the real models."""

from __future__ import annotations

import torch
from torch import Tensor

from lowvram.offload.budget import Ledger, segment_size
from lowvram.offload.device import Buffer, CpuDevice

META = torch.device("meta")


class MetaDevice(CpuDevice):
    """Its buffers are meta tensors, and so are those of its host; nothing is copied."""

    def __init__(self) -> None:
        super().__init__()
        self.kind, self.torch_device, self.ledger = "meta", META, Ledger(None, "VRAM")

    def footprint(self, nbytes: int) -> int:
        return segment_size(nbytes)

    def _allocate(self, name: str, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=META)

    def host_alloc(self, name: str, nbytes: int, *, pin: bool = True) -> Buffer:
        return Buffer(name, nothing(nbytes), lambda: None)


def nothing(nbytes: int) -> Tensor:
    """Meta tensors are what is counted: this one was there before."""
    return _EVERYTHING[:nbytes]


class OnHost(Tensor):
    """A meta tensor that lies in the host's memory: what is asked of it for the device is a copy there."""

    def to(self, *_: object, **__: object) -> Tensor:  # type: ignore[override]
        return self.as_subclass(Tensor).clone()


def on_host(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor of the host, which the device does not count."""
    count = dtype.itemsize * torch.Size(shape).numel()
    return nothing(count).view(dtype).view(shape).as_subclass(OnHost)


_EVERYTHING = torch.empty(1 << 40, dtype=torch.uint8, device=META)
