"""The `lowvram` command: verbs, errors and exit codes in one place."""

from __future__ import annotations

import sys
from typing import Annotated

import click
import typer

from lowvram import __version__
from lowvram.cli import console, decode, demo, generate, inspect, plan, resume
from lowvram.errors import UsageError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Wan video diffusion inside a hard memory budget.",
)


def _version(value: bool) -> None:
    if value:
        console.emit(f"lowvram {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Wan video diffusion inside a hard memory budget."""


app.command("demo")(demo.demo)
app.command("generate")(generate.generate)
app.command("plan")(plan.plan)
app.command("inspect")(inspect.inspect)
app.command("resume")(resume.resume)
app.command("decode")(decode.decode)


def run(arguments: list[str] | None = None) -> None:
    """Entry point: parse, run, and leave with the exit code of what happened."""
    given = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in given
    sys.exit(_run([a for a in given if a != "--debug"], debug, "--json" in given))


def _run(arguments: list[str], debug: bool, as_json: bool) -> int:
    error: BaseException
    try:
        with console.sigterm_raises():
            code = app(args=arguments, prog_name="lowvram", standalone_mode=False)
            return int(code or 0)
    except click.exceptions.Exit as leave:
        return leave.exit_code
    except click.ClickException as problem:
        if isinstance(problem, click.exceptions.NoArgsIsHelpError):
            console.say(problem.format_message())
            return 2
        verb = problem.ctx.command_path if isinstance(problem, click.UsageError) and problem.ctx else "lowvram"
        error = UsageError(problem.format_message(), advice=f"see `{verb} --help`")
    except click.Abort:
        error = KeyboardInterrupt()
    except BaseException as problem:  # noqa: BLE001 every error ends here, as text for people
        error = problem
    code = console.print_error(error, debug)
    if as_json:
        console.emit_json(console.error_record(error))
    return code


if __name__ == "__main__":
    run()
