"""Somebody tells, renames or deletes Optuna's trials and studies: facts stay, and rows come back."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState as OptunaState
from rich.console import Console
from sqlalchemy import text

from tests.studies import formula
from tests.study.simulation import simulate, trials
from tuner.engines import SimulatedWorker
from tuner.records import Assignment, Trial, TrialState
from tuner.report import View, open_view
from tuner.study.sampling import optuna_storage

NAME = "tiny/round1"
CHANGES: dict[str, Any] = {"trials": 6, "steps": 8, "every": 2}

Meddle = Callable[[optuna.storages.RDBStorage], None]


def study_id(storage: optuna.storages.RDBStorage) -> int:
    return storage.get_study_id_from_name(NAME)


def newest(storage: optuna.storages.RDBStorage) -> optuna.trial.FrozenTrial:
    return storage.get_all_trials(study_id(storage))[-1]


def tell_a_running_one(storage: optuna.storages.RDBStorage) -> None:
    """As the dashboard does."""
    open_ones = [t for t in storage.get_all_trials(study_id(storage)) if not t.state.is_finished()]
    for trial in open_ones:
        storage.set_trial_state_values(trial._trial_id, OptunaState.COMPLETE, [0.001])


def fail_a_running_one(storage: optuna.storages.RDBStorage) -> None:
    for trial in storage.get_all_trials(study_id(storage)):
        if not trial.state.is_finished():
            storage.set_trial_state_values(trial._trial_id, OptunaState.FAIL)


def delete_the_study(storage: optuna.storages.RDBStorage) -> None:
    storage.delete_study(study_id(storage))


def rename_the_study(storage: optuna.storages.RDBStorage) -> None:
    """As the dashboard does: a copy under the new name, then the old one is deleted."""
    optuna.copy_study(from_study_name=NAME, from_storage=storage, to_storage=storage, to_study_name="mine")
    delete_the_study(storage)


def delete_a_trial(storage: optuna.storages.RDBStorage) -> None:
    with storage.engine.begin() as connection:
        # All that belongs to it goes with it, as a person with SQL would have it.
        number = newest(storage)._trial_id
        for table in ("trial_values", "trial_params", "trial_intermediate_values", "trial_user_attributes"):
            connection.execute(text(f"DELETE FROM {table} WHERE trial_id = :id"), {"id": number})
        connection.execute(text("DELETE FROM trial_system_attributes WHERE trial_id = :id"), {"id": number})
        connection.execute(text("DELETE FROM trials WHERE trial_id = :id"), {"id": number})


def change_a_value(storage: optuna.storages.RDBStorage) -> None:
    with storage.engine.begin() as connection:
        connection.execute(text("UPDATE trial_values SET value = 0.001"))


MEDDLING: dict[str, Meddle] = {
    meddle.__name__: meddle
    for meddle in (
        tell_a_running_one,
        fail_a_running_one,
        delete_the_study,
        rename_the_study,
        delete_a_trial,
        change_a_value,
    )
}


class Meddled(SimulatedWorker):
    """A worker beside which somebody opens the dashboard once, after some calls."""

    def __init__(self, storage: optuna.storages.RDBStorage, meddle: Meddle, *, after: int) -> None:
        super().__init__(formula, slots=2)
        self._storage, self._meddle, self._left = storage, meddle, after

    def events(self, timeout_seconds: float) -> list[Any]:
        self._left -= 1
        if self._left == 0:
            self._meddle(self._storage)
            self._storage.remove_session()
        return super().events(timeout_seconds)

    def start(self, assignment: Assignment) -> None:
        super().start(assignment)


def said() -> tuple[View, io.StringIO]:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=False, width=1000)
    return open_view(console=console, title="test", trials_total=6, max_train_steps=8), stream


def told(storage: optuna.storages.RDBStorage, name: str = NAME) -> list[tuple[int, str, float | None, Any]]:
    found = storage.get_all_trials(storage.get_study_id_from_name(name))
    return [
        (t.number, t.state.name, t.value if t.state.name == "COMPLETE" else None, t.params) for t in found
    ]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[tuple[Trial, ...], list[Any]]:
    directory = tmp_path_factory.mktemp("undisturbed")
    simulate(directory, **CHANGES)
    return trials(directory, **CHANGES), told(optuna_storage(f"sqlite:///{directory}/tuner.db"))


@pytest.mark.parametrize("after", [2, 7])
@pytest.mark.parametrize("name", MEDDLING)
def test_while_a_round_runs(
    tmp_path: Path, undisturbed: tuple[tuple[Trial, ...], list[Any]], name: str, after: int
) -> None:
    storage = optuna_storage(f"sqlite:///{tmp_path}/tuner.db")
    view, stream = said()
    simulate(
        tmp_path, make_worker=lambda: Meddled(storage, MEDDLING[name], after=after), view=view, **CHANGES
    )
    assert_as_undisturbed(tmp_path, undisturbed)
    if name != "change_a_value" or after == 7:
        assert "made anew from tuner's facts" in stream.getvalue()
    assert "Error" not in stream.getvalue()
    assert ".." not in stream.getvalue()


@pytest.mark.parametrize("name", [name for name in MEDDLING if "running" not in name])
def test_after_a_round(tmp_path: Path, undisturbed: tuple[tuple[Trial, ...], list[Any]], name: str) -> None:
    """The same command that would report on the round finds and mends it, once."""
    simulate(tmp_path, **CHANGES)
    storage = optuna_storage(f"sqlite:///{tmp_path}/tuner.db")
    MEDDLING[name](storage)
    storage.remove_session()
    view, stream = said()
    simulate(tmp_path, view=view, **CHANGES)
    assert "made anew from tuner's facts" in stream.getvalue()
    assert_as_undisturbed(tmp_path, undisturbed)
    view, stream = said()
    simulate(tmp_path, view=view, **CHANGES)
    assert "made anew" not in stream.getvalue()


def test_what_was_told_elsewhere_is_said_and_kept_aside(tmp_path: Path) -> None:
    storage = optuna_storage(f"sqlite:///{tmp_path}/tuner.db")
    view, stream = said()
    simulate(
        tmp_path, make_worker=lambda: Meddled(storage, tell_a_running_one, after=2), view=view, **CHANGES
    )
    assert "was ended as complete with 0.001, and it has not ended" in stream.getvalue()
    names = sorted(study.study_name for study in storage.get_all_studies())
    assert names[0] == NAME
    assert names[1].startswith(f"{NAME} (set aside 1970-01-01 ")
    assert 0.001 in [value for _, _, value, _ in told(storage, names[1])]
    assert 0.001 not in [value for _, _, value, _ in told(storage)]


def test_a_second_study_of_the_same_second_has_a_name_of_its_own(tmp_path: Path) -> None:
    from tuner.study.optuna_rows import set_aside

    storage = optuna_storage(f"sqlite:///{tmp_path}/tuner.db")
    for expected in ("", " 2", " 3"):
        study = optuna.create_study(storage=storage, study_name=NAME)
        study.add_trial(optuna.trial.create_trial(value=1.0))
        assert set_aside(storage, NAME, at=0.0) == f"{NAME} (set aside 1970-01-01 00:00:00 UTC){expected}"
    assert set_aside(storage, NAME, at=0.0) is None


def curves(of: tuple[Trial, ...]) -> list[str]:
    """As text, in which NaN equals NaN."""
    return [repr((t.hyperparameters, t.state, t.evaluations)) for t in of]


def assert_as_undisturbed(directory: Path, undisturbed: tuple[tuple[Trial, ...], list[Any]]) -> None:
    facts, rows = undisturbed
    found = trials(directory, **CHANGES)
    assert curves(found) == curves(facts)
    assert all(t.state in (TrialState.COMPLETE, TrialState.INFEASIBLE) for t in found)
    storage = optuna_storage(f"sqlite:///{directory}/tuner.db")
    by_number = {number: rest for number, *rest in told(storage)}
    assert [by_number[t.optuna_trial] for t in found if t.optuna_trial is not None] == [
        rest for _, *rest in rows
    ]
