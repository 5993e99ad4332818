"""Frames on their way from the device: one is copied to the host while the next is made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

from numpy.typing import NDArray
from torch import Tensor

from lowvram.offload.device import Device, Event


@dataclass(frozen=True, slots=True)
class Sent:
    """Something on its way."""

    source: Tensor
    """On the device, until it has arrived."""
    target: Tensor
    event: Event

    def arrived(self) -> NDArray[Any]:
        """A copy of it on the host, when it is there."""
        self.event.synchronize()
        return self.target.numpy().copy()


class Outbox:
    """Two pinned buffers of `nbytes` each, used in turn: before a third thing is sent, the first must have arrived.

    A context manager.
    """

    def __init__(self, device: Device, nbytes: int) -> None:
        self._device, self._turn = device, 0
        self._buffer = device.host_alloc("ram outgoing", 2 * nbytes)
        self._places = [self._buffer.tensor[i * nbytes : (i + 1) * nbytes] for i in range(2)]

    def send(self, source: Tensor) -> Sent:
        """Queue a copy of a contiguous tensor of the device."""
        place = self._places[self._turn][: source.numel() * source.element_size()]
        self._turn = 1 - self._turn
        target = place.view(source.dtype).view(source.shape)
        return Sent(
            source, target, self._device.copy_async(target, source, after=self._device.record_compute())
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._device.synchronize()
        self._places = []
        self._buffer.free()
