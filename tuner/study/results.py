"""What rounds left, as the playbook reads it, and the final trial's score on test rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tuner.config import HYPERPARAMETERS, RoundFile, RoundSpec, limits
from tuner.errors import InputError
from tuner.playbook import Reading, RoundResults, read_round
from tuner.playbook.comparison_runs import ComparisonRule, branch_results, branches_left
from tuner.playbook.observations import Outcome, outcomes
from tuner.playbook.results import final_score, scored_trials
from tuner.records import (
    CheckpointKind,
    Evaluation,
    FinalScore,
    Objective,
    RoundRecord,
    Trial,
    TrialScored,
    TrialState,
)
from tuner.store import Store, hold_study
from tuner.study.folder import StudyFolder, opened


def round_results(record: RoundRecord, trials: Sequence[Trial]) -> RoundResults:
    """Return a round's results: its configuration, its trials so far, and the measured cost of evaluation."""
    spec = RoundSpec.recorded(record.spec)
    measured = record.throughput.evaluation_share if record.throughput else None
    return RoundResults(
        name=record.name,
        max_train_steps=record.max_train_steps,
        evaluate_every=spec.evaluation.every_steps,
        space=spec.space(),
        trials=tuple(trials),
        train_rows=record.train_rows,
        production_steps=spec.run.production_steps,
        worthwhile_gain=spec.run.worthwhile_gain,
        evaluation_share=record.evaluation_share if measured is None else measured,
        max_examples=spec.evaluation.max_examples,
        is_sweep=record.is_sweep,
        workload=record.workload,
        seconds_per_step=seconds_per_step(trials),
        branches=branch_results(trials, record.branches),
        sampler=spec.search.sampler,
        objective=objective_of(record, trials),
        limits=limits(spec.table),
        tiers={name: row.tier for name, row in spec.table.items() if name not in HYPERPARAMETERS},
    )


def as_written_now(record: RoundRecord, file: RoundFile) -> RoundRecord:
    """Update a round by what its file may still change, even if no run has used the new values yet."""
    now = keep_unwritten_rule(file, record).spec.model_dump(mode="json")
    search = {**record.spec["search"], "trials": now["search"]["trials"]}
    return replace(record, spec={**record.spec, "goal": now["goal"], "run": now["run"], "search": search})


def objective_of(record: RoundRecord, trials: Sequence[Trial] = ()) -> Objective:
    """What a round ranks by: as its evaluations say, before the first one as its record does."""
    objective = RoundSpec.recorded(record.spec).recorded_objective
    made = next((e.objective for trial in trials for e in trial.evaluations), None)
    return made if made is not None and made.metric == objective.metric else objective


def restated(results: RoundResults, objective: Objective) -> RoundResults:
    """An earlier round as a round of that objective would have it.

    Where its evaluations lack the metric none of them is the best, so that nothing is compared with them.
    """

    def by(evaluations: Iterable[Evaluation]) -> tuple[Evaluation, ...]:
        return tuple(evaluation.by(objective) for evaluation in evaluations)

    return replace(
        results,
        trials=tuple(replace(trial, evaluations=by(trial.evaluations)) for trial in results.trials),
        branches=tuple(replace(run, evaluations=by(run.evaluations)) for run in results.branches),
    )


def num_promised(record: RoundRecord) -> int:
    """Return the number of trials of a complete round."""
    return RoundSpec.recorded(record.spec).num_trials


def keep_unwritten_rule(file: RoundFile, record: RoundRecord | None) -> RoundFile:
    """Return the file without comparison runs, if its round started without and it does not name them.

    So a new default does not add comparison runs to a round that an earlier version started or finished.
    """
    run = file.spec.run
    if record is None or recorded_rule(record) is not False or "decay_branches" in run.model_fields_set:
        return file
    without = run.model_copy(update={"decay_branches": False})
    return replace(file, spec=file.spec.model_copy(update={"run": without}))


def recorded_rule(record: RoundRecord) -> ComparisonRule:
    """Return which comparison runs a round makes; none if the version that started it knew no such key."""
    rule: ComparisonRule = record.spec.get("run", {}).get("decay_branches", False)
    return rule


def num_branches_left(store: Store, record: RoundRecord, results: RoundResults | None = None) -> int:
    """Return how many comparison runs a round still needs after its trials, by this record of it.

    `results` are its `round_results` where they are known.
    """
    rule = recorded_rule(record)
    if rule is False:
        return 0
    if results is None:
        results = round_results(record, store.trials(record.name))
    return len(branches_left(results, earlier_results(store, record), rule=rule, begun=record.branches))


