"""Tables and plots of the committed results: what has not been measured says so, and no number is written by hand.

    python bench/draw.py            writes bench/RESULTS.md and bench/results/*.svg

Reads bench/peaks.json and bench/results/*.json.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from lowvram.bench import peaks
from lowvram.bench.results import Peer, Results, load
from lowvram.bench.suite import table
from lowvram.offload.budget import format_bytes
from lowvram.offload.io import write_atomic

FOLDER = Path(__file__).parent
NOT_YET = "not measured yet"
COMMAND = "python -m lowvram.bench.gpu --folder /disk/with/room"
INK, SOFT, GRID = "#1f2430", "#6b7280", "#d9dde3"
COLOURS: Mapping[str, str] = {
    "text": "#8fb8de",
    "condition": "#b7a8d6",
    "prepare": "#f0b67f",
    "denoise": "#3a6ea5",
    "decode": "#6bab90",
    "peer": "#9aa5b1",
    "lowvram": "#3a6ea5",
}


def main() -> None:
    """The command."""
    found = {path.name: load(path) for path in sorted((FOLDER / "results").glob("*.json"))}
    recorded = peaks.load()
    write_atomic(FOLDER / "results" / "peaks.svg", peaks_plot(recorded).encode())
    peers = [peer for results in found.values() for peer in results.peers]
    if peers:
        write_atomic(FOLDER / "results" / "peers.svg", peers_plot(peers).encode())
    write_atomic(FOLDER / "RESULTS.md", document(recorded, found).encode())
    print(FOLDER / "RESULTS.md")


def document(recorded: Mapping[str, peaks.Peaks], found: Mapping[str, Results]) -> str:
    """RESULTS.md."""
    on_gpu = {name: r for name, r in found.items() if r.environment.kind == "cuda"}
    with_peers = {name: r for name, r in found.items() if r.peers}
    parts = [
        "# Results",
        (
            "Made by `python bench/draw.py` from the files in `bench/results/` and `bench/peaks.json`; nothing here is typed"
            " by hand."
        ),
        "## Planned peaks of VRAM",
        (
            "Plans at the true sizes, from the product's own code on fake tensors (rtx4090 profile, 64 GB of RAM, prompts of"
            " full length). These are forecasts; the test suite fails when one grows by over 1 %."
        ),
        peaks_table(recorded),
        "![Planned peak of every stage under each budget](results/peaks.svg)",
        "## On a GPU",
        *(gpu_section(name, r) for name, r in on_gpu.items()),
    ]
    if not on_gpu:
        parts.append(
            f"Times, measured peaks, the streaming tax and the hand-over: {NOT_YET}. `{COMMAND}` measures them."
        )
    parts += ["## Beside other programs"]
    for name, results in with_peers.items():
        e = results.environment
        parts += [
            (
                f"One small Wan transformer (57 million parameters, float32), the same inputs, one core of"
                f" {e.device}, {e.ram / 1e9:.0f} GB, {results.date} (`{name}`). Seconds are processor seconds of one forward."
                " Overhead is against the same network with everything resident: lowvram's own for lowvram, diffusers' for"
                " the others; the machine was shared, so differences of 0.1 and 0.2 mean little. Exact: the same bits as that one."
                " Files that a program maps into memory are not seen as read. lowvram's three rows are of a second run."
            ),
            peers_table(results.peers),
        ]
    parts.append("![Overhead and RAM of each program and mode](results/peers.svg)" if with_peers else NOT_YET)
    parts.append(f"On a GPU, at true size, against each program's best: {NOT_YET}.")
    return "\n\n".join(parts) + "\n"


def gpu_section(name: str, results: Results) -> str:
    """What one card did."""
    rows = [f"| {p.name} | {p.outcome} | {p.seconds:.0f} s | {p.why} |" for p in results.parts]
    acceptance = "\n".join(["| part | outcome | time | |", "|---|---|---|---|", *rows])
    shown = table(results.measurements) if results.measurements else NOT_YET
    return f"### {results.environment.device}, {results.date} (`{name}`)\n\n{acceptance}\n\n```text\n{shown}\n```"


def peaks_table(recorded: Mapping[str, peaks.Peaks]) -> str:
    """A row a case: its peak under each budget, and the least budget."""
    budgets = [f"{b} GB" for b in peaks.BUDGETS]
    lines = [f"| case | {' | '.join(budgets)} | least |", "|---|" + "---|" * (len(budgets) + 1)]
    for name, by_budget in recorded.items():
        cells = [format_bytes(peak_of(by_budget[b])) if b in by_budget else "-" for b in budgets]
        lines.append(f"| {name} | {' | '.join(cells)} | {format_bytes(by_budget['least']['vram'])} |")
    return "\n".join(lines)


def peak_of(stages: Mapping[str, int]) -> int:
    """VRAM of the largest stage."""
    return max(n for stage, n in stages.items() if stage != "ram")


def peers_table(peers: Sequence[Peer]) -> str:
    """A row a program and mode."""
    lines = [
        "| program | mode | seconds | overhead | peak RAM | read from files | exact |",
        "|---|---|---|---|---|---|---|",
    ]
    for p in peers:
        if p.seconds is None:
            lines.append(f"| {p.name} {p.version} | {p.mode} | {p.note or NOT_YET} | | | | |")
            continue
        exact = "" if p.exact is None else "yes" if p.exact else "no"
        lines.append(
            f"| {p.name} {p.version} | {p.mode} | {p.seconds:.2f} | {p.overhead:.2f} | {format_bytes(p.rss or 0)} |"
            f" {format_bytes(p.disk_read or 0)} | {exact} |"
        )
    return "\n".join(lines)


# ---- plots


def peaks_plot(recorded: Mapping[str, peaks.Peaks]) -> str:
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
    """Overhead of each program and mode, with its RAM beside."""
    shown = [p for p in peers if p.overhead is not None]
    width, row, left, top = 720, 26, 230, 56
    longest = max(p.overhead or 0 for p in shown)
    scale = (width - left - 190) / max(longest, 1.0)
    out = [
        text(16, 24, "Processor time of a forward over everything resident", size=15, weight="bold"),
        text(width - 16, 44, "peak RAM", anchor="end", fill=SOFT),
    ]
    bottom = top + row * len(shown)
    out += [line(left + scale, top - 6, left + scale, bottom, SOFT, dash="4 3")]
    for n, p in enumerate(shown):
        y = top + n * row
        w = (p.overhead or 0) * scale
        out += [
            text(left - 10, y + 14, f"{p.name}: {p.mode}", anchor="end"),
            box(left, y, w, row - 8, COLOURS.get(p.name, COLOURS["peer"])),
            text(left + w + 6, y + 14, f"{p.overhead:.2f}" + ("" if p.exact else ", other bits"), fill=SOFT),
            text(width - 16, y + 14, format_bytes(p.rss or 0), anchor="end"),
        ]
    return svg(width, bottom + 16, out)


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


if __name__ == "__main__":
    main()
