"""What `study check` is wired to: file, tokenizer, data and model are looked at, nothing is recorded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import click
from rich.console import Console

from tuner.data import PreparedData, load_tokenizer, prepare, show_rows
from tuner.errors import DataError, InputError, Mistake, ModelError, RoundFileError
from tuner.report import check_document, dumps, plan_table
from tuner.report.documents import RoundPlan
from tuner.spec import RoundSpec, load_round
from tuner.study.checking import planned_round
from tuner.study.plan import RoundPlan as StudyPlan


def check_round(path: Path, *, show: int, probe: bool, as_json: bool) -> bool:
    """Print the plan, or every mistake; returns whether the round can be run."""
    try:
        plan, remarks = _plan(path, show=0 if as_json else show, probe=probe)
    except InputError as error:
        if not as_json:
            raise
        click.echo(dumps(check_document(_mistakes(error), None)))
        return False
    if as_json:
        click.echo(dumps(check_document([], plan)))
    else:
        Console().print(plan_table(plan, title=path.name, remarks=remarks))
    return True


def _plan(path: Path, *, show: int, probe: bool) -> tuple[RoundPlan, list[str]]:
    file = load_round(path)
    spec = StudyPlan(file).absolute
    tokenizer = load_tokenizer(spec.model)
    data = prepare(spec, tokenizer, file.directory / ".tuner-cache")
    if show:
        for shown in show_rows(data.train, tokenizer, show):
            _print_row(shown)

    from tuner.adapters import largest_adapter  # loads torch: after what is cheap to check

    plan = planned_round(spec, data, adapter_weights=largest_adapter(spec.model, spec.space()))
    if probe:
        from tuner.training.probe import probe_round

        measured = probe_round(spec, data)
        hours = plan.trials * measured.seconds_per_trial / 3600
        plan = replace(plan, peak_memory_bytes=measured.peak_memory_bytes, hours=hours)
    return plan, _remarks(spec, data)


def _remarks(spec: RoundSpec, data: PreparedData) -> list[str]:
    """What became of rows that are not trained on as they are."""
    remarks = []
    for name, split in (("train", data.report.train), ("eval", data.report.evaluation)):
        if split.truncated:
            remarks.append(
                f"{split.truncated} of {split.rows_kept} {name} rows are cut at max_length "
                f"{spec.data.max_length}"
            )
        dropped = split.cut_off + split.empty
        if dropped:
            remarks.append(f"{dropped} {name} rows are left out: nothing in them to learn within max_length")
        if split.duplicates:
            remarks.append(f"{split.duplicates} {name} rows repeat one before them")
    return remarks


def _print_row(pieces: Sequence[tuple[str, bool]]) -> None:
    """A row as the model sees it: what the loss sees is green, between brackets where there is no colour."""
    console = Console()
    coloured = console.is_terminal
    for text, is_target in pieces:
        if coloured:
            console.print(text, style="green" if is_target else "dim", end="", markup=False, highlight=False)
        else:
            click.echo(f"[[{text}]]" if is_target else text, nl=False)
    click.echo("\n" + "-" * 40)


def _mistakes(error: InputError) -> tuple[Mistake, ...]:
    if isinstance(error, RoundFileError):
        return error.mistakes
    key = "data" if isinstance(error, DataError) else "model" if isinstance(error, ModelError) else ""
    return (Mistake(None, key, str(error)),)
