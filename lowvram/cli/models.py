"""lowvram models: which model files are on this machine, which models they make, whether they are whole."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowvram.cli import options as o
from lowvram.columns import aligned

if TYPE_CHECKING:
    from lowvram.api import Pipeline
    from lowvram.job import Job
    from lowvram.library.choose import Chosen
    from lowvram.library.entries import Entry
    from lowvram.library.scan import Library

_KINDS: Mapping[str, str] = {
    "dit": "transformer",
    "vae": "VAE",
    "text": "text encoder",
    "clip": "CLIP",
    "lora": "LoRA",
    "tokenizer": "tokenizer",
    "broken": "broken",
}


def scan(models_dir: o.ModelsDir = None, as_json: o.Json = False, quiet: o.Quiet = False) -> None:
    """Find the Wan files on this machine. What they are and where they lie is read from headers only."""
    from lowvram.cli.console import emit, emit_json, say
    from lowvram.discovery import look

    library = look(models_dir or (), announce(quiet or as_json))
    if as_json:
        for entry in library.entries:
            emit_json(record(entry))
        return
    if library.entries:
        emit(table(library.entries))
    for line in remarks(library):
        say(line)


def list_(models_dir: o.ModelsDir = None, as_json: o.Json = False, quiet: o.Quiet = False) -> None:
    """Say which models can be run with the files that are here. Of the others, which parts they lack."""
    from lowvram.cli.console import emit, emit_json, say
    from lowvram.discovery import is_embedded, look
    from lowvram.errors import UsageError
    from lowvram.library.choose import choose, distilled
    from lowvram.sampling.presets import load_models

    library = look(models_dir or (), announce(quiet or as_json))
    for name in load_models():
        if is_embedded(name):
            state, files, question = "ready (ships inside)", {}, ""
        else:
            try:
                chosen = choose(library.entries, name)
                state, question = _state(chosen), ""
                for preset in distilled(library.entries, name) if chosen.missing else ():
                    if not (other := choose(library.entries, name, preset=preset)).missing:
                        chosen, state = other, f"ready with --preset {preset}"
                files = {part: taken.path for part, taken in chosen.parts.items()}
            except UsageError as several:
                state, files, question = "choose", {}, f"{several.found}; {several.advice}"
        if as_json:
            emit_json(
                {"schema": "lowvram.model/1", "model": name, "state": state, "files": files, "note": question}
            )
            continue
        emit(f"{name:<18}  {state}")
        for part, path in files.items():
            emit(f"    {part:<10}{printable(path)}")
        if question:
            emit(f"    {printable(question)}")
    if not as_json:
        say("see `lowvram models scan` for every file, `lowvram models pull NAME` to fetch what is missing")


def verify(
    files: Annotated[
        list[Path] | None,
        typer.Argument(metavar="FILE", help="Files to verify; all that are found if left out."),
    ] = None,
    models_dir: o.ModelsDir = None,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Read model files to their end and check them. Ranges against sizes, sha256 against what was published."""
    from lowvram.cli.console import emit, emit_json
    from lowvram.discovery import look
    from lowvram.errors import FileError, UsageError
    from lowvram.library.cache import load_cache, models_cache, save_cache
    from lowvram.library.verify import verify as verify_file

    if files and models_dir:
        raise UsageError(
            f"--models-dir {models_dir[0]} beside files",
            expected="one or the other: the files are all that is verified",
            advice="leave --models-dir out, or the files to verify all in it",
        )
    paths = files or [Path(e.path) for e in look(models_dir or (), announce(quiet or as_json)).entries]
    cache, count, wrong = load_cache(models_cache()), 0, 0
    progress = Percent(quiet or as_json)
    for path in dict.fromkeys(paths):
        for verdict in verify_file(path, cache, lambda file, done, size: progress(file.name, done, size)):
            count, wrong = count + 1, wrong + (not verdict.ok)
            if as_json:
                emit_json({"schema": "lowvram.verdict/1"} | asdict(verdict))
            else:
                told = "ok   " if verdict.ok else "WRONG"
                emit(f"{told}  {printable(verdict.path)}: {printable(verdict.finding)}")
        save_cache(models_cache(), cache)
    if wrong:
        raise FileError(f"{wrong} of {count} files are not what they should be", advice="fetch them again")


