"""Moving what holds tensors from one device to another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def moved(value: T, device: torch.device) -> T:
    """`value` with its tensors on `device`: a tensor, or tuples, lists, mappings and frozen dataclasses that hold some.

    What is there twice is one afterwards too.
    """
    result: T = _moved(value, device, {})
    return result


def _moved(value: Any, device: torch.device, known: dict[int, Any]) -> Any:
    """known: what was moved before, by identity. No function here refers to itself by a closure: such a cycle would hold
    the tensors until Python's collector comes by."""
    if id(value) not in known:
        known[id(value)] = _anew(value, device, known)
    return known[id(value)]


def _anew(value: Any, device: torch.device, known: dict[int, Any]) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: _moved(each, device, known) for key, each in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_moved(each, device, known) for each in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(
            value, **{f.name: _moved(getattr(value, f.name), device, known) for f in fields(value) if f.init}
        )
    return value
