"""The store that forgets: the same facts by the same rules, for tests and for plans nobody keeps."""

from __future__ import annotations

import json
from collections import ChainMap
from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import dataclass, field, replace
from typing import Any

from tuner.records import (
    Attempt,
    Branch,
    Checkpoint,
    CheckpointKind,
    Evaluation,
    Promotion,
    RoundRecord,
    Throughput,
    Trial,
    hyperparameters_from_json,
)
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
    state_of,
)
from tuner.store.schema import storable_text


@dataclass(frozen=True, slots=True)
class _Saved:
    attempt: int
    checkpoint: Checkpoint
    is_removed: bool = False


@dataclass(frozen=True, slots=True)
class _Known:
    """What is known of a trial; `asked` is the trial as it was asked."""

    asked: Trial
    attempts: Mapping[int, Attempt] = field(default_factory=dict)
    evaluations: Mapping[int, Evaluation] = field(default_factory=dict)
    checkpoints: Mapping[tuple[CheckpointKind, int], _Saved] = field(default_factory=dict)
    ended: TrialEnded | None = None
    note: str | None = None
    scored: TrialScored | None = None
    answered: TrialAnswered | None = None

    @classmethod
    def of(cls, trial: Trial) -> _Known:
        """What is known of a trial that stands as it is."""
        newest = max((attempt.number for attempt in trial.attempts), default=1)
        ended_at = max((attempt.ended_at or 0.0 for attempt in trial.attempts), default=0.0)
        place = (trial.round, trial.number)
        is_final = trial.state.is_final
        return cls(
            Trial(*place, trial.hyperparameters, continues=trial.continues, optuna_trial=trial.optuna_trial),
            attempts={attempt.number: attempt for attempt in trial.attempts},
            evaluations={evaluation.step: evaluation for evaluation in trial.evaluations},
            checkpoints={(c.kind, c.step): _Saved(newest, c) for c in trial.checkpoints},
            ended=TrialEnded(*place, trial.state, trial.reason, ended_at) if is_final else None,
            note=None if is_final else trial.reason,
            scored=TrialScored(*place, trial.final_score) if trial.final_score else None,
            answered=TrialAnswered(*place, trial.answer_score) if trial.answer_score else None,
        )

    def trial(self) -> Trial:
        attempts = tuple(self.attempts[number] for number in sorted(self.attempts))
        there = [saved.checkpoint for saved in self.checkpoints.values() if not saved.is_removed]
        ended = self.ended
        return replace(
            self.asked,
            state=state_of(None if ended is None else ended.state, attempts),
            reason=self.note if ended is None or ended.reason is None else ended.reason,
            evaluations=tuple(self.evaluations[step] for step in sorted(self.evaluations)),
            checkpoints=tuple(sorted(there, key=lambda c: (c.step, c.kind))),
            attempts=attempts,
            final_score=None if self.scored is None else self.scored.score,
            answer_score=None if self.answered is None else self.answered.score,
        )


@dataclass
class _Facts:
    rounds: dict[str, RoundRecord] = field(default_factory=dict)
    """As they were said; their `throughputs` and `branches` do not count."""
    throughputs: dict[tuple[str, str], Throughput] = field(default_factory=dict)
    """By round and session."""
    branches: dict[tuple[str, int, int], Branch] = field(default_factory=dict)
    """By round, trial and horizon."""
    trials: MutableMapping[tuple[str, int], _Known] = field(default_factory=dict)
    promotions: dict[str, Promotion] = field(default_factory=dict)

    def on_top(self) -> _Facts:
        """The same facts, to which others can be added without changing these."""
        return _Facts(
            dict(self.rounds),
            dict(self.throughputs),
            dict(self.branches),
            ChainMap({}, self.trials),
            dict(self.promotions),
        )

    def settle(self, added: _Facts) -> None:
        """Take over what was added on top; of trials, which may be many, those that changed."""
        self.rounds, self.throughputs, self.branches = added.rounds, added.throughputs, added.branches
        self.promotions = added.promotions
        assert isinstance(added.trials, ChainMap)
        self.trials.update(added.trials.maps[0])

    def add(self, fact: Fact) -> None:
        match fact:
            case RoundBegun(round=record):
                self._begin_round(record)
            case TrialAsked(trial=trial):
                self._ask_trial(fact, trial)
            case BranchAdvanced(round=name, branch=branch):
                if (name, branch.trial) not in self.trials:
                    raise not_recorded(fact)
                self.branches[name, branch.trial, branch.max_train_steps] = _storable(branch)
            case WorkMeasured(round=name, throughput=throughput):
                if name not in self.rounds:
                    raise not_recorded(fact)
                self.throughputs[name, throughput.session] = throughput
            case PromotionPlanned(promotion=promotion):
                if promotion.from_round not in self.rounds:
                    raise not_recorded(fact)
                text = storable_text(promotion.file_text)
                self.promotions[promotion.to_round] = replace(
                    promotion, plan=_as_json(promotion.plan), file_text=text
                )
            case _:
                known = self.trials.get((fact.round, fact.trial))
                if known is None:
                    raise not_recorded(fact)
                self.trials[fact.round, fact.trial] = _learn(known, fact)

    def _begin_round(self, record: RoundRecord) -> None:
        begun = self.rounds.get(record.name, record)
        if begun.max_train_steps != record.max_train_steps:
            raise FactError(
                f"{record.name} has begun with other max_train_steps than {record.max_train_steps}"
            )
        self.rounds[record.name] = replace(begun, spec=_as_json(record.spec))

    def _ask_trial(self, fact: TrialAsked, trial: Trial) -> None:
        if trial.round not in self.rounds:
            raise not_recorded(fact)
        key = (trial.round, trial.number)
        asked = Trial(
            round=trial.round,
            number=trial.number,
            hyperparameters=hyperparameters_from_json(_as_json(trial.hyperparameters)),
            continues=trial.continues,
            optuna_trial=trial.optuna_trial,
        )
        known = self.trials.setdefault(key, _Known(asked))
        if (known.asked.hyperparameters, known.asked.continues) != (asked.hyperparameters, asked.continues):
            raise FactError(f"{trial.round}/{trial.number} was asked with other hyperparameters")
        self.trials[key] = replace(known, asked=asked)


