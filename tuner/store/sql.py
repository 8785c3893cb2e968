"""The SQL store: facts are written in transactions, and assembled into records when read."""

from __future__ import annotations

import gc
import itertools
import json
import sqlite3
import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from typing import Any

from sqlalchemy import (
    URL,
    ColumnElement,
    Connection,
    Engine,
    Select,
    Table,
    create_engine,
    func,
    null,
    select,
    type_coerce,
)
from sqlalchemy.exc import IntegrityError
from sqlalchemy.types import NullType

from tuner.records import Fact, Promotion, RoundKind, RoundRecord, Trial, TrialState
from tuner.records.state import RoundFacts
from tuner.store.database import (
    exists,
    explained,
    is_only_readable,
    is_sqlite,
    open_engine,
    open_read_only,
    parse_url,
    read_only,
    reading,
    refusal_of,
    refuse_encoding,
    shown_url,
    whole_or_absent,
    writing,
)
from tuner.store.migrations import newest_revision, one_by_one, revision_of, upgrade
from tuner.store.recording import ROUND_ROWS, TRIAL_ROWS, Recorder, asked_trial
from tuner.store.schema import ATTEMPTS, EVALUATIONS, PROMOTIONS, ROUNDS, TRIALS
from tuner.store.turn import Turn

_AS_KEPT = NullType()
_READ_AS_KEPT = {
    EVALUATIONS: (
        "eval_loss",
        "train_loss",
        "learning_rate",
        "example_nll",
        "example_tokens",
        "metrics",
        "objective",
    ),
    ATTEMPTS: ("environment",),
    TRIALS: ("hyperparameters",),
}
"""Columns of long tables whose readers convert the values themselves: one call for each would take longer."""


_OF_EXAMPLES = ("example_nll", "example_tokens")
"""Columns of evaluations that grow with the evaluation set."""
_KNOWN = ("study", "round")
"""Columns that whoever reads a round's evaluations knows; to read them again takes longer."""
_NUMBERS_AT_ONCE = 500
"""Trials in one statement, whose number of values databases limit."""
_ROWS_AT_ONCE = 100
"""Fetching rows one by one, or all at once, takes longer (docs/log.md)."""


@dataclass(frozen=True, slots=True)
class Revision:
    """The schema revision of a database."""

    place: str
    """The file or the server, without a password."""
    found: str | None
    """None: none of our tables are there yet."""
    newest: str
    """The last that this version of tuner knows."""
    is_newer: bool
    """Whether the database was made by a newer version."""


def revision(url: str) -> Revision:
    """Return the schema revision of the tables at a URL. Changes nothing.

    Raises StorageError for a database that cannot be reached or read.
    """
    target = parse_url(url)
    place = str(target.database) if is_sqlite(target) else shown_url(target)
    there = exists(url)
    engine = create_engine("sqlite://", creator=lambda: read_only(target)) if is_sqlite(target) else None
    engine = engine or open_engine(target)
    try:
        with explained(target):
            found, newest, is_newer = revision_of(engine) if there else (None, newest_revision(), False)
    finally:
        engine.dispose()
    return Revision(place, found, newest, is_newer)


@contextmanager
def making_tables(url: str) -> Iterator[None]:
    """Keep other processes from making tables in the database meanwhile: Optuna's fail at the same moment."""
    target = parse_url(url)
    engine = open_engine(target)
    try:
        with explained(target), one_by_one(engine):
            yield
    finally:
        engine.dispose()


