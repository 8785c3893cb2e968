"""`study check`: the plan printed, or every mistake; and rows as the model sees them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from tuner.api.check import check_document_of, checked
from tuner.cli.printing import PROSE, output, prepared
from tuner.data import PreparedData, ShownRow, printable, show_rows
from tuner.data.preview import WRITTEN
from tuner.report import dumps, plan_table
from tuner.report.format import count

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def check_round(path: Path, *, show: int, probe: bool, as_json: bool) -> str | None:
    """Print the plan, or every mistake; returns the command that comes next, None after a mistake."""
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
    """A row as the model sees it: what the loss sees is green, between brackets where there is no colour."""
    console = output()
    coloured = console.is_terminal and console.color_system is not None and not console.no_color
    place = row.place.removeprefix(f"{directory}/")
    typer.echo(f"--- {place}: {count(row.num_tokens, 'token')}, {row.num_targets} of them learned")
    if row.num_written:
        typer.echo(
            f"({count(row.num_written, 'special token')} that the row says itself: {'...'.join(WRITTEN)})"
        )
    for piece, is_target in row.pieces:
        text = printable(piece)
        if coloured:
            typer.secho(text, fg="green" if is_target else None, dim=not is_target, nl=False)
        else:
            typer.echo(f"[[{text}]]" if is_target else text, nl=False)
    typer.echo("\n")
