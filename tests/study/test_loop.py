"""The loop keeps its law at every seam: file, then fact, then tell."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import optuna
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.studies import formula, silent_view
from tests.study.simulation import Crash, Fuse, rounds, simulate, trials
from tuner.engines import SimulatedWorker
from tuner.errors import Interrupted, RoundStopped, WorkerError
from tuner.playbook.schedule import evaluation_steps
from tuner.playbook.selection import ranked
from tuner.records import (
    Answered,
    AnswerScore,
    Assignment,
    Attempt,
    Checkpoint,
    CheckpointKind,
    Died,
    Ended,
    Evaluated,
    Event,
    Measured,
    NodeChange,
    NodeChanged,
    Ready,
    RoundBegun,
    RoundRecord,
    RunId,
    Started,
    Throughput,
    Trial,
    TrialState,
)
from tuner.store import CachedStore, MemoryStore, open_store
from tuner.study.round_state import MAX_ATTEMPTS, has_failed, unreplaced
from tuner.study.sampling import optuna_storage


def states(directory: Path) -> list[str]:
    return [str(trial.state) for trial in trials(directory)]


def optuna_study(directory: Path) -> optuna.Study:
    storage = optuna_storage(f"sqlite:///{directory / 'tuner.db'}")
    return optuna.load_study(study_name="tiny/round1", storage=storage)


def check_consistent(directory: Path, *, promised: int) -> None:
    """Every promised trial is there once, with its whole curve, and Optuna was told of each."""
    found = trials(directory)
    results = [trial for trial in found if trial.state.is_result]
    assert [trial.number for trial in found] == list(range(len(found)))
    assert len(results) == promised
    study = optuna_study(directory)
    told = [t for t in study.trials if t.state.name in ("COMPLETE", "PRUNED")]
    assert len(told) == promised
    for trial in results:
        steps = [evaluation.step for evaluation in trial.evaluations]
        if trial.state == TrialState.COMPLETE:
            assert steps == list(evaluation_steps(8, 2))
        expected = [formula(trial.hyperparameters, step, 8) for step in steps]
        assert [repr(e.eval_loss) for e in trial.evaluations] == [repr(e.eval_loss) for e in expected]
        assert trial.optuna_trial is not None
        frozen = study.trials[trial.optuna_trial]
        assert frozen.user_attrs["trial"] == trial.number
        assert frozen.params["learning_rate"] == trial.hyperparameters["learning_rate"]


def test_a_round_runs_to_its_end(tmp_path: Path) -> None:
    simulate(tmp_path, trials=6)
    check_consistent(tmp_path, promised=6)
    assert {"complete", "infeasible"} == set(states(tmp_path))
    infeasible = [t for t in trials(tmp_path) if t.state == TrialState.INFEASIBLE]
    assert all("nan" in str(trial.reason) for trial in infeasible)


def test_running_a_complete_round_again_changes_nothing(tmp_path: Path) -> None:
    simulate(tmp_path)
    before = trials(tmp_path)
    simulate(tmp_path)
    assert repr(trials(tmp_path)) == repr(before)


def test_raising_the_number_of_trials_reopens_a_round(tmp_path: Path) -> None:
    simulate(tmp_path, trials=3)
    first = trials(tmp_path)
    simulate(tmp_path, trials=5)
    assert repr(trials(tmp_path)[:3]) == repr(first)
    check_consistent(tmp_path, promised=5)


ONE_RATE = "3e-3"


@pytest.mark.parametrize("sampler", ["quasi-random", "random", "tpe", "gp", "grid"])
@pytest.mark.parametrize(
    ("changes", "tried"),
    [
        ({"lora_r": "[4, 8]", "trials": 6}, {4, 8}),
        ({"lora_r": "[4, 8, 16]", "trials": 3}, {4, 8, 16}),
        ({"lora_r": "[4, 8, 16]", "trials": 2, "enqueue": "[{lora_r: 8}]"}, None),
        ({"lora_r": "[4, 8]", "trials": 6, "enqueue": "[{lora_r: 8}]"}, {4, 8}),
        ({"lora_r": "4", "trials": 6}, {4}),
    ],
)
def test_a_round_is_complete_when_its_space_is_exhausted(
    tmp_path: Path, changes: dict[str, Any], tried: set[int] | None, sampler: str
) -> None:
    changes = {"learning_rate": ONE_RATE, "sampler": sampler, **changes}
    simulate(tmp_path, **changes)
    ranks = [trial.hyperparameters["lora_r"] for trial in trials(tmp_path, **changes)]
    assert len(ranks) == len(set(ranks)) == (len(tried) if tried else 2)
    assert set(ranks) == (tried or set(ranks))
    simulate(tmp_path, **changes)
    assert len(trials(tmp_path, **changes)) == len(ranks)


def test_infeasible_points_of_an_exhausted_space_are_results(tmp_path: Path) -> None:
    changes = {"learning_rate": "[3e-3, 9e-2]", "lora_r": "4", "trials": 5}
    simulate(tmp_path, **changes)
    assert sorted(states(tmp_path)) == ["complete", "infeasible"]


def test_more_trials_of_an_exhausted_space_are_none(tmp_path: Path) -> None:
    changes = {"learning_rate": ONE_RATE, "lora_r": "[4, 8]"}
    simulate(tmp_path, trials=2, **changes)
    before = trials(tmp_path, trials=2, **changes)
    simulate(tmp_path, trials=7, **changes)
    assert repr(trials(tmp_path, trials=7, **changes)) == repr(before)


@pytest.mark.parametrize("sampler", ["quasi-random", "tpe"])
def test_a_finite_round_that_dies_at_every_seam_repeats_no_point(tmp_path: Path, sampler: str) -> None:
    changes = {"learning_rate": "[1e-3, 3e-3]", "lora_r": "[4, 8]", "trials": 9, "sampler": sampler}
    changes["enqueue"] = "[{lora_r: 8}, {learning_rate: 1e-3, lora_r: 4}]"
    simulate(tmp_path / "undisturbed", **changes)
    for seam in itertools.count(1, 7):
        try:
            simulate(tmp_path / "disturbed", fuse=seam, **changes)
        except Crash:
            assert seam < 900, "the round makes no headway"
            continue
        break
    found = trials(tmp_path / "disturbed")
    points = [(t.hyperparameters["learning_rate"], t.hyperparameters["lora_r"]) for t in found]
    assert len(points) == len(set(points)) == 4
    if sampler == "quasi-random":
        assert [t.hyperparameters for t in found] == [
            t.hyperparameters for t in trials(tmp_path / "undisturbed")
        ]


def test_dying_at_every_seam_in_turn(tmp_path: Path) -> None:
    """One process for each seam of a whole round, each killed one seam further on."""
    undisturbed = simulate(tmp_path / "undisturbed", trials=2).passed
    assert {"after ask", "before tell"} <= set(undisturbed)
    assert len(undisturbed) > 30
    directory = tmp_path / "disturbed"
    for seam in itertools.count(1):
        try:
            simulate(directory, fuse=seam, trials=2)
        except Crash:
            assert seam < 500, "the round makes no headway"
            continue
        break
    check_consistent(directory, promised=2)
    assert [t.hyperparameters for t in trials(directory)] == [
        t.hyperparameters for t in trials(tmp_path / "undisturbed")
    ]


@settings(
    max_examples=6,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(fuses=st.lists(st.integers(1, 60), max_size=5), slots=st.integers(1, 3))
def test_dying_anywhere_any_number_of_times(
    tmp_path_factory: pytest.TempPathFactory, fuses: list[int], slots: int
) -> None:
    directory = tmp_path_factory.mktemp("round")
    for fuse in fuses:
        try:
            simulate(directory, fuse=fuse, make_worker=lambda: SimulatedWorker(formula, slots=slots))
        except Crash:
            continue
    simulate(directory, make_worker=lambda: SimulatedWorker(formula, slots=slots))
    check_consistent(directory, promised=3)


def test_a_stop_saves_and_the_next_run_goes_on(tmp_path: Path) -> None:
    asked: Iterator[bool] = itertools.chain([False] * 3, itertools.repeat(True))
    with pytest.raises(Interrupted):
        simulate(tmp_path, stopping=lambda: next(asked))
    assert set(states(tmp_path)) <= {"waiting", "complete", "infeasible"}
    assert "waiting" in states(tmp_path)
    simulate(tmp_path)
    check_consistent(tmp_path, promised=3)


@dataclass
class Listener:
    """A view that keeps the last that it was told of each trial."""

    def __init__(self) -> None:
        self._told: dict[int, Trial] = {}

    @property
    def told(self) -> tuple[Trial, ...]:
        return tuple(self._told.values())

    def event(self, event: Event) -> None:
        pass

    def trials(self, trials: Sequence[Trial]) -> None:
        self._told |= {trial.number: trial for trial in trials}

    def message(self, text: str) -> None:
        pass

    def close(self) -> None:
        pass


def test_the_view_is_told_the_last_facts_too(tmp_path: Path) -> None:
    """What other tools show comes from it; a round that is complete is told of again."""
    asked = itertools.chain([False] * 3, itertools.repeat(True))
    stopped, whole, again = Listener(), Listener(), Listener()
    with pytest.raises(Interrupted):
        simulate(tmp_path, stopping=lambda: next(asked), view=stopped)
    # As text, since one NaN is not equal to another.
    assert repr(stopped.told) == repr(trials(tmp_path))
    assert any(trial.evaluations for trial in stopped.told)
    simulate(tmp_path, view=whole)
    assert repr(whole.told) == repr(trials(tmp_path)) != repr(stopped.told)
    simulate(tmp_path, view=again)
    assert repr(again.told) == repr(whole.told)


class DeafWorker(SimulatedWorker):
    """Is closed before it has begun what it was given."""

    def events(self, timeout_seconds: float) -> list[Event]:
        return [event for event in super().events(timeout_seconds) if isinstance(event, Ready)]


def test_what_was_given_and_not_begun_is_not_shown_as_running(tmp_path: Path) -> None:
    asked = itertools.chain([False], itertools.repeat(True))
    stopped = Listener()
    with pytest.raises(Interrupted):
        simulate(
            tmp_path,
            stopping=lambda: next(asked),
            view=stopped,
            make_worker=lambda: DeafWorker(formula, slots=3),
        )
    assert "running" in states(tmp_path), "the facts have no end"
    assert {trial.state.value for trial in stopped.told} == {"waiting"}


class MortalWorker(SimulatedWorker):
    """Dies each time one of the given trials starts, as often as told."""

    def __init__(self, deaths: dict[int, int], *, is_ready: bool = True) -> None:
        super().__init__(formula, slots=1)
        self.deaths = deaths
        self.is_ready = is_ready

    def start(self, assignment: Assignment) -> None:
        super().start(assignment)
        if self.deaths.get(assignment.trial, 0) > 0:
            self.deaths[assignment.trial] -= 1
            self._said = [Ready(1, "mortal")] if self.is_ready else []
            self._said.append(Died("hit by a cosmic ray", (assignment.run,)))

    def events(self, timeout_seconds: float) -> list[Event]:
        said = super().events(timeout_seconds)
        if any(isinstance(event, Died) for event in said):
            self._runs.clear()
        return said


def test_a_worker_that_dies_is_tried_again(tmp_path: Path) -> None:
    deaths = {1: MAX_ATTEMPTS - 1}
    simulate(tmp_path, make_worker=lambda: MortalWorker(deaths))
    check_consistent(tmp_path, promised=3)
    assert [len(trial.attempts) for trial in trials(tmp_path)] == [1, MAX_ATTEMPTS, 1]
    assert trials(tmp_path)[1].attempts[0].outcome == "died"


def test_a_failed_trial_is_replaced_by_one_with_the_same_hyperparameters(tmp_path: Path) -> None:
    deaths = {1: MAX_ATTEMPTS}
    simulate(tmp_path, make_worker=lambda: MortalWorker(deaths))
    check_consistent(tmp_path, promised=3)
    found = trials(tmp_path)
    assert [t.state for t in found].count(TrialState.FAILED) == 1
    assert found[1].state == TrialState.FAILED
    assert "cosmic ray" in str(found[1].reason)
    assert found[2].hyperparameters == found[1].hyperparameters
    assert "repeats trial 1" in str(found[2].reason)
    assert optuna_study(tmp_path).trials[1].state.name == "FAIL"


def test_a_repetition_that_fails_too_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match=r"trial 1.*cosmic ray"):
        simulate(tmp_path, make_worker=lambda: MortalWorker({0: 99, 1: 99}))


def test_workers_that_are_never_ready_end_the_run(tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match="before they could start"):
        simulate(tmp_path, make_worker=lambda: MortalWorker({0: 99}, is_ready=False))


def test_input_that_cannot_be_used_any_more_ends_the_run_at_once(tmp_path: Path) -> None:
    class Refusing(SimulatedWorker):
        def start(self, assignment: Assignment) -> None:
            super().start(assignment)
            self._said = [Died("model.path: cannot load", is_input_error=True)]

    with pytest.raises(RoundStopped, match="cannot load"):
        simulate(tmp_path, make_worker=lambda: Refusing(formula, slots=1))


class Answering(SimulatedWorker):
    """Whose trials answer when they have come to their horizon: each better than the one before."""

    def _say(self, event: Event) -> None:
        if isinstance(event, Ended) and event.outcome == "complete" and event.horizon is None:
            score = AnswerScore(4, "exact_match", 0.1 * (1 + event.trial), 0.05, 20, is_objective=True)
            super()._say(Answered(event.round, event.trial, event.attempt, score))
        super()._say(event)


def test_answers_are_recorded_before_the_end_is_and_optuna_is_told_them(tmp_path: Path) -> None:
    """As facts, by which the round's trials are ranked."""
    answers = ", answers: {objective: true}"
    fuse = simulate(tmp_path, make_worker=lambda: Answering(formula, slots=1), evaluation=answers)
    seams = [seam.partition(" record ")[2] for seam in fuse.passed if seam.startswith("after record")]
    assert "TrialEnded" in seams[1 + seams.index("Answered")]
    complete = [trial for trial in trials(tmp_path) if trial.state == TrialState.COMPLETE]
    assert len(complete) > 1
    assert [trial for trial, _ in ranked(complete)] == complete[::-1]
    study = optuna_study(tmp_path)
    told = {t.user_attrs["trial"]: t.value for t in study.trials if t.value is not None}
    assert told == {trial.number: pytest.approx(0.1 * (1 + trial.number)) for trial in complete}
    assert study.best_trial.user_attrs["trial"] == complete[-1].number
    with closing(open_store(f"sqlite:///{tmp_path / 'tuner.db'}", study="tiny")) as store:
        assert repr(CachedStore(store).trials("round1")) == repr(store.trials("round1"))


