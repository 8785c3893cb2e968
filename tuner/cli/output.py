"""What the verbs of studies and trials print."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tuner.api.check import check_document_of, checked
from tuner.api.generate import scored as with_score
from tuner.api.run import Where, restored_adapter, run_again
from tuner.api.study import standing
from tuner.cli.printing import PROSE, error_output, next_command, output, prepared, spoken_by, stop_signals
from tuner.data import PreparedData, ShownRow, printable, show_rows
from tuner.data.preview import WRITTEN
from tuner.errors import Interrupted
from tuner.playbook.reproduction import Agreement
from tuner.records import Trial, TrialState, searched
from tuner.report import (
    View,
    dumped,
    dumps,
    open_view,
    plan_table,
    status_document,
    status_table,
    trial_document,
    trial_page,
    trials_table,
)
from tuner.report.format import count
from tuner.report.reproduction import reproduction_document, reproduction_page
from tuner.report.round_report import SAID_BY_THE_EVIDENCE
from tuner.report.terminal import FittedTable
from tuner.study.folder import StudyFolder, opened
from tuner.study.lookup import begun_round, find_trial, objectives_of, trials_of
from tuner.study.reproduction import Rerun, planned_rerun
from tuner.study.results import scores_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tuner.api.doctor import Check


def print_status(folder: StudyFolder, *, as_json: bool) -> str:
    """Print the state of every round; return the next command."""
    found, command = standing(folder)
    if as_json:
        typer.echo(dumps(status_document(folder.name, found)))
    else:
        output().print(status_table(folder.name, found))
    return command


def check_round(path: Path, *, show: int, probe: bool, where: Where, as_json: bool) -> str | None:
    """Print the plan, or every mistake; return the next command, None after a mistake."""
    if as_json:
        document = check_document_of(path, prepare=prepared, probe=probe, where=where)
        typer.echo(dumps(document))
        return "" if document["ok"] else None

    def look(data: PreparedData, tokenizer: PreTrainedTokenizerBase) -> None:
        for row in show_rows(data.train, tokenizer, show) if show else ():
            _print_row(row, path.parent.absolute())

    plan, remarks, command = checked(path, prepare=prepared, probe=probe, where=where, look=look)
    if show and plan.train_rows is None:
        remarks = [*remarks, f"--show {show} shows nothing: only the command knows its rows"]
    output(piped_width=PROSE).print(plan_table(plan, title=path.name, remarks=remarks))
    return command


def _print_row(row: ShownRow, directory: Path) -> None:
    """Print a row as the model sees it: tokens in the loss are green, or in brackets without colour."""
    console = output()
    coloured = console.is_terminal and console.color_system is not None and not console.no_color
    place = row.place.removeprefix(f"{directory}/")
    typer.echo(f"--- {place}: {count(row.num_tokens, 'token')}, {row.num_targets} of them in the loss")
    if row.num_written:
        typer.echo(
            f"({count(row.num_written, 'special token')} written in the row itself: {'...'.join(WRITTEN)})"
        )
    for piece, is_target in row.pieces:
        text = printable(piece)
        if coloured:
            typer.secho(text, fg="green" if is_target else None, dim=not is_target, nl=False)
        else:
            typer.echo(f"[[{text}]]" if is_target else text, nl=False)
    typer.echo("\n")


def promotion_text(document: Mapping[str, Any]) -> str:
    """Print a promotion's JSON document as text."""
    steps = document["max_train_steps"]
    changed = {n: c for n, c in document["hyperparameters"].items() if c["from"] != c["to"]}
    lines = [
        f"{document['study']}: {document['from']} -> {document['to']}, "
        f"{steps['from']} -> {steps['to']} steps ({document['diagnosis']})",
        "",
        *(f"  {sentence}" for sentence in document["evidence"]),
        "",
        f"  {_carried_over(document)}",
        *(
            f"  {name}: {_brief(c['from'])} -> {_brief(c['to'])}  ({c['reason']})"
            for name, c in changed.items()
        ),
        *(f"  {note}" for note in document.get("notes", [])),
        *(
            f"  {f['severity']}: {f['message']}"
            for f in document["findings"]
            if f["rule"] not in SAID_BY_THE_EVIDENCE
        ),
        "",
        f"wrote {document['file']}: review it, edit it if needed, then run it",
    ]
    return "\n".join(lines)


def _carried_over(document: Mapping[str, Any]) -> str:
    enqueued, total = document["trials"]["enqueued"], document["trials"]["total"]
    if not enqueued:
        return f"None of {document['to']}'s {total} trials is carried over."
    horizon = document["max_train_steps"]["to"]
    from_steps = [entry["from_step"] for entry in document["continues"]]
    is_over = from_steps.count(horizon) == enqueued
    how = ", already complete" if is_over else f"; {_resumed(len(from_steps), enqueued)}"
    verb = "is" if enqueued == 1 else "are"
    return f"{enqueued} of {document['to']}'s {total} trials {verb} carried over{how}."