def pull(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A known model, such as wan2.2-t2v-a14b.")],
    weights: Annotated[
        str | None,
        typer.Option(
            "--weights", metavar="FORMAT", help="Encoding of the transformers, such as fp8 or q4_k_m."
        ),
    ] = None,
    text: Annotated[
        str, typer.Option("--text", metavar="FORMAT", help="Encoding of the text encoder: fp8 or fp16.")
    ] = "fp8",
    models_dir: o.ModelsDir = None,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Fetch the parts of a model that are not on this machine. They go into the Hugging Face cache."""
    from lowvram.cli.console import emit, emit_json, say
    from lowvram.discovery import look
    from lowvram.errors import UsageError
    from lowvram.library.choose import choose
    from lowvram.library.downloads import downloads
    from lowvram.library.places import hub_cache
    from lowvram.library.pull import ask, check_space, fetch, hub_from
    from lowvram.offload.budget import format_bytes
    from lowvram.sampling.presets import model_preset

    if text not in ("fp8", "fp16"):
        raise UsageError(f'"{text}"', where="--text", expected="fp8 or fp16", advice="leave it out for fp8")
    experts = model_preset(name).expert_names()
    downloads(
        name, experts, weights
    )  # an encoding that is not published is told before anything is looked for
    hushed = quiet or as_json
    entries = look(models_dir or (), announce(hushed)).entries
    try:
        missing = choose(entries, name, weights=weights).missing
    except UsageError:
        missing = choose(entries, name, given=experts).missing  # transformers are here, more than once
    hub = hub_from(os.environ, hub_cache(os.environ, Path.home()))
    carried = ("tokenizer",) if "text" in missing else ()  # the text encoders that are fetched carry it
    parts = [part for part in missing if part not in carried]
    wanted = ask(hub, downloads(name, parts, weights, text))
    check_space(hub, wanted)
    if not hushed:
        left = sum(each.nbytes for each in wanted if not each.is_here)
        say(
            f"{len(wanted)} files, {format_bytes(left)} to fetch into {hub.cache}"
            if wanted
            else "all parts are here"
        )
    progress = Percent(hushed)
    for each in wanted:
        path = fetch(hub, each, lambda file, done, size: progress(Path(file.name).name, done, size))
        if as_json:
            emit_json(
                {
                    "schema": "lowvram.pulled/1",
                    "part": each.download.part,
                    "path": str(path),
                    "bytes": each.nbytes,
                }
            )
        else:
            emit(f"{each.download.part:<10}{printable(str(path))}")


class Percent:
    """Says how far a file is, at every tenth of it that is reached."""

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self._last = ("", 0)

    def __call__(self, name: str, done: int, size: int) -> None:
        from lowvram.cli.console import say
        from lowvram.offload.budget import format_bytes

        tenth = 10 * done // max(1, size)
        if self._quiet or (name, tenth) == self._last or size < 64 << 20:
            return
        self._last = (name, tenth)
        say(f"{printable(name)}: {10 * tenth} % of {format_bytes(size)}")


def _state(chosen: Chosen) -> str:
    from lowvram.library.parts import PART_NAMES

    if not chosen.missing:
        return "ready"
    lacks = ", ".join(PART_NAMES[part] for part in chosen.missing)
    return (
        f"lacks {lacks}" if chosen.parts.keys() & {"high", "low", "single"} else f"not here (lacks {lacks})"
    )


def announce(quiet: bool) -> Callable[[Path], None]:
    """Says that headers are being read, once a first unknown file is met, and then which."""
    from lowvram.cli.console import say

    count = 0

    def tell(path: Path) -> None:
        nonlocal count
        count += 1
        if not quiet and (count in (1, 10, 30) or count % 100 == 0):
            say(f"reading headers ({count}): {printable(str(path))}")

    return tell


def tell_files(pipe: Pipeline, quiet: bool) -> None:
    """Which files were chosen among others, and why."""
    from lowvram.cli.console import say

    for part, why in () if quiet else pipe.reasons.items():
        say(f"{part:<10}{printable(pipe.files[part])}  ({why})")


def tell_preset(pipe: Pipeline, flags: o.JobFlags, job: Job, quiet: bool) -> None:
    """The preset that was not asked for by name, and what every LoRA does."""
    from lowvram.cli.console import say
    from lowvram.model_files import with_loras

    if quiet:
        return
    if job.preset is not None and flags.preset is None:
        say(f"preset    {job.preset}  (what these files were made for)")
    source = "" if flags.lora else f"of --preset {job.preset}, "
    for expert, transformer in with_loras(pipe.model, job.loras).transformers.items():
        for lora in transformer.loras:
            path = printable(str(lora.matched.files[0]))
            say(f"lora      {path}  ({source}{expert}, strength {lora.told()}: {lora.report()})")


def record(entry: Entry) -> dict[str, Any]:
    """An entry as an object for programs."""
    return {
        "schema": "lowvram.file/1",
        "path": entry.path,
        "kind": entry.kind,
        "variant": entry.variant,
        "models": list(entry.models),
        "encoding": entry.encoding,
        "bytes": entry.nbytes,
        "expert": entry.expert,
        "preset": entry.preset,
        "place": entry.place,
        "sha256": entry.sha256 or None,
        "problem": entry.problem or None,
    }


def table(entries: Iterable[Entry]) -> str:
    """The files for people."""
    from lowvram.offload.budget import format_bytes

    rows = [("what", "variant", "encoding", "size", "expert", "where", "file")]
    for entry in entries:
        told = (entry.version, entry.variant, entry.derived, entry.preset)
        variant = " ".join(filter(None, dict.fromkeys(told)))
        rows.append(
            (
                _KINDS.get(entry.kind, entry.kind),
                "cannot be used" if entry.problem else variant,
                entry.encoding,
                format_bytes(entry.nbytes),
                entry.expert or "",
                entry.place,
                printable(entry.path),
            )
        )
    size = rows[0].index("size")
    return "\n".join(aligned(rows, left=[place for place in range(len(rows[0])) if place != size]))


def remarks(library: Library) -> list[str]:
    """What people should know besides the table."""
    lines = [
        f"{printable(entry.path)}: {printable(entry.problem)}" for entry in library.entries if entry.problem
    ]
    lines += [f"{printable(str(each.folder))}: {printable(each.why)}" for each in library.unreadable]
    if not library.entries:
        lines.append(
            "no part of a Wan model was found; name folders with --models-dir, or set LOWVRAM_MODELS"
        )
    looked = ", ".join(dict.fromkeys(place.label for place in library.places))
    if not looked:
        return [*lines, "no program that keeps models, and no folder of models, is known here"]
    others = (
        "1 other checkpoint there is"
        if library.others == 1
        else f"{library.others} other checkpoints there are"
    )
    count = f"; {others} none of Wan's" if library.others else ""
    return [*lines, f"looked in: {looked}{count}"]


def printable(text: str) -> str:
    """Text from a file or a folder, fit for one line of a terminal."""
    from lowvram.cli.console import one_line

    return one_line(text)


def verbs() -> Sequence[tuple[str, Callable[..., None]]]:
    """The commands of this group by name."""
    return (("scan", scan), ("list", list_), ("verify", verify), ("pull", pull))
