"""What each fact writes: statements that may run again, in the same transaction or a later one."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, assert_never

from sqlalchemy import ColumnElement, Connection, CursorResult, Table, and_, case, or_, select, update
from sqlalchemy.dialects import postgresql, sqlite

from tuner.records import RoundRecord, Trial, hyperparameters_from_json, to_json
from tuner.store.facts import (
    AttemptEnded,
    AttemptPlaced,
    AttemptStarted,
    BranchAdvanced,
    CheckpointSaved,
    CheckpointsRemoved,
    EvaluationMade,
    Fact,
    FactError,
    PromotionPlanned,
    RoundBegun,
    StepsRun,
    TrialAnswered,
    TrialAsked,
    TrialEnded,
    TrialNoted,
    TrialScored,
    WorkMeasured,
    not_recorded,
)
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


@dataclass(frozen=True)
class Recorder:
    """Writes facts of one study, in the transaction that the connection is in."""

    connection: Connection
    study: str

    def write(self, fact: Fact) -> None:
        """Write one fact, by the rules that `facts` states.

        Raises FactError, or IntegrityError where a foreign key shows that its subject is not recorded.
        """
        match fact:
            case RoundBegun(round=record):
                self._begin_round(record)
            case TrialAsked(trial=trial):
                self._ask_trial(trial)
            case AttemptStarted():
                self._start_attempt(fact)
            case AttemptPlaced(environment=environment):
                if not self._update(ATTEMPTS, _is_attempt(fact), environment=dict(environment)):
                    raise not_recorded(fact)
            case StepsRun():
                self._run_steps(fact)
            case EvaluationMade():
                self._make_evaluation(fact)
            case CheckpointSaved():
                self._save_checkpoint(fact)
            case CheckpointsRemoved():
                self._remove_checkpoints(fact)
            case AttemptEnded():
                self._end_attempt(fact)
            case TrialEnded():
                self._end_trial(fact)
            case TrialNoted():
                self._require_trial(fact)
                self._update(TRIALS, _is_trial(fact), note=fact.reason)
            case TrialScored(round=name, trial=trial_number, score=score):
                values = {"round": name, "trial": trial_number, **to_json(score)}
                self._upsert(FINAL_SCORES, values, replacing=[])
            case TrialAnswered(round=name, trial=trial_number, score=answers):
                self._upsert(ANSWER_SCORES, {"round": name, "trial": trial_number, **to_json(answers)})
            case BranchAdvanced(round=name, branch=branch):
                self._upsert(BRANCHES, {"round": name, **to_json(branch)})
            case WorkMeasured(round=name, throughput=throughput):
                self._upsert(THROUGHPUTS, {"round": name, **to_json(throughput)})
            case PromotionPlanned(promotion=promotion):
                self._upsert(PROMOTIONS, to_json(promotion))
            case _:
                assert_never(fact)

    def _begin_round(self, record: RoundRecord) -> None:
        same_horizon = ROUNDS.c.max_train_steps == record.max_train_steps
        values = {name: value for name, value in to_json(record).items() if name in ROUNDS.columns}
        if not self._upsert(ROUNDS, values, replacing=["spec"], where=same_horizon):
            raise FactError(
                f"{record.name} has begun with other max_train_steps than {record.max_train_steps}"
            )

    def _ask_trial(self, trial: Trial) -> None:
        values = {
            "round": trial.round,
            "number": trial.number,
            "hyperparameters": dict(trial.hyperparameters),
            "continues": None if trial.continues is None else str(trial.continues),
            "optuna_trial": trial.optuna_trial,
        }
        self._upsert(TRIALS, values, replacing=["optuna_trial"])
        is_trial = and_(TRIALS.c.round == trial.round, TRIALS.c.number == trial.number)
        asked = self._select(TRIALS, is_trial).one()
        same = hyperparameters_from_json(asked.hyperparameters) == dict(trial.hyperparameters)
        if not same or asked.continues != values["continues"]:
            raise FactError(f"{trial.round}/{trial.number} was asked with other hyperparameters")

    def _start_attempt(self, fact: AttemptStarted) -> None:
        values = {
            "round": fact.round,
            "trial": fact.trial,
            "number": fact.attempt,
            "from_step": fact.from_step,
            "to_step": fact.from_step,
            "started_at": fact.at,
        }
        self._upsert(ATTEMPTS, values, replacing=[])

    def _run_steps(self, fact: StepsRun | AttemptEnded) -> None:
        highest = case((ATTEMPTS.c.to_step < fact.to_step, fact.to_step), else_=ATTEMPTS.c.to_step)
        if not self._update(ATTEMPTS, _is_attempt(fact), to_step=highest):
            raise not_recorded(fact)

    def _end_attempt(self, fact: AttemptEnded) -> None:
        self._run_steps(fact)
        is_open = and_(_is_attempt(fact), ATTEMPTS.c.ended_at.is_(None))
        self._update(ATTEMPTS, is_open, ended_at=fact.at, outcome=fact.outcome, message=fact.message)

    def _make_evaluation(self, fact: EvaluationMade) -> None:
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
            "correct_tokens": made.correct_tokens,
            "metrics": dict(made.metrics),
            "objective": to_json(made.objective) if made.objective else None,
        }
        self._upsert(EVALUATIONS, values)

    def _save_checkpoint(self, fact: CheckpointSaved) -> None:
        values = {
            "round": fact.round,
            "trial": fact.trial,
            "attempt": fact.attempt,
            **to_json(fact.checkpoint),
            "removed": False,
        }
        there_already = CHECKPOINTS.c.attempt == fact.attempt
        newer = or_(CHECKPOINTS.c.attempt < fact.attempt, and_(there_already, ~CHECKPOINTS.c.removed))
        self._upsert(CHECKPOINTS, values, where=newer)

    def _remove_checkpoints(self, fact: CheckpointsRemoved) -> None:
        self._require_trial(fact)
        is_gone = and_(
            CHECKPOINTS.c.round == fact.round,
            CHECKPOINTS.c.trial == fact.trial,
            CHECKPOINTS.c.path.in_(fact.paths),
        )
        self._update(CHECKPOINTS, is_gone, removed=True)

    def _end_trial(self, fact: TrialEnded) -> None:
        self._require_trial(fact)
        is_open = and_(_is_trial(fact), TRIALS.c.state.is_(None))
        self._update(TRIALS, is_open, state=str(fact.state), reason=fact.reason, ended_at=fact.at)

    def _require_trial(self, fact: CheckpointsRemoved | TrialEnded | TrialNoted) -> None:
        if self._select(TRIALS, _is_trial(fact)).first() is None:
            raise not_recorded(fact)

    # --- the only statements, each kept to the study ------------------------------------------------

    def _select(self, table: Table, where: ColumnElement[bool]) -> CursorResult[Any]:
        return self.connection.execute(select(table).where(table.c.study == self.study, where))

    def _update(self, table: Table, where: ColumnElement[bool], **values: Any) -> int:
        """How many rows there were to update."""
        statement = update(table).where(table.c.study == self.study, where).values(**values)
        return self.connection.execute(statement).rowcount

    def _upsert(
        self,
        table: Table,
        values: Mapping[str, Any],
        *,
        replacing: Collection[str] | None = None,
        where: ColumnElement[bool] | None = None,
    ) -> bool:
        """Insert a row; where its key is taken, replace these columns (default: all) if `where` holds.

        Whether anything was written.
        """
        dialect = postgresql if self.connection.dialect.name == "postgresql" else sqlite
        statement = dialect.insert(table).values(study=self.study, **values)
        key = [column.name for column in table.primary_key]
        names = values.keys() - set(key) if replacing is None else replacing
        if names:
            replaced = {name: statement.excluded[name] for name in names}
            statement = statement.on_conflict_do_update(index_elements=key, set_=replaced, where=where)
        else:
            statement = statement.on_conflict_do_nothing(index_elements=key)
        return self.connection.execute(statement.returning(*table.primary_key)).first() is not None


def _is_trial(fact: CheckpointsRemoved | TrialEnded | TrialNoted) -> ColumnElement[bool]:
    return and_(TRIALS.c.round == fact.round, TRIALS.c.number == fact.trial)


def _is_attempt(fact: AttemptPlaced | StepsRun | AttemptEnded) -> ColumnElement[bool]:
    return and_(
        ATTEMPTS.c.round == fact.round, ATTEMPTS.c.trial == fact.trial, ATTEMPTS.c.number == fact.attempt
    )
