"""Self attention at the sizes of a 14B model: every mode, torch's backends and others' packages, side by side.

Of each, the time of all queries, and the error of some against exact attention in float32: to the tiles that were
selected, where some are. Producers (norm, rotation, quantisation) are not in the times, as in what others publish.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from lowvram.bench.blocks import seconds_of
from lowvram.bench.results import Fact
from lowvram.triton_kernels import backends, dispatch
from lowvram.triton_kernels.attention import KEY_TILE, QUERY_TILE, attention, pool_keys, select_tiles
from lowvram.triton_kernels.keys import balanced_centre, sample_stride
from lowvram.triton_kernels.modes import MODES, Mode
from lowvram.triton_kernels.norm_rope import quantise_rows, quantise_values
from lowvram.triton_kernels.tiles import ATTENTION, Tile, arch_of

HEADS = 40
TOKENS = (32_760, 75_600, 111_600)
"""832x480 and 1280x720 with 81 frames, 1280x720 with 121."""
BACKENDS = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
CHECKED = 2 * QUERY_TILE
"""Queries whose result is compared with the exact one."""
MOST: Mapping[str, float] = {"": 0.01, "bf16": 0.015, "fp16": 0.015, "fp8": 0.06}
"""Largest relative error on Gaussian data by format of V; "" for what is not quantised."""


@dataclass(frozen=True, slots=True)
class Run:
    """One way to attend."""

    name: str
    call: Callable[[], Tensor]
    """-> [n, heads * 128]"""
    most: float
    """The largest error that passes."""
    index: Tensor | None = None
    """The tiles of keys that are attended to; None for all."""


def compare(kind: str, n: int, heads: int = HEADS) -> tuple[dict[str, Fact], list[str]]:
    """Facts of n tokens, and what is wrong: what is too far from exact, or not finite, by name.

    On a CPU our kernels run in Triton's interpreter: to be right, not to be timed.
    """
    facts: dict[str, Fact] = {}
    wrong = []
    generator = torch.Generator(kind).manual_seed(0)
    q, k, v = (torch.randn(heads, n, 128, device=kind, generator=generator).to(torch.bfloat16) for _ in "qkv")
    first = n // 2 // QUERY_TILE * QUERY_TILE
    some = slice(first, first + CHECKED)
    exact = _exact(q[:, some], k, v)
    seconds: dict[str, float] = {}
    for run in _runs(q, k, v):
        what = f"{run.name}, {n} tokens"
        try:
            y = run.call()[some].float()
            true = exact if run.index is None else _exact(q[:, some], k, v, run.index, first)
            error = float((y - true).norm() / true.norm())
            seconds[run.name] = seconds_of(run.call, kind)
        except Exception as problem:  # noqa: BLE001  a compiler, a backend, or a card that has not the memory
            facts[what] = (str(problem) or type(problem).__name__).splitlines()[0]
            continue
        facts[f"{what}: error"] = error
        facts[f"{what}: ms"] = 1e3 * seconds[run.name]
        facts[f"{what}: FLOP/s"] = 4 * n * n * 128 * heads / seconds[run.name]
        if not error <= run.most:  # NaN is not
            wrong.append(f"{what} is {error:.2g} from exact attention")
    return facts | {f"{key}, {n} tokens": value for key, value in _comparison(seconds, kind).items()}, wrong


def _comparison(seconds: dict[str, float], kind: str) -> dict[str, Fact]:
    """How the fastest of ours stands to sageattention, and what `auto` takes to the fastest that is exact or nearly so."""
    dense = {name: s for name, s in seconds.items() if name not in MODES or MODES[name].keep == 1}
    ours = [s for name, s in dense.items() if name in MODES and MODES[name].quantised]
    found: dict[str, Fact] = {}
    if ours and "sage" in seconds:
        found["fastest of ours over sageattention"] = seconds["sage"] / min(ours)
    if kind == "cuda":
        auto = dispatch.choose("auto", arch_of(torch.device(kind)), dispatch.installed()).mode
        found["auto takes"] = auto
        if auto in dense:
            found["auto over the fastest"] = min(dense.values()) / dense[auto]
    return found


def _runs(q: Tensor, k: Tensor, v: Tensor) -> Iterator[Run]:
    card = q.is_cuda
    yield Run("sdpa", partial(attention, q, k, v), MOST[""])
    for backend in BACKENDS if card else ():
        yield Run(f"sdpa by {backend.name.lower()}", partial(by_backend, backend, q, k, v), MOST[""])
    arch, packages = arch_of(q.device), dispatch.installed()
    for mode in MODES.values():
        if mode.package and not dispatch.obstacle(mode, arch, packages):
            yield Run(mode.name, partial(backends.attention_by, q, k, v, mode.package), MOST["fp8"])
    stride = sample_stride(k.shape[1])
    balance, centre = balanced_centre(q[:, ::stride], k[:, ::stride])
    scale = balance.view(-1, 1, 128).to(q.dtype)
    q8, k8 = _by_head(q, scale, None), _by_head(k, 1 / scale, centre)
    for mode in MODES.values():
        if mode.quantised and (not card or arch in mode.archs):
            yield _ours(mode, arch, q8, k8, v)


def by_backend(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's attention by this backend and no other: [n, heads * 128]."""
    with sdpa_kernel(backend):
        return scaled_dot_product_attention(q[None], k[None], v[None])[0].transpose(0, 1).flatten(1)


