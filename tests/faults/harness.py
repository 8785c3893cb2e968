"""A round under a seeded fault, then run to its end, and what has to hold then."""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import optuna
import psutil
from sqlalchemy import create_engine, make_url, text

from tests.commands.driving import document, written
from tests.faults.warm import WarmRun, WarmRuns, Wish
from tests.studies import write_round
from tuner.commands import process_tree
from tuner.records import CheckpointKind, Trial, TrialState
from tuner.store import Store, is_held, open_store
from tuner.study.sampling import optuna_storage
from tuner.whole import digest

SECONDS = 240
"""At most, for one run of a round on a machine that does other work."""
TRIALS, STEPS = 2, 10
RUN = ("study", "run", "round1.yaml")


@dataclass(frozen=True, slots=True)
class Setting:
    """A round that takes seconds, and where its facts and its workers are."""

    name: str
    write: Callable[[Path, str], object]
    """Writes its file; the second argument is its database's URL."""
    study: str = "tiny"
    url: str | None = None
    """None: a file in its folder."""
    is_remote: bool = False


def _packed(directory: Path, url: str, **changes: Any) -> None:
    values: dict[str, Any] = {"trials": TRIALS, "steps": STEPS, "every": 2, "decay_steps": 3, "storage": url}
    write_round(directory, **values | changes)


def _command(directory: Path, url: str) -> None:
    values = {"learning_rate": [0.003, 0.05], "schedule": "linear", "decay_steps": 3, "pause": 0.02}
    search = {"trials": TRIALS, "sampler": "grid"}
    written(
        directory,
        document(
            hyperparameters=values,
            search=search,
            storage=url,
            max_train_steps=STEPS,
            evaluation={"every_steps": 2},
        ),
    )


def execute(url: str, statement: str, **values: Any) -> None:
    """Execute a statement of SQL on a connection of its own."""
    engine = create_engine(url)
    with engine.begin() as connection:
        connection.execute(text(statement), values)
    engine.dispose()


LOCAL = Setting("local", _packed)
COMMAND = Setting("command", _command, study="commands")


def on_a_server(url: str) -> Setting:
    """The facts are in a PostgreSQL database, which keeps its promise when the server crashes."""
    setting = Setting("postgres", _packed, url=url)
    execute(url, f"ALTER DATABASE {make_url(url).database} SET synchronous_commit = on")
    return setting


def on_ray(address: str) -> Setting:
    """The workers are on a cluster."""
    run = f"run: {{engine: ray, slots: 1, ray_address: '{address}'}}"
    return Setting("ray", partial(_packed, run=run), is_remote=True)


