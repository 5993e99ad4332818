"""The `lowvram` command: verbs, errors and exit codes in one place."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from typing import Annotated, Any, cast

import typer

from lowvram import __version__
from lowvram.cli import (
    animate,
    bench,
    console,
    decode,
    demo,
    doctor,
    encode,
    generate,
    inspect,
    jobs,
    models,
    plan,
    quantize,
    resume,
)
from lowvram.cli.foreign import ANSWERS, translate
from lowvram.errors import StorageError, UsageError

app = typer.Typer(add_completion=False, rich_markup_mode=None)

_ParserError = cast(type[Exception], typer.BadParameter.__base__)
"""What the parser raises for arguments that cannot be meant. Recent releases of Typer carry a copy of click of their own,
so the class is asked of Typer and not of click."""


class _Stopped(Exception):
    """Ctrl-C or SIGTERM on its way through Typer, which turns every KeyboardInterrupt into a silent exit code 130."""

    def __init__(self, why: KeyboardInterrupt) -> None:
        self.why = why


def _verb(work: Callable[..., None]) -> Callable[..., None]:
    @wraps(work)
    def call(**given: Any) -> None:
        try:
            work(**given)
        except KeyboardInterrupt as why:
            raise _Stopped(why) from None

    return call


def _version(value: bool) -> None:
    if value:
        console.emit(f"lowvram {__version__}")
        raise typer.Exit


@app.callback(epilog="An error takes three lines; --debug, with any command, adds where it came from.")
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Wan video diffusion inside a hard memory budget."""


VERBS: tuple[Callable[..., None], ...] = (
    demo.demo,
    generate.generate,
    animate.animate,
    plan.plan,
    doctor.doctor,
    inspect.inspect,
    quantize.quantize,
    resume.resume,
    encode.encode,
    decode.decode,
    bench.bench,
)
for verb in VERBS:
    app.command(verb.__name__)(_verb(verb))

library = typer.Typer(help="The model files on this machine.", rich_markup_mode=None)
for name, action in models.verbs():
    library.command(name)(_verb(action))
app.add_typer(library, name="models")

kept = typer.Typer(help="The jobs that are kept on this machine.", rich_markup_mode=None)
kept.callback(invoke_without_command=True)(_verb(jobs.jobs))
kept.command("rm")(_verb(jobs.rm))
app.add_typer(kept, name="jobs")


def run(arguments: list[str] | None = None) -> None:
    """Entry point: parse, run, and leave with the exit code of what happened."""
    console.open_streams()
    given = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in given
    sys.exit(_run([a for a in given if a != "--debug"], debug, "--json" in given))


def _run(arguments: list[str], debug: bool, as_json: bool) -> int:
    error: BaseException
    command = typer.main.get_command(app)
    try:
        with console.sigterm_raises():
            given = [*arguments, "--help"] if arguments in ([], ["models"]) else translate(arguments)
            code = command.main(given, prog_name="lowvram", standalone_mode=False)
            return int(code or 0)
    except _ParserError as problem:
        context = getattr(problem, "ctx", None)
        verb = context.command_path if context else "lowvram"
        message = " ".join(problem.format_message().split()).rstrip(".")  # type: ignore[attr-defined]
        instead = ANSWERS.get(str(getattr(problem, "option_name", "")))
        error = UsageError(message, advice=instead or f"see `{verb} --help`")
    except _Stopped as stopped:
        error = stopped.why
    except typer.Abort:
        error = KeyboardInterrupt()
    except BaseException as problem:  # noqa: BLE001 every error ends here, as text for people
        error = problem
    code = console.print_error(error, debug)
    if as_json:
        with suppress(StorageError):  # stdout takes nothing: that was told on stderr
            console.emit_json(console.error_record(error))
    return code


if __name__ == "__main__":
    run()