def test_a_metric_that_was_edited_between_two_trials_is_said_once(tmp_path: Path) -> None:
    class Scores(SimulatedWorker):
        metric = "before"

        def _say(self, event: Event) -> None:
            super()._say(
                replace(event, environment={"metric": self.metric}) if isinstance(event, Started) else event
            )

    class ScoresOtherwise(Scores):
        metric = "after"

    said: list[str] = []
    view = silent_view()
    view.message = said.append
    answers = ", answers: {metric: own.py:score}"
    for promised, worker in ((2, Scores), (5, ScoresOtherwise)):
        simulate(
            tmp_path,
            trials=promised,
            evaluation=answers,
            view=view,
            make_worker=partial(worker, formula, slots=1),
        )
    [warning] = [text for text in said if text.startswith("warning")]
    assert "the file of own.py:score has changed" in warning


def test_what_workers_measure_is_added_up_over_their_sessions(tmp_path: Path) -> None:
    """Two processes one after the other, each saying its sums so far again and again."""

    class Measures(SimulatedWorker):
        session = "first"
        tokens = 0

        def _say(self, event: Event) -> None:
            super()._say(event)
            if isinstance(event, Evaluated) and event.horizon is None:
                self.tokens += 10
                peak = 70 if self.session == "first" else 50
                work = Throughput(self.session, 2.0, tokens=self.tokens, peak_memory_bytes=peak)
                super()._say(Measured(work))

    class MeasuresAgain(Measures):
        session = "second"

    simulate(tmp_path, trials=1, make_worker=lambda: Measures(formula, slots=1))
    (first,) = rounds(tmp_path)[0].throughputs
    evaluations = len(trials(tmp_path)[0].evaluations)
    assert first == Throughput("first", 2.0, tokens=10 * evaluations, peak_memory_bytes=70)
    simulate(tmp_path, trials=2, make_worker=lambda: MeasuresAgain(formula, slots=1))
    whole = rounds(tmp_path)[0].throughput
    assert whole is not None
    assert (whole.training_seconds, whole.peak_memory_bytes) == (4.0, 70)
    assert whole.tokens == 10 * sum(len(trial.evaluations) for trial in trials(tmp_path))


