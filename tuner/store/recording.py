"""How each kind of fact is kept: the rows that it writes, and what is known again from them.

Statements may run again, in the same transaction or a later one. The rules are those that each fact's class
states, and `MemoryStore` passes the same contract.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import cache, lru_cache
from typing import Any, TypeVar, get_type_hints

from sqlalchemy import (
    ColumnElement,
    Connection,
    Row,
    Select,
    Table,
    Update,
    and_,
    bindparam,
    case,
    or_,
    select,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite

from tuner.records import (
    Answered,
    AnswerScore,
    Attempt,
    AttemptFact,
    AttemptStarted,
    BranchAdvanced,
    Checkpoint,
    CheckpointKind,
    CheckpointsRemoved,
    Continuation,
    Ended,
    Evaluated,
    Fact,
    FinalScore,
    Measured,
    NodeChanged,
    Objective,
    Progressed,
    PromotionPlanned,
    RoundBegun,
    Saved,
    Started,
    Trial,
    TrialAsked,
    TrialEnded,
    TrialFact,
    TrialNoted,
    TrialScored,
    TrialState,
    branch_from_json,
    from_json,
    hyperparameters_from_json,
    to_json,
)
from tuner.records.state import RoundFacts, SavedCheckpoint, TrialFacts
from tuner.records.throughput import Throughput
from tuner.records.trials import Packed, recorded_evaluation
from tuner.store.schema import (
    ANSWER_SCORES,
    ATTEMPTS,
    BRANCHES,
    CHECKPOINTS,
    EVALUATIONS,
    FINAL_SCORES,
    NODE_CHANGES,
    PROMOTIONS,
    ROUNDS,
    THROUGHPUTS,
    TRIALS,
    numbers,
)

F = TypeVar("F", bound=Fact)

Write = Callable[["Recorder", Any], None]
Read = Callable[[Any, Row[Any]], None]
"""Takes a row over into what is known of its round (RoundFacts) or of its trial (TrialFacts)."""

WRITES: dict[type[Fact], Write] = {}
TRIAL_ROWS: dict[Table, Read] = {}
"""Tables with rows about a trial, by their column `trial`."""
ROUND_ROWS: dict[Table, Read] = {}
"""Tables with rows about a round, by their column `round`."""


def kept(
    kind: type[Fact],
    table: Table,
    *,
    replacing: Collection[str] | None = None,
    read: Read | None = None,
) -> None:
    """Keep facts of a kind as rows of a table, whose columns are named as the fields of fact and payload.

    Where a key is taken, a fact replaces these columns (default: all; with none the first said counts).
    `read` takes a row over; by default the fact is made from it again and changes what is known.
    """

    def write(to: Recorder, fact: Fact) -> None:
        to.insert(table, _flat(fact, table), replacing=replacing)

    WRITES[kind] = write
    rows = TRIAL_ROWS if issubclass(kind, TrialFact) else ROUND_ROWS
    rows[table] = read or (lambda known, row: _fact(kind, dict(row._mapping)).change(known))


def _writes(kind: type[F]) -> Callable[[Callable[[Recorder, F], None]], Callable[[Recorder, F], None]]:
    def keep(write: Callable[[Recorder, F], None]) -> Callable[[Recorder, F], None]:
        WRITES[kind] = write
        return write

    return keep


def _reads(table: Table, rows: dict[Table, Read] = TRIAL_ROWS) -> Callable[[Read], Read]:
    def keep(read: Read) -> Read:
        rows[table] = read
        return read

    return keep


def _flat(fact: Fact, table: Table) -> dict[str, Any]:
    """Return the values of a fact's fields, and of records in them, for which the table has columns."""
    values: dict[str, Any] = {}
    for each in fields(fact):  # type: ignore[arg-type]  # every fact is a dataclass
        value = getattr(fact, each.name)
        record = is_dataclass(value)
        values |= {f.name: getattr(value, f.name) for f in fields(value)} if record else {each.name: value}
    return {
        name: value if isinstance(value, (tuple, Packed)) and name != "attempts" else to_json(value)
        for name, value in values.items()
        if name in table.columns
    }


