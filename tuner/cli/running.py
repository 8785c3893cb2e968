"""What verbs that run rounds add to running them: the live view, signals, and a time that ends."""

from __future__ import annotations

import re
import shlex
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Literal

import typer

from tuner.api.running import Gpus, Where, has_begun, run_here
from tuner.cli.printing import error_output, next_command, say, spoken_by
from tuner.errors import InputError, Interrupted, RoundStopped
from tuner.records import searched
from tuner.report import View, open_view
from tuner.spec import RoundFile

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def where_typed(slots: str | None, workers: str | None, engine: str | None) -> Where:
    """Where rounds are run, as typed. Raises InputError."""
    return Where(
        None if slots is None else parse_count("--slots", slots),
        parse_count("--workers", workers or "auto"),
        engine,
    )


def run_file(path: Path, *, duration: str | None, where: Where) -> Path | None:
    """Run or go on with a round, showing it live on standard error; returns the file there is to report on.

    With the engine `simulated` that is the rehearsal's copy. It is None when the time was over before base
    and data were loaded for the first time. Raises Interrupted, naming the command that goes on, when a
    signal asked to stop.
    """
    command = f"tuner study run {shlex.quote(str(path))}{where.options}"
    with interruptible(command, duration=duration) as stopping:
        file = where.file(path)
        run_shown(file, where, stopping=stopping)
    return file.path if has_begun(file) else None


@contextmanager
def interruptible(command: str, *, duration: str | None) -> Iterator[Callable[[], bool]]:
    """Gives a function that says whether to stop: a signal came, or the time is over.

    What stops on the way names the command that goes on, as it has to be typed here. The end of the time is
    no failure: it is said, and the block is left.
    """
    again = next_command(command)
    deadline = None if duration is None else time.monotonic() + parse_duration(duration)
    with stop_signals("stopping: saving every trial (once more ends at once)") as was_signalled:
        try:
            yield lambda: was_signalled() or (deadline is not None and time.monotonic() > deadline)
        except Interrupted as stop:
            if was_signalled():
                raise Interrupted(f"{stop}; go on with: {again}") from stop
            typer.echo(f"{duration} are over: {stop}; go on with: {again}", err=True)
        except RoundStopped as stop:
            raise RoundStopped(f"{stop}; then go on with: {again}") from stop


def run_shown(file: RoundFile, where: Where, *, stopping: Callable[[], bool], passes: int = 1) -> None:
    """Run or go on with a round, showing it live on standard error. Raises what `run_round` does."""
    with ExitStack() as while_shown:

        def shown(file: RoundFile, gpus: Gpus | None) -> View:
            view = _live_view(file, gpus)
            while_shown.enter_context(spoken_by(view.message))
            return view

        run_here(file, where, open_view=shown, stopping=stopping, passes=passes)


def _live_view(file: RoundFile, gpus: Gpus | None) -> View:
    return open_view(
        console=error_output(),
        title=f"{file.spec.study}/{file.spec.round}",
        trials_total=file.spec.num_trials,
        max_train_steps=file.spec.max_train_steps,
        searched=tuple(searched(file.spec.space())),
        gpus=gpus,
    )


def parse_duration(text: str) -> float:
    """Seconds of `90s`, `30m`, `2h` or `1h30m`. Raises InputError."""
    parts = re.findall(r"(\d+(?:\.\d+)?)([smhd])", text)
    seconds = sum(float(number) * _UNITS[unit] for number, unit in parts)
    if not seconds or "".join(number + unit for number, unit in parts) != text.replace(" ", ""):
        raise InputError(f"--for {text!r}: expects a time such as 90s, 30m, 2h or 1h30m")
    return seconds


def parse_count(option: str, text: str) -> int | Literal["auto"]:
    """A whole number of at least 1, or auto. Raises InputError."""
    if text == "auto":
        return "auto"
    if not text.isdecimal() or int(text) < 1:
        raise InputError(f"{option} {text!r}: expects auto or a whole number of at least 1")
    return int(text)


@contextmanager
def stop_signals(answer: str) -> Iterator[Callable[[], bool]]:
    """Ctrl-C and SIGTERM ask to stop, and are answered; a second one ends the process at once."""
    received: list[int] = []

    def receive(number: int, _: FrameType | None) -> None:
        received.append(number)
        signal.signal(number, signal.SIG_DFL)
        # In a thread: what was interrupted may hold the lock of the very stream that this is written to.
        threading.Thread(target=say, args=(answer,), daemon=True).start()

    before = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
