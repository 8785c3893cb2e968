"""`python -m tuner.training`: one worker process, which reads its parent's commands on standard input.

Standard output carries only events, one JSON document a line; whatever libraries print goes to standard
error, which the parent keeps as the worker's log.
"""

# ruff: noqa: E402  Collections are rare before the libraries are imported, which create a million objects.

from __future__ import annotations

import gc

gc.set_threshold(100_000)

import fcntl
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tuner.config import RoundSpec
from tuner.errors import InputError, TunerError
from tuner.methods.plug_ins import loaded
from tuner.pipes import RESTING, CommandReader, event_writer
from tuner.process_log import begin_worker
from tuner.records import Died, Event, Preparing, Ready, evaluation_from_json
from tuner.training.disk_room import DiskRoom, NoRoom
from tuner.training.environment import keep_freed_memory, let_go
from tuner.training.memory_budget import predict
from tuner.training.startup import load_worker_state, predict_packed
from tuner.training.worker import train
from tuner.training.worker_state import Kept, Pulse, WorkerState
from tuner.whole import keep_others_out

_AFTER_PARENT_SECONDS = 60.0
"""A parent that sees the same disk gives up first, and lets every trial be saved."""


def main() -> int:
    """Set up, send `Ready`, and train until told to close."""
    keep_others_out()
    os.environ.setdefault("TQDM_DISABLE", "1")
    say = event_writer()
    keep_freed_memory()
    commands = CommandReader(sys.stdin)

    def say_what_it_does(doing: str) -> None:
        if commands.closed:
            sys.exit()  # nothing has begun, so there is nothing to save
        say(Preparing(doing))

    document: dict[str, Any] | None = commands.read_document()
    kept: Kept | None = None
    is_first = True
    while document is not None:
        if "log" in document:
            _log_into(document["log"])
        begin_worker(document["spec"]["round"])
        with Path(document["lock"]).open("w") as lock:
            # A parent waits until no worker of an earlier one shares this lock: two never write one folder.
            fcntl.flock(lock, fcntl.LOCK_SH)
            if is_first:
                commands.listen()
            code, kept = _round(document, kept, commands, say, say_what_it_does)
        if not commands.rests:
            return code
        is_first = False
        say(Preparing(RESTING))
        let_go()  # while the parent decides on the next round
        document = commands.next_document()
    return 0


def _round(
    document: Mapping[str, Any],
    kept: Kept | None,
    commands: CommandReader,
    say: Callable[[Event], None],
    say_what_it_does: Callable[[str], None],
) -> tuple[int, Kept | None]:
    """Train a round until told to end it; return the exit code, and what another round may use."""
    try:
        spec, state, ready = _loaded(document, say_what_it_does, kept)
    except TunerError as error:
        say(Died(str(error), is_input_error=isinstance(error, InputError)))
        return 1, None
    say(ready)
    state.pulse = Pulse(say, loading_seconds=spec.run.loading_seconds)
    # Every pass of training, evaluation and generation goes through it once.
    hook = state.base.model.get_input_embeddings().register_forward_pre_hook(lambda *_: state.pulse.on_pass())
    state.room = DiskRoom(
        say,
        patience_seconds=spec.run.storage_seconds,
        grace_seconds=_AFTER_PARENT_SECONDS,
        beat=state.pulse.phase,
        is_closed=lambda: commands.closed,
    )
    try:
        train(state, commands, say)
    except NoRoom as error:
        say(Died(str(error), is_input_error=True))
        return 1, None
    except TunerError as error:
        # Another worker would generate the same answers and fail alike.
        say(Died(f"{error}. Every trial is saved. Fix the metric", is_input_error=True))
        return 1, None
    hook.remove()
    state.pack.close()
    return 0, state.kept


def _log_into(path: str) -> None:
    """Send standard error, and what libraries print, to the log of another round."""
    sys.stderr.flush()
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


def _loaded(
    document: Mapping[str, Any], say: Callable[[str], None], kept: Kept | None
) -> tuple[RoundSpec, WorkerState, Ready]:
    """Load what the parent's document asks for. Raises what `load_worker_state` does."""
    spec = RoundSpec.model_validate(document["spec"])
    loaded(spec.hyperparameters)
    known = document.get("base")
    state, ready = load_worker_state(
        spec,
        cache=Path(document["cache"]),
        slots=document["slots"],
        base_evaluation=evaluation_from_json(known) if known else None,
        say=say,
        names=document.get("paths", {}),
        kept=kept,
        known_data=document.get("data"),
    )
    if document.get("probe"):
        say("timing a few steps")
        predicted = predict(state, spec)
        if document["slots"] == "auto":
            predicted = predict_packed(state, spec, predicted)
        ready = replace(ready, predicted=predicted)
    return spec, state, ready


if __name__ == "__main__":
    code = main()
    gc.freeze()  # else Python collects all libraries once more as it ends
    sys.exit(code)
