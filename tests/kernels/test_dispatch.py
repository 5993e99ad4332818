"""What runs where: the table of modes, what stands in a mode's way, and the test on the card itself."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from lowvram.errors import UsageError
from lowvram.quant.encodings.registry import encoding_by_name
from lowvram.triton_kernels import attention, dispatch, modes, toolchain
from lowvram.triton_kernels import ops as operations
from lowvram.triton_kernels.dispatch import (
    PACKAGES,
    choose,
    choose_matmul,
    obstacle,
    told,
    try_mode,
    try_ops,
    try_w8a8,
)
from lowvram.triton_kernels.modes import (
    ARCHS,
    AUTO,
    CAREFUL,
    EXACT,
    INT8_GEMM,
    MODES,
    PRODUCTS,
)
from lowvram.triton_kernels.ops import FUSED, TORCH, ops_for
from lowvram.triton_kernels.tiles import ATTENTION, GEMM, HALF
from lowvram.triton_kernels.tuned import Tuned

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
        ("flash", "sm_120", frozenset({"triton"}), "flash_attn is not installed"),
        ("kitchen", "sm_86", frozenset({"triton"}), "comfy_kitchen is not installed"),
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
    wrong = replace(TORCH, modulate=lambda *x: TORCH.modulate(*x) * 1.1)
    assert try_ops(CPU, wrong).startswith("modulate is ")

    def refuses(x: Tensor) -> Tensor:
        raise RuntimeError("no such instruction\nand more")

    assert try_ops(CPU, replace(TORCH, gelu=refuses)) == "RuntimeError: no such instruction"


@pytest.mark.skipif(os.name == "nt", reason="Triton brings its compiler there")
def test_what_triton_lacks_to_start_kernels_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    failed = subprocess.CalledProcessError(1, ["gcc", "cuda_utils.c"])
    monkeypatch.setenv("CC", "/usr/bin/gcc")
    monkeypatch.setattr("sysconfig.get_paths", lambda scheme: {"include": "/nowhere"})
    monkeypatch.delenv("C_INCLUDE_PATH", raising=False)
    monkeypatch.delenv("CPATH", raising=False)
    assert told(failed).startswith("the C headers of this Python are not here")
    (tmp_path / "Python.h").touch()
    monkeypatch.setenv("CPATH", f"/elsewhere:{tmp_path}")
    assert toolchain.lack() == "" and told(failed).startswith("CalledProcessError: Command '['gcc'")
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert told(RuntimeError("Failed to find C compiler. More.")).startswith("no C compiler is here")


# ---- multiplication


def fits(*forms: str) -> Callable[[str], str]:
    return lambda form: "" if form in forms else "the weights are bf16"


def test_the_tables_of_multiplication_name_what_there_is() -> None:
    assert set(GEMM) == set(ARCHS) and set(INT8_GEMM.values()) <= {"triton", "torch"}
    for form, product in PRODUCTS.items():
        assert product.form == form and set(product.gain) == set(product.archs) <= set(ARCHS)
        assert product.measured <= set(product.archs)
        assert encoding_by_name(product.to).w8a8 == form
    assert "sm_86" not in PRODUCTS["fp8"].archs


@pytest.mark.parametrize("form", PRODUCTS)
def test_auto_multiplies_exactly_until_somebody_has_timed_a_form(form: str) -> None:
    found = choose_matmul("auto", "sm_89", fits(form))
    assert found.exact and f"nobody has timed --matmul {form} on sm_89" in found.why
    for arch in ("sm_75", ""):
        assert choose_matmul("auto", arch, fits(form)) == EXACT
    assert choose_matmul("auto", "sm_89", fits()) == choose_matmul("exact", "sm_89", fits(form)) == EXACT
    assert choose_matmul("auto", "sm_86", fits("fp8")) == EXACT


@pytest.mark.parametrize("form", PRODUCTS)
def test_auto_takes_a_form_where_it_was_measured(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    timed = Tuned("a card", "", {}, (128, 128, 64, 4, 4), "triton", (), (form,))
    monkeypatch.setattr(modes, "TUNED", {"sm_89": timed})
    found = choose_matmul("auto", "sm_89", fits(form))
    assert found.mode == form and "chosen for sm_89" in found.why
    assert choose_matmul("auto", "sm_89", fits()) == EXACT
    failed = choose_matmul("auto", "sm_89", fits(form), lambda form: "0.3 from torch")
    assert failed.exact and f"{form} failed its self-test: 0.3 from torch" in failed.why


@pytest.mark.parametrize("form", PRODUCTS)
def test_a_form_as_asked_says_what_it_is(form: str) -> None:
    assert "nobody has timed it on sm_89" in choose_matmul(form, "sm_89", fits(form), lambda form: "").why
    assert "not its speed" in choose_matmul(form, "", fits(form)).why
    with pytest.raises(UsageError, match="the weights are bf16"):
        choose_matmul(form, "sm_89", fits())
    with pytest.raises(UsageError, match="exact, int8, fp8"):
        choose_matmul("fast", "sm_89", fits(form))


def test_a_card_without_fp8_multiplies_exactly_and_says_so() -> None:
    found = choose_matmul("fp8", "sm_86", fits("fp8"))
    assert found.exact and "no fp8 multiplication for sm_86" in found.why


def test_the_faster_multiplication_of_a_measurement_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ops_for("sm_89", "") is FUSED and ops_for("sm_89", "no triton") is TORCH
    monkeypatch.setattr(operations, "INT8_GEMM", {"sm_89": "torch"})
    found = ops_for("sm_89", "")
    assert found.int8.linear is TORCH.int8.linear and found.int8.quantise is FUSED.int8.quantise
    assert ops_for("sm_86", "") is FUSED


@pytest.mark.parametrize("form", PRODUCTS)
def test_operations_of_8_bits_are_tried_one_by_one(form: str) -> None:
    right = TORCH.w8a8(form)
    assert try_w8a8(form, CPU, TORCH) == ""
    broken = replace(right, linear=lambda *given: right.linear(*given) * 1.1)
    assert try_w8a8(form, CPU, replace(TORCH, **{form: broken})).startswith("product is ")
    broken = replace(right, gelu=lambda x, group: right.quantise(x, group))
    assert try_w8a8(form, CPU, replace(TORCH, **{form: broken})).startswith("gelu and quantise is ")


@pytest.mark.parametrize("name", [m.name for m in MODES.values() if m.package])
@pytest.mark.parametrize("off", [1.0, 1.5])
def test_attention_of_a_package_is_called_as_it_asks_and_tried(
    name: str, off: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fakes with the layouts of the packages: sageattention and comfy-kitchen take heads first, flash-attn tokens first."""

    def heads_first(q: Tensor, k: Tensor, v: Tensor, **how: object) -> Tensor:
        assert q.dim() == 4 and how in ({}, {"tensor_layout": "HND", "is_causal": False})
        return off * torch.nn.functional.scaled_dot_product_attention(q, k, v)

    def tokens_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return heads_first(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    call = {"sage": "sageattn", "flash": "flash_attn_func", "kitchen": "int8_attention"}[name]
    fake = SimpleNamespace(**{call: tokens_first if name == "flash" else heads_first})
    monkeypatch.setitem(sys.modules, MODES[name].package, fake)
    wrong = try_mode(MODES[name], CPU, "")
    assert wrong == "" if off == 1.0 else "from exact attention" in wrong
