"""Kernels decode a format only where they give the bits of torch; where they do not, torch does, and a note says why.

The kernels themselves are tested in tests/kernels/interpreted_dequant.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lowvram.quant import fused
from lowvram.quant.encodings.base import Encoding
from lowvram.quant.encodings.registry import encoding_by_name, encoding_names
from lowvram.quant.linear import Encoded, Params
from lowvram.quant.refs import Shape

CPU = torch.device("cpu")
SHAPE = (192, 1024)
DTYPES = (torch.bfloat16, torch.float32)
FP8 = encoding_by_name("fp8_row")


def imitate(monkeypatch: pytest.MonkeyPatch, change: Any = None) -> list[Encoding]:
    """Kernels that torch stands in for, with `change` done to what they write; those that ran."""
    ran: list[Encoding] = []

    def stand_in(encoding: Encoding, parts: fused.Parts, out: Tensor) -> None:
        ran.append(encoding)
        encoding.decode(parts, tuple(out.shape), out.dtype, out)
        if change is not None:
            change(out)

    monkeypatch.setattr(fused, "_DECODERS", dict.fromkeys(fused._DECODERS, stand_in))
    monkeypatch.setattr(fused, "kernels_obstacle", lambda arch: "")
    return ran


def test_a_cpu_decodes_in_torch_and_says_nothing_of_it() -> None:
    assert fused.choose({FP8: SHAPE}, CPU, "", DTYPES) == (frozenset(), ())


def test_a_card_without_kernels_says_so() -> None:
    assert fused.choose({FP8: SHAPE}, CPU, "sm_75", DTYPES) == (
        frozenset(),
        ("fp8_row is decoded by torch: no kernels for sm_75",),
    )


def test_kernels_that_are_right_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = imitate(monkeypatch)
    encodings: dict[Encoding, Shape] = {encoding_by_name(name): SHAPE for name in encoding_names()}
    able = {encoding for encoding in encodings if fused.has_kernel(encoding)}
    found, notes = fused.choose(encodings, CPU, "sm_89", DTYPES)
    assert found == able and {FP8, encoding_by_name("q4_k")} <= able
    assert len(ran) == 2 * len(able)
    assert len(notes) == len(encodings) - len(able) and all(
        "there is no kernel for it" in note for note in notes
    )


def flip_a_last_bit(out: Tensor) -> None:
    out.view(torch.int32 if out.dtype == torch.float32 else torch.int16)[-1, -1] ^= 1


def test_one_wrong_bit_is_enough_for_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    imitate(monkeypatch, flip_a_last_bit)
    found, notes = fused.choose({FP8: SHAPE}, CPU, "sm_89", DTYPES)
    assert not found and notes == ("fp8_row is decoded by torch: other numbers than torch in bfloat16",)


def test_a_kernel_that_does_not_compile_leaves_it_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(out: Tensor) -> None:
        raise RuntimeError("no such instruction\nand more")

    imitate(monkeypatch, refuse)
    found, notes = fused.choose({FP8: SHAPE}, CPU, "sm_89", DTYPES)
    assert not found and notes == ("fp8_row is decoded by torch: RuntimeError: no such instruction",)


def test_a_weight_is_decoded_as_was_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = imitate(monkeypatch)
    parts = fused.random_parts(FP8, SHAPE, CPU)
    stored, by_kernel = (Encoded(FP8, SHAPE, parts, chosen) for chosen in (False, True))
    want = stored.decode(torch.bfloat16)
    assert not ran
    assert fused.same_bits(by_kernel.decode(torch.bfloat16), want)
    scratch = torch.empty(2 * want.numel(), dtype=torch.uint8)
    unpacked = Params({"a.weight": by_kernel}).unpacked(torch.bfloat16, scratch)["a.weight"]
    assert unpacked.data_ptr() == scratch.data_ptr() and fused.same_bits(unpacked, want)
    assert ran == [FP8, FP8]


def test_what_is_tried_tells_any_two_bit_patterns_apart_but_those_of_nan() -> None:
    a = torch.tensor([0.0, 1.0, torch.nan])
    assert fused.same_bits(a, a.clone()) and fused.same_bits(a, torch.tensor([0.0, 1.0, -torch.nan]))
    assert not fused.same_bits(a, torch.tensor([-0.0, 1.0, torch.nan]))
    assert not fused.same_bits(a, torch.tensor([0.0, 1.0, 2.0]))
