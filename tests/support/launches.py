"""A card that compiles and runs nothing: what kernels of Triton would be launched with, and on how many programs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
from torch import Tensor


@dataclass(frozen=True)
class Launch:
    kernel: str
    grid: tuple[int, int, int]
    types: Mapping[str, str]
    """Of the arguments that are read and neither constants nor 1."""
    constants: Mapping[str, object]
    whole: frozenset[str]
    """Arguments that are divisible by 16."""
    options: Any
    """num_warps, num_stages and what else a compiler is told."""


class Card:
    """Triton's idea of a card of architecture "sm_86" and the like, for as long as a test lasts; tensors may be meta."""

    def __init__(self, arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
        from triton.backends.compiler import GPUTarget
        from triton.runtime import driver
        from triton.runtime.jit import JITFunction

        self.launches: list[Launch] = []
        number = int(arch.removeprefix("sm_"))
        stand_in = SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", number, 32),
            get_current_device=lambda: number,  # kernels remember by device what they are compiled for
            get_current_stream=lambda device: 0,
        )
        monkeypatch.setattr(driver, "_active", stand_in)
        monkeypatch.setattr(JITFunction, "_do_compile", self._compiled())

    def _compiled(self) -> Callable[..., object]:
        card = self

        def compile_(
            kernel: Any, key: str, signature: Mapping[str, str], device: int, constants: Mapping[Any, object],
            options: Any, attributes: Mapping[Any, list[Any]], warmup: bool,
        ) -> object:  # fmt: skip
            names = kernel.arg_names
            whole = frozenset(names[at[0]] for at, given in attributes.items() if given)

            def run(x: int, y: int, z: int, *rest: Any) -> None:
                arguments = rest[-len(names) :]
                read = {
                    name: kind
                    for (name, kind), value in zip(signature.items(), arguments, strict=True)
                    if kind != "constexpr" and not _stands_in(value, arguments)
                }
                fixed = {names[at[0]]: value for at, value in constants.items()}
                card.launches.append(Launch(kernel.__name__, (x, y, z), read, fixed, whole, options))

            return SimpleNamespace(
                run=run, function=None, packed_metadata=None, launch_metadata=lambda *arguments: None
            )

        return compile_


def _stands_in(value: object, arguments: tuple[object, ...]) -> bool:
    """Whether a tensor is there because a kernel wants a pointer, and not to be read."""
    return isinstance(value, Tensor) and (not value.numel() or sum(other is value for other in arguments) > 1)
