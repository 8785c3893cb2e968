"""`python -m tuner.commands`: one worker process, which runs the command of one trial at a time."""

from __future__ import annotations

import fcntl
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tuner.commands import process_tree
from tuner.commands.attempt import Attempt, Round, Unusable, tokens_of
from tuner.commands.check import refuse_unusable, workload
from tuner.config import RoundSpec
from tuner.errors import InputError, TunerError, WorkerError
from tuner.installation import version
from tuner.pipes import CommandReader, event_writer
from tuner.process_log import about, begin_worker
from tuner.records import Died, Ended, Event, Ready, evaluation_from_json


def main() -> int:
    """Check the command, send `Ready`, and run trials until told to close."""
    say = event_writer()
    running: list[str] = []

    def end_with_parent() -> None:
        # The parent is gone, so nobody would read what the command reports.
        try:
            for token in running:
                process_tree.end(token, grace_seconds=0.0)
        finally:
            os._exit(1)

    commands = CommandReader(sys.stdin, on_parent_gone=end_with_parent)
    document = commands.read_document()
    begin_worker(document["spec"]["round"])
    lock_file = Path(document["lock"])
    with lock_file.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        commands.listen()
        try:
            process_tree.end_orphans(tokens_of(lock_file.parent))
            work = _round(document)
        except TunerError as error:
            say(Died(str(error), is_input_error=isinstance(error, InputError)))
            return 1
        fingerprint = workload(work.spec, work.directory, names=document.get("paths", {}))
        say(Ready(1, "command", base=work.base, workload=fingerprint))
        try:
            _serve(work, commands, say, running)
        except (Unusable, WorkerError) as error:
            say(Died(f"{error}", is_input_error=isinstance(error, Unusable)))
            return 1
    return 0


def _round(document: dict[str, Any]) -> Round:
    """Return the work that the parent's first line describes. Raises InputError if no trial can run."""
    spec = RoundSpec.model_validate(document["spec"])
    directory = Path(document["directory"])
    refuse_unusable(spec, directory)
    known = document.get("base")
    return Round(
        spec,
        directory,
        spec.recorded_objective,
        {"tuner": version(), "slots": "1", "tool": spec.command.tool if spec.command else "none"},
        base=evaluation_from_json(known) if known else None,
        has_reported=document["has_reported"],
        has_completed=document["has_completed"],
    )


def _serve(work: Round, commands: CommandReader, say: Callable[[Event], None], running: list[str]) -> None:
    """Run assignments one after another. Raises Unusable."""
    guard = process_tree.Guard()

    def started(token: str) -> None:
        running.append(token)
        guard.watch(token)

    while not commands.closed:
        for assignment in commands.assignments(wait=True):
            run = assignment.run
            if commands.closed or run in commands.unwanted:
                name = (assignment.round, assignment.trial, assignment.attempt)
                say(Ended(*name, 0, "stopped", None, horizon=assignment.horizon))
                continue
            attempt = Attempt(work, assignment, say, on_start=started)
            with about(assignment.trial):
                attempt.run(lambda run=run: commands.closed or run in commands.unwanted)  # type: ignore[misc]
            running.clear()


if __name__ == "__main__":
    sys.exit(main())
