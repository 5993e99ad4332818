"""lowvram inspect: what a file is."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer

from lowvram.cli import options as o


def inspect(
    paths: Annotated[
        list[Path], typer.Argument(metavar="FILE...", help="Checkpoints, LoRAs, folders or videos.")
    ],
    as_json: o.Json = False,
) -> None:
    """Say what model files and videos hold; only headers are read."""
    from lowvram.cli.console import emit, emit_json

    for path in paths:
        facts = describe(path)
        if as_json:
            emit_json(facts)
        else:
            emit("\n".join(f"{name}: {value}" for name, value in facts.items()))


def describe(path: Path) -> dict[str, Any]:
    """Facts about a file or a folder of shards. FileError if it is nothing known."""
    if path.suffix.lower() in (".mp4", ".mkv", ".webm", ".mov"):
        return _video(path)
    from lowvram.offload.io import FileReader
    from lowvram.quant.files.shards import open_checkpoint_files
    from lowvram.quant.identify import identify

    headers = open_checkpoint_files(path, FileReader)
    found = identify(headers)
    stored = sum(ref.nbytes for ref in found.refs.values())
    facts: dict[str, Any] = {
        "file": str(path),
        "kind": found.kind,
        "variant": found.variant,
        "naming": found.style,
        "tensors": len(found.refs),
        "bytes": stored,
    }
    if found.spec is not None:
        from dataclasses import asdict

        facts["sizes"] = {k: v for k, v in asdict(found.spec).items() if k not in ("mean", "std")}
        facts["encodings"] = dict(Counter(ref.encoding.name for ref in found.refs.values()))
    if found.metadata:
        facts["metadata"] = dict(found.metadata)
    return facts


def _video(path: Path) -> dict[str, Any]:
    import json

    from lowvram.media.probe import probe

    info = probe(path)
    facts: dict[str, Any] = {
        "file": str(path),
        "kind": "video",
        "size": f"{info.width}x{info.height}",
        "frames": info.frames,
        "fps": float(info.fps),
        "codec": info.codec,
    }
    try:
        facts["job"] = json.loads(info.metadata.get("comment", ""))
    except ValueError:
        facts["metadata"] = dict(info.metadata)
    return facts
