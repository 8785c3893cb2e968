"""What `study run` is wired to: a worker process, the live view, signals and the clock."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import click
from rich.console import Console

from tuner.errors import InputError, Interrupted
from tuner.records import Evaluation, searched, to_json
from tuner.report import open_view
from tuner.spec import load_round
from tuner.study.plan import RoundPlan
from tuner.study.running import run_round
from tuner.workers import LocalWorker, Worker

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def run_file(path: Path, *, duration: str | None, slots: str | None) -> None:
    """Run or go on with a round, showing it live on standard error.

    Raises Interrupted, naming the command that goes on, when a signal asked to stop.
    """
    seconds = None if duration is None else parse_duration(duration)
    wanted_slots = None if slots is None else parse_slots(slots)
    file = load_round(path)
    console = Console(stderr=True)
    view = open_view(
        console=console,
        title=f"{file.spec.study}/{file.spec.round}",
        trials_total=file.spec.search.trials,
        max_train_steps=file.spec.max_train_steps,
        searched=tuple(searched(file.spec.space())),
    )

    def make_worker(plan: RoundPlan, base: Callable[[], Evaluation | None]) -> Worker:
        def document() -> dict[str, object]:
            known = base()
            return {
                "spec": plan.absolute.model_dump(mode="json"),
                "slots": wanted_slots or plan.spec.run.slots,
                "cache": str(plan.file.directory / ".tuner-cache"),
                "lock": str(plan.checkpoints / "worker.lock"),
                "base": None if known is None else to_json(known),
            }

        return LocalWorker(document, log=plan.checkpoints / "worker.log")

    deadline = None if seconds is None else time.monotonic() + seconds
    command = f"tuner study run {path}"
    with _stop_signals() as was_signalled:

        def stopping() -> bool:
            return was_signalled() or (deadline is not None and time.monotonic() > deadline)

        try:
            run_round(file, make_worker=make_worker, view=view, stopping=stopping)
        except Interrupted as stop:
            if not was_signalled():
                view.message(f"{duration} are over: {stop}; go on with: {command}")
                return
            raise Interrupted(f"{stop}; go on with: {command}") from stop
        finally:
            view.close()


def parse_duration(text: str) -> float:
    """Seconds of `90s`, `30m`, `2h` or `1h30m`. Raises InputError."""
    parts = re.findall(r"(\d+(?:\.\d+)?)([smhd])", text)
    if not parts or "".join(number + unit for number, unit in parts) != text.replace(" ", ""):
        raise InputError(f"--for {text!r}: expects a time such as 90s, 30m, 2h or 1h30m")
    return sum(float(number) * _UNITS[unit] for number, unit in parts)


def parse_slots(text: str) -> int | str:
    """A number of slots, or auto. Raises InputError."""
    if text == "auto":
        return text
    if not text.isdigit() or int(text) < 1:
        raise InputError(f"--slots {text!r}: expects auto or a whole number of at least 1")
    return int(text)


@contextmanager
def _stop_signals() -> Iterator[Callable[[], bool]]:
    """Ctrl-C and SIGTERM ask to stop; a second one ends the process at once."""
    received: list[int] = []

    def receive(number: int, _: FrameType | None) -> None:
        received.append(number)
        signal.signal(number, signal.SIG_DFL)
        click.echo("\nstopping: saving every trial (once more ends at once)", err=True)

    before = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