@dataclass
class Case:
    """One round in a folder, the run of it that is under way, and the dice."""

    runs: WarmRuns
    setting: Setting
    directory: Path
    dice: random.Random
    seams: Counter[str] = field(default_factory=Counter)
    """How many of each an undisturbed run has, by "PROCESS SEAM"."""
    run: WarmRun | None = None
    damaged: set[Path] = field(default_factory=set)
    """Checkpoints that a fault has damaged: nobody restores those that nobody needs."""

    def __post_init__(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        self.setting.write(self.directory, self.url)

    @property
    def url(self) -> str:
        return self.setting.url or f"sqlite:///{self.directory}/tuner.db"

    @property
    def rounds_folder(self) -> Path:
        return self.directory / "runs" / "round1"

    @property
    def process(self) -> WarmRun:
        """The run under way, or the last one."""
        assert self.run is not None
        return self.run

    def start(self, wish: Wish | None = None) -> None:
        """Start a run of the round."""
        self.run = self.runs.start(self.directory, *RUN, wish=wish)

    def end(self, *codes: int) -> None:
        """Wait until the run ends, with one of these exit codes."""
        code = self.process.wait(SECONDS)
        assert code in (codes or (0,)), f"exit code {code}\n{self.said[-3000:]}"

    def finish(self) -> None:
        """Run the round to its end."""
        self.start()
        self.end()

    @property
    def said(self) -> str:
        """All that the runs printed."""
        log = self.directory / "said.log"
        return log.read_text(errors="replace") if log.exists() else ""

    def wait_for(self, words: str) -> None:
        """Wait until a run has said something, or has ended."""
        until = time.monotonic() + SECONDS
        while words not in self.said and self.process.poll() is None and time.monotonic() < until:
            time.sleep(0.02)

    @property
    def workers(self) -> list[psutil.Process]:
        """Worker processes of this run, without what watches over them and what they start."""
        if self.setting.is_remote:  # in the cluster that this process has started
            return [each for each in psutil.Process().children(recursive=True) if _trains(each)]
        try:
            found = psutil.Process(self.process.pid).children()
        except psutil.NoSuchProcess:
            return []
        return [each for each in found if _leads_a_session(each)]

    @contextmanager
    def opened(self) -> Iterator[Store]:
        """The facts."""
        with closing(open_store(self.url, study=self.setting.study)) as store:
            yield store

    @property
    def trials(self) -> list[Trial]:
        with self.opened() as store:
            return list(store.trials("round1"))

    @property
    def rows(self) -> optuna.storages.RDBStorage:
        """Optuna's."""
        return optuna_storage(self.url)

    @property
    def optuna_study(self) -> int:
        found: int = self.rows.get_study_id_from_name(f"{self.setting.study}/round1")
        return found

    def execute(self, statement: str, **values: Any) -> None:
        """Change rows behind everyone's back."""
        execute(self.url, statement, **values)

    def clean(self) -> None:
        """Leave no process behind, whatever happened."""
        if self.run is not None and self.run.poll() is None:
            left = [*self.workers, self.run]
            for each in left:
                each.kill()
            self.run.wait(SECONDS)

    # --- what has to hold ----------------------------------------------------------------------------

    @property
    def curves(self) -> list[str]:
        """Trials and curves as text, in which NaN equals NaN."""
        return [
            repr((t.number, t.state, _without_pause(t.hyperparameters), t.evaluations)) for t in self.trials
        ]

    def refuse_half_made(self) -> None:
        """Every `best` leads to a folder that is as one of the trial's checkpoints was recorded."""
        if not self.rounds_folder.exists() or (self.setting.url is None and not self._has_facts):
            return
        for trial in self.trials:
            link = self.rounds_folder / f"trial-{trial.number:04d}" / "best"
            if link.is_symlink() and link.resolve() not in self.damaged:
                recorded = {c.sha256 for c in trial.checkpoints if c.kind == CheckpointKind.BEST}
                assert digest(link) in recorded, f"{link} -> {link.resolve()}"

    @property
    def _has_facts(self) -> bool:
        file = self.directory / "tuner.db"
        return file.exists() and file.stat().st_size > 0

    def refuse_leftovers(self) -> None:
        """No process, no temporary file, no lock; each trial complete once, its checkpoints as recorded."""
        names = [path.name for path in self.directory.rglob("*")]
        half = [name for name in names if name.endswith((".tmp", ".pid")) or name.startswith("unfinished-")]
        assert half == []
        assert not is_held(self.directory, self.url, self.setting.study)
        assert _processes_in(self.directory) == []
        assert "Traceback" not in self.said, self.said
        for trial in self.trials:
            assert trial.state == TrialState.COMPLETE
            assert [e.step for e in trial.evaluations] == sorted({e.step for e in trial.evaluations})
            assert trial.executed_steps >= STEPS
            assert all(attempt.ended_at is not None for attempt in trial.attempts)
            self._refuse_wrong_checkpoints(trial)
        told = self.rows.get_all_trials(self.optuna_study)
        assert sum(trial.state == optuna.trial.TrialState.COMPLETE for trial in told) == TRIALS

    def _refuse_wrong_checkpoints(self, trial: Trial) -> None:
        place = self.rounds_folder / f"trial-{trial.number:04d}"
        recorded = {self.rounds_folder / checkpoint.path for checkpoint in trial.checkpoints}
        found = {path for kind in ("best-steps", "last", "trunk") for path in (place / kind).glob("*")}
        assert found == recorded
        best = trial.checkpoint(CheckpointKind.BEST)
        assert best is not None
        assert (place / "best").resolve() == (self.rounds_folder / best.path).resolve()
        for checkpoint in trial.checkpoints:
            path = self.rounds_folder / checkpoint.path
            if checkpoint.kind == CheckpointKind.BEST or path not in self.damaged:
                assert digest(path) == checkpoint.sha256, path


def _without_pause(hyperparameters: Any) -> dict[str, Any]:
    return {name: value for name, value in hyperparameters.items() if name != "pause"}


def _trains(process: psutil.Process) -> bool:
    try:
        return "tuner.training" in process.cmdline()
    except psutil.Error:
        return False


def _leads_a_session(process: psutil.Process) -> bool:
    pid: int = process.pid
    try:
        return os.getsid(pid) == pid
    except ProcessLookupError:
        return False


def _processes_in(directory: Path) -> list[int]:
    """Processes that work in a folder, or run a command of one of its attempts, after a moment to end."""
    tokens = [path.read_text() for path in directory.rglob("token")]
    until = time.monotonic() + 30
    while True:
        found = [
            each.pid for each in psutil.process_iter() if each.pid != os.getpid() and _is_in(each, directory)
        ]
        found += [each.pid for token in tokens for each in process_tree.with_token(token)]
        if not found or time.monotonic() > until:
            return found
        time.sleep(0.1)


def _is_in(process: psutil.Process, directory: Path) -> bool:
    try:
        cwd: str = process.cwd()
        return process.status() != psutil.STATUS_ZOMBIE and cwd == str(directory)
    except (psutil.Error, OSError):
        return False


def undisturbed(runs: WarmRuns, setting: Setting, directory: Path) -> tuple[list[str], Counter[str]]:
    """Run the round without a fault; return its curves, and how many seams of each kind it has."""
    case = Case(runs, setting, directory, random.Random(0))
    tally = directory.with_name(f"{directory.name}-seams")
    case.start(Wish(tally=str(tally)))
    case.end()
    case.refuse_leftovers()
    return case.curves, Counter(tally.read_text().splitlines())


def restore_best(case: Case) -> None:
    """Do what a user is told to where an adapter is damaged."""
    for trial in case.trials:
        case.run = case.runs.start(
            case.directory, "trial", "reproduce", f"round1/{trial.number}", "--restore"
        )
        case.end()
