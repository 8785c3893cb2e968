"""Look things up in a study: trials by name, the status of each round, its reports."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tuner.errors import InputError
from tuner.playbook.curves import may_rise_after_best
from tuner.playbook.selection import ranked
from tuner.records import LOSS, Objective, RoundRecord, Trial, TrialState
from tuner.report import RoundReport, round_status
from tuner.report.documents import RoundStatus
from tuner.store import Store
from tuner.study.dashboard import lineage
from tuner.study.folder import StudyFolder, opened
from tuner.study.results import as_written_now, num_branches_left, num_promised, objective_of, recorded_rule


def begun_round(store: Store, name: str, *, asked: str | None = None) -> RoundRecord:
    """Return the record of a round. Raises InputError, which begins with `asked`, if it has not started."""
    found = store.round(name)
    if found is None:
        begun = ", ".join(record.name for record in store.rounds()) or "none"
        raise InputError(f"{asked or name}: no such round has started; started: {begun}")
    return found


def find_trial(folder: StudyFolder, name: str) -> tuple[Trial, int]:
    """Return the trial named `round1/7`, `7` or `best`, and its round's horizon. Raises InputError."""
    with opened(folder) as store:
        record = folder.latest(store)
        if name == "best":
            return _best_trial(folder, store)
        round_name, slash, number = name.rpartition("/")
        if slash:
            record = begun_round(store, round_name, asked=name)
        trials = store.trials(record.name)
        if not (number.isascii() and number.isdecimal()) or int(number) >= len(trials):
            known = f"trials 0 to {len(trials) - 1}" if trials else "no trials yet"
            raise InputError(f"{name}: expects ROUND/NUMBER, NUMBER or best; {record.name} has {known}")
        return at_rest(trials[int(number)], folder.is_running()), record.max_train_steps


def _best_trial(folder: StudyFolder, store: Store) -> tuple[Trial, int]:
    """Return the best complete trial of the latest round that has one, without sweeps."""
    for record in (record for record in reversed(store.rounds()) if not record.is_sweep):
        order = ranked(store.trials(record.name))
        if order:
            return order[0][0], record.max_train_steps
    raise InputError(f"best: no trial of {folder.name} is complete yet; see: tuner study status")


def trials_of(folder: StudyFolder, store: Store, round_name: str) -> tuple[Trial, ...]:
    """Return the trials of a round in their current state; none for one that has not started."""
    is_running = folder.is_running()
    return tuple(at_rest(trial, is_running) for trial in store.trials(round_name))


def objectives_of(store: Store) -> dict[str, Objective]:
    """Return the objective of each started round by name."""
    return {record.name: objective_of(record, store.trials(record.name)) for record in store.rounds()}


def at_rest(trial: Trial, is_running: bool) -> Trial:
    """Treat a trial recorded as running as waiting if no process runs the study: the last one was killed."""
    if trial.state == TrialState.RUNNING and not is_running:
        return replace(trial, state=TrialState.WAITING)
    return trial


def statuses(folder: StudyFolder, store: Store) -> list[RoundStatus]:
    """Return the status of each round: started ones in their order, then the other files."""
    records = {record.name: record for record in store.rounds()}
    order = [*records, *(f.spec.round for f in folder.files if f.spec.round not in records)]
    is_running = folder.is_running()
    newest = next(reversed(records), None)
    found = []
    for name in order:
        file, record = folder.file(name), records.get(name)
        promised = file.spec.num_trials if file else num_promised(record) if record else 0
        owing = as_written_now(record, file) if record and file else record
        # Which comparison runs are due is known once the trials have ended, from the losses of examples.
        may_owe = owing and recorded_rule(owing) is not False and store.num_results(name) >= promised
        trials = [at_rest(trial, is_running) for trial in store.trials(name, examples=bool(may_owe))]
        horizon = record.max_train_steps if record else file.spec.max_train_steps if file else 0
        place = folder.checkpoints(name)
        adapters = {trial.number: place.adapter(trial) for trial in trials}
        found.append(
            round_status(
                name,
                max_train_steps=horizon,
                trials=trials,
                rising=trials if may_owe else _rising(store, name, trials),
                promised=promised,
                is_running=is_running
                and (name == newest or any(t.state == TrialState.RUNNING for t in trials)),
                adapters={number: str(path) for number, path in adapters.items() if path is not None},
                throughput=record.throughput if record else None,
                throughput_by_node=record.throughput_by_node if record else None,
                node_changes=record.node_changes if record else (),
                kept=record.kept if record else "adapter",
                branches_left=num_branches_left(store, owing) if owing and may_owe else 0,
                now=time.time(),
                objective=objective_of(record, trials)
                if record
                else file.spec.recorded_objective
                if file
                else LOSS,
            )
        )
    return found


def _rising(store: Store, round_name: str, trials: Sequence[Trial]) -> tuple[Trial, ...]:
    """Return the trials that may overfit, with the losses of single examples, which decide if they do."""
    numbers = {trial.number for trial in trials if may_rise_after_best(trial.evaluations)}
    return store.trials(round_name, numbers=numbers)


def reports_on(folder: StudyFolder, round_path: Path | None) -> tuple[RoundReport, ...]:
    """Return the report on a round by name or file, else on the latest, after those on earlier rounds.

    Raises InputError if it has not started.
    """
    with opened(folder) as store:
        if round_path is None:
            return lineage(folder, store, folder.latest(store))
        name = round_path.name.removesuffix(".yaml").removesuffix(".yml")
        by_file = next((f.spec.round for f in folder.files if f.path.name == round_path.name), name)
        return lineage(folder, store, begun_round(store, by_file, asked=str(round_path)))
