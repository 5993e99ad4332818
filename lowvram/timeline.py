"""The memory of a job over time, drawn: what was claimed, what was seen, and the caps. SVG, written by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from html import escape
from itertools import pairwise

from lowvram.offload.budget import Budget, format_bytes
from lowvram.report import Sample

WIDTH, PANEL, LEFT, TOP, GAP = 960, 200, 90, 40, 50
_TINTS = ("#f4f6f8", "#e9edf1")
_CLAIMED, _SEEN, _CAP, _INK = "#4c8bf5", "#d9480f", "#868e96", "#343a40"


def draw(samples: Sequence[Sample], budget: Budget) -> str:
    """An SVG of two panels, VRAM and RAM, over the seconds of the job; stages are bands with their names.

    samples: in the order in which they were taken, at least one
    """
    start, end = samples[0].at, max(samples[-1].at, samples[0].at + 1e-3)
    height = TOP + 2 * PANEL + 2 * GAP

    def x(at: float) -> float:
        return LEFT + (at - start) / (end - start) * (WIDTH - LEFT - 20)

    legend = ((_CLAIMED, "claimed"), (_SEEN, "resident set of the process"), (_CAP, "cap"))
    style = f'font-family="sans-serif" font-size="12" fill="{_INK}"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" {style}>',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        *_bands(samples, x, TOP + 2 * PANEL + GAP),
        *_panel("VRAM", samples, x, TOP, budget.vram, lambda s: s.vram, None),
        *_panel("RAM", samples, x, TOP + PANEL + GAP, budget.ram, lambda s: s.ram, lambda s: s.rss),
        f'<text x="{LEFT}" y="{height - 12}">0 s</text>',
        f'<text x="{WIDTH - 20}" y="{height - 12}" text-anchor="end">{end - start:.1f} s</text>',
        *(
            f'<text x="{WIDTH / 2 - 180 + 180 * n}" y="{height - 12}" text-anchor="middle" fill="{colour}">{name}</text>'
            for n, (colour, name) in enumerate(legend)
        ),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _bands(samples: Sequence[Sample], x: Callable[[float], float], bottom: int) -> Iterator[str]:
    begins = [n for n, s in enumerate(samples) if n == 0 or s.stage != samples[n - 1].stage]
    for number, (first, after) in enumerate(pairwise([*begins, len(samples) - 1])):
        left, right, stage = x(samples[first].at), x(samples[after].at), samples[first].stage
        yield (
            f'<rect x="{left:.1f}" y="{TOP}" width="{right - left:.1f}" height="{bottom - TOP}" '
            f'fill="{_TINTS[number % 2]}"/>'
        )
        if right - left > 7 * len(stage):  # a name that has no room is left out
            yield f'<text x="{(left + right) / 2:.1f}" y="{TOP - 8}" text-anchor="middle">{escape(stage)}</text>'


def _panel(
    title: str,
    samples: Sequence[Sample],
    x: Callable[[float], float],
    top: int,
    cap: int,
    claimed: Callable[[Sample], int],
    seen: Callable[[Sample], int] | None,
) -> Iterator[str]:
    most = max(max(claimed(s), 0 if seen is None else seen(s)) for s in samples)
    # A cap far above everything would press the picture flat: it is then only named.
    scale = max(1, cap if cap <= 2 * most else most) * 1.05

    def y(nbytes: int) -> float:
        return top + PANEL * (1 - nbytes / scale)

    points = " ".join(f"{x(s.at):.1f},{y(claimed(s)):.1f}" for s in samples)
    base = top + PANEL
    yield (
        f'<polygon points="{x(samples[0].at):.1f},{base} {points} {x(samples[-1].at):.1f},{base}" '
        f'fill="{_CLAIMED}" fill-opacity="0.35" stroke="{_CLAIMED}"/>'
    )
    if seen is not None:
        line = " ".join(f"{x(s.at):.1f},{y(seen(s)):.1f}" for s in samples)
        yield f'<polyline points="{line}" fill="none" stroke="{_SEEN}" stroke-width="1.5"/>'
    if cap <= scale:
        yield (
            f'<line x1="{LEFT}" x2="{WIDTH - 20}" y1="{y(cap):.1f}" y2="{y(cap):.1f}" stroke="{_CAP}" '
            'stroke-dasharray="6 4"/>'
        )
    yield f'<line x1="{LEFT}" x2="{WIDTH - 20}" y1="{base}" y2="{base}" stroke="{_INK}"/>'
    yield f'<text x="12" y="{top + 14}" font-weight="bold">{title}</text>'
    yield f'<text x="12" y="{top + 32}">peak</text><text x="12" y="{top + 48}">{format_bytes(most)}</text>'
    yield f'<text x="12" y="{top + 70}">cap</text><text x="12" y="{top + 86}">{format_bytes(cap)}</text>'
