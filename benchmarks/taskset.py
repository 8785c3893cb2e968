"""tuner's rounds against other tuners, replayed on recorded learning curves.

    python benchmarks/taskset.py DIR                         every method on every .npz file of DIR, 100 seeds
    python benchmarks/taskset.py DIR --methods tpe,asha --seeds 10 --raw raw.jsonl

A file holds `hyperparameters` [n, k], `names`, `valid_loss` and `train_loss` [n, evaluations], as TaskSet's
tables do: runs at a rate that does not depend on the horizon, so that a curve cut at a step is the whole
run to that step. Proposals of every method are snapped to the nearest configuration that its replay has
not used; seeds are paired; every step is charged, those of restarts included. A replay ends within 1% of
the best loss of the table, or after 600 full-length runs, which then is its cost. `asha` and `bohb` need
the extra: pip install '.[bench]' in the clone.

With --raw each replay is written down as it ends, and what is written there is not run again; with
--summarise nothing more is run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("OMP_NUM_THREADS", "1")

from replay import baselines, rounds
from replay.summary import Replay, markdown, svg
from replay.task import Ledger, ReplayOver, Task, UnreadableTask, read_task

METHODS: dict[str, baselines.Method] = {
    "tuner": rounds.tuner_passes,
    "tuner-promotions": rounds.tuner_promotions,
    "halving": baselines.successive_halving,
    "asha": baselines.syne_tune_asha,
    "bohb": baselines.syne_tune_bohb,
    "optuna-halving": baselines.optuna_halving,
    "optuna-hyperband": baselines.optuna_hyperband,
    "tpe": baselines.tpe_full_length,
    "quasi-random": baselines.quasi_random_full_length,
    "random": baselines.random_full_length,
    "two-rounds-from-scratch": baselines.two_rounds_from_scratch,
}
"""What is compared, tuner's first."""
REFERENCE = "tuner"
"""Whose costs are divided by those of the others, seed by seed."""

_tasks: dict[Path, Task] = {}


@dataclass(frozen=True)
class Job:
    """One replay to run."""

    path: Path
    method: str
    seed: int
    budget: int


def main() -> int:
    arguments = _arguments()
    try:
        tasks = [read_task(path) for path in sorted(arguments.directory.glob("*.npz"))]
    except UnreadableTask as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not tasks:
        print(f"error: {arguments.directory}: no .npz file there", file=sys.stderr)
        return 2
    begun = time.monotonic()
    replays = list(_replays(arguments))
    text = markdown(
        replays,
        tasks,
        methods=arguments.methods,
        describe={name: " ".join((METHODS[name].__doc__ or "").split()) for name in arguments.methods},
        reference=REFERENCE,
        command=_command(arguments),
        minutes=None if arguments.summarise else (time.monotonic() - begun) / 60,
        plot=arguments.out.with_suffix(".svg").name,
    )
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(text)
    arguments.out.with_suffix(".svg").write_text(svg(replays, tasks, methods=arguments.methods))
    print(text)
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("directory", metavar="DIR", type=Path, help="folder of .npz tables")
    parser.add_argument("--seeds", type=int, default=100, help="replays of a method on a task")
    parser.add_argument("--methods", type=_methods, default=list(METHODS), help=f"of {', '.join(METHODS)}")
    parser.add_argument("--budget", type=int, default=600, help="full-length runs at most")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--raw", type=Path, help="JSON lines of the replays, to go on with")
    parser.add_argument("--summarise", action="store_true", help="write the page of what --raw has")
    parser.add_argument(
        "--out", type=Path, default=Path("taskset.md"), help="the Markdown; the plot beside it"
    )
    return parser.parse_args()


def _methods(text: str) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: expects names of {', '.join(METHODS)}")
    return names


def _command(arguments: argparse.Namespace) -> str:
    chosen = "" if arguments.methods == list(METHODS) else f" --methods {','.join(arguments.methods)}"
    raw = " --raw RAW --summarise" if arguments.summarise else f" --seeds {arguments.seeds}"
    return f"python benchmarks/taskset.py DIR{raw}{chosen}"


def _replays(arguments: argparse.Namespace) -> Iterator[Replay]:
    """Those written down first, then the others as they end."""
    paths = sorted(arguments.directory.glob("*.npz"))
    # By seed: a run that is cut short has whole seeds.
    jobs = [
        Job(path, method, seed, arguments.budget)
        for seed in range(arguments.seeds)
        for method in arguments.methods
        for path in paths
    ]
    raw: Path | None = arguments.raw
    known = (
        [Replay(**json.loads(line)) for line in raw.read_text().splitlines()] if raw and raw.exists() else []
    )
    done = {(replay.task, replay.method, replay.seed) for replay in known}
    wanted = {(job.path.stem, job.method, job.seed) for job in jobs}
    if arguments.summarise:
        yield from known
        return
    yield from (replay for replay in known if (replay.task, replay.method, replay.seed) in wanted)
    left = [job for job in jobs if (job.path.stem, job.method, job.seed) not in done]
    with multiprocessing.get_context("spawn").Pool(arguments.jobs) as pool:
        for replay in pool.imap_unordered(replay_job, left):
            if raw is not None:
                with raw.open("a") as file:
                    file.write(json.dumps(replay._asdict()) + "\n")
            yield replay


def replay_job(job: Job) -> Replay:
    """Run one replay to its end."""
    if job.path not in _tasks:
        _tasks[job.path] = read_task(job.path)
    task = _tasks[job.path]
    ledger = Ledger(task, job.seed, budget=job.budget)
    with contextlib.suppress(ReplayOver):
        METHODS[job.method](ledger)
    return Replay(task.name, job.method, job.seed, job.budget, [(s, loss) for s, loss in ledger.trace])


if __name__ == "__main__":
    sys.exit(main())
