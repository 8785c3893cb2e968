"""What `study promote` prints: what was seen, what follows, and what each line of the new file changed to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import typer

from tuner.methods.schedules import DecayRule
from tuner.report import dumps
from tuner.report.round_report import SAID_BY_THE_EVIDENCE
from tuner.study.folder import StudyFolder
from tuner.study.promotion import Overrides, promote_held


def promote_round(
    folder: StudyFolder,
    *,
    to: str,
    from_round: str | None,
    max_train_steps: int | None,
    top: int | None = None,
    decay: DecayRule = "share",
    add: Sequence[str] = (),
    force: bool,
    as_json: bool,
) -> Path:
    """Promote, print why, and return the new file's path."""
    overrides = Overrides(max_train_steps, top, decay, tuple(add))
    done = promote_held(folder, to=to, from_round=from_round, overrides=overrides, force=force)
    typer.echo(dumps(done.document) if as_json else promotion_text(done.document))
    return done.path


def promotion_text(document: Mapping[str, Any]) -> str:
    """A promotion's JSON document, told to a person."""
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