def _learn(known: _Known, fact: Fact) -> _Known:
    match fact:
        case AttemptStarted():
            started = Attempt(fact.attempt, fact.from_step, fact.from_step, fact.at)
            return replace(known, attempts={fact.attempt: started, **known.attempts})
        case AttemptPlaced(environment=environment):
            return _change_attempt(known, fact, environment=dict(environment))
        case StepsRun() | AttemptEnded():
            return _run_steps(known, fact)
        case EvaluationMade(evaluation=made):
            return replace(known, evaluations={**known.evaluations, made.step: made})
        case CheckpointSaved():
            return _save_checkpoint(known, fact)
        case CheckpointsRemoved(paths=paths):
            checkpoints = {
                key: replace(saved, is_removed=saved.is_removed or saved.checkpoint.path in paths)
                for key, saved in known.checkpoints.items()
            }
            return replace(known, checkpoints=checkpoints)
        case TrialEnded(reason=reason):
            ended = replace(fact, reason=None if reason is None else storable_text(reason))
            return replace(known, ended=known.ended or ended)
        case TrialNoted(reason=reason):
            return replace(known, note=storable_text(reason))
        case TrialScored():
            return replace(known, scored=known.scored or fact)
        case TrialAnswered():
            return replace(known, answered=fact)
    raise AssertionError(fact)


def _run_steps(known: _Known, fact: StepsRun | AttemptEnded) -> _Known:
    attempt = _attempt(known, fact)
    known = _change_attempt(known, fact, to_step=max(attempt.to_step, fact.to_step))
    if isinstance(fact, AttemptEnded) and attempt.ended_at is None:
        message = None if fact.message is None else storable_text(fact.message)
        return _change_attempt(known, fact, ended_at=fact.at, outcome=fact.outcome, message=message)
    return known


def _change_attempt(known: _Known, fact: AttemptPlaced | StepsRun | AttemptEnded, **changes: Any) -> _Known:
    changed = replace(_attempt(known, fact), **changes)
    return replace(known, attempts={**known.attempts, fact.attempt: changed})


def _attempt(known: _Known, fact: AttemptPlaced | StepsRun | AttemptEnded) -> Attempt:
    if fact.attempt not in known.attempts:
        raise not_recorded(fact)
    return known.attempts[fact.attempt]


def _save_checkpoint(known: _Known, fact: CheckpointSaved) -> _Known:
    if fact.attempt not in known.attempts:
        raise not_recorded(fact)
    key = (fact.checkpoint.kind, fact.checkpoint.step)
    saved = known.checkpoints.get(key)
    if saved is not None and (saved.attempt, saved.is_removed) > (fact.attempt, False):
        return known
    return replace(known, checkpoints={**known.checkpoints, key: _Saved(fact.attempt, fact.checkpoint)})


def _storable(branch: Branch) -> Branch:
    return replace(branch, reason=None if branch.reason is None else storable_text(branch.reason))


def _as_json(document: Mapping[str, Any]) -> Any:
    return json.loads(json.dumps(document))


class MemoryStore:
    """A Store in this process, gone with it."""

    def __init__(self) -> None:
        self._facts = _Facts()

    def record(self, *facts: Fact) -> None:
        """As `Store` says: on top of what was known, and then all of it at once."""
        added = self._facts.on_top()
        for fact in facts:
            added.add(fact)
        self._facts.settle(added)

    def take_over(self, record: RoundRecord, trials: Iterable[Trial]) -> None:
        """Hold a round as another store has assembled it."""
        for throughput in record.throughputs:
            self._facts.throughputs[record.name, throughput.session] = throughput
        for branch in record.branches:
            self._facts.branches[record.name, branch.trial, branch.max_train_steps] = branch
        self._facts.rounds[record.name] = record
        for trial in trials:
            self._facts.trials[trial.round, trial.number] = _Known.of(trial)

    def rounds(self) -> tuple[RoundRecord, ...]:
        """As `Store` says."""
        measured = sorted(self._facts.throughputs.items(), key=lambda item: item[0])
        branches = sorted(self._facts.branches.items(), key=lambda item: item[0])
        begun = sorted(self._facts.rounds.values(), key=lambda r: (r.begun_at, r.name))
        return tuple(
            replace(
                record,
                throughputs=tuple(work for (name, _), work in measured if name == record.name),
                branches=tuple(branch for (name, *_), branch in branches if name == record.name),
            )
            for record in begun
        )

    def trials(self, round: str) -> tuple[Trial, ...]:
        """As `Store` says."""
        known = self._facts.trials
        return tuple(known[key].trial() for key in sorted(known) if key[0] == round)

    def trial(self, round: str, number: int) -> Trial:
        """As `Store` says."""
        return self._facts.trials[round, number].trial()

    def promotions(self) -> tuple[Promotion, ...]:
        """As `Store` says."""
        return tuple(sorted(self._facts.promotions.values(), key=lambda p: (p.planned_at, p.to_round)))

    def close(self) -> None:
        """As `Store` says; there is nothing to let go of."""
