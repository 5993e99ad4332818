"""Ahead-of-time builds of every kernel configuration, for cards that are not here: what the compiler made of each.

Pointers and strides are marked divisible by 16, as a launch would find them: without that the compiler uses neither
cp.async nor ldmatrix, and the build says nothing.
"""

from __future__ import annotations

import ast
import hashlib
import itertools
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lowvram.quant.encodings.kquants import BLOCK_SIZES
from lowvram.triton_kernels import (
    attention_triton,
    dequant_triton,
    gemm_triton,
    ggml_triton,
    modulate_triton,
    norm_rope_triton,
    quantise_triton,
    tiles,
    vae_norm_triton,
)
from lowvram.triton_kernels.attention import KEY_TILE, QUERY_TILE, V_PEAK, V_RUN
from lowvram.triton_kernels.gemm import RANK
from lowvram.triton_kernels.hadamard import root
from lowvram.triton_kernels.modes import ARCHS, PRODUCTS
from lowvram.triton_kernels.norm_rope import EPS, LEAST
from lowvram.triton_kernels.quantise import PEAK
from lowvram.triton_kernels.vae_norm import LEAST as LEAST_NORM

SHARED_LIMIT = 101_376
"""99 KiB: what a program may take on sm_86, sm_89 and sm_120."""
SHARED_LIMIT_SM90 = 232_448

INT8 = r"(mma\.sync|wgmma)\S*s32\.s8\.s8"
HALF = {
    "fp16": r"(mma\.sync\S*\.f16\.f16\.f16\.f16|wgmma\S*\.f16\.f16\.f16)",
    "fp8": r"(mma\.sync\S*\.f16\.e4m3\.e4m3\.f16|wgmma\S*\.f16\.e4m3\.e4m3)",
}
FULL = {
    "bf16": r"(mma\.sync|wgmma)\S*f32\.bf16\.bf16",
    "fp8": r"(mma\.sync|wgmma)\S*f32\.e4m3\.e4m3",
}
POINTER = {"bf16": "*bf16", "fp16": "*fp16", "fp8": "*fp8e4nv"}


@dataclass(frozen=True)
class Build:
    """One kernel with everything that is fixed when it is compiled."""

    kernel: Any
    config: str
    arch: str
    pointers: Mapping[str, str]
    """Type of each pointer argument."""
    constants: Mapping[str, object]
    warps: int
    stages: int = 3
    numbers: Mapping[str, str] = field(default_factory=dict)
    """Arguments that are neither pointers nor 32-bit integers."""
    ragged: frozenset[str] = frozenset()
    """Integers that need not be divisible by 16."""
    instructions: Mapping[str, str] = field(default_factory=dict)
    """What makes it fast: name, and pattern that its PTX must hold."""
    quick: bool = False
    """Whether the test suite builds it."""
    exact: bool = False
    """Whether a product is rounded before anything is added to it, and small numbers stay."""


def builds() -> Iterator[Build]:
    """Every configuration that a run may use, or that the tuning command tries."""
    for arch in ARCHS:
        yield from _attention(arch)
        yield from _producers(arch)
        yield from _decoders(arch)
        yield from _gemm(arch)


def _attention(arch: str) -> Iterator[Build]:
    for v_format, by_arch in tiles.ATTENTION.items():
        if arch not in by_arch:
            continue
        half = tiles.HALF[v_format].get(arch, False)
        for tile in sorted({by_arch[arch], *tiles.CANDIDATES}, key=lambda t: t != by_arch[arch]):
            for sparse in (False, True):
                if sparse and tile.n != KEY_TILE:
                    continue
                patterns = {
                    "int8 mma": INT8,
                    f"{v_format} mma": (HALF if half else FULL)[v_format],
                    "ldmatrix": r"ldmatrix|wgmma",
                    "cp.async": r"cp\.async\.c[ag]",
                }
                yield Build(
                    attention_triton.attend_kernel,
                    f"v={v_format} half={half} sparse={sparse} tile={tile.m}x{tile.n} warps={tile.warps} "
                    f"stages={tile.stages}",
                    arch,
                    {"q": "*i8", "q_scale": "*fp32", "k": "*i8", "k_scale": "*fp32", "v": POINTER[v_format],
                     "v_scale": "*fp32", "index": "*i32", "out": "*bf16"},
                    {"V_FORMAT": v_format, "HALF": half, "SPARSE": sparse, "SELECT_M": QUERY_TILE,
                     "V_RUN": V_RUN, "BLOCK_M": tile.m, "BLOCK_N": tile.n},
                    tile.warps,
                    tile.stages,
                    numbers={"factor": "fp32"},
                    ragged=frozenset({"n_q", "n_k", "count", "qs_head", "ks_head", "index_head", "index_row"}),
                    instructions=patterns,
                    quick=tile == by_arch[arch] and not sparse and (v_format, arch) in QUICK,
                )  # fmt: skip