def _by_head(x: Tensor, scale: Tensor, centre: Tensor | None) -> tuple[Tensor, Tensor]:
    """`quantise_rows`, one head's float32 at a time."""
    found = [
        quantise_rows(x[h : h + 1] * scale[h], None if centre is None else centre[h : h + 1])
        for h in range(x.shape[0])
    ]
    rows, scales = zip(*found, strict=True)
    return torch.cat(rows), torch.cat(scales)


def _ours(mode: Mode, arch: str, q8: tuple[Tensor, Tensor], k8: tuple[Tensor, Tensor], v: Tensor) -> Run:
    from lowvram.triton_kernels import attention_triton

    heads, n, _ = v.shape
    values = (v, q8[1]) if mode.v_format == "bf16" else quantise_values(v, mode.v_format)
    index = None
    if mode.keep < 1:
        pooled = torch.empty(heads, -(-n // KEY_TILE), 128, device=v.device)
        pool_keys(*k8, pooled)
        index = select_tiles(*q8, pooled, mode.keep)
    out, half = v.new_empty(n, heads * 128), dispatch.half_of(mode, arch)
    tiles = ATTENTION[mode.v_format]
    tile: Tile = tiles[arch] if arch else tiles["sm_89"]

    def run() -> Tensor:
        attention_triton.attend(out, *q8, *k8, *values, index, v_format=mode.v_format, half=half, tile=tile)
        return out

    return Run(mode.name, run, MOST[mode.v_format], index)


def _exact(q: Tensor, k: Tensor, v: Tensor, index: Tensor | None = None, first: int = 0) -> Tensor:
    """Attention of queries first.. in float32, head by head: [m, heads * 128]. index: tiles of keys, see `attend_`."""
    out = q.new_empty(q.shape[1], q.shape[0] * 128, dtype=torch.float32)
    for h in range(q.shape[0]):
        logits = q[h].float() @ k[h].float().mT / 128**0.5
        if index is not None:
            tile = torch.arange(first, first + q.shape[1], device=q.device) // QUERY_TILE
            kept = torch.zeros(index.shape[1], -(-k.shape[1] // KEY_TILE), dtype=torch.bool, device=q.device)
            kept.scatter_(1, index[h].long(), True)
            seen = kept[tile].repeat_interleave(KEY_TILE, 1)[:, : k.shape[1]]
            logits.masked_fill_(~seen, -torch.inf)
        out[:, h * 128 : (h + 1) * 128] = logits.softmax(-1) @ v[h].float()
    return out
