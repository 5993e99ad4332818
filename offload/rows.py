"""HostRows: a matrix in host memory whose rows pass through the device, a run at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from lowvram.offload.device import Device, Event

WINDOWS = 2
"""Runs on the device at once: one is worked on while the next arrives."""

Run = tuple[int, int]
"""First row, and the row after the last."""


class HostRows:
    """A matrix [n, width] that can be read and written like a tensor, by slices of rows.

    device   whose host memory holds it, as `name`, and whose memory holds two runs of `window` rows
    dtype    of the numbers
    kept     if not 0: rows 0, kept, 2 * kept.. lie on the device as well, and `rows[::kept]` gives those at no cost

    `rows[i:j]` is a device tensor, good until the slice after the next is asked for; the run behind it is fetched
    meanwhile. `rows[i:j] = value` writes one; what was changed in a slice itself is kept by writing the slice back.
    Order between the queues is kept by events; the host never waits.
    Raises OutOfMemoryError if there is no room, DeviceLostError if a copy cannot be queued.
    """

    def __init__(
        self,
        device: Device,
        name: str,
        n: int,
        width: int,
        dtype: torch.dtype,
        window: int,
        kept: int = 0,
    ) -> None:
        self._device, self._window, self._stride = device, min(window, n), kept
        self._places = [
            torch.empty(self._window, width, dtype=dtype, device=device.torch_device) for _ in range(WINDOWS)
        ]
        self._kept = self._places[0].new_empty(-(-n // kept) if kept else 0, width)
        # Claimed last: nothing after it can fail and leave the claim behind.
        self._home = device.host_alloc(name, n * width * dtype.itemsize)
        self._matrix = self._home.tensor.view(dtype).view(n, width)
        self._written: list[Event | None] = [None] * WINDOWS  # copies home that are under way
        self._last = 0  # the place that was handed out or written last
        self._holds: Run | None = None  # what it holds
        self._ahead: tuple[Run, Event] | None = None  # what arrives in the other

    @property
    def shape(self) -> torch.Size:
        return self._matrix.shape

    @property
    def device(self) -> torch.device:
        """Of what slices give."""
        return self._device.torch_device

    @property
    def dtype(self) -> torch.dtype:
        return self._matrix.dtype

    def __getitem__(self, rows: slice) -> Tensor:
        if self._stride and rows.indices(self._matrix.shape[0]) == (0, self._matrix.shape[0], self._stride):
            return self._kept
        run = self._run(rows)
        if self._holds == run:
            self._settle()  # the caller may change it
            return self._places[self._last][: run[1] - run[0]]
        if self._ahead is None or self._ahead[0] != run:
            self._fetch(run)
        assert self._ahead is not None
        self._device.wait(self._ahead[1])
        self._last, self._holds, self._ahead = 1 - self._last, run, None
        following = self._following(run)
        if following != run:
            self._fetch(following)
        return self._places[self._last][: run[1] - run[0]]

    def __setitem__(self, rows: slice, value: Tensor) -> None:
        run = self._run(rows)
        if self._holds != run:
            self._last, self._holds = 1 - self._last, run
            self._forget_ahead()  # its place is taken
        elif self._ahead is not None and self._ahead[0][0] < run[1] and run[0] < self._ahead[0][1]:
            self._forget_ahead()  # it holds what was there before
        self._settle()
        place = self._places[self._last][: run[1] - run[0]]
        if value.data_ptr() != place.data_ptr():
            place.copy_(value)
        if self._stride:
            first = -(-run[0] // self._stride)
            fresh = place[first * self._stride - run[0] :: self._stride]
            self._kept[first : first + fresh.shape[0]] = fresh
        self._written[self._last] = self._device.copy_async(
            self._matrix[run[0] : run[1]], place, after=self._device.record_compute()
        )

    def _forget_ahead(self) -> None:
        """What arrives is of no use; compute may write to its place once it is there."""
        if self._ahead is not None:
            self._device.wait(self._ahead[1])
            self._ahead = None

    def _settle(self) -> None:
        """Compute goes on once the copy home, out of the place that it is about to change, is over."""
        written, self._written[self._last] = self._written[self._last], None
        if written is not None:
            self._device.wait(written)

    def _run(self, rows: slice) -> Run:
        start, stop, step = rows.indices(self._matrix.shape[0])
        if step != 1 or not 0 < stop - start <= self._window:
            raise IndexError(f"rows {start} to {stop} of {self._matrix.shape[0]}, {self._window} at once")
        return start, stop

    def _following(self, run: Run) -> Run:
        n = self._matrix.shape[0]
        start = run[1] % n
        return start, min(start + self._window, n)

    def _fetch(self, run: Run) -> None:
        """Into the place that was not handed out last; copies out of it end first, as one queue does both."""
        place = self._places[1 - self._last][: run[1] - run[0]]
        event = self._device.copy_async(
            place, self._matrix[run[0] : run[1]], after=self._device.record_compute()
        )
        self._ahead = run, event

    def close(self) -> None:
        """Give the memory back. Copies that are under way end first."""
        try:
            self._device.synchronize()
        finally:
            self._places.clear()
            del self._matrix, self._kept
            self._home.free()
