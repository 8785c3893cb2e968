"""What `study status`, `study report`, `trial list` and `trial show` print."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import typer

from tuner.cli.printing import output
from tuner.errors import InputError
from tuner.records import Trial, TrialState
from tuner.report import (
    RoundReport,
    dumps,
    round_markdown,
    status_document,
    status_table,
    trial_document,
    trial_page,
    trials_table,
    write_html,
)
from tuner.report.terminal import FittedTable
from tuner.study.dashboard import round_report
from tuner.study.final_score import scores_of
from tuner.study.folder import StudyFolder
from tuner.study.lookup import begun_round, find_trial, opened, statuses, trials_of


def print_status(folder: StudyFolder, *, as_json: bool) -> str:
    """Print where every round stands; returns the command that comes next."""
    with opened(folder) as store:
        found = statuses(folder, store)
        if as_json:
            typer.echo(dumps(status_document(folder.name, found)))
        else:
            output().print(status_table(folder.name, found))
        unfinished = next((s for s in found if s.state != "complete"), None)
        if unfinished is not None:
            return _going_on(folder, unfinished.round)
        return round_report(folder, store, folder.latest(store)).next_command


def _going_on(folder: StudyFolder, round_name: str) -> str:
    """The command that goes on with a round; one of a sweep is gone on with by sweeping its first file."""
    swept = (file for file in folder.files if not file.spec.is_sweep)
    of_sweep = (file := folder.file(round_name)) is not None and file.spec.is_sweep
    if of_sweep and (file := next(swept, None)) is not None:
        return f"tuner study sweep {file.path.name}"
    return f"tuner study run {_file_name(folder, round_name)}"


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
    with opened(folder) as store:
        names = [record.name for record in store.rounds()]
        if round_name is not None:
            begun_round(store, round_name, asked=f"--round {round_name}")
        shown = [name for name in names if round_name in (None, name)]
        trials = [trial for name in shown for trial in trials_of(folder, store, name)]
        scored = scores_of(store)
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
        from tuner.cli.score import scored as with_score

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
    with opened(folder) as store:
        return scores_of(store)


def _file_name(folder: StudyFolder, round_name: str) -> str:
    file = folder.file(round_name)
    return file.path.name if file else f"{round_name}.yaml"
