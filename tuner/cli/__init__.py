"""Define the command line: its verbs and what each one calls.

Nothing heavy is imported until a verb runs, so that `--help` answers at once.
"""

from __future__ import annotations

import errno
import gc
import os
import shlex
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from tuner.cli import printing, study_verbs, trial_verbs
from tuner.cli.hints import Group, explain
from tuner.errors import InputError, TunerError, last_words, shown
from tuner.process_log import harmless, kept_trace, said_by, trace_of
from tuner.whole import keep_others_out

_UsageError: Any = typer.BadParameter.__mro__[2]
"""Raised by Typer for a wrong command line: Click's class, or the one in Typer's own copy of Click."""

app = typer.Typer(
    name="tuner",
    cls=Group,
    help="Find hyperparameters for LoRA fine-tuning in rounds, and learn how long to train.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["--help", "-h"]},
)
app.add_typer(study_verbs.app, name="study")
app.add_typer(trial_verbs.app, name="trial")


def _version(wanted: bool) -> None:
    if wanted:
        from tuner.installation import version

        typer.echo(f"tuner {version()}")
        raise typer.Exit


@app.callback()
def _root(
    directory: Annotated[
        Path | None, typer.Option("-C", metavar="DIR", help="Run as if started in DIR, as in git.")
    ] = None,
    verbose: Annotated[
        bool,
        typer.Option("--verbose", help="Show the log on standard error, and the whole trace of a bug."),
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    printing.acting_in = directory
    if verbose:
        printing.verbose.enter_context(said_by(printing.say))
    if directory is not None:
        try:
            os.chdir(directory)
        except OSError as error:
            raise InputError(f"-C {directory}: {error.strerror}; pass the folder of a study") from error


@app.command()
def doctor(
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output.")] = False,
) -> None:
    """Check versions, GPUs, memory, disk, storage and the Hub; exits with 1 if there is a problem.

    Example: `tuner doctor`
    """
    from tuner.api.doctor import examine, health_document, is_healthy
    from tuner.cli.output import health_table
    from tuner.report import dumps

    checks = list(examine(Path()))
    if json:
        typer.echo(dumps(health_document(checks)))
    else:
        printing.output(piped_width=printing.PROSE).print(health_table(checks))
        has_study = any(check.name == "storage" for check in checks)
        command = "tuner study status" if has_study else "tuner study new --help"
        typer.echo(f"next: {printing.next_command(command)}", err=True)
    if not is_healthy(checks):
        raise typer.Exit(1)


def main() -> None:
    """Run the `tuner` command. Exit codes: 0 done, 1 ran and failed, 2 bad input, 130 interrupted."""
    keep_others_out()
    sys.stdout, sys.stderr = printing.outliving(sys.stdout), printing.outliving(sys.stderr)
    code = run(sys.argv[1:])
    gc.freeze()  # else Python collects all of torch and transformers once more as it ends, for a second
    sys.exit(code)


def _bug(error: Exception, *, is_verbose: bool) -> str:
    """Return what to say of an error that no message explains: one line, unless the user wants all of it."""
    place = kept_trace(error)
    where = "could not be written; see it with: tuner --verbose ..." if place is None else f"is in {place}"
    said = harmless(last_words(error))
    line = f"error: a bug in tuner: {said}. The whole trace {where}; please report it"
    return f"{trace_of(error)}{line}" if is_verbose else line


COLLECT_AFTER = 100_000
"""Objects created between garbage collections: each collection scans all objects of a large study."""


def run(arguments: list[str]) -> int:
    """Run one command and return its exit code."""
    gc.set_threshold(COLLECT_AFTER)
    printing.typed = shlex.join(["tuner", *arguments])
    with ExitStack() as printing.verbose:
        return _run(arguments)


def _run(arguments: list[str]) -> int:
    try:
        code = app(arguments, prog_name="tuner", standalone_mode=False)
    except TunerError as error:
        typer.echo(f"error: {harmless(str(error))}", err=True)
        return error.exit_code
    except _UsageError as error:
        explain(error)
        error.show()
        return int(error.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        typer.echo("interrupted; run the same command again to continue", err=True)
        return 130
    except Exception as error:  # noqa: BLE001  # a bug of ours, whatever it is
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:  # whichever argument it is
            typer.echo(f"error: {shown(error.filename)}: is too long for a path; choose another", err=True)
            return InputError.exit_code
        typer.echo(_bug(error, is_verbose="--verbose" in arguments), err=True)
        return 1
    return code if isinstance(code, int) else 0
