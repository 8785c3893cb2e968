"""What every Store keeps its word on."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from tuner.records import (
    Answered,
    AnswerScore,
    Attempt,
    AttemptFact,
    AttemptStarted,
    Branch,
    BranchAdvanced,
    Checkpoint,
    CheckpointKind,
    CheckpointsRemoved,
    Continuation,
    Direction,
    Ended,
    Evaluated,
    Evaluation,
    Fact,
    FactError,
    FinalScore,
    Measured,
    NodeChange,
    NodeChanged,
    Objective,
    Progressed,
    Promotion,
    PromotionPlanned,
    RoundBegun,
    RoundKind,
    RoundRecord,
    Saved,
    Started,
    Throughput,
    Trial,
    TrialAsked,
    TrialEnded,
    TrialNoted,
    TrialScored,
    TrialState,
)
from tuner.store import Store

ROUND = RoundRecord(
    "round1",
    max_train_steps=60,
    spec={
        "study": "s",
        "max_train_steps": 60,
        "hyperparameters": {"learning_rate": {"low": 1e-5}},
        "a": [1, None],
    },
    begun_at=1700000000.25,
    train_rows=400,
    eval_rows=40,
    workload="abc",
    evaluation_share=0.1 + 0.2,
)
TRIAL = Trial(
    "round1",
    7,
    {
        "learning_rate": 0.1 + 0.2,
        "lora_r": 16,
        "target_modules": ("q", "v"),
        "layers_to_transform": (0, 1),
        "use_dora": False,
        "schedule": "linear",
    },
    continues=Continuation("round0", 3, 36),
    optuna_trial=11,
)
STARTED = AttemptStarted("round1", 7, 1, from_step=0, at=10.5)
ENDED = Ended("round1", 7, 1, step=30, at=20.5, outcome="interrupted", reason="killed")
COMPLETE = TrialEnded("round1", 7, TrialState.COMPLETE, None, at=30.0)
BEST = Checkpoint(CheckpointKind.BEST, 20, "trial-0007/best-20-1", size_bytes=5_000_000_000, sha256="b")
LAST = Checkpoint(CheckpointKind.LAST, 30, "trial-0007/last-30-1", size_bytes=7, sha256="l")
PROMOTION = Promotion(
    "round1", "round2", {"from": "round1", "findings": [{"x": 0.1}]}, "round: round2\n# é\n", 40.0
)
WORK = Throughput(
    session="1700000000-12",
    training_seconds=0.1 + 0.2,
    evaluating_seconds=1 / 3,
    saving_seconds=5e-324,
    passes=2**40,
    micro_steps=2**41,
    trial_steps=30,
    tokens=2**50,
    padded_tokens=2**51,
    peak_memory_bytes=80_000_000_000,
)
SCORE = FinalScore(
    step=20,
    loss=0.1 + 0.2,
    standard_error=5e-324,
    num_examples=40,
    num_tokens=2**40,
    rows="abc",
    scored_at=50.25,
)
ANSWERS = AnswerScore(
    step=20,
    metric="metrics.py:overlap",
    mean=0.1 + 0.2,
    standard_error=5e-324,
    num_examples=50,
    is_objective=True,
)
BRANCH = Branch(
    7,
    30,
    18,
    attempts=(Attempt(1, 18, 24, 31.0, 32.0, "died", "log: \0 and \udcff"), Attempt(2, 24, 30, 33.0)),
    checkpoint=Checkpoint(CheckpointKind.LAST, 24, "branch-0007-000030/last/step-000024.a1", 7, "l"),
    reason="odd",
    evaluation=Evaluation(30, 0.1 + 0.2, None, 1e-4, 3, (1.0, math.inf), (2, 3)),
)
LEFT_OUT = NodeChange("gpu-7", "left_out", 8, at=41.0 + 1 / 3, reason="it has torch 1.0 instead of 2.0")
HISTORY: list[Fact] = [
    RoundBegun(ROUND),
    TrialAsked(TRIAL),
    STARTED,
    Progressed("round1", 7, 1, 20),
    Evaluated("round1", 7, 1, Evaluation(20, 1.0, None, None, 0, (1.0,), (2,))),
    Saved("round1", 7, 1, BEST),
    Saved("round1", 7, 1, LAST),
    CheckpointsRemoved("round1", 7, (LAST.path,)),
    ENDED,
    TrialNoted("round1", 7, "afresh"),
    AttemptStarted("round1", 7, 2, 20, 25.0),
    Started("round1", 7, 2, 0, {"device": "cpu (AVX2)", "torch": "2.13.0"}),
    Ended("round1", 7, 2, 60, "complete", at=29.0),
    COMPLETE,
    TrialScored("round1", 7, SCORE),
    Answered("round1", 7, 1, ANSWERS),
    BranchAdvanced("round1", BRANCH),
    Measured(WORK, "round1"),
    NodeChanged(LEFT_OUT, "round1"),
    PromotionPlanned(PROMOTION),
]
"""One of every fact, each following from those before."""


def contents(store: Store) -> object:
    return store.rounds(), store.trials("round1"), store.promotions()


class StoreContract:
    """Run by every implementation.

    A subclass gives the fixtures `store`, an empty one, and `other`, that of another study kept in the same
    place.
    """

    def test_begins_empty(self, store: Store) -> None:
        assert contents(store) == ((), (), ())

    def test_recording_nothing_is_allowed(self, store: Store) -> None:
        store.record()
        assert store.rounds() == ()

    def test_a_round_comes_back_as_it_was(self, store: Store) -> None:
        store.record(RoundBegun(ROUND))
        assert store.rounds() == (ROUND,)
        assert list(store.rounds()[0].spec) == list(ROUND.spec)

    def test_a_round_that_goes_on_takes_only_its_new_spec(self, store: Store) -> None:
        store.record(RoundBegun(ROUND))
        store.record(
            RoundBegun(replace(ROUND, spec={"goal": "new"}, begun_at=9e9, train_rows=1, workload="other"))
        )
        assert store.rounds() == (replace(ROUND, spec={"goal": "new"}),)

    def test_a_round_keeps_its_horizon(self, store: Store) -> None:
        store.record(RoundBegun(ROUND))
        with pytest.raises(FactError, match="round1"):
            store.record(RoundBegun(replace(ROUND, max_train_steps=61, spec={})))
        assert store.rounds() == (ROUND,)

    def test_rounds_come_in_the_order_of_their_beginning(self, store: Store) -> None:
        for name, at in (("b", 2.0), ("a", 3.0), ("c", 1.0)):
            store.record(RoundBegun(replace(ROUND, name=name, begun_at=at)))
        assert [record.name for record in store.rounds()] == ["c", "b", "a"]

    def test_what_was_given_may_be_changed_afterwards(self, store: Store) -> None:
        spec, hyperparameters = {"goal": "old"}, {"lora_r": 8}
        store.record(RoundBegun(replace(ROUND, spec=spec)), TrialAsked(Trial("round1", 0, hyperparameters)))
        spec["goal"], hyperparameters["lora_r"] = "new", 16
        assert store.rounds()[0].spec == {"goal": "old"}
        assert store.trials("round1")[0].hyperparameters == {"lora_r": 8}

    def test_a_trial_that_was_asked_waits(self, store: Store) -> None:
        store.record(RoundBegun(ROUND), TrialAsked(TRIAL))
        (trial,) = store.trials("round1")
        assert trial == TRIAL
        assert trial.state is TrialState.WAITING
        assert repr(dict(trial.hyperparameters)) == repr(dict(TRIAL.hyperparameters))

    def test_asking_records_nothing_but_what_was_asked(self, store: Store) -> None:
        store.record(
            RoundBegun(ROUND), TrialAsked(replace(TRIAL, state=TrialState.FAILED, checkpoints=(BEST,)))
        )
        assert store.trials("round1") == (TRIAL,)

    def test_a_number_belongs_to_one_trial(self, store: Store) -> None:
        store.record(RoundBegun(ROUND), TrialAsked(TRIAL))
        with pytest.raises(FactError, match="round1/7"):
            store.record(TrialAsked(replace(TRIAL, hyperparameters={"learning_rate": 1e-3})))
        with pytest.raises(FactError, match="round1/7"):
            store.record(TrialAsked(replace(TRIAL, continues=None)))
        assert store.trials("round1") == (TRIAL,)

    def test_a_trial_may_move_to_another_optuna_trial(self, store: Store) -> None:
        store.record(RoundBegun(ROUND), TrialAsked(TRIAL), STARTED)
        store.record(TrialAsked(replace(TRIAL, optuna_trial=12)))
        (trial,) = store.trials("round1")
        assert (trial.optuna_trial, trial.state) == (12, TrialState.RUNNING)

    def test_one_trial_is_read_by_its_number(self, store: Store) -> None:
        store.record(RoundBegun(ROUND), *(TrialAsked(replace(TRIAL, number=number)) for number in (0, 2)))
        for trial in store.trials("round1"):
            assert store.trial("round1", trial.number) == trial
        for round, number in (("round1", 1), ("round9", 0)):
            with pytest.raises(KeyError):
                store.trial(round, number)

    def test_trials_come_by_number_and_of_one_round(self, store: Store) -> None:
        store.record(RoundBegun(ROUND), RoundBegun(replace(ROUND, name="round2")))
        for number in (10, 2, 0):
            store.record(TrialAsked(replace(TRIAL, number=number)))
        store.record(TrialAsked(replace(TRIAL, round="round2")))
        assert [trial.number for trial in store.trials("round1")] == [0, 2, 10]
        assert [trial.number for trial in store.trials("round2")] == [7]

    def test_some_trials_and_trials_without_examples_are_read(self, store: Store) -> None:
        store.record(RoundBegun(ROUND))
        for number in (2, 0, 1):
            known = Trial("round1", number, {"lora_r": 8})
            made = Evaluation(
                5, 1.5, example_nll=(3.0, 1.5), example_tokens=(2, 1), correct_tokens=2, metrics={"own": 0.5}
            )
            store.record(TrialAsked(known), AttemptStarted("round1", number, 1, from_step=0, at=1.0))
            store.record(Evaluated("round1", number, 1, made))
        whole = store.trials("round1")
        assert store.trials("round1", numbers=[2, 0, 7]) == (whole[0], whole[2])
        assert store.trials("round1", numbers=[]) == ()
        bare = store.trials("round1", examples=False)
        assert [trial.number for trial in bare] == [0, 1, 2]
        for trial, one in zip(bare, whole, strict=True):
            (found,), (made,) = trial.evaluations, one.evaluations
            assert replace(found, example_nll=(), example_tokens=()) == replace(
                made, example_nll=(), example_tokens=()
            )
            assert replace(trial, evaluations=()) == replace(one, evaluations=())
        assert store.trials("round1") == whole

    def test_results_are_counted(self, store: Store) -> None:
        store.record(RoundBegun(ROUND), RoundBegun(replace(ROUND, name="round2")))
        assert store.num_results("round1") == store.num_results("unknown") == 0
        for number, state in enumerate([*TrialState, TrialState.COMPLETE]):
            store.record(TrialAsked(Trial("round1", number, {"lora_r": 8})))
            if state.is_final:
                store.record(TrialEnded("round1", number, state, None, 1.0))
        assert store.num_results("round1") == sum(t.state.is_result for t in store.trials("round1")) == 4
        assert store.num_results("round2") == 0

    def test_state_follows_the_attempts_until_the_end(self, store: Store) -> None:
        steps: list[tuple[Fact, TrialState]] = [
            (STARTED, TrialState.RUNNING),
            (ENDED, TrialState.WAITING),
            (AttemptStarted("round1", 7, 2, from_step=20, at=21.0), TrialState.RUNNING),
            (COMPLETE, TrialState.COMPLETE),
            (Ended("round1", 7, 2, 60, "complete", at=29.0), TrialState.COMPLETE),
        ]
        store.record(RoundBegun(ROUND), TrialAsked(TRIAL))
        for fact, state in steps:
            store.record(fact)
            assert store.trials("round1")[0].state is state, fact
        (trial,) = store.trials("round1")
        assert trial.attempts == (
            Attempt(1, 0, 30, 10.5, 20.5, "interrupted", "killed"),
            Attempt(2, 20, 60, 21.0, 29.0, "complete"),
        )
        assert trial.executed_steps == 70

    def test_the_end_of_an_earlier_attempt_does_not_stop_the_latest(self, store: Store) -> None:
        store.record(
            RoundBegun(ROUND), TrialAsked(TRIAL), STARTED, AttemptStarted("round1", 7, 2, 0, 15.0), ENDED
        )
        assert store.trials("round1")[0].state is TrialState.RUNNING

    def test_the_start_of_an_attempt_that_ended_does_not_run_it_again(self, store: Store) -> None:
        store.record(
            RoundBegun(ROUND), TrialAsked(TRIAL), STARTED, ENDED, replace(STARTED, from_step=5, at=99.0)
        )
        (trial,) = store.trials("round1")
        assert trial.state is TrialState.WAITING
        assert (trial.attempts[0].from_step, trial.attempts[0].started_at) == (0, 10.5)

    def test_the_last_that_is_said_of_an_attempts_environment_counts(self, store: Store) -> None:
        store.record(RoundBegun(ROUND), TrialAsked(TRIAL), STARTED)
        for version in ("2.12.0", "2.13.0"):
            store.record(Started("round1", 7, 1, 0, {"torch": version}), ENDED)
        (attempt,) = store.trials("round1")[0].attempts
        assert (attempt.environment, attempt.outcome) == ({"torch": "2.13.0"}, "interrupted")

    def test_the_first_end_of_an_attempt_counts(self, store: Store) -> None:
        again = replace(ENDED, step=40, outcome="died", reason=None, at=99.0)
        store.record(RoundBegun(ROUND), TrialAsked(TRIAL), STARTED, ENDED, again)
        assert store.trials("round1")[0].attempts == (Attempt(1, 0, 40, 10.5, 20.5, "interrupted", "killed"),)

    @pytest.mark.parametrize("state", [state for state in TrialState if state.is_final])
    def test_a_final_state_is_never_left(self, store: Store, state: TrialState) -> None:
        store.record(
            RoundBegun(ROUND), TrialAsked(TRIAL), STARTED, TrialEnded("round1", 7, state, "why", 30.0)
        )
        late: list[Fact] = [TrialAsked(TRIAL), STARTED, ENDED, AttemptStarted("round1", 7, 2, 0, 40.0)]
        late += [TrialEnded("round1", 7, other, "late", 50.0) for other in TrialState if other.is_final]
        for fact in (*late, TrialNoted("round1", 7, "note")):
            store.record(fact)
            (trial,) = store.trials("round1")
            assert (trial.state, trial.reason) == (state, "why"), fact

    def test_steps_only_grow(self, store: Store) -> None:
        store.record(RoundBegun(ROUND), TrialAsked(TRIAL), STARTED)
        for said, known in ((5, 5), (12, 12), (8, 12)):
            store.record(Progressed("round1", 7, 1, said))
            assert store.trials("round1")[0].attempts[0].to_step == known
        store.record(replace(ENDED, step=3))
        assert store.trials("round1")[0].attempts[0].to_step == 12

    @pytest.mark.parametrize("kind", list(CheckpointKind))
    def test_a_checkpoint_proves_that_its_step_was_run(self, store: Store, kind: CheckpointKind) -> None:
        """Whatever a kill has hidden between it and the last progress; an earlier one proves nothing."""
        store.record(RoundBegun(ROUND), TrialAsked(TRIAL), STARTED, Progressed("round1", 7, 1, 12))
        for step in (15, 10):
            store.record(Saved("round1", 7, 1, Checkpoint(kind, step, f"{kind}-{step}", 1, "x")))
            found = store.trial("round1", 7)
            assert (found.attempts[0].to_step, found.executed_steps) == (15, 15)

    def test_evaluations_come_by_step_and_the_last_said_counts(self, store: Store) -> None:
        store.record(RoundBegun(ROUND), TrialAsked(TRIAL))
        for step, loss in ((10, 1.0), (0, 2.0), (5, 1.5), (10, 0.5)):
            store.record(Evaluated("round1", 7, 1, Evaluation(step, loss)))
        assert store.trials("round1")[0].evaluations == (
            Evaluation(0, 2.0),
            Evaluation(5, 1.5),
            Evaluation(10, 0.5),
        )

    @pytest.mark.parametrize(
        "number", [math.nan, math.inf, -math.inf, 0.1 + 0.2, 5e-324, 1.7976931348623157e308]
    )
    def test_every_digit_comes_back(self, store: Store, number: float) -> None:
        made = Evaluation(1, number, number, number, 3, (number, -0.0, 1 / 3), (1, 0, 2**31 - 1), 2**40)
        store.record(RoundBegun(ROUND), TrialAsked(TRIAL), Evaluated("round1", 7, 1, made))
        (trial,) = store.trials("round1")
        assert repr(trial.evaluations) == repr((made,))

    def test_not_a_number_in_documents_comes_back(self, store: Store) -> None:
        strange = {"a": math.nan, "b": [math.inf, {"\0\ud800é": 1e-300}]}
        store.record(
            RoundBegun(replace(ROUND, spec=strange)), PromotionPlanned(replace(PROMOTION, plan=strange))
        )
        assert repr(store.rounds()[0].spec) == repr(store.promotions()[0].plan) == repr(strange)

    def test_what_an_evaluation_does_not_know_stays_unknown(self, store: Store) -> None:
        store.record(RoundBegun(ROUND), TrialAsked(TRIAL), Evaluated("round1", 7, 1, Evaluation(0, 1.5)))
        assert store.trials("round1")[0].evaluations == (Evaluation(0, 1.5, None, None, 0, (), ()),)

    def test_metrics_and_the_objective_of_an_evaluation_come_back(self, store: Store) -> None:
        up = Objective("pkg:ACCURACY", Direction.MAXIMIZE, is_relative_to_gained=True)
        ranked = Evaluation(5, 1.5, metrics={"pkg:ACCURACY": 0.1 + 0.2, "other": math.inf}, objective=up)
        reported = Evaluation(10, 1.0, metrics={"other": -1.0})
        store.record(RoundBegun(ROUND), TrialAsked(TRIAL))
        store.record(*(Evaluated("round1", 7, 1, made) for made in (ranked, reported)))
        assert store.trials("round1")[0].evaluations == (ranked, reported)
        lacking = Evaluation(15, 1.5, metrics={"pkg:ACCURACY": math.nan}, objective=up)
        store.record(Evaluated("round1", 7, 1, lacking))
        assert repr(store.trials("round1")[0].evaluations[-1]) == repr(lacking)

    def test_checkpoints_are_there_until_removed(self, store: Store) -> None:
        store.record(RoundBegun(ROUND), TrialAsked(TRIAL), STARTED)
        store.record(Saved("round1", 7, 1, LAST), Saved("round1", 7, 1, BEST))
        assert store.trials("round1")[0].checkpoints == (BEST, LAST)
        store.record(CheckpointsRemoved("round1", 7, (LAST.path, "never/recorded")))
        assert store.trials("round1")[0].checkpoints == (BEST,)
        store.record(CheckpointsRemoved("round1", 7, ()))
        assert store.trials("round1")[0].checkpoints == (BEST,)

    def test_a_removal_concerns_one_trial(self, store: Store) -> None:
        store.record(RoundBegun(ROUND), TrialAsked(TRIAL), TrialAsked(replace(TRIAL, number=8)))
        for number in (7, 8):
            store.record(AttemptStarted("round1", number, 1, 0, 0.0), Saved("round1", number, 1, BEST))
        store.record(CheckpointsRemoved("round1", 8, (BEST.path,)))
        assert [trial.checkpoints for trial in store.trials("round1")] == [(BEST,), ()]

    def test_a_removed_checkpoint_comes_back_with_a_later_attempt_only(self, store: Store) -> None:
        store.record(RoundBegun(ROUND), TrialAsked(TRIAL), STARTED, AttemptStarted("round1", 7, 2, 0, 1.0))
        saved = Saved("round1", 7, 1, BEST)
        store.record(saved, CheckpointsRemoved("round1", 7, (BEST.path,)), saved)
        assert store.trials("round1")[0].checkpoints == ()
        store.record(replace(saved, attempt=2), saved)
        assert store.trials("round1")[0].checkpoints == (BEST,)

    def test_of_a_step_the_checkpoint_of_the_latest_attempt_counts(self, store: Store) -> None:
        store.record(RoundBegun(ROUND), TrialAsked(TRIAL), STARTED, AttemptStarted("round1", 7, 2, 0, 1.0))
        newer = replace(BEST, path="trial-0007/best-20-2", size_bytes=9, sha256="n")
        store.record(Saved("round1", 7, 2, newer), Saved("round1", 7, 1, BEST))
        assert store.trials("round1")[0].checkpoints == (newer,)

    def test_a_note_is_the_reason_until_the_end_gives_one(self, store: Store) -> None:
        store.record(RoundBegun(ROUND), TrialAsked(TRIAL), TrialAsked(replace(TRIAL, number=8)))
        for number in (7, 8):
            store.record(TrialNoted("round1", number, "old"), TrialNoted("round1", number, "note"))
        assert [trial.reason for trial in store.trials("round1")] == ["note", "note"]
        store.record(COMPLETE, TrialEnded("round1", 8, TrialState.INFEASIBLE, "diverged", 1.0))
        assert [trial.reason for trial in store.trials("round1")] == ["note", "diverged"]

    def test_odd_characters_do_not_lose_a_reason(self, store: Store) -> None:
        odd = "log: \0 and \udcff and é"
        seen = "log: \ufffd and ? and é"
        store.record(RoundBegun(ROUND), TrialAsked(TRIAL), STARTED, TrialNoted("round1", 7, odd))
        assert store.trials("round1")[0].reason == seen
        store.record(
            replace(ENDED, reason=odd),
            replace(COMPLETE, reason=odd),
            PromotionPlanned(replace(PROMOTION, file_text=odd)),
        )
        (trial,) = store.trials("round1")
        assert (trial.reason, trial.attempts[0].message, store.promotions()[0].file_text) == (
            seen,
            seen,
            seen,
        )

    def test_the_last_plan_of_a_round_counts(self, store: Store) -> None:
        other = replace(PROMOTION, to_round="round3", planned_at=39.0)
        store.record(RoundBegun(ROUND), PromotionPlanned(PROMOTION), PromotionPlanned(other))
        assert store.promotions() == (other, PROMOTION)
        again = replace(PROMOTION, plan={}, file_text="", planned_at=1.0)
        store.record(PromotionPlanned(again))
        assert store.promotions() == (again, other)

    def test_of_a_session_the_last_work_said_counts(self, store: Store) -> None:
        more = replace(WORK, training_seconds=9.5, trial_steps=31, peak_memory_bytes=1)
        second = replace(WORK, session="1700000000-11")
        store.record(RoundBegun(ROUND), RoundBegun(replace(ROUND, name="round2")))
        store.record(Measured(WORK, "round1"), Measured(more, "round1"))
        store.record(Measured(second, "round1"), Measured(WORK, "round2"))
        assert [record.throughputs for record in store.rounds()] == [(second, more), (WORK,)]
        store.record(Measured(more, "round1"))
        assert [record.throughputs for record in store.rounds()] == [(second, more), (WORK,)]

    def test_a_round_begins_without_work_and_keeps_what_it_has(self, store: Store) -> None:
        store.record(RoundBegun(replace(ROUND, throughputs=(replace(WORK, session="not recorded"),))))
        assert store.rounds() == (ROUND,)
        store.record(Measured(WORK, "round1"), RoundBegun(replace(ROUND, spec={"goal": "new"})))
        assert store.rounds() == (replace(ROUND, spec={"goal": "new"}, throughputs=(WORK,)),)

    def test_each_change_of_a_node_is_kept_by_time(self, store: Store) -> None:
        lost, odd = replace(LEFT_OUT, change="lost", at=7.0, reason=None), replace(LEFT_OUT, reason="\0")
        again = replace(lost, at=50.0)
        store.record(RoundBegun(replace(ROUND, node_changes=(LEFT_OUT,))))
        assert store.rounds()[0].node_changes == ()
        store.record(*(NodeChanged(change, "round1") for change in (again, odd, lost, again)))
        kept = (lost, replace(odd, reason="\ufffd"), again)
        assert store.rounds()[0].node_changes == kept
        store.record(NodeChanged(replace(lost, gpus=1), "round1"), RoundBegun(ROUND))
        assert store.rounds()[0].node_changes == kept

    def test_the_first_score_of_a_trial_counts(self, store: Store) -> None:
        store.record(RoundBegun(ROUND), TrialAsked(replace(TRIAL, final_score=SCORE)))
        assert store.trials("round1")[0].final_score is None
        store.record(TrialScored("round1", 7, SCORE))
        store.record(TrialScored("round1", 7, replace(SCORE, loss=9.0, standard_error=None)))
        assert repr(store.trials("round1")[0].final_score) == repr(SCORE)

    def test_the_last_answers_of_a_trial_count(self, store: Store) -> None:
        """Those of an adapter that was trained again."""
        store.record(RoundBegun(ROUND), TrialAsked(replace(TRIAL, answer_score=ANSWERS)))
        assert store.trials("round1")[0].answer_score is None
        alone = replace(ANSWERS, mean=-1e300, standard_error=None, num_examples=1, is_objective=False)
        for score in (ANSWERS, alone):
            store.record(Answered("round1", 7, 1, score))
            assert repr(store.trials("round1")[0].answer_score) == repr(score)

    def test_of_a_branch_the_last_said_counts(self, store: Store) -> None:
        later = replace(
            BRANCH, state="complete", checkpoint=None, reason=None, evaluation=Evaluation(30, 1.0)
        )
        longer, of_another = replace(BRANCH, max_train_steps=42), replace(BRANCH, trial=2)
        store.record(RoundBegun(replace(ROUND, branches=(BRANCH,))), TrialAsked(TRIAL))
        assert store.rounds()[0].branches == ()
        store.record(TrialAsked(replace(TRIAL, number=2)))
        store.record(*(BranchAdvanced("round1", b) for b in (BRANCH, longer, of_another, later)))
        assert repr(store.rounds()[0].branches) == repr((of_another, later, longer))
        store.record(RoundBegun(ROUND))
        assert len(store.rounds()[0].branches) == 3

    @pytest.mark.parametrize(
        ("fact", "missing"),
        [
            (TrialAsked(replace(TRIAL, round="round9")), "round round9"),
            (replace(STARTED, trial=8), "trial round1/8"),
            (replace(STARTED, round="round9"), "trial round9/7"),
            (Progressed("round1", 7, 2, 5), "attempt 2 of trial round1/7"),
            (Progressed("round1", 8, 1, 5), "round1/8"),
            (Evaluated("round1", 8, 1, Evaluation(0, 1.0)), "trial round1/8"),
            (Saved("round1", 7, 2, BEST), "attempt 2 of trial round1/7"),
            (CheckpointsRemoved("round1", 8, ("x",)), "trial round1/8"),
            (replace(ENDED, attempt=2), "attempt 2 of trial round1/7"),
            (replace(COMPLETE, trial=8), "trial round1/8"),
            (TrialNoted("round9", 7, "x"), "trial round9/7"),
            (TrialScored("round1", 8, SCORE), "trial round1/8"),
            (Answered("round1", 8, 1, ANSWERS), "trial round1/8"),
            (BranchAdvanced("round1", replace(BRANCH, trial=8)), "trial round1/8"),
            (Measured(WORK, "round9"), "round round9"),
            (NodeChanged(LEFT_OUT, "round9"), "round round9"),
            (PromotionPlanned(replace(PROMOTION, from_round="round9")), "round round9"),
        ],
    )
    def test_a_fact_about_the_unknown_is_refused_with_all_said_beside_it(
        self, store: Store, fact: Fact, missing: str
    ) -> None:
        store.record(RoundBegun(ROUND), TrialAsked(TRIAL), STARTED)
        before = contents(store)
        with pytest.raises(FactError, match=f"{missing} is not recorded"):
            store.record(Evaluated("round1", 7, 1, Evaluation(0, 1.0)), TrialNoted("round1", 7, "x"), fact)
        assert contents(store) == before

    def test_an_evaluation_says_how_far_its_attempt_has_come(self, store: Store) -> None:
        store.record(RoundBegun(ROUND), TrialAsked(TRIAL), STARTED)
        for step, known in ((5, 5), (12, 12), (8, 12)):
            store.record(Evaluated("round1", 7, 1, Evaluation(step, 1.0)))
            assert store.trials("round1")[0].attempts[0].to_step == known

    @pytest.mark.parametrize("fact", [fact for fact in HISTORY if isinstance(fact, AttemptFact)])
    def test_what_a_worker_says_of_a_comparison_run_is_not_taken_for_its_parents(
        self, store: Store, fact: AttemptFact
    ) -> None:
        store.record(*HISTORY[:3])
        before = contents(store)
        with pytest.raises(FactError, match="round1/7 to step 30 is a comparison run"):
            store.record(replace(fact, horizon=30))
        assert contents(store) == before

    def test_one_round_is_read_by_its_name(self, store: Store) -> None:
        assert store.round("round1") is None
        store.record(*HISTORY, RoundBegun(replace(ROUND, name="round2", kind=RoundKind.SWEEP)))
        for record in store.rounds():
            assert repr(store.round(record.name)) == repr(record)
        assert [record.kind for record in store.rounds()] == [RoundKind.SEARCH, RoundKind.SWEEP]

    def test_a_round_keeps_its_kind(self, store: Store) -> None:
        store.record(RoundBegun(replace(ROUND, kind=RoundKind.DRY_RUN)), RoundBegun(ROUND))
        assert store.rounds()[0].kind is RoundKind.DRY_RUN

    def test_saying_everything_again_changes_nothing(self, store: Store) -> None:
        store.record(*HISTORY)
        before = contents(store)
        for fact in HISTORY:
            store.record(fact)
            assert contents(store) == before, fact
        store.record(*HISTORY, *HISTORY)
        assert contents(store) == before

    def test_a_study_sees_nothing_of_another(self, store: Store, other: Store) -> None:
        store.record(*HISTORY)
        assert contents(other) == ((), (), ())

    def test_names_belong_to_one_study(self, store: Store, other: Store) -> None:
        """The same round and number, with what would be refused within a study."""
        record = replace(ROUND, max_train_steps=99, spec={"study": "other"}, begun_at=1.0)
        trial = Trial("round1", 7, {"lora_r": 4})
        plan = replace(PROMOTION, plan={}, file_text="other")
        store.record(*HISTORY)
        before = contents(store)
        other.record(RoundBegun(record), TrialAsked(trial), PromotionPlanned(plan))
        assert contents(other) == ((record,), (trial,), (plan,))
        assert contents(store) == before

    @pytest.mark.parametrize("fact", HISTORY[3:], ids=lambda fact: type(fact).__name__)
    def test_what_is_said_of_a_trial_concerns_one_study(self, store: Store, other: Store, fact: Fact) -> None:
        begun = [*HISTORY[:3], Saved("round1", 7, 1, LAST)]
        other.record(*begun)
        store.record(*begun)
        before = contents(other)
        store.record(AttemptStarted("round1", 7, 2, 20, 25.0), fact)
        assert contents(other) == before

    @pytest.mark.parametrize("fact", HISTORY[1:], ids=lambda fact: type(fact).__name__)
    def test_what_another_study_recorded_is_not_recorded(
        self, store: Store, other: Store, fact: Fact
    ) -> None:
        store.record(*HISTORY)
        with pytest.raises(FactError, match="is not recorded"):
            other.record(fact)
        assert contents(other) == ((), (), ())
