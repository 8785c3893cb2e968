"""What `study status`, `study report`, `trial list` and `trial show` print."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import typer

from tuner.cli.printing import output
from tuner.errors import InputError
from tuner.playbook.selection import ranked
from tuner.playbook.sweep import is_sweep
from tuner.records import Trial, TrialState
from tuner.report import (
    RoundReport,
    dumps,
    round_markdown,
    round_status,
    status_document,
    status_table,
    trial_document,
    trial_page,
    trials_table,
    write_html,
)
from tuner.report.documents import RoundStatus
from tuner.report.fitted_table import FittedTable
from tuner.store import Store
from tuner.study.final_score import scores_of
from tuner.study.folder import StudyFolder, open_folder
from tuner.study.pages import lineage, round_report
from tuner.study.results import as_written_now, num_branches_left, num_promised


def print_status(folder: StudyFolder, *, as_json: bool) -> str:
    """Print where every round stands; returns the command that comes next."""
    store = folder.open()
    try:
        statuses = _statuses(folder, store)
        if as_json:
            typer.echo(dumps(status_document(folder.name, statuses)))
        else:
            output().print(status_table(folder.name, statuses))
        unfinished = next((s for s in statuses if s.state != "complete"), None)
        if unfinished is not None:
            return _going_on(folder, unfinished.round)
        return round_report(folder, store, folder.latest(store)).next_command
    finally:
        store.close()


def _going_on(folder: StudyFolder, round_name: str) -> str:
    """The command that goes on with a round; one of a sweep is gone on with by sweeping its first file."""
    swept = (file for file in folder.files if not is_sweep(file.spec.round))
    if is_sweep(round_name) and (file := next(swept, None)) is not None:
        return f"tuner study sweep {file.path.name}"
    return f"tuner study run {_file_name(folder, round_name)}"


def reports_on(directory: Path, round_path: Path | None) -> tuple[RoundReport, ...]:
    """The report on a round by name or file, else on the latest, after those on the rounds before it.

    Raises InputError when it has not begun.
    """
    folder = open_folder(directory)
    store = folder.open()
    try:
        if round_path is None:
            return lineage(folder, store, folder.latest(store))
        name = round_path.name.removesuffix(".yaml").removesuffix(".yml")
        by_file = next((f.spec.round for f in folder.files if f.path.name == round_path.name), name)
        record = next((record for record in store.rounds() if record.name == by_file), None)
        if record is None:
            begun = ", ".join(r.name for r in store.rounds()) or "none"
            raise InputError(f"{round_path}: no such round has begun; begun: {begun}")
        return lineage(folder, store, record)
    finally:
        store.close()


def write_reports(reports: Sequence[RoundReport], *, html: Path | None, markdown: Path | None) -> Path:
    """Write the page on the last, and its Markdown where it is wanted; returns the page's path."""
    *earlier, report = reports
    page = html or Path(f"report-{report.record.name}.html")
    try:
        write_html(page, report, earlier=earlier)
        if markdown is not None:
            markdown.write_text(round_markdown(report), encoding="utf-8")
    except OSError as error:
        raise InputError(f"{error.filename}: cannot be written: {error.strerror}") from error
    return page


def print_trials(folder: StudyFolder, *, round_name: str | None, as_json: bool) -> str:
    """Print the trials of all rounds, or of one; returns the command that comes next."""
    store = folder.open()
    try:
        names = [record.name for record in store.rounds()]
        if round_name is not None and round_name not in names:
            raise InputError(
                f"--round {round_name}: no such round has begun; begun: {', '.join(names) or 'none'}"
            )
        running = folder.is_running()
        trials = [
            _at_rest(trial, running)
            for name in names
            if round_name in (None, name)
            for trial in store.trials(name)
        ]
        scored = scores_of(store)
    finally:
        store.close()
    if as_json:
        documents = [trial_document(trial, adapter=folder.adapter(trial), scored=scored) for trial in trials]
        typer.echo(dumps(documents))
    else:
        _print_table(trials_table(trials))
    if any(trial.state == TrialState.COMPLETE for trial in trials):
        return "tuner trial show best"
    return "tuner study status" if names else f"tuner study run {folder.files[0].path.name}"


