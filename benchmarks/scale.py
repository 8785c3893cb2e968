"""What a study of many trials costs: going on with a round, an event, and looking at it.

    python benchmarks/scale.py --trials 100,1000,10000

CPU seconds of one thread, after the imports, in SQLite: a round of N complete trials with 10 evaluations of
32 examples each, written as facts. `asks` is what a process that goes on with the round does until its first
new trial has its hyperparameters, Optuna's own storage calls apart; `event` is one evaluation of a running
trial in `RoundLoop`, from the worker's message to the view's board, likewise. The others are what commands
do, the printing of tables included.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

EVALUATIONS, EXAMPLES, TOKENS = 10, 32, 16
HORIZON, EVERY = 90, 10
EVENTS = 200
MEASURED = {
    "asks": ", s",
    "event": ", ms",
    "status": ", s",
    "status, complete": ", s",
    "trial list": ", s",
    "trial list --json": ", s",
    "report": ", s",
}


def write_study(directory: Path, count: int) -> Path:
    """A round of so many complete trials, and a file that promises a hundred more."""
    from tests.studies import write_round
    from tuner.config import load_round
    from tuner.records import (
        AttemptStarted,
        Ended,
        Evaluated,
        Evaluation,
        RoundBegun,
        RoundRecord,
        Trial,
        TrialAsked,
        TrialEnded,
        TrialState,
        complete_hyperparameters,
    )  # fmt: skip
    from tuner.store import open_store

    path = write_round(
        directory, trials=count + 100, steps=HORIZON, every=EVERY, decay_steps=36, lora_r="[2, 4]"
    )
    file, draw = load_round(path), random.Random(0)
    spec = file.spec
    store = open_store(spec.absolute(file.directory).storage, study=spec.study)
    store.record(
        RoundBegun(RoundRecord("round1", HORIZON, spec.model_dump(mode="json"), 1.0, 100, 8, workload="w"))
    )
    for number in range(count):
        rate = 10 ** draw.uniform(-4, -1)
        values = complete_hyperparameters(
            spec.space(), {"learning_rate": rate, "lora_r": draw.choice([2, 4])}
        )
        name = ("round1", number)
        facts = [TrialAsked(Trial(*name, values)), AttemptStarted(*name, 1, 0, float(number))]
        for step in range(0, HORIZON + 1, EVERY):
            loss = 3.0 - (1.0 - (1.0 + step / 20) ** -0.5) * (1.0 + 0.1 * draw.random())
            nll = tuple(loss * TOKENS + draw.gauss(0.0, 0.5) for _ in range(EXAMPLES))
            made = Evaluation(
                step,
                sum(nll) / (TOKENS * EXAMPLES),
                loss if step else None,
                1e-3,
                0,
                nll,
                (TOKENS,) * EXAMPLES,
            )
            facts.append(Evaluated(*name, 1, made))
        end = float(number + 1)
        store.record(
            *facts,
            Ended(*name, 1, HORIZON, "complete", at=end),
            TrialEnded(*name, TrialState.COMPLETE, None, end),
        )
    store.close()
    return path


def measure(what: str, path: Path) -> tuple[float, float]:
    """CPU seconds and peak memory in MB of one thing, in this process."""
    from tuner.cli import COLLECT_AFTER
    from tuner.study.folder import open_folder

    folder = open_folder(path.parent)
    gc.set_threshold(COLLECT_AFTER)  # as `tuner.cli.run` does
    match what:
        case "asks":
            begun = time.process_time()
            _, state, round_study = _resumed(path)
            round_study.sampler.point(len(state.trials), state.trials)
        case "event":
            from tuner.records import AttemptStarted, Evaluated, Evaluation, Trial, TrialAsked

            loop, state, round_study = _resumed(path)
            first, values = len(state.trials), state.trials[-1].hyperparameters
            running = range(first, first + EVENTS // EVALUATIONS)
            for number in running:
                trial = Trial("round1", number, values)
                state.record(TrialAsked(trial), AttemptStarted("round1", number, 1, 0, 1.0))
            loop.view.trials(state.changed())
            nll, tokens = (48.0,) * EXAMPLES, (TOKENS,) * EXAMPLES
            begun = time.process_time()
            for step in range(0, EVERY * EVALUATIONS, EVERY):
                made = Evaluation(step, 3.0, example_nll=nll, example_tokens=tokens)
                for number in running:  # as in `RoundLoop.run`
                    assert not loop._is_over()
                    loop._record(Evaluated("round1", number, 1, made))
                    loop.view.trials(state.changed())
            return (time.process_time() - begun) / EVENTS, _peak()
        case "status" | "status, complete":
            from tuner.report import status_table
            from tuner.study.lookup import opened, statuses

            begun = time.process_time()
            with opened(folder) as store:
                _print(status_table(folder.name, statuses(folder, store)))
        case "trial list":
            from tuner.report import trials_table
            from tuner.study.lookup import opened, trials_of

            begun = time.process_time()
            with opened(folder) as store:
                _print(trials_table(trials_of(folder, store, "round1")))
        case "trial list --json":
            from contextlib import redirect_stdout
            from io import StringIO

            from tuner.cli.output import print_trials

            begun = time.process_time()
            with redirect_stdout(StringIO()):
                print_trials(folder, round_name=None, as_json=True)
        case "report":
            from tuner.report import round_markdown
            from tuner.study.lookup import reports_on

            begun = time.process_time()
            *_, report = reports_on(folder, None)
            round_markdown(report)
    return time.process_time() - begun, _peak()


def _print(table: Any) -> None:
    """Print as a command does into a pipe."""
    import io

    from rich.console import Console

    Console(file=io.StringIO(), width=1000, markup=False, emoji=False, highlight=False).print(table)


def _resumed(path: Path) -> tuple[Any, Any, Any]:
    """What a process that goes on with the round has: its loop, its state and Optuna, told nothing."""
    from tuner.config import load_round
    from tuner.engines import SimulatedWorker
    from tuner.report.board import Board
    from tuner.store import CachedStore, open_store
    from tuner.study.continuation import Continuations
    from tuner.study.loop import RoundLoop
    from tuner.study.plan import CheckpointFolder, RoundPlan
    from tuner.study.sampling import RoundStudy, optuna_storage

    class Shown:
        """The live view's board, which nobody prints."""

        def __init__(self, total: int) -> None:
            self.board = Board(trials_total=total, max_train_steps=HORIZON)

        def trials(self, trials: Any) -> None:
            self.board.sync(trials)

        def event(self, event: Any) -> None:
            self.board.take(event, now=1.0)

    class Silent(RoundStudy):
        """Optuna's own calls apart."""

        def report(self, *arguments: Any) -> None:
            pass

    file = load_round(path)
    plan = RoundPlan(file)
    store = CachedStore(open_store(plan.absolute.storage, study=file.spec.study))
    round_study = Silent(
        optuna_storage(f"sqlite:///{path.parent}/optuna.db"), "scale", plan.space, file.spec.search,
        max_train_steps=HORIZON,
    )  # fmt: skip
    loop = RoundLoop(
        plan=plan,
        store=store,
        round_study=round_study,
        worker=SimulatedWorker(lambda *_: None, slots=1),  # type: ignore[arg-type,return-value]
        folder=CheckpointFolder(plan.checkpoints),
        continuations=Continuations(plan, store, "w"),
        view=Shown(file.spec.search.trials),  # type: ignore[arg-type]
        clock=time.time,
    )
    return loop, loop.state, round_study


