"""The ways to run self attention, as data: what each multiplies and stores, where it may run, what it is worth.

    R0  sdpa                            torch's own, in the compute dtype
    R1  int8         int8 Q K, bf16 P V
    R2  int8-fp16    int8 Q K, fp16 P V
    R3  int8-fp8     int8 Q K, fp8 P V
    R4  sparse       R2 on the half of the key tiles that matters most
        sage, flash, kitchen            other people's kernels, where their package is installed

Torch is not imported here: a plan and the command line need the table only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lowvram.triton_kernels.tuned import TUNED, Tuned

ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_120")
"""Architectures the kernels are built and tested for."""


@dataclass(frozen=True, slots=True)
class Mode:
    """One way to run self attention."""

    name: str
    what: str
    archs: tuple[str, ...] = ARCHS
    """Where it runs. The arithmetic of our own modes is also there on a CPU, in torch, for tests and comparison."""
    v_format: str = ""
    """How V is stored by 8-bit attention, "bf16", "fp16" or "fp8"; "" where K and V stay in the compute dtype."""
    package: str = ""
    """What has to be installed."""
    keep: float = 1.0
    """Share of the key tiles that a tile of queries attends to."""
    gain: Mapping[str, float] | None = None
    """Rate over that of sdpa by architecture: a forecast, the ceilings of kernels.md times 0.73, the share of its
    ceiling that SageAttention 1, a Triton kernel with the arithmetic of R2, has reached on a 4090. None: 1."""

    @property
    def quantised(self) -> bool:
        return bool(self.v_format)

    @property
    def ours(self) -> bool:
        return not self.package


@dataclass(frozen=True, slots=True)
class Choice:
    """How the self attention of a job runs: settled when the job is made, because it changes bits."""

    mode: str = "sdpa"
    ends: str = "sdpa"
    """Mode of the first and the last step, and of the first block of every step."""
    why: str = ""

    def modes(self) -> tuple[Mode, ...]:
        return tuple(MODES[name] for name in dict.fromkeys((self.mode, self.ends)))

    @property
    def selects(self) -> bool:
        """Whether some step attends to some tiles of keys only: tokens then go in an order that keeps neighbours together."""
        return any(mode.keep < 1 for mode in self.modes())

    def of_step(self, step: int, steps: int) -> Mode:
        """Of all blocks but the first."""
        return MODES[self.ends if step in (0, steps - 1) else self.mode]


@dataclass(frozen=True, slots=True)
class Product:
    """A way to multiply by 8-bit weights as they are stored, activations quantised per token."""

    form: str
    what: str
    weights: str
    """What has to be stored."""
    to: str
    """What `lowvram quantize --to` makes of other weights."""
    archs: tuple[str, ...]
    """Where it runs. Its arithmetic is also there on a CPU, in torch."""
    gain: Mapping[str, float]
    """Rate over that of bf16 by architecture: a forecast."""

    @property
    def measured(self) -> frozenset[str]:
        """Architectures where `bench/kernels.py tune` has found it faster than bf16: `auto` takes it there."""
        return frozenset(arch for arch, tuned in TUNED.items() if self.form in tuned.products)


_FP8_ARCHS = ("sm_89", "sm_90", "sm_120")
PRODUCTS: Mapping[str, Product] = {
    product.form: product
    for product in (
        # The ratio of the ceilings (4 on GeForce, 2 elsewhere) times 0.68, the share of its ceiling that 8-bit
        # multiplication reaches where others have measured it.
        Product(
            "int8", "int8 weights as they are stored, activations quantised per token",
            "int8 weights, plain or rotated in groups of 256", "int8_convrot", ARCHS,
            dict.fromkeys(("sm_86", "sm_89", "sm_120"), 2.7) | dict.fromkeys(("sm_80", "sm_90"), 1.4),
        ),
        # The ratio of the ceilings, 2 everywhere with fp32 sums, times 0.93, the share that a 5090 has reached.
        Product(
            "fp8", "fp8 weights as they are stored, activations quantised per token",
            "e4m3 weights, plain or with a scale for each row or for all", "fp8_row", _FP8_ARCHS,
            dict.fromkeys(_FP8_ARCHS, 1.86),
        ),
    )
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Matmul:
    """How the Linears of a job's blocks multiply: settled when the job is made, because it changes bits."""

    mode: str = "exact"
    """One of MATMULS."""
    why: str = ""

    @property
    def exact(self) -> bool:
        return self.mode == "exact"

    def gain(self, arch: str) -> float:
        """Rate over that of exact multiplication: a forecast."""
        return 1.0 if self.exact else PRODUCTS[self.mode].gain.get(arch, 1.0)


MATMULS: Mapping[str, str] = {
    "exact": "weights as numbers, in the compute dtype",
    **{name: product.what for name, product in PRODUCTS.items()},
}
EXACT = Matmul()
INT8_GEMM: Mapping[str, str] = {arch: tuned.int8_by for arch, tuned in TUNED.items()}
"""What multiplies int8 on an architecture, "triton" or "torch" (`torch._int_mm`): the faster of a measurement. Where nobody
has measured it is our kernel, whose sums do not leave the registers."""

SDPA = Choice()
_GEFORCE_R1 = dict.fromkeys(("sm_86", "sm_89", "sm_120"), 1.17)
_GEFORCE_R2 = dict.fromkeys(("sm_86", "sm_89", "sm_120"), 1.95)
MODES: Mapping[str, Mode] = {
    mode.name: mode
    for mode in (
        Mode("sdpa", "scaled_dot_product_attention of torch"),
        Mode("int8", "int8 Q K, bf16 P V", v_format="bf16", gain=_GEFORCE_R1),
        Mode("int8-fp16", "int8 Q K, fp16 P V", v_format="fp16", gain=_GEFORCE_R2),
        Mode(
            "int8-fp8", "int8 Q K, fp8 P V", ("sm_89", "sm_90", "sm_120"), "fp8",
            gain={"sm_89": 2.9, "sm_120": 2.9},
        ),
        Mode("sparse", "int8 Q K, fp16 P V on half of the key tiles", v_format="fp16", keep=0.5, gain=_GEFORCE_R2),
        Mode("sage", "sageattention", package="sageattention"),
        Mode("flash", "flash-attn", package="flash_attn"),
        Mode("kitchen", "INT8 attention of comfy-kitchen", package="comfy_kitchen"),
    )
}  # fmt: skip

_CAREFULLY_FAST = ("int8-fp16", "int8", "flash", "sdpa")
"""What `auto` may take: exact, or of errors that are promised."""


def auto_modes(tuned: Mapping[str, Tuned]) -> dict[str, tuple[str, ...]]:
    """What `auto` tries, by architecture: what was timed there, the fastest first, and a forecast for GeForce."""
    forecast = dict.fromkeys(("sm_86", "sm_89", "sm_120"), ("int8-fp16", "int8", "sdpa"))
    return forecast | {
        arch: tuple(name for name in row.modes if name in _CAREFULLY_FAST) for arch, row in tuned.items()
    }


AUTO: Mapping[str, tuple[str, ...]] = auto_modes(TUNED)
"""sdpa where there is nothing: where fp32 accumulation runs at full rate it is the best."""

MEASURED: frozenset[tuple[str, str]] = frozenset(
    (name, arch) for arch, row in TUNED.items() for name in row.modes
)
"""(mode, architecture) that somebody has timed against sdpa with `bench/kernels.py`."""

CAREFUL = "int8"
"""What replaces int8-fp8 and sparse in the first and the last step and in the first block."""
