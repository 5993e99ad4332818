"""What runs where: the table of modes, what stands in a mode's way, and the test on the card itself."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lowvram.errors import UsageError
from lowvram.triton_kernels import attention, dispatch
from lowvram.triton_kernels.dispatch import PACKAGES, choose, obstacle, try_mode, try_ops
from lowvram.triton_kernels.modes import ARCHS, AUTO, CAREFUL, MODES
from lowvram.triton_kernels.ops import TORCH
from lowvram.triton_kernels.tiles import ATTENTION, HALF

ALL = frozenset(PACKAGES)
CPU = torch.device("cpu")


def test_the_tables_name_what_there_is() -> None:
    for arch, names in AUTO.items():
        assert arch in ARCHS and set(names) <= set(MODES)
        assert all(arch in MODES[name].archs for name in names)
    for mode in MODES.values():
        if mode.quantised:
            assert set(mode.archs) == set(ATTENTION[mode.v_format])
            assert set(HALF[mode.v_format]) in (set(), set(mode.archs))
    assert CAREFUL in MODES and "fp8" not in CAREFUL


@pytest.mark.parametrize(
    ("arch", "mode"), [("sm_86", "int8-fp16"), ("sm_89", "int8-fp16"), ("sm_120", "int8-fp16"),
                       ("sm_90", "sdpa"), ("sm_80", "sdpa"), ("sm_75", "sdpa"), ("", "sdpa")],
)  # fmt: skip
def test_auto_takes_what_suits_the_card_and_says_that_nobody_timed_it(arch: str, mode: str) -> None:
    found = choose("auto", arch, ALL)
    assert found.mode == found.ends == mode
    assert ("nobody has timed" in found.why) == (mode != "sdpa")


def test_auto_does_without_what_is_missing_or_fails_and_says_so() -> None:
    found = choose("auto", "sm_89", frozenset())
    assert found.mode == "sdpa" and "triton is not installed" in found.why
    found = choose("auto", "sm_89", ALL, lambda mode: "0.4 off" if mode.name == "int8-fp16" else "")
    assert found.mode == "int8" and "not int8-fp16: 0.4 off" in found.why


def test_a_mode_that_fails_its_test_is_replaced_by_name() -> None:
    found = choose("int8-fp8", "sm_89", ALL, lambda mode: "NaN")
    assert found.mode == found.ends == "sdpa" and "int8-fp8 failed its self-test: NaN" in found.why


@pytest.mark.parametrize(
    ("asked", "arch", "packages", "said"),
    [
        ("int8-fp8", "sm_86", ALL, "no int8-fp8 kernel for sm_86"),
        ("int8", "sm_89", frozenset(), "triton is not installed"),
        ("sage", "sm_89", frozenset({"triton"}), "sageattention is not installed"),
        ("flash", "", ALL, "needs an NVIDIA card"),
        ("fast", "sm_89", ALL, '"fast"'),
    ],
)
def test_what_cannot_run_here_is_refused(asked: str, arch: str, packages: frozenset[str], said: str) -> None:
    with pytest.raises(UsageError, match=said) as refused:
        choose(asked, arch, packages)
    assert "--attention" in str(refused.value) and len(str(refused.value).splitlines()) <= 3


def test_ends_are_careful_where_the_mode_is_not() -> None:
    assert choose("int8-fp8", "sm_89", ALL).ends == CAREFUL
    assert choose("sparse", "", ALL).ends == CAREFUL
    assert choose("int8-fp16", "sm_89", ALL).ends == "int8-fp16"
    found = choose("int8-fp16", "sm_89", ALL, ends="sdpa")
    assert [found.of_step(i, 5).name for i in range(5)] == ["sdpa", *["int8-fp16"] * 3, "sdpa"]
    assert {mode.name for mode in found.modes()} == {"sdpa", "int8-fp16"}
    with pytest.raises(UsageError, match="--attention-ends"):
        choose("int8-fp16", "sm_89", ALL, ends="int8-fp8")


@pytest.mark.parametrize("name", [m.name for m in MODES.values() if m.quantised])
def test_the_self_test_passes_here_and_fails_on_a_broken_kernel(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mode = MODES[name]
    assert obstacle(mode, "", frozenset()) == "" and try_mode(mode, CPU, "") == ""

    def broken(out: Tensor, q: Tensor, *rest: Tensor, v_format: str, half: bool) -> None:
        attention.attend_(out, q, *rest, v_format=v_format, half=half)
        out[7] += 3

    monkeypatch.setattr(dispatch, "attend_", broken)
    assert "from its own arithmetic" in try_mode(mode, CPU, "")
    monkeypatch.setattr(dispatch, "attend_", lambda out, *rest, **how: None)  # writes nothing
    assert "nan" in try_mode(mode, CPU, "")


def test_fused_operations_are_tried_one_by_one() -> None:
    assert try_ops(CPU, TORCH) == ""
    wrong = replace(TORCH, modulate=lambda x, shift, scale: TORCH.modulate(x, shift, scale) * 1.1)
    assert try_ops(CPU, wrong).startswith("modulate is ")

    def refuses(x: Tensor) -> Tensor:
        raise RuntimeError("no such instruction\nand more")

    assert try_ops(CPU, replace(TORCH, gelu=refuses)) == "RuntimeError: no such instruction"
