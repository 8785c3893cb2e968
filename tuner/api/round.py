"""A round of a study, and its trials and evaluations as DataFrames."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuner.api.advice import Advice
from tuner.api.arguments import naming_arguments
from tuner.api.trial import Trial
from tuner.errors import InputError
from tuner.playbook.selection import ranked
from tuner.report import RoundReport, round_markdown, write_html
from tuner.report.format import count
from tuner.study.folder import StudyFolder, opened
from tuner.study.lookup import begun_round, reports_on, statuses, trials_of
from tuner.study.results import reading_of

if TYPE_CHECKING:
    import pandas as pd

    from tuner.api.trial import Trial


class Round:
    """One round of a study: trials that train for the same number of steps."""

    def __init__(self, folder: StudyFolder, name: str, ended_because: str | None = None) -> None:
        self._study = folder
        self.name = name
        self.ended_because = ended_because
        """Why `Study.auto` ended after this round; None for any other round."""

    def __repr__(self) -> str:
        trials = count(len(self.trials), "trial")
        return f"Round({self.name!r}): {trials} of {count(self.max_train_steps, 'step')}"

    @property
    def max_train_steps(self) -> int:
        """Horizon of its trials."""
        with opened(self._study) as store:
            return begun_round(store, self.name).max_train_steps

    @property
    def state(self) -> str:
        """`running`, `open` (incomplete, and no process runs it) or `complete`."""
        with opened(self._study) as store:
            return next(s.state for s in statuses(self._study, store) if s.round == self.name)

    @property
    def trials(self) -> tuple[Trial, ...]:
        """Its trials by number."""
        with opened(self._study) as store:
            return tuple(Trial(self._study, each) for each in trials_of(self._study, store, self.name))

    @property
    def best(self) -> Trial | None:
        """The best complete trial by the round's objective; None if none is complete."""
        with opened(self._study) as store:
            order = ranked(store.trials(self.name))
        return Trial(self._study, order[0][0]) if order else None

    @property
    def advice(self) -> Advice:
        """Whether the horizon was right, and how long to train next."""
        with opened(self._study) as store:
            record = begun_round(store, self.name)
            _, reading = reading_of(store, record)
        return Advice(reading, record.max_train_steps)

    @naming_arguments
    def report(
        self, html: str | os.PathLike[str] | None = None, *, markdown: str | os.PathLike[str] | None = None
    ) -> str:
        """Return the report as Markdown; optionally write it as a self-contained page and as Markdown.

        Raises InputError where a file cannot be written.
        """
        reports = reports_on(self._study, Path(self.name))
        return write_reports(
            reports, html=Path(html) if html else None, markdown=Path(markdown) if markdown else None
        )


def write_reports(reports: Sequence[RoundReport], *, html: Path | None, markdown: Path | None) -> str:
    """Write the last report to the given paths; return it as Markdown. The others are of earlier rounds.

    Raises InputError where a file cannot be written.
    """
    *earlier, report = reports
    text = round_markdown(report)
    try:
        if html is not None:
            write_html(html, report, earlier=earlier)
        if markdown is not None:
            markdown.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{error.filename}: cannot be written: {error.strerror}") from error
    return text


_TRIAL_COLUMNS = (
    "round", "number", "state", "reason", "best_step", "best_eval_loss", "settled_step", "executed_steps",
    "continues", "adapter", "best_value",
)  # fmt: skip
_EVALUATION_COLUMNS = (
    "round", "number", "step", "eval_loss", "train_loss", "learning_rate", "token_accuracy",
)  # fmt: skip


_TEXTS = ("round", "state", "reason", "continues", "adapter")


def trials_dataframe(trials: Iterable[Trial]) -> pd.DataFrame:
    """Return a row for each trial, with its hyperparameters as `params_NAME`."""
    return _table([_trial_row(trial) for trial in trials], _TRIAL_COLUMNS)


def evaluations_dataframe(trials: Iterable[Trial]) -> pd.DataFrame:
    """Return a row for each evaluation."""
    return _table([row for trial in trials for row in _evaluation_rows(trial)], _EVALUATION_COLUMNS)


def _trial_row(trial: Trial) -> dict[str, Any]:
    adapter = None if trial.adapter is None else str(trial.adapter)
    own = {name: getattr(trial, name) for name in _TRIAL_COLUMNS} | {
        "state": trial.state.value,
        "adapter": adapter,
    }
    return own | {f"params_{name}": value for name, value in trial.hyperparameters.items()}


def _evaluation_rows(trial: Trial) -> Iterator[dict[str, Any]]:
    for made in trial.evaluations:
        values = {name: getattr(made, name) for name in _EVALUATION_COLUMNS[2:]}
        yield {"round": trial.round, "number": trial.number, **values, **made.metrics}


def _table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> pd.DataFrame:
    import pandas as pd

    more = list(dict.fromkeys(name for row in rows for name in row if name not in columns))
    table = pd.DataFrame(rows, columns=[*columns, *more])
    # A column of numbers that are all missing would be one of objects, which cannot be averaged or plotted.
    missing = [name for name in columns if name not in _TEXTS and table[name].isna().all()]
    return table.astype(dict.fromkeys(missing, float)) if rows else table
