"""What is launched at real sizes: as many programs as a card takes, and what `bench/kernels.py aot` builds."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

import pytest
import torch
from launches import Card, Launch
from torch import Tensor

from lowvram.triton_kernels.modes import ARCHS, PRODUCTS
from lowvram.triton_kernels.tiles import ATTENTION, GEMM, HALF, NARROW

if TYPE_CHECKING:
    from lowvram.bench.kernel_builds import Build

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed here"
)
N = 111_600
"""Tokens of 1280x720 with 121 frames."""


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def wide(*shape: int) -> Tensor:
    return empty(*shape, dtype=torch.float32)


def small(*shape: int) -> Tensor:
    return empty(*shape, dtype=torch.int8)


def launched(arch: str, monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """Every launch of a 14B model's block and of an autoencoder's norm, all tokens at once."""
    from lowvram.triton_kernels import attention_triton as attention
    from lowvram.triton_kernels import dequant_triton as dequant
    from lowvram.triton_kernels import gemm_triton as gemm
    from lowvram.triton_kernels import ggml_triton as ggml
    from lowvram.triton_kernels import modulate_triton as modulate
    from lowvram.triton_kernels import norm_rope_triton as norm
    from lowvram.triton_kernels import quantise_triton as quantise
    from lowvram.triton_kernels import vae_norm_triton as vae

    card = Card(arch, monkeypatch)
    x, hidden, row, rope, weight = empty(N, 5120), empty(N, 13824), wide(1, 5120), wide(N, 64, 2), wide(5120)
    norm.rms_factor(x)
    norm.norm_rope(empty(40, N, 128), None, x, weight, rope, None, None)
    norm.norm_rope(small(40, N, 128), wide(40, N), x, weight, rope, None, None)
    norm.norm_rope(small(40, N, 128), wide(40, N), x, weight, rope, wide(N, 1), wide(40, 128))
    modulate.modulate(x, row, wide(1, 5120))
    modulate.gated(x, empty(N, 5120), row)
    modulate.gelu(hidden)
    for v_format, by_arch in ATTENTION.items():
        if arch not in by_arch:
            continue
        v = small(40, 128, N + 16) if v_format == "fp8" else empty(40, N, 128)
        v = v.view(torch.float8_e4m3fn) if v_format == "fp8" else v
        v = v.to(torch.float16) if v_format == "fp16" else v
        if v_format != "bf16":
            norm.quantise_values(v, wide(40, 109, 128), x, v_format)
        for index in (None, empty(40, 872, 872, dtype=torch.int32)):
            attention.attend(
                x, small(40, N, 128), wide(40, N), small(40, N, 128), wide(40, N), v, wide(40, 109, 128), index,
                v_format=v_format, half=HALF[v_format].get(arch, False), tile=by_arch[arch],
            )  # fmt: skip
    for low, up in ((None, None), (empty(N, 64), empty(5120, 64))):
        for gate in (None, row):
            bias = empty(5120)
            gemm.linear(
                x, small(N, 13824), wide(N), small(5120, 13824), weight, bias, gate, low, up, GEMM[arch]
            )
    gemm.linear(
        empty(N, 64), small(N, 5120), wide(N), small(64, 5120), wide(64), empty(64), None, None, None, NARROW
    )
    for form in PRODUCTS:
        if arch in PRODUCTS[form].archs:
            group = 256 if form == "int8" else 0
            quantise.quantise(x, group, form)
            quantise.gelu(hidden, group, form)
            quantise.modulate(x, row, wide(1, 5120), group, form)
    frame = empty(720, 1280, 96).permute(2, 0, 1)
    vae.rms_silu(empty(720, 1280, 96).permute(2, 0, 1), frame, empty(96))
    matrix, codes = empty(13824, 5120), small(13824, 5120).view(torch.uint8)
    dequant.scaled(matrix, codes, wide(13824), "e4m3", "row", [1, 1], 1.0)
    dequant.rotated(matrix, small(13824, 2560), wide(13824), 256)
    dequant.mxfp8(matrix, codes, codes)
    dequant.nvfp4(matrix, codes, codes.view(-1), wide(), None, True)
    dequant.levels(matrix, codes, wide(1105920), wide(16), wide(16), wide(16), 64, 0, 0.0)
    dequant.halves(matrix, codes, empty(552960), small(552960), 128)
    ggml.blocks(empty(276480, 256), codes.view(-1)[: 276480 * 144].view(-1, 144), "Q4_K")
    return card.launches


@pytest.mark.parametrize("arch", ARCHS)
def test_what_is_launched_is_what_was_built(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from lowvram.bench.kernel_builds import builds

    made = [build for build in builds() if build.arch == arch]
    for launch in launched(arch, monkeypatch):
        x, y, z = launch.grid
        assert 0 < x < 2**31 and y <= 65_535 and z <= 65_535, launch
        assert any(_same(launch, build) for build in made), launch


def _same(launch: Launch, build: Build) -> bool:
    names = build.kernel.arg_names
    whole = {n for n in names if n not in {*build.constants, *build.numbers, *build.ragged}}
    read = {name: kind for name, kind in launch.types.items() if kind.startswith("*")}
    return (
        launch.kernel == build.kernel.__name__
        and all(launch.constants[name] == value for name, value in build.constants.items())
        and all(build.pointers[name] == kind for name, kind in read.items())
        and whole <= launch.whole | launch.constants.keys()
        and (launch.options.num_warps, launch.options.num_stages) == (build.warps, build.stages)
        and launch.options.enable_fp_fusion is not build.exact
    )
