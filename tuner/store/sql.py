"""The store that lasts: facts written in whole transactions, and assembled again when read."""

from __future__ import annotations

import sqlite3
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import URL, ColumnElement, Connection, Engine, Row, Select, Table, create_engine, select
from sqlalchemy.exc import IntegrityError

from tuner.records import (
    AnswerScore,
    Attempt,
    Branch,
    Checkpoint,
    CheckpointKind,
    Continuation,
    Evaluation,
    FinalScore,
    Promotion,
    RoundRecord,
    Throughput,
    Trial,
    TrialState,
    branch_from_json,
    hyperparameters_from_json,
    objective_from_json,
)
from tuner.store.database import (
    database_file,
    exists,
    explained,
    is_sqlite,
    open_engine,
    parse_url,
    reading,
    whole_or_absent,
    writing,
)
from tuner.store.facts import Fact, not_recorded, state_of
from tuner.store.migrations import newest_revision, revision_of, upgrade
from tuner.store.recording import Recorder
from tuner.store.schema import (
    ANSWER_SCORES,
    ATTEMPTS,
    BRANCHES,
    CHECKPOINTS,
    EVALUATIONS,
    FINAL_SCORES,
    PROMOTIONS,
    ROUNDS,
    THROUGHPUTS,
    TRIALS,
)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Revision:
    """How far the tables of a database have come."""

    place: str
    """The file or the server, without a password."""
    found: str | None
    """None: none of our tables are there yet."""
    newest: str
    """The last that this version of tuner knows."""
    is_newer: bool
    """Whether the database was made by a newer version."""


def revision(url: str) -> Revision:
    """How far the tables at a URL have come. Changes nothing.

    Raises StorageError for a database that cannot be reached or read.
    """
    target = parse_url(url)
    place = str(target.database) if is_sqlite(target) else target.render_as_string()
    there = exists(url)
    engine = create_engine("sqlite://", creator=lambda: _read_only(target)) if is_sqlite(target) else None
    engine = engine or open_engine(target)
    try:
        with explained(target):
            found, newest, is_newer = revision_of(engine) if there else (None, newest_revision(), False)
    finally:
        engine.dispose()
    return Revision(place, found, newest, is_newer)


def _read_only(target: URL) -> sqlite3.Connection:
    """A connection that leaves no file behind: one that may not write cannot take its journal away again."""
    file = database_file(target)
    mode = "mode=ro" if Path(f"{file}-wal").exists() else "immutable=1"
    return sqlite3.connect(f"{file.as_uri()}?{mode}", uri=True)


def open_store(url: str, *, study: str) -> SqlStore:
    """The facts of one study, in the database at a URL.

    The database and our tables are created, or brought up to date; other studies in it are not seen.
    Raises StorageError when that cannot be done, and then leaves no file that was not there before.
    """
    target = parse_url(url)
    engine = open_engine(target)
    with ExitStack() as undo:
        undo.callback(engine.dispose)
        with whole_or_absent(target), explained(target):
            upgrade(engine)
        undo.pop_all()
    return SqlStore(target, engine, study)


class SqlStore:
    """A Store in SQLite or PostgreSQL. Made by `open_store`; safe to use from several threads."""

    def __init__(self, url: URL, engine: Engine, study: str) -> None:
        self._url = url
        self._engine = engine
        self._study = study

    def record(self, *facts: Fact) -> None:
        """As `Store` says, in one transaction."""
        with explained(self._url), writing(self._engine) as connection:
            recorder = Recorder(connection, self._study)
            for fact in facts:
                try:
                    recorder.write(fact)
                except IntegrityError as error:
                    if not _is_foreign_key(error):
                        raise
                    raise not_recorded(fact) from error

    def rounds(self) -> tuple[RoundRecord, ...]:
        """As `Store` says."""
        measured: defaultdict[str, list[Throughput]] = defaultdict(list)
        branches: defaultdict[str, list[Branch]] = defaultdict(list)
        with explained(self._url), reading(self._engine) as connection:
            begun = self._rows(connection, ROUNDS, ROUNDS.c.begun_at, ROUNDS.c.name)
            for row in self._rows(connection, THROUGHPUTS):
                measured[row.pop("round")].append(Throughput(**row))
            for row in self._rows(connection, BRANCHES, BRANCHES.c.trial, BRANCHES.c.max_train_steps):
                branches[row.pop("round")].append(branch_from_json(row))
        return tuple(
            RoundRecord(
                **row,
                throughputs=tuple(sorted(measured[row["name"]], key=lambda t: t.session)),
                branches=tuple(branches[row["name"]]),
            )
            for row in begun
        )

    def trials(self, round: str) -> tuple[Trial, ...]:
        """As `Store` says."""
        return self._read(round, None)

    def trial(self, round: str, number: int) -> Trial:
        """As `Store` says."""
        found = self._read(round, number)
        if not found:
            raise KeyError((round, number))
        return found[0]

    def _read(self, round: str, number: int | None) -> tuple[Trial, ...]:
        """The round's trials, or the one of a number."""

        def rows(table: Table) -> Select[Any]:
            of_round = select(table).where(table.c.study == self._study, table.c.round == round)
            column = table.c.number if table is TRIALS else table.c.trial
            return of_round if number is None else of_round.where(column == number)

        with explained(self._url), reading(self._engine) as connection:
            asked = connection.execute(rows(TRIALS)).all()
            attempts = _by_trial(connection, rows(ATTEMPTS), _attempt)
            evaluations = _by_trial(connection, rows(EVALUATIONS), _evaluation)
            there = rows(CHECKPOINTS).where(CHECKPOINTS.c.removed.is_(False))
            checkpoints = _by_trial(connection, there, _checkpoint)
            scores = _by_trial(connection, rows(FINAL_SCORES), _final_score)
            answers = _by_trial(connection, rows(ANSWER_SCORES), _answer_score)
        return tuple(
            _trial(
                row,
                attempts[row.number],
                evaluations[row.number],
                checkpoints[row.number],
                scores[row.number],
                answers[row.number],
            )
            for row in sorted(asked, key=lambda row: row.number)
        )

    def promotions(self) -> tuple[Promotion, ...]:
        """As `Store` says."""
        order = PROMOTIONS.c.planned_at, PROMOTIONS.c.to_round
        with explained(self._url), reading(self._engine) as connection:
            return tuple(Promotion(**row) for row in self._rows(connection, PROMOTIONS, *order))

    def close(self) -> None:
        """As `Store` says."""
        self._engine.dispose()

    def _rows(self, connection: Connection, table: Table, *order: ColumnElement[Any]) -> list[dict[str, Any]]:
        """The study's rows without its name."""
        columns = [column for column in table.columns if column.name != "study"]
        statement = select(*columns).where(table.c.study == self._study).order_by(*order)
        return [dict(row._mapping) for row in connection.execute(statement)]


