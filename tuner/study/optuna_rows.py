"""Optuna's rows of a round, which anyone with the database or the dashboard may change.

Facts do not follow from them. Where they no longer fit the facts, the study is set aside under a dated name.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import optuna
from optuna.exceptions import OptunaError, StorageInternalError, UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm.exc import ObjectDeletedError, StaleDataError

from tuner.errors import StorageError, TunerError
from tuner.records import Trial

Told: TypeAlias = tuple[TrialState, float | None]
"""What Optuna has of a trial: its state, and its value where it is complete."""

OPEN = (TrialState.RUNNING, TrialState.WAITING)

_STATES = text(
    "SELECT t.number, t.state, v.value, v.value_type FROM trials t "
    "LEFT JOIN trial_values v ON v.trial_id = t.trial_id AND v.objective = 0 WHERE t.study_id = :study"
)
"""A few columns of Optuna's tables: its own reader takes 36 s for 10,000 trials with their evaluations."""
_RENAMED = text("UPDATE studies SET study_name = :new WHERE study_name = :old")
_OUTSIDE = {"INF_POS": float("inf"), "INF_NEG": float("-inf")}


class RowsChanged(TunerError):
    """Optuna's rows are not those that the facts lead to; the message says what is different."""


@dataclass(frozen=True, slots=True)
class Expected:
    """What Optuna may have of a trial."""

    trial: Trial
    told: Told
    """As it was, or will be, told."""
    is_any_value: bool = False
    """Whether the value depends on what other trials came to."""

    def differs(self, found: Told | None) -> str | None:
        """Return what is different; None if it fits. An ended trial may not have been told yet."""
        number = f"Optuna's trial {self.trial.optuna_trial} (trial {self.trial.number})"
        if found is None:
            return f"{number} is missing"
        state, value = found
        if state in OPEN:
            return None
        if not self.trial.state.is_final:
            return f"{number} was ended as {_said(found)}, and it has not ended"
        if state != self.told[0] or not (self.is_any_value or value == self.told[1]):
            return f"{number} was told {_said(found)} and came to {_said(self.told)}"
        return None


def difference(found: Mapping[int, Told], expected: Sequence[Expected]) -> str | None:
    """Return the first difference between Optuna's trials, by number, and the facts; None if they fit."""
    for each in expected:
        assert each.trial.optuna_trial is not None
        if (what := each.differs(found.get(each.trial.optuna_trial))) is not None:
            return what
    return None


def told(storage: optuna.storages.BaseStorage, study_id: int) -> dict[int, Told]:
    """Return what Optuna has of each trial, by its number."""
    if not isinstance(storage, optuna.storages.RDBStorage):
        return {trial.number: told_of(trial) for trial in storage.get_all_trials(study_id, deepcopy=False)}
    with storage.engine.connect() as connection:
        rows = connection.execute(_STATES, {"study": study_id}).all()
    return {
        row.number: (TrialState[row.state], _OUTSIDE.get(row.value_type, row.value))
        if row.state == TrialState.COMPLETE.name
        else (TrialState[row.state], None)
        for row in rows
    }


def told_of(trial: FrozenTrial) -> Told:
    """Return what Optuna has of one trial."""
    return trial.state, trial.value if trial.state == TrialState.COMPLETE else None


@contextmanager
def noticing() -> Iterator[None]:
    """Turn an error that missing or changed rows can cause into RowsChanged.

    A database that fails is another matter: those errors pass.
    """
    try:
        yield
    except StorageInternalError:
        raise
    except (KeyError, ValueError, OptunaError, StaleDataError, ObjectDeletedError) as error:
        raise RowsChanged(_what_is_wrong(error)) from error


def _what_is_wrong(error: Exception) -> str:
    match error:
        case KeyError() | StaleDataError() | ObjectDeletedError():
            return "a trial, or the whole study, is missing"
        case UpdateFinishedTrialError():
            return "a running trial was ended"
        case _:
            return " ".join(str(error).split()).rstrip(".")


def set_aside(storage: optuna.storages.BaseStorage, name: str, *, at: float) -> str | None:
    """Rename a study, dated by `at` in seconds since the epoch, and return its new name.

    None where there is none of that name, or where it has no trials: it is then deleted.
    """
    try:
        study_id = storage.get_study_id_from_name(name)
    except KeyError:
        return None
    if not told(storage, study_id):
        storage.delete_study(study_id)
        return None
    dated = f"{name} (set aside {time.strftime('%Y-%m-%d %H:%M:%S', time.gmtime(at))} UTC)"
    there = {study.study_name for study in storage.get_all_studies()}
    new = next(each for each in _numbered(dated) if each not in there)
    if isinstance(storage, optuna.storages.RDBStorage):
        storage.remove_session()
        with storage.engine.begin() as connection:
            connection.execute(_RENAMED, {"new": new, "old": name})
    else:
        optuna.copy_study(from_study_name=name, from_storage=storage, to_storage=storage, to_study_name=new)
        storage.delete_study(study_id)
    return new


def filled(
    study: optuna.Study, trials: Sequence[tuple[int, FrozenTrial]], *, system_attrs: Mapping[int, Any]
) -> None:
    """Add trials under their numbers, ascending, to a study without any; numbers between become failed ones.

    `system_attrs` are those to give to a number, such as what an imported sampler noted on it. Raises
    StorageError where rows are left of trials that somebody has removed.
    """
    next_number = 0
    for number, trial in trials:
        trial.system_attrs = {**trial.system_attrs, **system_attrs.get(number, {})}
        try:
            for _ in range(next_number, number):
                study.add_trial(optuna.trial.create_trial(state=TrialState.FAIL))
            study.add_trial(trial)
        except IntegrityError as error:
            raise StorageError(
                f"Optuna's tables contradict each other ({' '.join(str(error.orig).split())}): somebody has "
                "removed rows or a table. Restore a copy of the database, or drop all of Optuna's tables in "
                "it: the next run makes them anew from tuner's facts"
            ) from error
        next_number = number + 1


def _numbered(name: str) -> Iterator[str]:
    yield name
    number = 2
    while True:
        yield f"{name} {number}"
        number += 1


def _said(what: Told) -> str:
    state, value = what
    return state.name.lower() if value is None else f"{state.name.lower()} with {value:g}"