def _fact(kind: type[F], row: Mapping[str, Any]) -> Any:
    """Return the fact that a row was written from."""
    hints, values = get_type_hints(kind), dict(row)
    for name, hint in hints.items():
        if is_dataclass(hint):
            names = {each.name for each in fields(hint)}
            values[name] = {each: values.pop(each) for each in names & values.keys()}
    own = {each.name for each in fields(kind)}  # type: ignore[arg-type]  # every fact is a dataclass
    return from_json(kind, {name: value for name, value in values.items() if name in own})


@dataclass(frozen=True)
class Recorder:
    """Writes facts of one study, in the transaction that the connection is in."""

    connection: Connection
    study: str

    def write(self, fact: Fact) -> None:
        """Write one fact.

        Raises FactError, or IntegrityError where a foreign key shows that its subject is not recorded.
        """
        if isinstance(fact, AttemptFact):
            fact.refuse_comparison()
        WRITES[type(fact)](self, fact)

    # --- the only statements, each kept to the study and built once ---------------------------------

    def has_trial(self, fact: TrialFact) -> bool:
        """Whether the trial is recorded."""
        return self.first(TRIALS, round=fact.round, number=fact.trial) is not None

    def first(self, table: Table, **key: Any) -> Row[Any] | None:
        """Return the row with this key."""
        statement = _selected(table, tuple(key))
        return self.connection.execute(statement, _keyed(self.study, key)).first()

    def change(
        self,
        table: Table,
        key: Mapping[str, Any],
        *,
        raised: Mapping[str, Any] | None = None,
        if_null: str | None = None,
        **values: Any,
    ) -> int:
        """Update the rows of a key; how many there were.

        `raised` values replace lower ones alone; with `if_null` that column must have no value yet.
        """
        raised = raised or {}
        statement = _updated(table, tuple(key), tuple(values), tuple(raised), if_null)
        new = {f"new_{name}": value for name, value in {**values, **raised}.items()}
        return self.connection.execute(statement, {**_keyed(self.study, key), **new}).rowcount

    def insert(
        self,
        table: Table,
        values: Mapping[str, Any],
        *,
        replacing: Collection[str] | None = None,
        where: Condition | None = None,
    ) -> bool:
        """Insert a row; where its key is taken, replace these columns (default: all) if `where` holds.

        Whether anything was written, where there is a condition.
        """
        dialect = self.connection.dialect.name
        columns = None if replacing is None else tuple(replacing)
        statement = _inserted(dialect, table, tuple(values), columns, where)
        done = self.connection.execute(statement, {"study": self.study, **values})
        return where is None or done.first() is not None


Condition = Callable[[Any], ColumnElement[bool]]
"""Of the columns of the row that is to be inserted."""


def _keyed(study: str, key: Mapping[str, Any]) -> dict[str, Any]:
    return {"key_study": study, **{f"key_{name}": value for name, value in key.items()}}


def _has_key(table: Table, key: tuple[str, ...]) -> ColumnElement[bool]:
    return and_(*(table.c[name] == bindparam(f"key_{name}") for name in ("study", *key)))


@cache
def _selected(table: Table, key: tuple[str, ...]) -> Select[Any]:
    return select(table).where(_has_key(table, key))


@cache
def _updated(
    table: Table, key: tuple[str, ...], names: tuple[str, ...], raised: tuple[str, ...], if_null: str | None
) -> Update:
    new = {name: bindparam(f"new_{name}", type_=table.c[name].type) for name in (*names, *raised)}
    values: dict[str, Any] = {name: new[name] for name in names}
    for name in raised:
        values[name] = case((table.c[name] < new[name], new[name]), else_=table.c[name])
    statement = update(table).where(_has_key(table, key)).values(values)
    return statement if if_null is None else statement.where(table.c[if_null].is_(None))


@cache
def _inserted(
    dialect: str,
    table: Table,
    names: tuple[str, ...],
    replacing: tuple[str, ...] | None,
    where: Condition | None,
) -> Any:
    statement: Any = (postgresql if dialect == "postgresql" else sqlite).insert(table)
    statement = statement.values(
        {name: bindparam(name, type_=table.c[name].type) for name in ("study", *names)}
    )
    key = [column.name for column in table.primary_key]
    replaced = [name for name in names if name not in key] if replacing is None else replacing
    if not replaced:
        return statement.on_conflict_do_nothing(index_elements=key)
    statement = statement.on_conflict_do_update(
        index_elements=key,
        set_={name: statement.excluded[name] for name in replaced},
        where=None if where is None else where(statement.excluded),
    )
    return statement if where is None else statement.returning(*table.primary_key)