def _is_foreign_key(error: IntegrityError) -> bool:
    in_sqlite = getattr(error.orig, "sqlite_errorname", None) == "SQLITE_CONSTRAINT_FOREIGNKEY"
    return in_sqlite or getattr(error.orig, "sqlstate", None) == "23503"


def _by_trial(connection: Connection, rows: Select[Any], make: Callable[[Row[Any]], T]) -> dict[int, list[T]]:
    found: defaultdict[int, list[T]] = defaultdict(list)
    for row in connection.execute(rows):
        found[row.trial].append(make(row))
    return found


def _trial(
    row: Row[Any],
    attempts: list[Attempt],
    evaluations: list[Evaluation],
    checkpoints: list[Checkpoint],
    scores: list[FinalScore],
    answers: list[AnswerScore],
) -> Trial:
    return Trial(
        round=row.round,
        number=row.number,
        hyperparameters=hyperparameters_from_json(row.hyperparameters),
        state=state_of(None if row.state is None else TrialState(row.state), attempts),
        reason=row.note if row.reason is None else row.reason,
        continues=None if row.continues is None else Continuation.parse(row.continues),
        evaluations=tuple(sorted(evaluations, key=lambda e: e.step)),
        checkpoints=tuple(sorted(checkpoints, key=lambda c: (c.step, c.kind))),
        attempts=tuple(sorted(attempts, key=lambda a: a.number)),
        optuna_trial=row.optuna_trial,
        final_score=next(iter(scores), None),
        answer_score=next(iter(answers), None),
    )


def _attempt(row: Row[Any]) -> Attempt:
    return Attempt(
        number=row.number,
        from_step=row.from_step,
        to_step=row.to_step,
        started_at=row.started_at,
        ended_at=row.ended_at,
        outcome=row.outcome,
        message=row.message,
        environment=row.environment,
    )


def _evaluation(row: Row[Any]) -> Evaluation:
    return Evaluation(
        step=row.step,
        eval_loss=row.eval_loss,
        train_loss=row.train_loss,
        learning_rate=row.learning_rate,
        clipped_updates=row.clipped_updates,
        example_nll=row.example_nll,
        example_tokens=row.example_tokens,
        correct_tokens=row.correct_tokens,
        metrics=row.metrics or {},
        objective=objective_from_json(row.objective),
    )


def _checkpoint(row: Row[Any]) -> Checkpoint:
    return Checkpoint(
        kind=CheckpointKind(row.kind),
        step=row.step,
        path=row.path,
        size_bytes=row.size_bytes,
        sha256=row.sha256,
    )


def _answer_score(row: Row[Any]) -> AnswerScore:
    return AnswerScore(
        step=row.step,
        metric=row.metric,
        mean=row.mean,
        standard_error=row.standard_error,
        num_examples=row.num_examples,
        is_objective=row.is_objective,
    )


def _final_score(row: Row[Any]) -> FinalScore:
    return FinalScore(
        step=row.step,
        loss=row.loss,
        standard_error=row.standard_error,
        num_examples=row.num_examples,
        num_tokens=row.num_tokens,
        rows=row.rows,
        scored_at=row.scored_at,
    )