def test_a_mirror_knows_what_was_measured_before_it(tmp_path: Path) -> None:
    inner = MemoryStore()
    record = RoundRecord("round1", 8, {}, begun_at=0.0)
    inner.record(RoundBegun(record), *(Measured(Throughput(session, 2.0), "round1") for session in "ab"))
    changes = NodeChange("a", "joined", 1, 5.0), NodeChange("a", "lost", 1, 6.0)
    inner.record(*(NodeChanged(change, "round1") for change in changes))
    mirrored = CachedStore(inner)
    assert mirrored.rounds() == inner.rounds()
    assert len(mirrored.rounds()[0].throughputs) == 2
    later = NodeChange("b", "joined", 1, 7.0)
    mirrored.record(NodeChanged(later, "round1"))
    assert mirrored.rounds()[0].node_changes == (*changes, later)


def test_steps_run_are_counted_over_attempts(tmp_path: Path) -> None:
    class DiesHalfWay(SimulatedWorker):
        died = False

        def events(self, timeout_seconds: float) -> list[Event]:
            said = super().events(timeout_seconds)
            steps = [run.step for run in self._runs.values()]
            if not type(self).died and steps == [4]:
                type(self).died = True
                held = tuple(self._runs)
                self._runs.clear()
                return [*said, Died("half way", held)]
            return said

    simulate(tmp_path, trials=1, make_worker=lambda: DiesHalfWay(formula, slots=1))
    (trial,) = trials(tmp_path)
    assert trial.executed_steps == 4 + 4
    assert [attempt.outcome for attempt in trial.attempts] == ["died", "complete"]