def _print_table(table: FittedTable) -> None:
    console = output()
    console.print(table)
    if left_out := table.left_out(console.width):
        typer.echo(f"too narrow for {', '.join(left_out)}: widen the window, or use --json", err=True)


def print_trial(folder: StudyFolder, name: str, *, test: bool, as_json: bool) -> str:
    """Print one trial, scored on `data.test` if that is wanted; returns the command that comes next."""
    trial, max_train_steps = find_trial(folder, name)
    if test:
        from tuner.cli.scoring import scored as with_score

        trial = with_score(folder, trial)
    adapter, scored = folder.adapter(trial), _scored(folder)
    if as_json:
        typer.echo(dumps(trial_document(trial, adapter=adapter, scored=scored)))
    else:
        output().print(trial_page(trial, max_train_steps=max_train_steps, adapter=adapter, scored=scored))
    if adapter is None:
        return "tuner trial list"
    return f'tuner trial generate {trial.round}/{trial.number} --prompt "..."'


def _scored(folder: StudyFolder) -> tuple[Trial, ...]:
    store = folder.open()
    try:
        return scores_of(store)
    finally:
        store.close()


def find_trial(folder: StudyFolder, name: str) -> tuple[Trial, int]:
    """The trial that `round1/7`, `7` or `best` means, and its round's horizon. Raises InputError."""
    store = folder.open()
    try:
        record = folder.latest(store)
        if name == "best":
            return _best_trial(folder, store)
        round_name, _, number = name.rpartition("/")
        if round_name:
            found = next((r for r in store.rounds() if r.name == round_name), None)
            if found is None:
                begun = ", ".join(r.name for r in store.rounds())
                raise InputError(f"{name}: no round {round_name!r} has begun; begun: {begun}")
            record = found
        trials = store.trials(record.name)
        if not number.isdecimal() or int(number) >= len(trials):
            known = f"trials 0 to {len(trials) - 1}" if trials else "no trials yet"
            raise InputError(f"{name}: expects ROUND/NUMBER, NUMBER or best; {record.name} has {known}")
        return _at_rest(trials[int(number)], folder.is_running()), record.max_train_steps
    finally:
        store.close()


def _best_trial(folder: StudyFolder, store: Store) -> tuple[Trial, int]:
    """The best complete trial of the latest round that has one, sweeps aside."""
    for record in (record for record in reversed(store.rounds()) if not is_sweep(record.name)):
        order = ranked(store.trials(record.name))
        if order:
            return order[0][0], record.max_train_steps
    raise InputError(f"best: no trial of {folder.name} is complete yet; see: tuner study status")


def _statuses(folder: StudyFolder, store: Store) -> list[RoundStatus]:
    records = {record.name: record for record in store.rounds()}
    order = [*records, *(f.spec.round for f in folder.files if f.spec.round not in records)]
    is_running = folder.is_running()
    newest = next(reversed(records), None)
    statuses = []
    for name in order:
        file, record = folder.file(name), records.get(name)
        trials = [_at_rest(trial, is_running) for trial in store.trials(name)]
        promised = file.spec.num_trials if file else num_promised(record) if record else 0
        horizon = record.max_train_steps if record else file.spec.max_train_steps if file else 0
        adapters = {trial.number: folder.adapter(trial) for trial in trials}
        statuses.append(
            round_status(
                name,
                max_train_steps=horizon,
                trials=trials,
                promised=promised,
                is_running=is_running
                and (name == newest or any(t.state == TrialState.RUNNING for t in trials)),
                adapters={number: path for number, path in adapters.items() if path is not None},
                throughput=record.throughput if record else None,
                branches_left=num_branches_left(store, as_written_now(record, file) if file else record)
                if record
                else 0,
                now=time.time(),
            )
        )
    return statuses


def _at_rest(trial: Trial, is_running: bool) -> Trial:
    """A trial recorded as running waits when no process runs the study: the last one was killed."""
    if trial.state == TrialState.RUNNING and not is_running:
        from dataclasses import replace

        return replace(trial, state=TrialState.WAITING)
    return trial


def _file_name(folder: StudyFolder, round_name: str) -> str:
    file = folder.file(round_name)
    return file.path.name if file else f"{round_name}.yaml"
