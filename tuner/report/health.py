"""What `tuner doctor` found: a line a check, with what to do where something is wrong, and its document."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text


class Health(StrEnum):
    """What a check means for a run."""

    OK = "ok"
    WARNING = "warning"
    """A run is slower, or less is possible."""
    PROBLEM = "problem"
    """A run would stop."""


_STYLES = {Health.OK: "green", Health.WARNING: "yellow", Health.PROBLEM: "bold red"}


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at."""

    name: str
    found: str
    status: Health = Health.OK
    advice: str = ""
    """What to do; empty where there is nothing to do."""


def is_healthy(checks: Sequence[Check]) -> bool:
    """Whether nothing found would stop a run."""
    return all(check.status is not Health.PROBLEM for check in checks)


def health_table(checks: Sequence[Check]) -> RenderableType:
    """One row a check, and the sum of them."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for check in checks:
        advice = f"\n{check.advice}" if check.advice else ""
        # As a string, an extra's `[wandb]` and a folder `x[/y]` would be read as markup.
        said = Text(check.found + advice)
        table.add_row(Text(check.status, style=_STYLES[check.status]), Text(check.name), said)
    counts = {health: sum(check.status is health for check in checks) for health in reversed(Health)}
    found = [f"{number} {health}" + "s" * (number != 1) for health, number in counts.items() if number]
    found = [text.replace("oks", "ok") for text in found]
    return Group(table, Text(", ".join(found)))


def health_document(checks: Sequence[Check]) -> dict[str, Any]:
    """The JSON document of `tuner doctor --json`."""
    return {"ok": is_healthy(checks), "checks": [asdict(check) for check in checks]}
