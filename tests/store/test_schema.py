"""The migrations make what the tables say, and leave Optuna's own alone."""

from __future__ import annotations

import importlib
import math
import pkgutil
from collections.abc import Callable
from contextlib import closing
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Table, create_engine, inspect, text

from tests.contracts.store import (
    ANSWERS,
    BRANCH,
    COMPLETE,
    HISTORY,
    LEFT_OUT,
    ROUND,
    SCORE,
    STARTED,
    TRIAL,
    WORK,
    contents,
)
from tuner.errors import StorageError
from tuner.records import (
    Answered,
    AnswerScore,
    Attempt,
    Branch,
    BranchAdvanced,
    Checkpoint,
    Direction,
    Evaluated,
    Evaluation,
    FinalScore,
    Measured,
    NodeChange,
    NodeChanged,
    Objective,
    Promotion,
    RoundBegun,
    RoundRecord,
    Started,
    Throughput,
    TrialAsked,
    TrialScored,
)
from tuner.store import migrations, open_store, schema


def test_the_migrations_make_the_tables(url: str) -> None:
    open_store(url, study="study").close()
    engine = create_engine(url)
    with engine.connect() as connection:
        context = MigrationContext.configure(
            connection,
            opts={
                "version_table": schema.VERSION_TABLE,
                "compare_type": True,
                "compare_server_default": True,
            },
        )
        assert compare_metadata(context, schema.METADATA) == []
        names = set(inspect(connection).get_table_names())
        for table in schema.METADATA.sorted_tables:
            key = inspect(connection).get_pk_constraint(table.name)["constrained_columns"]
            assert key == [column.name for column in table.primary_key]
            assert key[0] == "study"
    engine.dispose()
    assert names == {*schema.METADATA.tables, "tuner_alembic_version"}
    assert all(name.startswith("tuner_") for name in names)


def at_revision(url: str, revision: str) -> None:
    """Take the migrations after a revision back."""
    engine = create_engine(url)
    config = migrations.configuration()
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.downgrade(config, revision)
    engine.dispose()


def test_the_migrations_can_be_taken_back(url: str) -> None:
    open_store(url, study="study").close()
    at_revision(url, "base")
    engine = create_engine(url)
    assert inspect(engine).get_table_names() == ["tuner_alembic_version"]
    engine.dispose()
    store = open_store(url, study="study")
    store.record(RoundBegun(ROUND))
    assert store.rounds() == (ROUND,)
    store.close()


def test_a_database_without_studies_takes_them_from_the_files_of_its_rounds(url: str) -> None:
    """As it was at revision 0001, where a round's name was a key of its own."""
    strange = Evaluated("round1", 7, 1, Evaluation(30, math.nan, None, math.inf, 0, (math.nan,), (1,)))
    later = (Measured, NodeChanged, TrialScored, Answered, BranchAdvanced, Started)
    told = [fact for fact in HISTORY if not isinstance(fact, later)]
    second = replace(ROUND, name="round9", spec={"study": "t"})
    with closing(open_store(url, study="s")) as store, closing(open_store(url, study="t")) as other:
        store.record(*told, strange)
        other.record(RoundBegun(second), TrialAsked(replace(TRIAL, round="round9")))
        before = repr(contents(store)), other.rounds(), other.trials("round9")
    at_revision(url, "0001")
    engine = create_engine(url)
    columns = {
        c["name"] for table in inspect(engine).get_table_names() for c in inspect(engine).get_columns(table)
    }
    engine.dispose()
    assert "study" not in columns
    with closing(open_store(url, study="s")) as store, closing(open_store(url, study="t")) as other:
        assert (repr(contents(store)), other.rounds(), other.trials("round9")) == before
        assert contents(other) == ((second,), (), ())
        store.record(*told)
        assert repr(contents(store)) == before[0]


def test_a_database_without_throughput_has_none(url: str) -> None:
    """As it was at revision 0002; what is measured afterwards is kept."""
    with closing(open_store(url, study="s")) as store:
        store.record(*HISTORY[:5])
        trials = store.trials("round1")
    at_revision(url, "0002")
    engine = create_engine(url)
    assert "tuner_throughput" not in inspect(engine).get_table_names()
    engine.dispose()
    with closing(open_store(url, study="s")) as store:
        assert (store.rounds(), store.trials("round1")) == ((ROUND,), trials)
        store.record(Measured(WORK, "round1"))
        assert store.rounds()[0].throughputs == (WORK,)


