"""Trials and evaluations as DataFrames, with documented columns."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

    from tuner.api.trial import Trial

_TRIAL_COLUMNS = (
    "round", "number", "state", "reason", "best_step", "best_eval_loss", "settled_step", "executed_steps",
    "continues", "adapter", "best_value",
)  # fmt: skip
_EVALUATION_COLUMNS = (
    "round", "number", "step", "eval_loss", "train_loss", "learning_rate", "token_accuracy",
)  # fmt: skip


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
    return pd.DataFrame(rows, columns=[*columns, *more])
