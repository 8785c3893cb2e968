"""What each fact writes: statements that may run again, in the same transaction or a later one."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, assert_never

from sqlalchemy import ColumnElement, Connection, Table, and_, case, or_, select, update
from sqlalchemy.dialects import postgresql, sqlite

from tuner.records import Promotion, RoundRecord, Trial, hyperparameters_from_json, to_json
from tuner.store.facts import (
    AttemptEnded,
    AttemptStarted,
    CheckpointSaved,
    CheckpointsRemoved,
    EvaluationMade,
    Fact,
    FactError,
    PromotionPlanned,
    RoundBegun,
    StepsRun,
    TrialAsked,
    TrialEnded,
    TrialNoted,
    not_recorded,
)
from tuner.store.schema import ATTEMPTS, CHECKPOINTS, EVALUATIONS, PROMOTIONS, ROUNDS, TRIALS


def write(connection: Connection, fact: Fact) -> None:
    """Write one fact, by the rules that `facts` states.

    Raises FactError, or IntegrityError where a foreign key shows that its subject is not recorded.
    """
    match fact:
        case RoundBegun(round=record):
            _begin_round(connection, record)
        case TrialAsked(trial=trial):
            _ask_trial(connection, trial)
        case AttemptStarted():
            _start_attempt(connection, fact)
        case StepsRun():
            _run_steps(connection, fact)
        case EvaluationMade():
            _make_evaluation(connection, fact)
        case CheckpointSaved():
            _save_checkpoint(connection, fact)
        case CheckpointsRemoved():
            _remove_checkpoints(connection, fact)
        case AttemptEnded():
            _end_attempt(connection, fact)
        case TrialEnded():
            _end_trial(connection, fact)
        case TrialNoted():
            _require_trial(connection, fact)
            connection.execute(update(TRIALS).where(_is_trial(fact)).values(note=fact.reason))
        case PromotionPlanned(promotion=promotion):
            _plan_promotion(connection, promotion)
        case _:
            assert_never(fact)


def _begin_round(connection: Connection, record: RoundRecord) -> None:
    values = to_json(record)
    same_horizon = ROUNDS.c.max_train_steps == record.max_train_steps
    if not _upsert(connection, ROUNDS, values, replacing=["spec"], where=same_horizon):
        raise FactError(f"{record.name} has begun with other max_train_steps than {record.max_train_steps}")


def _ask_trial(connection: Connection, trial: Trial) -> None:
    values = {
        "round": trial.round,
        "number": trial.number,
        "hyperparameters": dict(trial.hyperparameters),
        "continues": None if trial.continues is None else str(trial.continues),
        "optuna_trial": trial.optuna_trial,
    }
    _upsert(connection, TRIALS, values, replacing=["optuna_trial"])
    is_trial = and_(TRIALS.c.round == trial.round, TRIALS.c.number == trial.number)
    asked = connection.execute(select(TRIALS.c.hyperparameters, TRIALS.c.continues).where(is_trial)).one()
    same = hyperparameters_from_json(asked.hyperparameters) == dict(trial.hyperparameters)
    if not same or asked.continues != values["continues"]:
        raise FactError(f"{trial.round}/{trial.number} was asked with other hyperparameters")


def _start_attempt(connection: Connection, fact: AttemptStarted) -> None:
    values = {
        "round": fact.round,
        "trial": fact.trial,
        "number": fact.attempt,
        "from_step": fact.from_step,
        "to_step": fact.from_step,
        "started_at": fact.at,
    }
    _upsert(connection, ATTEMPTS, values, replacing=[])


def _run_steps(connection: Connection, fact: StepsRun | AttemptEnded) -> None:
    highest = case((ATTEMPTS.c.to_step < fact.to_step, fact.to_step), else_=ATTEMPTS.c.to_step)
    if not connection.execute(update(ATTEMPTS).where(_is_attempt(fact)).values(to_step=highest)).rowcount:
        raise not_recorded(fact)


def _end_attempt(connection: Connection, fact: AttemptEnded) -> None:
    _run_steps(connection, fact)
    connection.execute(
        update(ATTEMPTS)
        .where(_is_attempt(fact), ATTEMPTS.c.ended_at.is_(None))
        .values(ended_at=fact.at, outcome=fact.outcome, message=fact.message)
    )


def _make_evaluation(connection: Connection, fact: EvaluationMade) -> None:
    made = fact.evaluation
    values = {
        "round": fact.round,
        "trial": fact.trial,
        "step": made.step,
        "eval_loss": made.eval_loss,
        "train_loss": made.train_loss,
        "learning_rate": made.learning_rate,
        "clipped_updates": made.clipped_updates,
        "example_nll": made.example_nll,
        "example_tokens": made.example_tokens,
    }
    _upsert(connection, EVALUATIONS, values)


def _save_checkpoint(connection: Connection, fact: CheckpointSaved) -> None:
    values = {
        "round": fact.round,
        "trial": fact.trial,
        "attempt": fact.attempt,
        **to_json(fact.checkpoint),
        "removed": False,
    }
    there_already = CHECKPOINTS.c.attempt == fact.attempt
    newer = or_(CHECKPOINTS.c.attempt < fact.attempt, and_(there_already, ~CHECKPOINTS.c.removed))
    _upsert(connection, CHECKPOINTS, values, where=newer)


def _remove_checkpoints(connection: Connection, fact: CheckpointsRemoved) -> None:
    _require_trial(connection, fact)
    connection.execute(
        update(CHECKPOINTS)
        .where(
            CHECKPOINTS.c.round == fact.round,
            CHECKPOINTS.c.trial == fact.trial,
            CHECKPOINTS.c.path.in_(fact.paths),
        )
        .values(removed=True)
    )


def _end_trial(connection: Connection, fact: TrialEnded) -> None:
    _require_trial(connection, fact)
    connection.execute(
        update(TRIALS)
        .where(_is_trial(fact), TRIALS.c.state.is_(None))
        .values(state=str(fact.state), reason=fact.reason, ended_at=fact.at)
    )


def _plan_promotion(connection: Connection, promotion: Promotion) -> None:
    _upsert(connection, PROMOTIONS, to_json(promotion))


def _upsert(
    connection: Connection,
    table: Table,
    values: Mapping[str, Any],
    *,
    replacing: Collection[str] | None = None,
    where: ColumnElement[bool] | None = None,
) -> bool:
    """Insert a row; where its key is taken, replace these columns (default: all) if `where` holds.

    Whether anything was written.
    """
    dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
    statement = dialect.insert(table).values(**values)
    key = [column.name for column in table.primary_key]
    names = values.keys() - set(key) if replacing is None else replacing
    if names:
        replaced = {name: statement.excluded[name] for name in names}
        statement = statement.on_conflict_do_update(index_elements=key, set_=replaced, where=where)
    else:
        statement = statement.on_conflict_do_nothing(index_elements=key)
    return connection.execute(statement.returning(*table.primary_key)).first() is not None


def _require_trial(connection: Connection, fact: CheckpointsRemoved | TrialEnded | TrialNoted) -> None:
    if connection.execute(select(TRIALS.c.number).where(_is_trial(fact))).first() is None:
        raise not_recorded(fact)


def _is_trial(fact: CheckpointsRemoved | TrialEnded | TrialNoted) -> ColumnElement[bool]:
    return and_(TRIALS.c.round == fact.round, TRIALS.c.number == fact.trial)


def _is_attempt(fact: StepsRun | AttemptEnded) -> ColumnElement[bool]:
    return and_(
        ATTEMPTS.c.round == fact.round, ATTEMPTS.c.trial == fact.trial, ATTEMPTS.c.number == fact.attempt
    )