def earlier_results(store: Store, record: RoundRecord) -> list[RoundResults]:
    """Return the rounds that started before this one, oldest first, by its objective, without sweeps."""
    rounds: list[RoundRecord] = []
    for other in store.rounds():
        if other.name == record.name:
            break
        if not other.is_sweep:
            rounds.append(other)
    if not rounds:
        return []
    objective = objective_of(record, store.trials(record.name))
    return [restated(round_results(other, store.trials(other.name)), objective) for other in rounds]


def earlier_outcomes(store: Store, record: RoundRecord) -> tuple[Outcome, ...]:
    """Return the outcomes of trials of earlier rounds of the same workload.

    Their answer scores count only if they were scored as in this round.
    """
    asked = {other.name: _asked(other) for other in store.rounds()}
    found: list[Outcome] = []
    for other in earlier_results(store, record):
        if other.workload == record.workload:
            known = outcomes(other.trials, max_train_steps=other.max_train_steps)
            is_alike = asked[other.name] == asked[record.name]
            found += known if is_alike else [replace(outcome, score=None) for outcome in known]
    return tuple(found)


def _asked(record: RoundRecord) -> dict[str, object]:
    """Return what determines the answers of a round's trials besides its workload."""
    answers = record.spec.get("evaluation", {}).get("answers") or {}
    return {name: value for name, value in answers.items() if name != "objective"}


def reading_of(store: Store, record: RoundRecord) -> tuple[RoundResults, Reading]:
    """Return a round's results and the playbook's reading of them and of the rounds before."""
    results = round_results(record, store.trials(record.name))
    return results, read_round(results, earlier_results(store, record))


def seconds_per_step(trials: Sequence[Trial]) -> float | None:
    """Return the seconds of a trial's step, including evaluations; None before any attempt has ended."""
    timed = [
        attempt
        for trial in trials
        for attempt in trial.attempts
        # The end of attempts in a killed process is unknown.
        if attempt.outcome != "interrupted" and attempt.ended_at is not None
        if attempt.to_step > attempt.from_step
    ]
    steps = sum(attempt.to_step - attempt.from_step for attempt in timed)
    seconds = sum((attempt.ended_at or 0.0) - attempt.started_at for attempt in timed)
    return seconds / steps if steps else None


@dataclass(frozen=True)
class Sums:
    """An adapter's sums on the test rows, example by example."""

    nll: Sequence[float]
    """Sum of negative log-likelihoods of each example."""
    tokens: Sequence[int]
    """Target tokens of each example."""
    rows: str
    """Fingerprint of the examples."""


def score_trial(
    folder: StudyFolder,
    trial: Trial,
    *,
    measure: Callable[[RoundSpec, Path, Path], Sums],
    clock: Callable[[], float],
) -> FinalScore:
    """Score a trial's best adapter on its round's `data.test` and record it; later calls return the record.

    `measure` gets the round file with absolute paths, the folder of tokenised rows and the adapter. Raises
    InputError for a trial that cannot be scored, StorageError while a round of the study runs.
    """
    if trial.final_score is not None:
        return trial.final_score
    plan = folder.plan(trial.round)
    adapter, best = _adapter_to_score(folder, trial), trial.checkpoint(CheckpointKind.BEST)
    if not plan.spec.data.test:
        raise InputError(
            f"{plan.file.path.name}: data.test: missing, so there is nothing to score {trial.name} on; "
            "add rows that are in neither train nor eval, as `test: [{path: ..., format: ...}]`"
        )
    assert best is not None
    with hold_study(folder.directory, folder.storage, folder.name):
        sums = measure(plan.absolute, plan.cache, adapter)
        score = final_score(sums.nll, sums.tokens, step=best.step, rows=sums.rows, scored_at=clock())
        with opened(folder) as store:
            store.record(TrialScored(trial.round, trial.number, score))
    return score


def scores_of(store: Store) -> tuple[Trial, ...]:
    """Return the study's trials that were scored on `data.test`, in the order in which they were scored."""
    return scored_trials(trial for record in store.rounds() for trial in store.trials(record.name))


def _adapter_to_score(folder: StudyFolder, trial: Trial) -> Path:
    if folder.is_dry_run:
        raise InputError(f"{folder.directory}: a dry run trains no model, so there is nothing to score")
    adapter = folder.verified_adapter(trial) if trial.state == TrialState.COMPLETE else None
    if adapter is None:
        why = f"is {trial.state}" if trial.state != TrialState.COMPLETE else "has no adapter any more"
        raise InputError(f"{trial.name} {why}; data.test is for the trial you settle on: tuner trial list")
    return adapter
