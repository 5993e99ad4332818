"""Plots of results as SVG, written by hand: the same input makes the same bytes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from lowvram.bench.peaks import Peaks
from lowvram.bench.results import Ceilings, Measurement, Peer
from lowvram.offload.budget import format_bytes

INK, SOFT, GRID = "#1f2430", "#6b7280", "#d9dde3"
COLOURS: Mapping[str, str] = {
    "text": "#8fb8de",
    "condition": "#b7a8d6",
    "prepare": "#f0b67f",
    "denoise": "#3a6ea5",
    "decode": "#6bab90",
    "peer": "#9aa5b1",
    "lowvram": "#3a6ea5",
    "computing": "#3a6ea5",
    "waiting for copies": "#e8a33d",
    "waiting for the disk": "#c0392b",
}
WIDTH = 760
ABOUT: Mapping[str, str] = {"text": "text", "forward": "denoise", "step": "denoise", "decode": "decode"}
"""The stage that a case is about, where it is not the whole job."""


def peaks_plot(recorded: Mapping[str, Peaks]) -> str:
    """For the largest case: the peak of every stage, in the order in which a job passes them, under each budget."""
    name, by_budget = next(iter(recorded.items()))
    budgets = [b for b in by_budget if b != "least"]
    stages = [s for s in by_budget[budgets[0]] if s != "ram"]
    top = max(int(b.split()[0]) for b in budgets)
    width, height, left, base = 720, 340, 56, 270
    scale = (base - 50) / top
    out = [text(left, 24, f"Planned peak of VRAM by stage: {name}", size=15, weight="bold")]
    for tick in range(0, top + 1, 4):
        y = base - tick * scale
        out += [
            line(left, y, width - 16, y, GRID),
            text(left - 8, y + 4, f"{tick} GB", anchor="end", fill=SOFT),
        ]
    group = (width - left - 16) / len(budgets)
    bar = group * 0.8 / len(stages)
    for n, budget in enumerate(budgets):
        x = left + n * group + group * 0.1
        for stage in stages:
            h = by_budget[budget][stage] / 1e9 * scale
            out.append(box(x, base - h, bar - 3, h, COLOURS.get(stage, INK)))
            x += bar
        y = base - int(budget.split()[0]) * scale
        out.append(line(left + n * group + 4, y, left + (n + 1) * group - 4, y, "#c0392b", dash="5 3"))
        out.append(text(left + (n + 0.5) * group, base + 18, f"budget {budget}", anchor="middle"))
    x = left
    for stage in stages:
        out += [box(x, base + 38, 12, 12, COLOURS.get(stage, INK)), text(x + 18, base + 48, stage)]
        x += 100
    return svg(width, height, out)


def peers_plot(peers: Sequence[Peer]) -> str:
    """Overhead of each program and mode over the rounds, its RAM beside."""
    shown = [p for p in peers if p.overhead is not None]
    row, left, top, right = 26, 250, 60, 190
    longest = max(1.0, *(o for p in shown for o in (p.overhead or 0, *p.overheads)))
    scale = (WIDTH - left - right) / longest
    out = [
        text(16, 24, "Processor time of a forward over everything resident", size=15, weight="bold"),
        text(left, 46, "bar: median; line: all rounds", fill=SOFT),
        text(WIDTH - 16, 46, "peak RAM", anchor="end", fill=SOFT),
    ]
    bottom = top + row * len(shown)
    for n, p in enumerate(shown):
        y, ends = top + n * row, p.overheads or [p.overhead or 0]
        x1, x2 = left + min(ends) * scale, left + max(ends) * scale
        out += [
            text(left - 10, y + 14, f"{p.name}: {p.mode}", anchor="end"),
            box(left, y, (p.overhead or 0) * scale, row - 8, COLOURS.get(p.name, COLOURS["peer"])),
            line(x1, y + 9, x2, y + 9, INK),
            line(x1, y + 5, x1, y + 13, INK),
            line(x2, y + 5, x2, y + 13, INK),
            text(x2 + 6, y + 14, f"{p.overhead:.2f}" + ("" if p.exact else ", other bits"), fill=SOFT),
            text(WIDTH - 16, y + 14, format_bytes(p.rss or 0), anchor="end"),
        ]
    out.append(line(left + scale, top - 6, left + scale, bottom, SOFT, dash="4 3"))
    return svg(WIDTH, bottom + 16, out)


def stalls_plot(measurements: Sequence[Measurement]) -> str:
    """How much of each job's time was computing, and how much waiting for weights, by cause. A hand-over is the
    difference of two times, and not among them."""
    measurements = [m for m in measurements if m.handover is None or m.case.split()[0] != "handover"]
    row, left, top, right = 30, 270, 56, 90
    causes = {"copy": "waiting for copies", "disk": "waiting for the disk"}
    out = [text(16, 24, "Where the time of a job went", size=15, weight="bold")]
    x = float(left)
    for name in ("computing", *causes.values()):
        out += [box(x, 34, 12, 12, COLOURS[name]), text(x + 18, 44, name, fill=SOFT)]
        x += 40 + 7 * len(name)
    for n, m in enumerate(measurements):
        y, x = top + n * row, float(left)
        waits = {name: sum(s.stalls.get(cause, 0.0) for s in m.stages) for cause, name in causes.items()}
        whole = max(m.seconds, sum(waits.values()), 1e-9)
        scale = (WIDTH - left - right) / whole
        for name, seconds in ({"computing": whole - sum(waits.values())} | waits).items():
            out.append(box(x, y, seconds * scale, row - 10, COLOURS[name]))
            x += seconds * scale
        out += [
            text(left - 10, y + 14, label(m), anchor="end"),
            text(WIDTH - 16, y + 14, seconds_text(m.seconds), anchor="end"),
        ]
    return svg(WIDTH, top + row * len(measurements) + 8, out)


def label(m: Measurement) -> str:
    """A measurement in few words."""
    return f"{m.case.split()[0]}, {m.model}, {m.placement}, {format_bytes(m.vram_budget)}"


def seconds_text(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1000 * seconds:.0f} ms"


def roofline_plot(measurements: Sequence[Measurement], ceilings: Ceilings) -> str:
    """What each case reached, over the FLOPs it does for every byte that crosses to the device.

    Left of the slopes the copies (or the disk) are the bound, right of them the arithmetic.
    """
    points = [(m, *reached(m)) for m in measurements if m.flops and m.seconds > 0]
    points = [p for p in points if p[1] > 0]
    left, right, top, base = 80, 250, 50, 330
    xs = [p[1] for p in points] + [ceilings.matmul / ceilings.link, ceilings.matmul / ceilings.disk]
    ys = [p[2] for p in points] + [ceilings.matmul, ceilings.attention]
    x0, x1 = math.floor(math.log10(min(xs))), math.ceil(math.log10(max(xs)))
    y0, y1 = math.floor(math.log10(min(ys))), math.ceil(math.log10(max(ys)))

    def px(x: float) -> float:
        return left + (math.log10(x) - x0) / (x1 - x0) * (WIDTH - left - right)

    def py(y: float) -> float:
        return base - (math.log10(y) - y0) / (y1 - y0) * (base - top)

    out = [text(16, 24, "FLOP/s reached, and what bounds it", size=15, weight="bold")]
    for e in range(x0, x1 + 1):
        out += [line(px(10.0**e), top, px(10.0**e), base, GRID)]
        out += [text(px(10.0**e), base + 16, f"10^{e}", anchor="middle", fill=SOFT)]
    for e in range(y0, y1 + 1):
        out += [line(left, py(10.0**e), WIDTH - right, py(10.0**e), GRID)]
        out += [text(left - 8, py(10.0**e) + 4, f"10^{e}", anchor="end", fill=SOFT)]
    out.append(
        text((left + WIDTH - right) / 2, base + 36, "FLOP per byte copied to the device", anchor="middle")
    )
    edge = 10.0**x1
    for name, rate, colour in (("link", ceilings.link, "#e8a33d"), ("disk", ceilings.disk, "#c0392b")):
        low = max(10.0**x0, 10.0**y0 / rate)
        ridge = min(edge, ceilings.matmul / rate)
        out += [
            line(px(low), py(low * rate), px(ridge), py(ridge * rate), colour, dash="6 3"),
            text(px(ridge) + 4, py(ridge * rate) - 6, name, fill=colour),
        ]
    for name, rate in (("multiplication", ceilings.matmul), ("attention", ceilings.attention)):
        out += [
            line(
                left, py(rate), WIDTH - right, py(rate), INK, dash="" if name == "multiplication" else "2 3"
            ),
            text(WIDTH - right + 6, py(rate) + (4 if name == "multiplication" else 16), name),
        ]
    for n, (m, x, y) in enumerate(points):
        out += [
            f'<circle cx="{px(x):.1f}" cy="{py(y):.1f}" r="8" fill="{COLOURS["lowvram"]}"/>',
            text(px(x), py(y) + 4, str(n + 1), anchor="middle", fill="#ffffff", size=10),
            text(WIDTH - right + 20, base - 14 * (len(points) - 1 - n), f"{n + 1}  {short(m)}", size=11),
        ]
    return svg(WIDTH, base + 50, out)


def short(m: Measurement) -> str:
    return f"{m.case.split()[0]} {m.height}p x {m.frames}, {m.placement}, {format_bytes(m.vram_budget)}"


def reached(m: Measurement) -> tuple[float, float]:
    """FLOP for every byte copied to the device in the stage that the case is about, and FLOP/s."""
    about = ABOUT.get(m.case.split()[0])
    moved = sum(s.h2d for s in m.stages if about in (None, s.name))
    return m.flops / max(moved, 1), m.flops / m.seconds


# ---- SVG


def svg(width: int, height: float, shapes: Sequence[str]) -> str:
    """A picture on white."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height:.0f}"'
    head += f' viewBox="0 0 {width} {height:.0f}" font-family="system-ui, sans-serif">'
    return "\n".join([head, box(0, 0, width, height, "#ffffff"), *shapes, "</svg>", ""])


def box(x: float, y: float, w: float, h: float, fill: str) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{h:.1f}" fill="{fill}"/>'


def line(x1: float, y1: float, x2: float, y2: float, stroke: str, dash: str = "") -> str:
    dashes = f' stroke-dasharray="{dash}"' if dash else ""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{stroke}"{dashes}/>'


def text(
    x: float,
    y: float,
    words: str,
    *,
    size: int = 12,
    anchor: str = "start",
    fill: str = INK,
    weight: str = "normal",
) -> str:
    style = f'font-size="{size}" text-anchor="{anchor}" fill="{fill}" font-weight="{weight}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(words)}</text>'
