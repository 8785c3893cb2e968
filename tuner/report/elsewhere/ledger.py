"""What a tool that cannot be asked has been given: a small JSON file beside the round's trials."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Given:
    """Of one trial."""

    run: str
    """The id of its run in the tool."""
    steps: tuple[int, ...] = ()
    """Steps whose points it has."""
    has_ended: bool = False
    """Whether it has the trial's end too."""


class Ledger:
    """Given by trial, on disk after every change."""

    def __init__(self, path: Path) -> None:
        self._path = path
        written = json.loads(path.read_text()) if path.exists() else {}
        self._given = {
            int(number): Given(given["run"], tuple(given["steps"]), given["has_ended"])
            for number, given in written.items()
        }

    def find(self, trial: int) -> Given | None:
        """What is known of a trial."""
        return self._given.get(trial)

    def begin(self, trial: int, run: str) -> Given:
        """A trial's run is open."""
        return self._keep(trial, Given(run))

    def add(self, trial: int, step: int) -> None:
        """A point was given."""
        given = self._given[trial]
        self._keep(trial, replace(given, steps=(*given.steps, step)))

    def end(self, trial: int) -> None:
        """The trial's end was given."""
        self._keep(trial, replace(self._given[trial], has_ended=True))

    def _keep(self, trial: int, given: Given) -> Given:
        self._given[trial] = given
        self._path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self._path.with_name(f".{self._path.name}.tmp")
        unfinished.write_text(json.dumps({number: asdict(each) for number, each in self._given.items()}))
        unfinished.replace(self._path)
        return given
