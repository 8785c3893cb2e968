"""Print the results of `trial list`, `show` and `reproduce`."""

from __future__ import annotations

import typer

from tuner.api.run import run_again
from tuner.api.score import scored as with_score
from tuner.cli.printing import PROSE, error_output, next_command, output, prepared, spoken_by
from tuner.cli.rounds import stop_signals
from tuner.errors import Interrupted
from tuner.playbook.reproduction import Agreement
from tuner.records import Trial, TrialState, searched
from tuner.report import dumps, open_view, trial_document, trial_page, trials_table
from tuner.report.reproduction import reproduction_document, reproduction_page
from tuner.report.terminal import FittedTable
from tuner.study.final_score import scores_of
from tuner.study.folder import StudyFolder, opened
from tuner.study.lookup import begun_round, find_trial, objectives_of, trials_of
from tuner.study.reproduction import planned_rerun


def print_trials(folder: StudyFolder, *, round_name: str | None, as_json: bool) -> str:
    """Print the trials of all rounds, or of one; return the next command."""
    with opened(folder) as store:
        names = [record.name for record in store.rounds()]
        if round_name is not None:
            begun_round(store, round_name, asked=f"--round {round_name}")
        shown = [name for name in names if round_name in (None, name)]
        trials = [trial for name in shown for trial in trials_of(folder, store, name)]
        scored = scores_of(store)
        objectives = objectives_of(store)
    if as_json:
        documents = [
            trial_document(
                trial, adapter=folder.adapter(trial), scored=scored, objective=objectives[trial.round]
            )
            for trial in trials
        ]
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
        typer.echo(
            f"terminal too narrow to show {', '.join(left_out)}: widen the window, or use --json", err=True
        )


def print_trial(folder: StudyFolder, name: str, *, test: bool, as_json: bool) -> str:
    """Print one trial, scored on `data.test` on request; return the next command."""
    trial, max_train_steps = find_trial(folder, name)
    if test:
        trial = with_score(folder, trial, prepare=prepared, tell=lambda text: typer.echo(text, err=True))
    adapter, scored = folder.adapter(trial), _scored(folder)
    if as_json:
        with opened(folder) as store:
            objective = objectives_of(store)[trial.round]
        typer.echo(dumps(trial_document(trial, adapter=adapter, scored=scored, objective=objective)))
    else:
        output().print(trial_page(trial, max_train_steps=max_train_steps, adapter=adapter, scored=scored))
    if adapter is None:
        return "tuner trial list"
    return f'tuner trial generate {trial.round}/{trial.number} --prompt "..."'


def _scored(folder: StudyFolder) -> tuple[Trial, ...]:
    with opened(folder) as store:
        return scores_of(store)


def reproduce_trial(folder: StudyFolder, name: str, *, to_step: int | None, as_json: bool) -> bool:
    """Run a trial again, shown live on standard error; print the comparison and return whether it agrees.

    Raises Interrupted, naming the command to start over with, after a signal.
    """
    trial, _ = find_trial(folder, name)
    rerun = planned_rerun(folder, trial, to_step=to_step)
    view = open_view(
        console=error_output(),
        title=f"{folder.name}/{trial.round}, trial {trial.number} again",
        trials_total=1,
        max_train_steps=rerun.record.max_train_steps,
        searched=tuple(searched(rerun.spec.space())),
    )
    limit = "" if to_step is None else f" --to-step {to_step}"
    try:
        with (
            spoken_by(view.message),
            stop_signals("stopping (Ctrl-C again to quit now)") as stopping,
        ):
            found = run_again(rerun, view=view, stopping=stopping)
    except Interrupted as stop:
        again = next_command(f"tuner trial reproduce {name}{limit}")
        raise Interrupted(f"{stop}; start over with: {again}") from stop
    if as_json:
        typer.echo(dumps(reproduction_document(folder.name, found)))
    else:
        output(piped_width=PROSE).print(reproduction_page(folder.name, found))
    return found.agreement != Agreement.DIFFERS
