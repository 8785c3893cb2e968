"""A round's facts in the form that the playbook reads, and the reading of the latest one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tuner.config import HYPERPARAMETERS, RoundFile, RoundSpec, limits
from tuner.playbook import Reading, RoundResults, read_round
from tuner.playbook.comparison_runs import branch_results, branches_left
from tuner.playbook.observations import Outcome, outcomes
from tuner.playbook.schedule import ComparisonRule
from tuner.records import RoundRecord, Trial
from tuner.store import Store


def round_results(record: RoundRecord, trials: Sequence[Trial]) -> RoundResults:
    """A round as it began, with its trials as they stand, and what its evaluations really took."""
    spec = RoundSpec.model_validate(record.spec)
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
        limits=limits(spec.table),
        tiers={name: row.tier for name, row in spec.table.items() if name not in HYPERPARAMETERS},
    )


def as_written_now(record: RoundRecord, file: RoundFile) -> RoundRecord:
    """A begun round with what its file may still change as it now says it, though no run has seen it yet."""
    now = keep_unwritten_rule(file, record).spec.model_dump(mode="json")
    search = {**record.spec["search"], "trials": now["search"]["trials"]}
    return replace(record, spec={**record.spec, "goal": now["goal"], "run": now["run"], "search": search})


def num_promised(record: RoundRecord) -> int:
    """Trials that a begun round is complete with."""
    return RoundSpec.model_validate(record.spec).num_trials


def keep_unwritten_rule(file: RoundFile, record: RoundRecord | None) -> RoundFile:
    """Return the file, without comparison runs where its round began without and it does not name them.

    So a round that an earlier version began or finished owes none because a default is another one now.
    """
    run = file.spec.run
    if record is None or recorded_rule(record) is not False or "decay_branches" in run.model_fields_set:
        return file
    without = run.model_copy(update={"decay_branches": False})
    return replace(file, spec=file.spec.model_copy(update={"run": without}))


def recorded_rule(record: RoundRecord) -> ComparisonRule:
    """Return which comparison runs a round makes; none where the version that began it knew no such key."""
    rule: ComparisonRule = record.spec.get("run", {}).get("decay_branches", False)
    return rule


def num_branches_left(store: Store, record: RoundRecord) -> int:
    """How many comparison runs a round whose trials have ended still owes, by this record of it."""
    rule = recorded_rule(record)
    if rule is False:
        return 0
    results = round_results(record, store.trials(record.name))
    return len(branches_left(results, earlier_results(store, record), rule=rule, begun=record.branches))


def earlier_results(store: Store, record: RoundRecord) -> list[RoundResults]:
    """The rounds that began before this one, oldest first, sweeps aside."""
    rounds: list[RoundRecord] = []
    for other in store.rounds():
        if other.name == record.name:
            break
        if not other.is_sweep:
            rounds.append(other)
    return [round_results(other, store.trials(other.name)) for other in rounds]


def earlier_outcomes(store: Store, record: RoundRecord) -> tuple[Outcome, ...]:
    """How the trials of the rounds before came out, as far as they are of the same workload.

    What they answered counts where they were asked as in this round.
    """
    asked = {other.name: _asked(other) for other in store.rounds()}
    found: list[Outcome] = []
    for other in earlier_results(store, record):
        if other.workload == record.workload:
            known = outcomes(other.trials, max_train_steps=other.max_train_steps)
            is_alike = asked[other.name] == asked[record.name]
            found += known if is_alike else [replace(outcome, answers=None) for outcome in known]
    return tuple(found)


def _asked(record: RoundRecord) -> dict[str, object]:
    """What decides about the answers of a round's trials besides its workload."""
    answers = record.spec.get("evaluation", {}).get("answers") or {}
    return {name: value for name, value in answers.items() if name != "objective"}


def reading_of(store: Store, record: RoundRecord) -> tuple[RoundResults, Reading]:
    """A round's results and what the playbook reads from them and from the rounds before."""
    results = round_results(record, store.trials(record.name))
    return results, read_round(results, earlier_results(store, record))


def seconds_per_step(trials: Sequence[Trial]) -> float | None:
    """Measured seconds of a trial's step, its evaluations included; None before any attempt has ended."""
    timed = [
        attempt
        for trial in trials
        for attempt in trial.attempts
        # When those that a killed process held ended is not known.
        if attempt.outcome != "interrupted" and attempt.ended_at is not None
        if attempt.to_step > attempt.from_step
    ]
    steps = sum(attempt.to_step - attempt.from_step for attempt in timed)
    seconds = sum((attempt.ended_at or 0.0) - attempt.started_at for attempt in timed)
    return seconds / steps if steps else None