QUICK = (("fp16", "sm_86"), ("fp8", "sm_89"), ("fp16", "sm_120"))


def _producers(arch: str) -> Iterator[Build]:
    for given, int8, centred in ((False, False, False), (False, True, False), (True, True, True)):
        yield Build(
            norm_rope_triton.norm_rope_kernel,
            f"factor={'given' if given else 'found'} int8={int8} centred={centred}",
            arch,
            {"x": "*bf16", "weight": "*fp32", "rope": "*fp32", "factor": "*fp32",
             "centre": "*fp32", "out": "*i8" if int8 else "*bf16", "scale": "*fp32"},
            {"EPS": EPS, "LEAST": LEAST, "HEADS": 40, "GIVEN": given, "INT8": int8, "CENTRED": centred,
             "BLOCK": norm_rope_triton.ROWS},
            norm_rope_triton.WARPS,
            numbers={"root": "fp32"},
            ragged=frozenset({"n", "scale_head"}),
            instructions={"bf16 mma": FULL["bf16"]} if int8 else {},
            quick=centred and arch == "sm_86",
        )  # fmt: skip
    yield Build(
        norm_rope_triton.rms_factor_kernel,
        "width=5120",
        arch,
        {"x": "*bf16", "factor": "*fp32"},
        {"EPS": EPS, "HEADS": 40, "BLOCK": norm_rope_triton.ROWS},
        norm_rope_triton.WARPS,
        ragged=frozenset({"n"}),
    )
    for v_format in ("fp16", "fp8"):
        if v_format == "fp8" and arch not in tiles.ATTENTION["fp8"]:
            continue
        yield Build(
            norm_rope_triton.quantise_values_kernel,
            f"v={v_format}",
            arch,
            {"v": "*bf16", "out": POINTER[v_format], "scale": "*fp32"},
            {"LEAST": LEAST, "PEAK": V_PEAK[v_format], "FP8": v_format == "fp8", "RUN": V_RUN,
             "PAD": KEY_TILE, "BLOCK": 64},
            norm_rope_triton.WARPS,
            ragged=frozenset({"n"}),
        )  # fmt: skip
    for residual in ("bf16", "fp32"):
        yield Build(
            modulate_triton.modulate_kernel,
            f"width=5120 residual={residual}",
            arch,
            {"x": f"*{residual}", "shift": "*fp32", "scale": "*fp32", "out": "*bf16"},
            {"EPS": EPS, "BLOCK": 8192},
            8,
        )
        yield Build(
            modulate_triton.gated_kernel,
            f"residual={residual}",
            arch,
            {"x": f"*{residual}", "y": "*bf16", "gate": "*fp32"},
            {"BLOCK": modulate_triton.BLOCK},
            modulate_triton.WARPS,
        )
    yield Build(
        modulate_triton.gelu_kernel,
        "",
        arch,
        {"x": "*bf16"},
        {"BLOCK": modulate_triton.BLOCK},
        modulate_triton.WARPS,
    )
    for channels in (96, 384, 1024):
        block = triton.next_power_of_2(channels)
        yield Build(
            vae_norm_triton.rms_silu_kernel,
            f"channels={channels}",
            arch,
            {"x": "*bf16", "gamma": "*bf16", "out": "*bf16"},
            {"LEAST": LEAST_NORM, "PIXELS": max(1, vae_norm_triton.ELEMENTS // block), "BLOCK": block,
             "x_channel": 1},
            vae_norm_triton.WARPS,
            numbers={"root": "fp32"},
            ragged=frozenset({"pixels", "width"}),
            quick=arch == "sm_86" and channels == 96,
        )  # fmt: skip


_SMALL_GROUPS: tuple[tuple[Any, str, Mapping[str, str], Mapping[str, object], tuple[str, ...]], ...] = (
    (dequant_triton.mxfp8_kernel, "", {"weight": "*u8", "scale": "*u8"}, {}, ("chunks",)),
    *(
        (dequant_triton.nvfp4_kernel, f"high_first={first} factors={factors}",
         {"weight": "*u8", "scale": "*u8", "whole": "*fp32", "factors": "*fp32"},
         {"HIGH_FIRST": first, "FACTORS": factors}, ("chunks",))
        for first, factors in ((True, False), (False, False), (True, True))
    ),
    *(
        (dequant_triton.levels_kernel, f"nested={nested}",
         {"weight": "*u8", "absmax": "*u8" if nested else "*fp32", "levels": "*fp32", "outer": "*fp32",
          "outer_levels": "*fp32"},
         {"COLUMNS": 64, "NESTED": nested}, ())
        for nested in (0, 256)
    ),
    *(
        (dequant_triton.halves_kernel, f"shift={shift}",
         {"packed": "*u8", "scale": "*bf16", "shift": shift}, {"COLUMNS": 128, "WHOLE": shift == "*i8"}, ())
        for shift in ("*bf16", "*i8")
    ),
)  # fmt: skip
"""Kernels of formats with a scale for some 16 to 128 weights: constants and integers that need not be whole."""


def _decoders(arch: str) -> Iterator[Build]:
    for form, scales in itertools.product(("e4m3", "e5m2", "int8"), ("none", "row", "tile")):
        if form == "int8" and scales != "row":
            continue
        side = 128 if scales == "tile" else 1
        yield Build(
            dequant_triton.scaled_kernel,
            f"{form} scales={scales}",
            arch,
            {"weight": "*i8" if form == "int8" else "*u8", "scale": "*fp32", "out": "*bf16"},
            {"FORMAT": form, "SCALES": scales, "ROWS": side, "COLUMNS": side, "FACTOR": 1.0,
             "BLOCK": dequant_triton.BLOCK},
            dequant_triton.WARPS,
            ragged=frozenset({"chunks", "scale_row"}),
            instructions={"wide loads": r"ld\.global\S*\.v2", "wide stores": r"st\.global\S*\.v4"},
            quick=arch == "sm_86" and form == "e4m3" and scales == "row",
            exact=True,
        )  # fmt: skip
    for packed, group in itertools.product((False, True), (16, 64, 256)):
        yield Build(
            dequant_triton.rotated_kernel,
            f"int{4 if packed else 8} group={group}",
            arch,
            {"weight": "*i8", "scale": "*fp32", "out": "*bf16"},
            {"PACKED": packed, "GROUP": group, "SHRINK": 1 / root(group), "BLOCK": dequant_triton.BLOCK},
            dequant_triton.WARPS,
            ragged=frozenset({"chunks", "scale_row"}),
            instructions={
                "fp16 mma": r"(mma\.sync|wgmma)\S*f32\.f16\.f16",
                "wide stores": r"st\.global\S*\.v4",
            },
            quick=arch == "sm_86" and packed and group == 256,
            exact=True,
        )
    for kernel, config, pointers, constants, ragged in _SMALL_GROUPS:
        yield Build(
            kernel,
            config,
            arch,
            {**pointers, "out": "*bf16"},
            {**constants, "BLOCK": dequant_triton.BLOCK},
            dequant_triton.WARPS,
            numbers={"offset": "fp32"},
            ragged=frozenset(ragged),
            instructions={"wide stores": r"st\.global\S*\.v4"},
            exact=True,
        )
    for kind, (groups, width) in ggml_triton.GROUPS.items():
        yield Build(
            ggml_triton.blocks_kernel,
            kind,
            arch,
            {"weight": "*u8", "out": "*bf16"},
            {"UNPACK": ggml_triton.UNPACK[kind], "NBYTES": BLOCK_SIZES[kind][1], "GROUPS": groups,
             "WIDTH": width, "BLOCKS": ggml_triton.WEIGHTS // (groups * width)},
            ggml_triton.WARPS,
            ragged=frozenset({"count"}),
            instructions={"wide stores": r"st\.global\S*\.v4"},
            quick=arch == "sm_86" and kind == "Q4_K",
            exact=True,
        )  # fmt: skip


def _gemm(arch: str) -> Iterator[Build]:
    chosen = tiles.GEMM[arch]
    for tile in sorted({chosen, tiles.NARROW, *tiles.GEMM_CANDIDATES}, key=lambda t: t != chosen):
        for gated, adapted in itertools.product((False, True), repeat=2):
            yield Build(
                gemm_triton.linear_kernel,
                f"gated={gated} lora={adapted} tile={tile.m}x{tile.n}x{tile.k} warps={tile.warps} stages={tile.stages}",
                arch,
                {"a": "*i8", "a_scale": "*fp32", "w": "*i8", "w_scale": "*fp32", "bias": "*bf16", "gate": "*fp32",
                 "low": "*bf16", "up": "*bf16", "out": "*bf16"},
                {"BIASED": True, "GATED": gated, "ADAPTED": adapted, "EVEN": True, "GROUP": gemm_triton.GROUP,
                 "RANK": RANK, "BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k},
                tile.warps,
                tile.stages,
                ragged=frozenset({"m"}),
                instructions={"int8 mma": INT8, "ldmatrix": r"ldmatrix|wgmma", "cp.async": r"cp\.async\.c[ag]"},
                quick=tile == chosen and gated and adapted and arch in ("sm_86", "sm_120"),
            )  # fmt: skip
    yield from _rows(arch)


def _rows(arch: str) -> Iterator[Build]:
    """The kernels that make rows of 8 bits; those of fp8 are not rotated."""
    forms = [("int8", False), ("int8", True), *[("fp8", False)] * (arch in PRODUCTS["fp8"].archs)]
    for form, rotated in forms:
        pointers = {"x": "*bf16", "out": "*fp8e4nv" if form == "fp8" else "*i8", "scale": "*fp32"}
        fixed = {"LEAST": LEAST, "PEAK": PEAK[form], "WHOLE": form == "int8", "ROTATED": rotated}
        for (width, block), gelu in itertools.product(((5120, 8192), (13824, 16384)), (False, True)):
            yield Build(
                quantise_triton.quantise_kernel,
                f"{form} width={width} gelu={gelu} rotated={rotated}",
                arch,
                pointers,
                fixed | {"GELU": gelu, "BLOCK": block},
                quantise_triton.warps_of(block),
                quick=rotated and gelu and width == 13824 and arch == "sm_86",
            )
        yield Build(
            quantise_triton.modulate_quantise_kernel,
            f"{form} width=5120 rotated={rotated}",
            arch,
            pointers | {"shift": "*fp32", "by": "*fp32"},
            fixed | {"EPS": EPS, "BLOCK": 8192},
            quantise_triton.warps_of(8192),
            quick=(rotated and arch == "sm_120") or (form == "fp8" and arch == "sm_89"),
        )


def key(build: Build) -> str:
    """What stands for all that a build depends on but the compiler: options, types, constants, and the code of the kernel
    and of the functions it calls, without comments and docstrings."""
    constants = {name: _code(value) for name, value in build.constants.items()}
    types = sorted((build.pointers | build.numbers).items())
    options = (
        build.arch,
        build.warps,
        build.stages,
        sorted(build.ragged),
        build.exact,
        sorted(build.instructions.items()),
    )
    return hashlib.sha256(
        repr((_code(build.kernel), sorted(constants.items()), types, options)).encode()
    ).hexdigest()[:16]


def _code(value: object) -> str:
    """A constant, or a kernel and the functions of its file's names that it uses."""
    if not isinstance(value, triton.JITFunction):
        return repr(value)
    tree = ast.parse(value.src)
    used: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
        called = value.fn.__globals__.get(node.id) if isinstance(node, ast.Name) else None
        if isinstance(called, triton.JITFunction) and called is not value:
            used[called.__name__] = _code(called)
    return repr((ast.unparse(tree), sorted(used.items())))


def report(build: Build) -> dict[str, object]:
    """Compile, and say what came out: one object of `kernels.py aot --json`, and a row of `kernels-aot.jsonl`."""
    names = build.kernel.arg_names
    signature = {
        name: "constexpr"
        if name in build.constants
        else build.pointers.get(name) or build.numbers.get(name, "i32")
        for name in names
    }
    whole = [
        (i,)
        for i, name in enumerate(names)
        if name not in build.constants and name not in build.numbers and name not in build.ragged
    ]
    source = ASTSource(
        fn=build.kernel,
        signature=signature,
        constexprs=dict(build.constants),
        attrs={i: [["tt.divisibility", 16]] for i in whole},
    )
    target = GPUTarget("cuda", int(build.arch.removeprefix("sm_")), 32)
    compiled = triton.compile(
        source,
        target=target,
        options={"num_warps": build.warps, "num_stages": build.stages, "enable_fp_fusion": not build.exact},
    )
    registers, spilled = _resources(compiled.asm["cubin"])
    ptx = compiled.asm["ptx"]
    missing = [name for name, pattern in build.instructions.items() if not re.search(pattern, ptx)]
    if build.exact and re.search(r"\bfma\.|\.ftz", ptx):
        missing.append("the arithmetic of torch")
    limit = SHARED_LIMIT_SM90 if build.arch == "sm_90" else SHARED_LIMIT
    shared = compiled.metadata.shared
    return {
        "kernel": build.kernel.__name__.removesuffix("_kernel"),
        "config": build.config,
        "arch": build.arch,
        "shared_bytes": shared,
        "spill_bytes": spilled,
        "registers": registers,
        "instructions": [name for name in build.instructions if name not in missing],
        "missing": missing,
        "ok": shared <= limit and spilled == 0 and not missing,
        "triton": triton.__version__,
        "key": key(build),
    }


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers a thread, and bytes of stack, where spilled registers go."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        file = os.path.join(folder, "kernel.cubin")
        Path(file).write_bytes(cubin)
        done = subprocess.run([tool, "-res-usage", file], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", done.stdout)
    assert found is not None, done.stdout
    return int(found[1]), int(found[2])