def attempt(number: int, from_step: int, outcome: str) -> Attempt:
    return Attempt(number, from_step, from_step, 0.0, 1.0, outcome)


def with_history(*attempts: Attempt, checkpoint_at: int | None = None) -> Trial:
    saved = () if checkpoint_at is None else (Checkpoint(CheckpointKind.LAST, checkpoint_at, "x", 1, "y"),)
    return Trial("round1", 0, {}, attempts=attempts, checkpoints=saved)


def test_a_trial_fails_after_three_deaths_without_headway() -> None:
    assert has_failed(with_history(*(attempt(n, 0, "died") for n in (1, 2, 3))))
    assert not has_failed(with_history(*(attempt(n, 0, "died") for n in (1, 2))))
    # The third death came after a checkpoint beyond its start: there is headway.
    assert not has_failed(with_history(*(attempt(n, 0, "died") for n in (1, 2, 3)), checkpoint_at=5))
    assert has_failed(with_history(*(attempt(n, 5, "died") for n in (1, 2, 3)), checkpoint_at=5))


def test_interruptions_of_the_parent_are_not_held_against_a_trial() -> None:
    assert not has_failed(with_history(*(attempt(n, 0, "interrupted") for n in range(1, 9))))
    assert not has_failed(with_history(*(attempt(n, 0, "stopped") for n in range(1, 9))))