# --- rounds and trials --------------------------------------------------------------------------------


@_writes(RoundBegun)
def _begin_round(to: Recorder, fact: RoundBegun) -> None:
    if not to.insert(ROUNDS, _flat(fact, ROUNDS), replacing=["spec"], where=_has_same_horizon):
        fact.refuse_other_horizon(None)


def _has_same_horizon(said: Any) -> ColumnElement[bool]:
    return and_(ROUNDS.c.max_train_steps == said.max_train_steps)


@_writes(TrialAsked)
def _ask_trial(to: Recorder, fact: TrialAsked) -> None:
    trial = fact.trial
    values = {
        "round": trial.round,
        "number": trial.number,
        "hyperparameters": dict(trial.hyperparameters),
        "continues": None if trial.continues is None else str(trial.continues),
        "optuna_trial": trial.optuna_trial,
    }
    to.insert(TRIALS, values, replacing=["optuna_trial"])
    known = to.first(TRIALS, round=trial.round, number=trial.number)
    assert known is not None
    fact.refuse_other(asked_trial(known, known.hyperparameters).asked)


@_writes(TrialNoted)
def _note(to: Recorder, fact: TrialNoted) -> None:
    if not to.change(TRIALS, _trial(fact), note=fact.reason):
        raise fact.not_recorded()


@_writes(TrialEnded)
def _end_trial(to: Recorder, fact: TrialEnded) -> None:
    end: dict[str, Any] = {"state": str(fact.state), "reason": fact.reason, "ended_at": fact.at}
    if not to.change(TRIALS, _trial(fact), if_null="state", **end) and not to.has_trial(fact):
        raise fact.not_recorded()


def asked_trial(row: Any, hyperparameters: Mapping[str, Any]) -> TrialFacts:
    """Return what the row of a trial records, with its hyperparameters as JSON has them."""
    # By place, here and below: a column by its name takes longer than the rest of reading a row.
    _, name, number, _, continues, optuna_trial, state, reason, note, _ = row
    return TrialFacts(
        Trial(
            name,
            number,
            hyperparameters_from_json(hyperparameters),
            continues=None if continues is None else Continuation.parse(continues),
            optuna_trial=optuna_trial,
        ),
        ended=None if state is None else TrialState(state),
        reason=reason,
        note=note,
    )


# --- attempts -----------------------------------------------------------------------------------------


@_writes(AttemptStarted)
def _start_attempt(to: Recorder, fact: AttemptStarted) -> None:
    values = {
        "round": fact.round,
        "trial": fact.trial,
        "number": fact.attempt,
        "from_step": fact.from_step,
        "to_step": fact.from_step,
        "started_at": fact.at,
    }
    to.insert(ATTEMPTS, values, replacing=[])


@_writes(Started)
def _place_attempt(to: Recorder, fact: Started) -> None:
    placed: dict[str, Any] = {"environment": dict(fact.environment)} if fact.environment else {}
    if not to.change(ATTEMPTS, _of_attempt(fact), raised={"to_step": fact.step}, **placed):
        raise fact.not_recorded()


@_writes(Progressed)
def _run_steps(to: Recorder, fact: Progressed) -> None:
    _reach(to, fact, fact.step)


@_writes(Ended)
def _end_attempt(to: Recorder, fact: Ended) -> None:
    assert fact.at is not None
    _reach(to, fact, fact.step)
    end: dict[str, Any] = {"ended_at": fact.at, "outcome": fact.outcome, "message": fact.reason}
    to.change(ATTEMPTS, _of_attempt(fact), if_null="ended_at", **end)


@_reads(ATTEMPTS)
def _attempt(known: TrialFacts, row: Any) -> None:
    _, _, _, number, from_step, to_step, started_at, ended_at, outcome, message, environment = row
    known.attempts[number] = Attempt(
        number, from_step, to_step, started_at, ended_at, outcome, message, _environment(environment)
    )


@lru_cache(maxsize=1024)
def _environment(text: str) -> dict[str, str]:
    """Parse an environment; most attempts of a round share one."""
    found: dict[str, str] = json.loads(text)
    return found


def _reach(to: Recorder, fact: AttemptFact, step: int) -> None:
    if not to.change(ATTEMPTS, _of_attempt(fact), raised={"to_step": step}):
        raise fact.not_recorded()


# --- evaluations and checkpoints ----------------------------------------------------------------------