def _all_ended(path: Path, count: int) -> Path:
    """Return the file of a copy of the study whose round promises no more trials than have ended."""
    copy = Path(shutil.copytree(path.parent, path.parent / "ended")) / path.name
    copy.write_text(path.read_text().replace(f"trials: {count + 100}\n", f"trials: {count}\n"))
    return copy


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", default="100,1000,10000", help="how many, separated by commas")
    parser.add_argument("--one", nargs=2, metavar=("WHAT", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(*measure(options.one[0], Path(options.one[1])))
        return
    print(f"load before: {os.getloadavg()[0]:.1f}\n")
    print(f"| trials | {' | '.join(what + unit for what, unit in MEASURED.items())} | peak memory, MB |")
    print(f"| {' | '.join(['---:'] * (len(MEASURED) + 2))} |")
    for count in (int(number) for number in options.trials.split(",")):
        with tempfile.TemporaryDirectory() as scratch:
            path = write_study(Path(scratch), count)
            cells, peak = [], 0.0
            ended = _all_ended(path, count)
            for what in MEASURED:
                command = [
                    sys.executable,
                    __file__,
                    "--one",
                    what,
                    str(ended if "complete" in what else path),
                ]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                seconds, memory = map(float, done.stdout.split())
                cells.append(f"{1000 * seconds:.2f}" if what == "event" else f"{seconds:.2f}")
                peak = max(peak, memory)
            print(f"| {count:,} | {' | '.join(cells)} | {peak:.0f} |", flush=True)
    print(f"\nload after: {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