def test_a_database_without_scores_takes_them(url: str) -> None:
    """As it was at revision 0003, with the table of branches that nothing wrote into, and none of answers."""
    with closing(open_store(url, study="s")) as store:
        store.record(*HISTORY[:5])
        before = contents(store)
    at_revision(url, "0003")
    with closing(open_store(url, study="s")) as store:
        assert contents(store) == before
        store.record(BranchAdvanced("round1", BRANCH), TrialScored("round1", 7, SCORE))
        store.record(Answered("round1", 7, 1, ANSWERS))
        assert repr(store.rounds()[0].branches) == repr((BRANCH,))
        assert store.trials("round1")[0].final_score == SCORE
        assert store.trials("round1")[0].answer_score == ANSWERS


def test_a_database_without_environments_knows_of_none(url: str) -> None:
    """As it was at revision 0004; those of later attempts are kept."""
    placed = Started("round1", 7, 1, 0, {"torch": "2.13.0"})
    with closing(open_store(url, study="s")) as store:
        store.record(*HISTORY[:5], placed)
    at_revision(url, "0004")
    with closing(open_store(url, study="s")) as store:
        assert store.trials("round1")[0].attempts[0].environment == {}
        store.record(placed)
        assert store.trials("round1")[0].attempts[0].environment == placed.environment


def test_a_database_without_metrics_ranks_by_the_loss(url: str) -> None:
    """As it was at revision 0006; metrics of later evaluations are kept."""
    up = Objective("token_accuracy", Direction.MAXIMIZE, is_relative_to_gained=True)
    counted = Evaluation(40, 1.0, metrics={"token_accuracy": 0.5}, objective=up)
    with closing(open_store(url, study="s")) as store:
        store.record(*HISTORY[:5])
        before = contents(store)
    at_revision(url, "0006")
    engine = create_engine(url)
    assert "metrics" not in {c["name"] for c in inspect(engine).get_columns("tuner_evaluations")}
    engine.dispose()
    with closing(open_store(url, study="s")) as store:
        assert contents(store) == before
        assert {e.objective for t in store.trials("round1") for e in t.evaluations} <= {None}
        store.record(Evaluated("round1", 7, 1, counted))
        assert store.trials("round1")[0].evaluations[-1] == counted


def test_a_database_without_kinds_takes_them_from_the_files_of_its_rounds(url: str) -> None:
    """As it was at revision 0006, where a sweep's round was known by its name and its rows."""
    rows, others = [{"path": "train.jsonl"}], [{"path": "eval.jsonl"}]
    swept = {"train": rows, "eval": rows, "allow_overlap": True}
    files = {
        "sweep-20": {"data": swept},
        "sweep-20b": {"data": swept, "run": {"engine": "simulated"}},
        "round1": {"data": swept},
        "sweep-60": {"data": {**swept, "eval": others}},
        "sweep-8": {"data": {**swept, "allow_overlap": False}},
        "round2": {"run": {"engine": "simulated"}},
        "round3": {"a": [1, None]},
    }
    with closing(open_store(url, study="s")) as store:
        store.record(*(RoundBegun(RoundRecord(name, 8, file, 0.0)) for name, file in files.items()))
    at_revision(url, "0006")
    with closing(open_store(url, study="s")) as store:
        kinds = {record.name: str(record.kind) for record in store.rounds()}
    assert kinds == {
        "sweep-20": "sweep",
        "sweep-20b": "sweep",
        "round1": "search",
        "sweep-60": "search",
        "sweep-8": "search",
        "round2": "dry run",
        "round3": "search",
    }


def test_a_database_without_changes_of_nodes_takes_them(url: str) -> None:
    """As it was at revision 0009; what it had stays."""
    with closing(open_store(url, study="s")) as store:
        store.record(*(fact for fact in HISTORY if not isinstance(fact, NodeChanged)))
        before = repr(contents(store))
    at_revision(url, "0009")
    engine = create_engine(url)
    assert "tuner_node_changes" not in inspect(engine).get_table_names()
    engine.dispose()
    with closing(open_store(url, study="s")) as store:
        assert repr(contents(store)) == before
        store.record(NodeChanged(LEFT_OUT, "round1"))
        assert store.rounds()[0].node_changes == (LEFT_OUT,)