@_writes(Evaluated)
def _evaluate(to: Recorder, fact: Evaluated) -> None:
    to.insert(EVALUATIONS, _flat(fact, EVALUATIONS))
    to.change(ATTEMPTS, _of_attempt(fact), raised={"to_step": fact.evaluation.step})


@_reads(EVALUATIONS)
def _evaluation(known: TrialFacts, row: Any) -> None:
    _, step, loss, train_loss, rate, clipped, nll, tokens, correct, metrics, objective = row
    known.evaluations[step] = recorded_evaluation(
        step,
        # SQLite has text where the number is NaN.
        loss if loss.__class__ is float else float(loss),
        train_loss if train_loss is None or train_loss.__class__ is float else float(train_loss),
        rate if rate is None or rate.__class__ is float else float(rate),
        clipped,
        () if nll is None else Packed(nll),
        () if tokens is None else _tokens(tokens),
        correct,
        json.loads(metrics) if metrics else {},
        _objective(objective) if objective else None,
    )


@lru_cache(maxsize=64)
def _objective(content: str) -> Objective:
    """Parse an objective; all evaluations of a round share one."""
    return from_json(Objective, json.loads(content))


@lru_cache(maxsize=1024)
def _tokens(content: bytes) -> tuple[int, ...]:
    """Unpack token counts; all evaluations of a round share them."""
    return numbers(content, "i")


@_writes(Saved)
def _save_checkpoint(to: Recorder, fact: Saved) -> None:
    to.insert(CHECKPOINTS, {**_flat(fact, CHECKPOINTS), "removed": False}, where=_is_newer)
    to.change(ATTEMPTS, _of_attempt(fact), raised={"to_step": fact.checkpoint.step})


def _is_newer(said: Any) -> ColumnElement[bool]:
    there_already = CHECKPOINTS.c.attempt == said.attempt
    return or_(CHECKPOINTS.c.attempt < said.attempt, and_(there_already, ~CHECKPOINTS.c.removed))


@_writes(CheckpointsRemoved)
def _remove_checkpoints(to: Recorder, fact: CheckpointsRemoved) -> None:
    if not to.has_trial(fact):
        raise fact.not_recorded()
    for path in fact.paths:
        to.change(CHECKPOINTS, {"round": fact.round, "trial": fact.trial, "path": path}, removed=True)


@_reads(CHECKPOINTS)
def _checkpoint(known: TrialFacts, row: Row[Any]) -> None:
    kind = CheckpointKind(row.kind)
    checkpoint = Checkpoint(kind, row.step, row.path, row.size_bytes, row.sha256)
    known.checkpoints[kind, row.step] = SavedCheckpoint(row.attempt, checkpoint, row.removed)


# --- what one row says --------------------------------------------------------------------------------


def _final_score(known: TrialFacts, row: Row[Any]) -> None:
    known.final_score = _payload(FinalScore, row)


def _answer_score(known: TrialFacts, row: Row[Any]) -> None:
    known.answer_score = _payload(AnswerScore, row)


def _throughput(known: RoundFacts, row: Row[Any]) -> None:
    known.throughputs[row.session] = _payload(Throughput, row)


def _branch(known: RoundFacts, row: Row[Any]) -> None:
    values = {name: value for name, value in row._mapping.items() if name not in ("study", "round")}
    known.branches[row.trial, row.max_train_steps] = branch_from_json(values)


def _payload(kind: type[Any], row: Row[Any]) -> Any:
    return kind(**{each.name: row._mapping[each.name] for each in fields(kind)})


kept(TrialScored, FINAL_SCORES, replacing=(), read=_final_score)
kept(Answered, ANSWER_SCORES, read=_answer_score)
kept(BranchAdvanced, BRANCHES, read=_branch)
kept(Measured, THROUGHPUTS, read=_throughput)
kept(NodeChanged, NODE_CHANGES, replacing=())


@_writes(PromotionPlanned)
def _plan_promotion(to: Recorder, fact: PromotionPlanned) -> None:
    to.insert(PROMOTIONS, _flat(fact, PROMOTIONS))


def _trial(fact: TrialFact) -> dict[str, Any]:
    return {"round": fact.round, "number": fact.trial}


def _of_attempt(fact: AttemptFact) -> dict[str, Any]:
    return {"round": fact.round, "trial": fact.trial, "number": fact.attempt}