def test_a_failed_trial_is_replaced_once() -> None:
    failed = replace(with_history(), state=TrialState.FAILED, hyperparameters={"learning_rate": 1e-3})
    assert unreplaced([failed]) == [failed]
    repetition = replace(failed, number=1, state=TrialState.COMPLETE)
    assert unreplaced([failed, repetition]) == []


def test_started_and_ready_are_no_facts(tmp_path: Path) -> None:
    """A worker that says `Started` twice does not make two attempts."""

    class Stutters(SimulatedWorker):
        def _say(self, event: Event) -> None:
            super()._say(event)
            if isinstance(event, Started):
                super()._say(event)

    simulate(tmp_path, trials=1, make_worker=lambda: Stutters(formula, slots=1))
    assert len(trials(tmp_path)[0].attempts) == 1


# --- pruners --------------------------------------------------------------------------------------

RATES = "[3e-3, 2e-2, 1e-4, 4e-3, 1e-3, 1e-2, 2e-4]"
"""The formula is best at the first."""


def pruned_round(directory: Path, pruner: str, **more: Any) -> Fuse:
    written = {"learning_rate": RATES, "lora_r": 2, "sampler": "grid", "run": f"run: {{pruner: {pruner}}}\n"}
    alone = {"make_worker": lambda: SimulatedWorker(formula, slots=1)}
    return simulate(directory, **{"trials": 7, **alone, **written, **more})