def refuse_damaged(url: str) -> None:
    """Raise StorageError for an SQLite file with a damaged page. Reads the file, changes nothing."""
    target = parse_url(url)
    if not is_sqlite(target) or not exists(url):
        return
    try:
        with closing(read_only(target)) as connection:
            (found,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    except sqlite3.OperationalError:
        return  # in use, or not readable: whoever opens it says so
    except sqlite3.DatabaseError as error:
        raise refusal_of(target, " ".join(str(error).split())) from error
    if found != "ok":
        raise refusal_of(target, f"a page is damaged ({' '.join(str(found).split())})")


def open_store(url: str, *, study: str) -> SqlStore:
    """Open the store of one study, in the database at a URL.

    The database and our tables are created, or brought up to date; other studies in it are not seen.
    Raises StorageError when that cannot be done, and then leaves no file that was not there before.
    """
    target = parse_url(url)
    engine = open_engine(target)
    with ExitStack() as undo:
        undo.callback(engine.dispose)
        with whole_or_absent(target), explained(target):
            if not is_sqlite(target):
                with engine.connect() as connection:
                    refuse_encoding(target, connection)
            upgrade(engine)
            with reading(engine) as connection:
                turn = Turn.found(connection, study)
        undo.pop_all()
    return SqlStore(target, engine, study, turn)


def open_to_read(url: str, *, study: str) -> SqlStore:
    """Open the store of one study as `open_store` does, or only to read where its file cannot be written.

    Such a store raises StorageError when it is to record, and at once for tables of an earlier version.
    """
    target = parse_url(url)
    if not is_only_readable(target):
        return open_store(url, study=study)
    engine = open_read_only(target)
    with ExitStack() as undo, explained(target):
        undo.callback(engine.dispose)
        upgrade(engine)
        with reading(engine) as connection:
            turn = Turn.found(connection, study)
        undo.pop_all()
    return SqlStore(target, engine, study, turn)


class SqlStore:
    """A Store in SQLite or PostgreSQL. Made by `open_store`; safe to use from several threads."""

    def __init__(self, url: URL, engine: Engine, study: str, turn: Turn) -> None:
        self._url = url
        self._engine = engine
        self._study = study
        self._turn = turn
        self._one_by_one = threading.Lock()

    def record(self, *facts: Fact) -> None:
        """As `Store` says, in one transaction.

        Raises StudyTaken where somebody else has recorded facts of the study since this store was opened.
        """
        with explained(self._url), self._one_by_one:
            with writing(self._engine) as connection:
                turn = self._turn.taken(connection)
                self._write(connection, facts)
            self._turn = turn

    def _write(self, connection: Connection, facts: Sequence[Fact]) -> None:
        recorder = Recorder(connection, self._study)
        for fact in facts:
            try:
                recorder.write(fact)
            except IntegrityError as error:
                if not _is_foreign_key(error):
                    raise
                raise fact.not_recorded() from error

    def rounds(self) -> tuple[RoundRecord, ...]:
        """As `Store` says."""
        return self._rounds()

    def round(self, name: str) -> RoundRecord | None:
        """As `Store` says."""
        return next(iter(self._rounds(name=name)), None)

    def _rounds(self, **begun: str) -> tuple[RoundRecord, ...]:
        known: dict[str, RoundFacts] = {}
        of = {"round": begun["name"]} if begun else {}
        with explained(self._url), reading(self._engine) as connection:
            for row in self._rows(connection, ROUNDS, ROUNDS.c.begun_at, ROUNDS.c.name, **begun):
                record = RoundRecord(**{**row, "kind": RoundKind(row["kind"])})
                known[record.name] = RoundFacts(record)
            for table, read in ROUND_ROWS.items():
                for found in connection.execute(self._select(table, **of)):
                    read(known[found.round], found)
        return tuple(facts.record() for facts in known.values())

    def trials(
        self, round: str, *, numbers: Collection[int] | None = None, examples: bool = True
    ) -> tuple[Trial, ...]:
        """As `Store` says."""
        if numbers is None:
            return self._read(round, examples=examples)
        order, size = tuple(sorted(numbers)), _NUMBERS_AT_ONCE
        parts = (order[at : at + size] for at in range(0, len(order), size))
        return tuple(trial for part in parts for trial in self._read(round, part, examples=examples))

    def trial(self, round: str, number: int) -> Trial:
        """As `Store` says."""
        found = self._read(round, (number,))
        if not found:
            raise KeyError((round, number))
        return found[0]

    def num_results(self, round: str) -> int:
        """As `Store` says."""
        states = [state for state in TrialState if state.is_result]
        conditions = TRIALS.c.study == self._study, TRIALS.c.round == round, TRIALS.c.state.in_(states)
        with explained(self._url), reading(self._engine) as connection:
            return int(connection.scalar(select(func.count()).where(*conditions)) or 0)

    def _read(
        self, round: str, numbers: Sequence[int] | None = None, *, examples: bool = True
    ) -> tuple[Trial, ...]:
        """Return the round's trials, or those with these numbers."""
        asked: dict[str, Any] = {} if numbers is None else {"number": numbers}
        of: dict[str, Any] = {} if numbers is None else {"trial": numbers}
        unread = () if examples else _OF_EXAMPLES
        with explained(self._url), reading(self._engine) as connection, _uncollected():
            trials = connection.execute(self._select(TRIALS, TRIALS.c.number, round=round, **asked)).all()
            # In one document: to parse them one by one takes twice as long.
            values = json.loads(f"[{','.join(row.hyperparameters for row in trials)}]")
            known = {row.number: asked_trial(row, own) for row, own in zip(trials, values, strict=True)}
            for table, read in TRIAL_ROWS.items():
                omitted = _KNOWN if table is EVALUATIONS else ()
                place = table.columns.keys().index("trial") - len(omitted)
                rows = connection.execute(
                    self._select(table, omitted=omitted, unread=unread, round=round, **of)
                )
                for row in itertools.chain.from_iterable(rows.partitions(_ROWS_AT_ONCE)):
                    read(known[row[place]], row)
            return tuple(facts.trial() for facts in known.values())

    def promotions(self) -> tuple[Promotion, ...]:
        """As `Store` says."""
        order = PROMOTIONS.c.planned_at, PROMOTIONS.c.to_round
        with explained(self._url), reading(self._engine) as connection:
            return tuple(Promotion(**row) for row in self._rows(connection, PROMOTIONS, *order))

    def close(self) -> None:
        """As `Store` says."""
        self._engine.dispose()

    def _rows(
        self, connection: Connection, table: Table, *order: ColumnElement[Any], **equal: Any
    ) -> list[dict[str, Any]]:
        """Return the study's rows without the column of its name."""
        found = connection.execute(self._select(table, *order, omitted=("study",), **equal))
        return [dict(row._mapping) for row in found]

    def _select(
        self,
        table: Table,
        *order: ColumnElement[Any],
        omitted: Sequence[str] = (),
        unread: Sequence[str] = (),
        **equal: Any,
    ) -> Select[Any]:
        """Select the study's rows with these values, or one of several; `unread` columns are NULL."""
        raw = _READ_AS_KEPT.get(table, ())
        columns = [
            null().label(column.name)
            if column.name in unread
            else type_coerce(column, _AS_KEPT).label(column.name)
            if column.name in raw
            else column
            for column in table.columns
            if column.name not in omitted
        ]
        conditions = [
            table.c.study == self._study,
            *(
                table.c[name].in_(value) if isinstance(value, tuple) else table.c[name] == value
                for name, value in equal.items()
            ),
        ]
        return select(*columns).where(*conditions).order_by(*order)


@contextmanager
def _uncollected() -> Iterator[None]:
    """Disable garbage collection, which would slow down a long read, and let what was read count as old.

    The next collection would scan all of it otherwise.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            if not gc.get_freeze_count():  # whoever has frozen objects keeps them so
                gc.freeze()
                gc.unfreeze()
            gc.enable()


def _is_foreign_key(error: IntegrityError) -> bool:
    in_sqlite = getattr(error.orig, "sqlite_errorname", None) == "SQLITE_CONSTRAINT_FOREIGNKEY"
    return in_sqlite or getattr(error.orig, "sqlstate", None) == "23503"
