"""Tables and plots of the committed results: what has not been measured says so, and no number is written by hand.

    python bench/results_page.py     writes bench/RESULTS.md and bench/results/*.svg

Reads bench/peaks.json and bench/results/*.json.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from lowvram import timeline
from lowvram.bench import peaks
from lowvram.bench.plots import peaks_plot, peers_plot, roofline_plot, stalls_plot
from lowvram.bench.results import Peer, Results, load
from lowvram.bench.suite import table
from lowvram.offload.budget import Budget, format_bytes
from lowvram.offload.io import write_atomic

FOLDER = Path(__file__).parent
NOT_YET = "not measured yet"
PLOTS: Mapping[str, str] = {
    "-memory.svg": "Memory of the tightest job over time",
    "-stalls.svg": "Where the time of each job went",
    "-roofline.svg": "FLOP/s reached, and what bounds it",
}
COMMAND = "python -m lowvram.bench.gpu --folder /disk/with/room"


def main() -> None:
    """The command."""
    found = {path.name: load(path) for path in sorted((FOLDER / "results").glob("*.json"))}
    recorded = peaks.load()
    for name, picture in pictures(recorded, found).items():
        write_atomic(FOLDER / "results" / name, picture.encode())
    write_atomic(FOLDER / "RESULTS.md", document(recorded, found).encode())
    print(FOLDER / "RESULTS.md")


def pictures(recorded: Mapping[str, peaks.Peaks], found: Mapping[str, Results]) -> dict[str, str]:
    """Every plot, by file name."""
    made = {"peaks.svg": peaks_plot(recorded)} if recorded else {}
    for name, results in found.items():
        stem = name.removesuffix(".json")
        if results.peers:
            made[f"{stem}.svg"] = peers_plot(results.peers)
        jobs = [m for m in results.measurements if m.samples and m.case.split()[0] in ("pair", "job")]
        if jobs:
            tightest = min(jobs, key=lambda m: (m.vram_budget, m.ram_budget))
            budget = Budget(tightest.vram_budget, tightest.ram_budget)
            made[f"{stem}-memory.svg"] = timeline.draw(tightest.samples, budget)
        if results.measurements:
            made[f"{stem}-stalls.svg"] = stalls_plot(results.measurements)
        if results.measurements and results.ceilings is not None:
            made[f"{stem}-roofline.svg"] = roofline_plot(results.measurements, results.ceilings)
    return made


def document(recorded: Mapping[str, peaks.Peaks], found: Mapping[str, Results]) -> str:
    """RESULTS.md."""
    on_gpu = {name: r for name, r in found.items() if r.environment.kind == "cuda"}
    with_peers = {name: r for name, r in found.items() if r.peers}
    parts = [
        "# Results",
        (
            "Made by `python bench/results_page.py` from the files in `bench/results/` and `bench/peaks.json`; nothing here is typed"
            " by hand."
        ),
        "## Planned peaks of VRAM",
        (
            "Plans at the true sizes, from the product's own code on meta tensors (rtx4090 profile, 64 GB of RAM, prompts of"
            " full length). These are forecasts; the test suite fails when one grows by over 1 %."
        ),
        peaks_table(recorded),
        "![Planned peak of every stage under each budget](results/peaks.svg)",
        "## On a GPU",
        *(measured_section(name, r) for name, r in on_gpu.items()),
    ]
    if not on_gpu:
        parts.append(
            f"Times, measured peaks, memory over time, waits, the streaming tax and the hand-over: {NOT_YET}."
            f" `{COMMAND}` measures them."
        )
    on_cpu = {name: r for name, r in found.items() if r.environment.kind == "cpu" and r.measurements}
    if on_cpu:
        parts += [
            "## The embedded model on a CPU",
            (
                "What `lowvram bench --dry` leaves: that every case runs and is measured. How fast a card is, it does not"
                " say; a share over 100 % means that the sizes by which the ceiling was measured were slower."
            ),
            *(measured_section(name, r) for name, r in on_cpu.items()),
        ]
    parts += ["## Beside other programs"]
    for name, results in with_peers.items():
        stem = name.removesuffix(".json")
        parts += [
            peers_words(name, results),
            peers_table(results.peers),
            f"![Overhead and RAM of each program and mode](results/{stem}.svg)",
        ]
    if not any(r.environment.kind == "cuda" for r in with_peers.values()):
        parts.append(
            f"On a GPU, at true size, against each program's best: {NOT_YET}. `python bench/peers/run.py --device cuda"
            " --size 720p --cap 16` measures it."
        )
    return "\n\n".join(parts) + "\n"


def peers_words(name: str, results: Results) -> str:
    """What the table below shows, and how."""
    e = results.environment
    sizes = " and ".join(sorted({p.size for p in results.peers}))
    return (
        f"One Wan transformer (`{sizes}` of `bench/peers/sizes.py`), the same inputs, on {e.device}, {results.date}"
        f" (`{name}`). On a CPU one core is used and seconds are of the processor. Overhead is against the same network with"
        " everything resident (lowvram's own for lowvram, diffusers' for the others), taken inside each round; the median of"
        " the rounds. Where the machine was not quiet, differences of 0.1 mean little: the plot shows all rounds. Exact: the"
        " same bits as with everything resident. Difference: to diffusers with everything resident. Files that a program"
        " maps into memory are not seen as read."
    )


def measured_section(name: str, results: Results) -> str:
    """What one machine did."""
    rows = [f"| {p.name} | {p.outcome} | {p.seconds:.0f} s | {p.why} |" for p in results.parts]
    acceptance = "\n".join(["| part | outcome | time | |", "|---|---|---|---|", *rows])
    shown = table(results.measurements) if results.measurements else NOT_YET
    drawn = pictures({}, {name: results})
    images = [
        f"![{words}](results/{file})" for end, words in PLOTS.items() for file in drawn if file.endswith(end)
    ]
    head = f"### {results.environment.device}, {results.date} (`{name}`)"
    return "\n\n".join([head, *([acceptance] if rows else []), f"```text\n{shown}\n```", *images])


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
        "| program | mode | seconds | overhead | peak RAM | read from files | exact | difference |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for p in peers:
        if p.seconds is None:
            lines.append(f"| {p.name} {p.version} | {p.mode} | {p.note or NOT_YET} | | | | | |")
            continue
        exact = "" if p.exact is None else "yes" if p.exact else "no"
        lines.append(
            f"| {p.name} {p.version} | {p.mode} | {p.seconds:.2f} | {p.overhead or 0:.2f} | {format_bytes(p.rss or 0)} |"
            f" {format_bytes(p.disk_read or 0)} | {exact} |"
            f" {'' if p.difference is None else f'{p.difference:.1e}'} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
