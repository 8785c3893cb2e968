"""`study sweep`: its rounds shown live, its answer printed."""

from __future__ import annotations

import shlex
from pathlib import Path

import typer

from tuner.api.running import Where
from tuner.api.sweeping import refuse_epochs, sweep_round
from tuner.cli.preparing import prepared
from tuner.cli.running import interruptible, run_shown
from tuner.spec import load_round


def sweep_file(
    path: Path, *, duration: str | None, where: Where, epochs: float | None = None
) -> tuple[str, Path | None]:
    """Sweep, or go on with it, and write what was found into the round file.

    Returns the command that comes next and the round file that it is to run, in whose folder it is to be
    typed; None when the time was over first. Raises Interrupted, naming the command that goes on, when a
    signal asked to stop, and what `sweep_round` does.
    """
    length = "" if epochs is None else f" --epochs {epochs:g}"
    limit = "" if duration is None else f" --for {shlex.quote(duration)}"
    command = f"tuner study sweep {shlex.quote(str(path))}{length}{limit}{where.options}"
    refuse_epochs(epochs, is_rehearsal=(where.engine or load_round(path).spec.run.engine) == "simulated")
    answered: Path | None = None
    with interruptible(command, duration=duration) as stopping:
        file = where.file(path)
        sweep_round(
            file,
            epochs=epochs,
            run=lambda found: run_shown(found, where, stopping=stopping),
            prepare=prepared,
            tell=typer.echo,
        )
        answered = file.path
    return (f"tuner study run {shlex.quote(path.name)}" if answered else command), answered
