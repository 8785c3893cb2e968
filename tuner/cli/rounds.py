"""`study run`, `study auto` and `study sweep`: parse their options, show progress and print results."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import typer

from tuner.api.auto import Automatic, refuse_epochs, refuse_sweep, sweep_round
from tuner.api.run import EngineNamed, Gpus, Stopping, Where, has_begun, keeping_workers, run_here
from tuner.cli.output import promotion_text
from tuner.cli.printing import error_output, next_command, prepared, spoken_by, stop_signals
from tuner.config import RoundFile, load_round
from tuner.engines import make_engine
from tuner.errors import InputError, Interrupted, RoundStopped
from tuner.playbook.restarts import Enough
from tuner.records import searched
from tuner.report import View, open_view

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def where_typed(
    slots: str | None,
    workers: str | None,
    engine: str | None,
    ray_address: str | None,
    notify: str | None = None,
) -> Where:
    """Parse where rounds run. Raises InputError."""
    return Where(
        None if slots is None else parse_count("--slots", slots),
        parse_count("--workers", workers or "auto"),
        engine,
        ray_address,
        parse_command("--notify", notify),
    )


def run_file(path: Path, *, duration: str | None, where: Where) -> tuple[str, Path | None]:
    """Start or resume a round, shown live; return the command that resumes, and the file to report on.

    With the engine `simulated`, the returned file is the dry run's copy. It is None if time ran out before
    the base model and data were first loaded. Raises Interrupted, naming the command to resume with, after a
    signal.
    """
    command = f"tuner study run {shlex.quote(str(path))}{_limit(duration)}{where.options}"
    with interruptible(command, duration=duration) as stopping:
        file = where.file(path)
        run_shown(file, where, stopping=stopping)
    return command, file.path if has_begun(file) else None


def _limit(duration: str | None) -> str:
    return "" if duration is None else f" --for {shlex.quote(duration)}"


@contextmanager
def interruptible(command: str, *, duration: str | None) -> Iterator[Stopping]:
    """Yield a check for whether to stop, after a signal or when time is up.

    Errors name the command to resume with. Running out of time is not an error: a message is printed and the
    block is left.
    """
    again = next_command(command)
    seconds = None if duration is None else parse_duration(duration)
    with stop_signals("stopping: saving all trials (Ctrl-C again to quit now)", seconds) as stopping:
        try:
            yield stopping
        except Interrupted as stop:
            if stopping.was_interrupted:
                raise Interrupted(f"{stop}; resume with: {again}") from stop
            typer.echo(f"time limit of {duration} reached: {stop}; resume with: {again}", err=True)
        except RoundStopped as stop:
            raise RoundStopped(f"{stop}; then resume with: {again}") from stop


def run_shown(
    file: RoundFile,
    where: Where,
    *,
    stopping: Callable[[], bool],
    restarts: int = 0,
    engine_named: EngineNamed = make_engine,
) -> None:
    """Start or resume a round, shown live on standard error. Raises what `run_round` does."""
    with ExitStack() as while_shown:

        def shown(file: RoundFile, gpus: Gpus) -> View:
            view = _live_view(file, gpus)
            while_shown.enter_context(spoken_by(view.message))
            return view

        run_here(
            file, where, open_view=shown, stopping=stopping, restarts=restarts, engine_named=engine_named
        )


def _live_view(file: RoundFile, gpus: Gpus) -> View:
    return open_view(
        console=error_output(),
        title=f"{file.spec.study}/{file.spec.round}",
        trials_total=file.spec.num_trials,
        max_train_steps=file.spec.max_train_steps,
        searched=tuple(searched(file.spec.space())),
        gpus=gpus,
    )


def parse_duration(text: str) -> float:
    """Return the seconds of `90s`, `30m`, `2h` or `1h30m`. Raises InputError."""
    parts = re.findall(r"(\d+(?:\.\d+)?)([smhd])", text)
    seconds = sum(float(number) * _UNITS[unit] for number, unit in parts)
    if not seconds or "".join(number + unit for number, unit in parts) != text.replace(" ", ""):
        raise InputError(f"--for {text!r}: expects a time such as 90s, 30m, 2h or 1h30m")
    return seconds


def parse_command(option: str, text: str | None) -> tuple[str, ...]:
    """Split a command line into a program and its arguments, as a shell does. Raises InputError."""
    if text is None:
        return ()
    try:
        command = tuple(shlex.split(text))
    except ValueError as error:
        raise InputError(f"{option} {text!r}: cannot be read: {error}") from None
    if not command or not command[0]:
        raise InputError(f"{option} {text!r}: expects a program and its arguments, such as 'python tell.py'")
    return command


def parse_count(option: str, text: str) -> int | Literal["auto"]:
    """Parse a whole number of at least 1, or `auto`. Raises InputError."""
    if text == "auto":
        return "auto"
    if not text.isdecimal() or int(text) < 1:
        raise InputError(f"{option} {text!r}: expects auto or a whole number of at least 1")
    return int(text)


@dataclass(frozen=True)
class Ended:
    """Outcome of a sequence of rounds."""

    command: str
    """The command that resumes."""
    last: Path | None = None
    """File of the latest round that has started; None if none has."""
    reason: str | None = None
    """Why there is no further round; None if time ran out first."""
    taught_nothing: bool = False
    """Whether the last round suggests no horizon."""
    remark: str | None = None
    """Note on `data.test`, besides its score."""


def run_rounds(path: Path, *, duration: str | None, restarts: int = 0, where: Where) -> Ended:
    """Run the latest round descended from a file, promote it and run the next, until no more is needed.

    With restarts, the search then begins again at the first horizon. Raises Interrupted, naming the
    command to resume with, after a signal, and InputError for a round of a sweep.
    """
    refuse_sweep(load_round(path))
    again = "" if restarts == 0 else f" --restarts {restarts}"
    ended = Ended(f"tuner study auto {shlex.quote(str(path))}{_limit(duration)}{again}{where.options}")
    rounds: Automatic | None = None
    enough: Enough | None = None
    with interruptible(ended.command, duration=duration) as stopping, keeping_workers() as engine_named:
        rounds = Automatic(
            first=where.file(path),
            run=lambda file: run_shown(
                file, where, stopping=stopping, restarts=restarts, engine_named=engine_named
            ),
            promoted=_say,
            stopping=stopping,
            restarts=restarts,
            has_deadline=duration is not None,
            say=_tell,
        )
        enough = rounds.run_until_enough()
        ended = replace(ended, reason=enough.reason, taught_nothing=enough.taught_nothing)
    if rounds is None or rounds.last is None:
        return ended
    remark = None if enough is None else rounds.score_the_best(enough, prepared, _tell)
    return replace(ended, last=rounds.last.path, remark=remark)


def _say(document: Mapping[str, Any]) -> None:
    typer.echo(promotion_text(document))


def _tell(text: str) -> None:
    typer.echo(text, err=True)


def sweep_file(
    path: Path, *, duration: str | None, where: Where, epochs: float | None = None
) -> tuple[str, Path | None]:
    """Start or resume a sweep and write its result into the round file.

    Returns the next command and the round file it runs; the command is to be typed in that file's folder.
    Returns None if time ran out first. Raises Interrupted, naming the command to resume with, after a signal,
    and what `sweep_round` raises.
    """
    length = "" if epochs is None else f" --epochs {epochs:g}"
    command = f"tuner study sweep {shlex.quote(str(path))}{length}{_limit(duration)}{where.options}"
    refuse_epochs(epochs, is_dry_run=(where.engine or load_round(path).spec.run.engine) == "simulated")
    answered: Path | None = None
    with interruptible(command, duration=duration) as stopping, keeping_workers() as engine_named:
        file = where.file(path)
        sweep_round(
            file,
            epochs=epochs,
            run=lambda found: run_shown(found, where, stopping=stopping, engine_named=engine_named),
            prepare=prepared,
            tell=typer.echo,
            say=_tell,
            stopping=stopping,
        )
        answered = file.path
    return (f"tuner study run {shlex.quote(path.name)}" if answered else command), answered
