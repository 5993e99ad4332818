"""lowvram quantize: the same network in another format."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lowvram.cli import options as o
from lowvram.columns import aligned

if TYPE_CHECKING:
    from lowvram.conversion import Done


def quantize(
    source: Annotated[
        Path, typer.Argument(metavar="IN", help="A transformer, text encoder or VAE: file or folder.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The file to write, or a folder.")],
    to: Annotated[
        str,
        typer.Option(
            "--to", metavar="FORMAT", help="fp8, int8, nf4, q4_k_m, ...: every format that --weights takes."
        ),
    ],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing files.")] = False,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Store a network in another format. A run that was stopped goes on where it was."""
    import time

    from lowvram.cli.console import emit, emit_json
    from lowvram.cli.progress import Forecast, Progress, progress_mode
    from lowvram.conversion import plan_conversion, run_conversion
    from lowvram.offload.budget import format_bytes

    task = plan_conversion(source, out, to, overwrite)
    before = sum(ref.nbytes for ref in task.source.refs.values())
    forecast = [Forecast("quantize", task.changes, 0.0)]
    done: list[Done] = []
    with Progress(forecast, 0, time.monotonic, progress_mode(quiet, as_json)) as progress:
        progress.note(f"{source}: {format_bytes(before)} -> {to}, {format_bytes(task.nbytes)}")
        progress.begin("quantize")
        try:
            for tensor in run_conversion(task):
                done.append(tensor)
                if tensor.changed:
                    progress.step()
                if as_json:
                    emit_json(record(tensor))
        except KeyboardInterrupt:
            progress.note("stopped; the same command goes on from here")
            raise
        progress.end()
    made = [str(task.folder / file.name) for file in task.files]
    if as_json:
        emit_json(
            {"schema": "lowvram.quantized/1", "to": to, "files": made, "bytes": task.nbytes, "before": before}
        )
        return
    if not quiet:
        progress.note("\n".join(table(done)))
    for path in made:
        emit(path)


def record(tensor: Done) -> dict[str, object]:
    return {
        "schema": "lowvram.quantized_tensor/1",
        "name": tensor.name,
        "encoding": tensor.encoding,
        "error": tensor.error,
        "bytes": tensor.nbytes,
    }


def table(done: Sequence[Done]) -> list[str]:
    """A line for each kind of tensor that lost precision: the same place in every block."""
    kinds: dict[tuple[str, str], list[Done]] = {}
    for tensor in done:
        if tensor.error:
            kinds.setdefault((_kind(tensor.name), tensor.encoding), []).append(tensor)
    rows = [("tensor", "format", "count", "error", "largest", "in")]
    for (kind, encoding), found in kinds.items():
        worst = max(found, key=lambda t: t.error)
        mean = sum(t.error for t in found) / len(found)
        block = worst.name.removesuffix(kind).rstrip(".") or worst.name
        rows.append((kind, encoding, str(len(found)), f"{mean:.3%}", f"{worst.error:.3%}", block))
    exact = sum(not tensor.error for tensor in done)
    lines = aligned(rows, left=range(len(rows[0]))) if kinds else []
    return [*lines, f"{exact} of {len(done)} tensors without any error"]


def _kind(name: str) -> str:
    """blocks.3.ffn.0.weight -> ffn.0.weight"""
    return name.split(".", 2)[2] if name.startswith("blocks.") else name