def test_every_migration_is_in_a_package_that_is_installed() -> None:
    versions = importlib.import_module("tuner.store.migrations.versions")
    assert versions.__file__ is not None
    on_disk = {path.stem for path in Path(versions.__file__).parent.glob("v*.py")}
    assert on_disk == {module.name for module in pkgutil.iter_modules(versions.__path__)}
    assert "v0001_facts" in on_disk


TABLES_OF_THEIR_OWN = {"throughputs", "branches", "node_changes"}


@pytest.mark.parametrize(
    ("record", "table"),
    [
        (RoundRecord, schema.ROUNDS),
        (Attempt, schema.ATTEMPTS),
        (Evaluation, schema.EVALUATIONS),
        (Checkpoint, schema.CHECKPOINTS),
        (Promotion, schema.PROMOTIONS),
        (Throughput, schema.THROUGHPUTS),
        (Branch, schema.BRANCHES),
        (NodeChange, schema.NODE_CHANGES),
        (FinalScore, schema.FINAL_SCORES),
        (AnswerScore, schema.ANSWER_SCORES),
    ],
)
def test_every_field_of_a_record_has_a_column(record: type[Any], table: Table) -> None:
    names = {field.name for field in fields(record)} - TABLES_OF_THEIR_OWN
    assert names <= set(table.columns.keys())


def test_a_database_of_a_newer_version_is_refused_and_left_alone(url: str) -> None:
    store = open_store(url, study="study")
    store.record(RoundBegun(ROUND))
    store.close()
    engine = create_engine(url)
    with engine.begin() as connection:
        connection.execute(text("UPDATE tuner_alembic_version SET version_num = '9999'"))
    with pytest.raises(StorageError, match=r"revision 9999.*newer version") as raised:
        open_store(url, study="study")
    assert raised.value.exit_code == 2
    with engine.begin() as connection:
        assert connection.scalar(text("SELECT version_num FROM tuner_alembic_version")) == "9999"
        assert connection.scalar(text("SELECT count(*) FROM tuner_rounds")) == 1
    engine.dispose()


def use_optuna(url: str) -> None:
    storage = optuna.storages.RDBStorage(url)
    storage.upgrade()
    study = optuna.create_study(study_name="study/round1", storage=storage, load_if_exists=True)
    trial = study.ask({"x": optuna.distributions.FloatDistribution(0, 1)})
    trial.report(1.0, 1)
    study.tell(trial, 0.5)
    assert len(optuna.load_study(study_name="study/round1", storage=url).trials) == len(study.trials)


def use_store(url: str) -> None:
    store = open_store(url, study="study")
    store.record(RoundBegun(ROUND), TrialAsked(TRIAL), STARTED, COMPLETE)
    assert len(store.trials("round1")) == 1
    store.close()


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
@pytest.mark.parametrize(
    "users",
    [
        (use_optuna, use_store),
        (use_store, use_optuna),
        (use_optuna, use_store, use_optuna, use_store, use_optuna),
    ],
    ids=["optuna first", "store first", "in turns"],
)
def test_optuna_lives_in_the_same_database(url: str, users: tuple[Callable[[str], None], ...]) -> None:
    for use in users:
        use(url)
    for use in users:
        use(url)
    store = open_store(url, study="study")
    assert [trial.number for trial in store.trials("round1")] == [TRIAL.number]
    store.close()
    assert optuna.get_all_study_names(storage=url) == ["study/round1"]


def test_optuna_works_while_the_store_is_open(url: str) -> None:
    store = open_store(url, study="study")
    store.record(RoundBegun(ROUND))
    use_optuna(url)
    store.record(TrialAsked(TRIAL))
    study = optuna.load_study(study_name="study/round1", storage=url)
    trial = study.ask()
    store.record(STARTED)
    study.tell(trial, 1.0)
    assert store.trials("round1")[0].optuna_trial == TRIAL.optuna_trial
    store.close()