@pytest.mark.parametrize(
    ("pruner", "ended_at"),
    [
        # Five have to be complete before there is a median.
        ("median", {3e-3: 8, 2e-2: 8, 1e-4: 8, 4e-3: 8, 1e-3: 8, 1e-2: 2, 2e-4: 2}),
        ("halving", {3e-3: 8, 2e-2: 2, 1e-4: 2, 4e-3: 2, 1e-3: 2, 1e-2: 2, 2e-4: 2}),
    ],
)
def test_a_pruner_ends_trials_early_and_changes_nothing_else(
    tmp_path: Path, pruner: str, ended_at: dict[float, int]
) -> None:
    pruned_round(tmp_path, pruner)
    check_consistent(tmp_path, promised=7)
    found = trials(tmp_path)
    assert {t.hyperparameters["learning_rate"]: t.evaluations[-1].step for t in found} == ended_at
    for trial in found:
        assert trial.executed_steps == trial.evaluations[-1].step
        is_early = trial.evaluations[-1].step < 8
        assert trial.state == (TrialState.PRUNED if is_early else TrialState.COMPLETE)
        assert (trial.reason or "").startswith(f"{pruner}: ") == is_early
    assert ranked(found)[0][0].hyperparameters["learning_rate"] == 3e-3


def test_a_pruned_trial_whose_process_dies_ends_as_if_it_had_not(tmp_path: Path) -> None:
    seams = pruned_round(tmp_path / "undisturbed", "halving", trials=2).passed
    undisturbed = trials(tmp_path / "undisturbed")
    decided = max(n for n, seam in enumerate(seams) if seam == "before record TrialEnded")
    # From the evaluation that decides, over the decision, to the tell, which is the last seam.
    for fuse in (decided, decided + 1, len(seams)):
        directory = tmp_path / str(fuse)
        with pytest.raises(Crash):
            pruned_round(directory, "halving", trials=2, fuse=fuse)
        pruned_round(directory, "halving", trials=2)
        check_consistent(directory, promised=2)
        assert [without_attempts(t) for t in trials(directory)] == [without_attempts(t) for t in undisturbed]


class _Deaf(SimulatedWorker):
    """Runs every trial to its end before it hears that it is to stop, unless it is closed."""

    def stop(self, run: RunId) -> None:
        pass

    def close(self) -> None:
        for run in list(self._runs):
            super().stop(run)


def test_what_a_pruned_trial_did_before_it_heard_of_it_changes_nothing(tmp_path: Path) -> None:
    """Or who else is pruned, and the adapter, would depend on who is faster."""
    pruned_round(tmp_path / "heard", "halving", trials=3)
    pruned_round(tmp_path / "deaf", "halving", make_worker=lambda: _Deaf(formula, slots=1), trials=3)
    heard, deaf = (trials(tmp_path / name) for name in ("heard", "deaf"))
    assert sum(trial.executed_steps for trial in deaf) > sum(trial.executed_steps for trial in heard)
    assert [without_attempts(t) for t in deaf] == [without_attempts(t) for t in heard]
    runs = tmp_path / "deaf" / "runs" / "round1"
    for trial in deaf:
        best = trial.checkpoint(CheckpointKind.BEST)
        assert best is not None
        assert (runs / f"trial-{trial.number:04d}" / "best").resolve() == runs / best.path
    check_consistent(tmp_path / "deaf", promised=3)


def without_attempts(trial: Trial) -> Trial:
    assert all(attempt.ended_at is not None for attempt in trial.attempts)
    return replace(trial, attempts=(), checkpoints=())
