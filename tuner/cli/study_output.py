"""Print the results of `study status`, `check` and `promote`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from tuner.api.check import check_document_of, checked
from tuner.api.study import standing
from tuner.cli.printing import PROSE, output, prepared
from tuner.data import PreparedData, ShownRow, printable, show_rows
from tuner.data.preview import WRITTEN
from tuner.report import dumps, plan_table, status_document, status_table
from tuner.report.format import count
from tuner.report.round_report import SAID_BY_THE_EVIDENCE
from tuner.study.folder import StudyFolder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def print_status(folder: StudyFolder, *, as_json: bool) -> str:
    """Print the state of every round; return the next command."""
    found, command = standing(folder)
    if as_json:
        typer.echo(dumps(status_document(folder.name, found)))
    else:
        output().print(status_table(folder.name, found))
    return command


def check_round(path: Path, *, show: int, probe: bool, as_json: bool) -> str | None:
    """Print the plan, or every mistake; return the next command, None after a mistake."""
    if as_json:
        document = check_document_of(path, prepare=prepared, probe=probe)
        typer.echo(dumps(document))
        return "" if document["ok"] else None

    def look(data: PreparedData, tokenizer: PreTrainedTokenizerBase) -> None:
        for row in show_rows(data.train, tokenizer, show) if show else ():
            _print_row(row, path.parent.absolute())

    plan, remarks, command = checked(path, prepare=prepared, probe=probe, look=look)
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
