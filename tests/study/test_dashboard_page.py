"""What a round's page in optuna-dashboard says: plots with titles, key numbers, what is infeasible."""

from __future__ import annotations

import json

import optuna
import pytest

from tests.report import synthetic
from tuner.study.dashboard import write_pages
from tuner.study.optuna_rows import RowsChanged


@pytest.fixture
def page() -> optuna.Study:
    study = optuna.create_study(study_name="s/round1")
    write_pages(study, synthetic.report())
    write_pages(study, synthetic.report())
    return study


def test_the_key_numbers_are_attributes_of_the_study(page: optuna.Study) -> None:
    report = synthetic.report()
    assert page.user_attrs["max_train_steps"] == 60
    assert page.user_attrs["diagnosis"] == report.reading.diagnosis
    assert page.user_attrs["suggested max_train_steps"] == report.reading.suggested_max_train_steps
    assert page.user_attrs["infeasible trials"] == "7"


def test_a_study_that_somebody_deleted_is_noticed(page: optuna.Study) -> None:
    """The run makes it anew, and writes the page once more."""
    page._storage.delete_study(page._study_id)
    with pytest.raises(RowsChanged):
        write_pages(page, synthetic.report())


def test_every_plot_has_a_title(page: optuna.Study) -> None:
    written = json.dumps(page._storage.get_study_system_attrs(page._study_id))
    for title in ("Best step of each trial, alpaca-smollm2", "Evaluations during training, alpaca-smollm2"):
        assert title in written