def _resumed(number: int, enqueued: int) -> str:
    if not number:
        return "it starts over" if enqueued == 1 else "they start over"
    if number == enqueued:
        every = "both" if number == 2 else f"all {number}"
        return "it resumes from a checkpoint" if number == 1 else f"{every} resume from a checkpoint"
    others = "the other starts" if enqueued - number == 1 else "the others start"
    return f"{number} of them {'resumes' if number == 1 else 'resume'} from a checkpoint, {others} over"


def _brief(value: Any) -> str:
    if isinstance(value, dict) and {"low", "high"} <= value.keys():
        return f"{value['low']} to {value['high']}{', logarithmic' if value.get('log') else ''}"
    if isinstance(value, dict):
        return " ".join(f"{key} {item}" for key, item in value.items())
    return str(value)


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
        places = {name: folder.checkpoints(name) for name in shown}
        documents = (
            trial_document(
                trial,
                adapter=None if (link := places[trial.round].adapter(trial)) is None else str(link),
                scored=scored,
                objective=objectives[trial.round],
            )
            for trial in trials
        )
        for piece in dumped(documents):
            typer.echo(piece, nl=False)
        typer.echo()
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
        with opened(folder) as store:
            kept = begun_round(store, trial.round).kept
        page = trial_page(trial, max_train_steps=max_train_steps, adapter=adapter, kept=kept, scored=scored)
        output().print(page)
    if adapter is None or folder.plan(trial.round).spec.command is not None:
        return "tuner trial list"
    return f'tuner trial generate {trial.name} --prompt "..."'


def _scored(folder: StudyFolder) -> tuple[Trial, ...]:
    with opened(folder) as store:
        return scores_of(store)


def restore_trial(folder: StudyFolder, name: str, *, where: Where, as_json: bool) -> None:
    """Put a trial's best adapter back and print how. Raises what `restored` does, and Interrupted."""
    trial, _ = find_trial(folder, name)
    try:
        with stop_signals("stopping (Ctrl-C again to quit now)") as stopping:
            how, found = restored_adapter(
                folder,
                trial,
                open_view=lambda rerun: _view_of_rerun(folder, rerun),
                stopping=stopping,
                where=where,
            )
    except Interrupted as stop:
        again = next_command(f"tuner trial reproduce {name} --restore{where.options}")
        raise Interrupted(f"{stop}; start over with: {again}") from stop
    if as_json:
        run = {} if found is None else reproduction_document(folder.name, found)
        typer.echo(dumps({"study": folder.name, "trial": trial.name, **run, "restored": how}))
        return
    if found is not None:
        output(piped_width=PROSE).print(reproduction_page(folder.name, found))
    typer.echo(how)


def _view_of_rerun(folder: StudyFolder, rerun: Rerun) -> View:
    trial = rerun.trial
    return open_view(
        console=error_output(),
        title=f"{folder.name}/{trial.round}, trial {trial.number} again",
        trials_total=1,
        max_train_steps=rerun.record.max_train_steps,
        searched=tuple(searched(rerun.spec.space())),
    )


def reproduce_trial(
    folder: StudyFolder, name: str, *, to_step: int | None, where: Where, as_json: bool
) -> bool:
    """Run a trial again, shown live on standard error; print the comparison and return whether it agrees.

    Raises Interrupted, naming the command to start over with, after a signal.
    """
    trial, _ = find_trial(folder, name)
    rerun = planned_rerun(folder, trial, to_step=to_step, engine=where.engine)
    view = _view_of_rerun(folder, rerun)
    limit = "" if to_step is None else f" --to-step {to_step}"
    try:
        with (
            spoken_by(view.message),
            stop_signals("stopping (Ctrl-C again to quit now)") as stopping,
        ):
            found = run_again(rerun, view=view, stopping=stopping, where=where)
    except Interrupted as stop:
        again = next_command(f"tuner trial reproduce {name}{limit}{where.options}")
        raise Interrupted(f"{stop}; start over with: {again}") from stop
    if as_json:
        typer.echo(dumps(reproduction_document(folder.name, found)))
    else:
        output(piped_width=PROSE).print(reproduction_page(folder.name, found))
    return found.agreement != Agreement.DIFFERS


_HEALTH_STYLES = {"ok": "green", "absent": "dim", "warning": "yellow", "problem": "bold red"}


def health_table(checks: Sequence[Check]) -> RenderableType:
    """Render one row per check of `tuner doctor`, then a summary."""
    from tuner.api.doctor import Health

    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for check in checks:
        advice = f"\n{check.advice}" if check.advice else ""
        # rich would read an extra's `[wandb]` or a folder `x[/y]` in a plain string as markup.
        said = Text(check.found + advice)
        table.add_row(Text(check.status, style=_HEALTH_STYLES[check.status]), Text(check.name), said)
    counts = {health: sum(check.status is health for check in checks) for health in reversed(Health)}
    nouns = {Health.WARNING: "warning", Health.PROBLEM: "problem"}
    found = [
        count(number, nouns[health]) if health in nouns else f"{number} {health}"
        for health, number in counts.items()
        if number
    ]
    return Group(table, Text(", ".join(found)))
