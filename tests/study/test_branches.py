"""Comparison runs follow the last trial, survive a crash at every seam, and leave nothing but a loss."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import optuna
import pytest

from tests.studies import formula, history, round_file
from tests.study.simulation import Crash, DyingStore, Fuse, rounds, simulate, trials
from tuner.engines import SimulatedWorker, Worker
from tuner.playbook import read_round
from tuner.playbook.gain import GainSource
from tuner.records import (
    Assignment,
    Branch,
    Checkpoint,
    CheckpointKind,
    CheckpointsRemoved,
    Died,
    Ended,
    Evaluated,
    Evaluation,
    Event,
    Fact,
    Progressed,
    RoundBegun,
    RoundRecord,
    RunId,
    Saved,
    Started,
    Trial,
)
from tuner.store import MemoryStore, Store
from tuner.study.branches import ComparisonRuns
from tuner.study.check import planned_work
from tuner.study.plan import CheckpointFolder, RoundPlan
from tuner.study.results import num_branches_left, round_results
from tuner.study.round_state import MAX_ATTEMPTS
from tuner.study.sampling import optuna_storage

CHANGES = {
    "trials": 3,
    "learning_rate": "{low: 1e-4, high: 1e-2, log: true}",
    "storage": "sqlite:///tuner.db\nrun: {decay_branches: true}",
}
"""Eight steps, the last three decaying: branches leave at 2 for 4 and at 4 for 6."""
ENDS = {(trial, horizon) for trial in range(3) for horizon in (4, 6)}


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("study")
    simulate(directory, **CHANGES)
    return directory


def losses(record: RoundRecord) -> dict[tuple[int, int], float]:
    ended = [branch for branch in record.branches if branch.state == "complete"]
    return {(b.trial, b.max_train_steps): b.evaluation.eval_loss for b in ended if b.evaluation}


def expected(found: tuple[Trial, ...]) -> dict[tuple[int, int], float]:
    return {(t, end): formula(found[t].hyperparameters, end, end).eval_loss for t, end in ENDS}


def test_a_round_is_complete_after_the_branches_of_its_leading_trials(study: Path) -> None:
    (record,), found = rounds(study), trials(study, **CHANGES)
    assert losses(record) == expected(found)
    store = MemoryStore()
    store.record(RoundBegun(record), *(fact for trial in found for fact in history(trial)))
    assert {(b.from_step, b.max_train_steps, b.executed_steps) for b in record.branches} == {
        (2, 4, 2),
        (4, 6, 2),
    }
    assert num_branches_left(store, record) == 0
    assert num_branches_left(store, replace(record, branches=record.branches[2:])) == 2


def test_a_branch_is_no_trial_and_leaves_no_files(study: Path) -> None:
    found = trials(study, **CHANGES)
    assert [(t.number, t.state, t.executed_steps) for t in found] == [(n, "complete", 8) for n in range(3)]
    storage = optuna_storage(f"sqlite:///{study / 'tuner.db'}")
    assert len(optuna.load_study(study_name="tiny/round1", storage=storage).trials) == 3
    assert {path.name for path in (study / "runs" / "round1").iterdir()} == {
        f"trial-{n:04d}" for n in range(3)
    }


def test_study_check_counts_what_is_run(study: Path) -> None:
    (record,), planned = rounds(study), planned_work(round_file(study, **CHANGES).spec)
    ran = sum(branch.executed_steps for branch in record.branches)
    assert (planned.branches, planned.branch_steps) == (len(record.branches), ran)
    assert planned.steps == ran + sum(trial.executed_steps for trial in trials(study, **CHANGES))


def test_the_gain_is_taken_from_them(study: Path) -> None:
    (record,) = rounds(study)
    reading = read_round(round_results(record, trials(study, **CHANGES)))
    best = reading.leading[0].trial
    half, whole = (formula(best.hyperparameters, step, step).eval_loss for step in (4, 8))
    assert reading.gain_source == GainSource.COMPARISON
    assert reading.gain == pytest.approx((half - whole) / half)


# --- crashes, at every seam ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def facts(study: Path) -> list[Fact]:
    """The study as its last trial left it."""
    found: list[Fact] = [RoundBegun(rounds(study)[0])]
    return found + [fact for trial in trials(study, **CHANGES) for fact in history(trial)]


class Place:
    """That study in memory, with the branches that a process has begun; its trunks are on disk."""

    def __init__(self, study: Path, facts: list[Fact], **changes: Any) -> None:
        self.plan = RoundPlan(round_file(study, **{**CHANGES, **changes}))
        self.store = MemoryStore()
        self.store.record(*facts)
        self.said: list[str] = []

    def opened(self, *, fuse: Fuse | None = None) -> ComparisonRuns:
        """The branches as a process sees them."""
        store: Store = self.store if fuse is None else DyingStore(self.store, fuse)  # type: ignore[assignment]
        folder = CheckpointFolder(self.plan.checkpoints)
        return ComparisonRuns(self.plan, store, folder, _seconds().__next__, self.said.append)

    def run(self, worker: Worker, *, fuse: Fuse | None = None) -> None:
        """One process: what an earlier one left is healed, then branches run to the end."""
        branches = self.opened(fuse=fuse)
        branches.recover()
        while branches.left():
            while worker.capacity() > 0 and (assignment := branches.next_assignment()) is not None:
                worker.start(assignment)
            for event in worker.events(0.0):
                if isinstance(event, Died):
                    branches.died(event.runs, event.reason)
                elif hasattr(event, "trial"):
                    branches.record(event)  # type: ignore[arg-type]

    @property
    def branches(self) -> tuple[Branch, ...]:
        return self.store.rounds()[0].branches


def test_dying_at_every_seam_in_turn(study: Path, facts: list[Fact]) -> None:
    """Wherever a process dies, the next one ends with the same losses and leaves no files.

    Of one trial: its two branches run side by side.
    """
    facts = [fact for fact in facts if getattr(fact, "trial", 0) in (0, trials(study, **CHANGES)[0])]
    whole = Fuse(-1)
    undisturbed = Place(study, facts)
    undisturbed.run(SimulatedWorker(formula, slots=4), fuse=whole)
    wanted = {end: loss for end, loss in expected(trials(study, **CHANGES)).items() if end[0] == 0}
    assert losses(undisturbed.store.rounds()[0]) == wanted
    for seam in range(1, len(whole.passed) + 1):
        place = Place(study, facts)
        with pytest.raises(Crash):
            place.run(SimulatedWorker(formula, slots=4), fuse=Fuse(seam))
        place.run(SimulatedWorker(formula, slots=4))
        assert losses(place.store.rounds()[0]) == wanted, whole.passed[seam - 1]
        assert all(2 <= branch.executed_steps <= 4 for branch in place.branches)
        assert not list(place.plan.checkpoints.glob("branch-*"))


def test_an_attempt_goes_on_from_the_checkpoint_of_the_one_before(study: Path, facts: list[Fact]) -> None:
    place, fuse = Place(study, facts), Fuse(-1)
    place.run(SimulatedWorker(formula, slots=1), fuse=fuse)
    for seam in range(1, len(fuse.passed)):
        place = Place(study, facts)
        with pytest.raises(Crash):
            place.run(SimulatedWorker(formula, slots=1), fuse=Fuse(seam))
        left = [branch for branch in place.branches if branch.state == "open" and branch.checkpoint]
        if left:
            break
    assert [branch.executed_steps for branch in left] == [2]
    place.run(SimulatedWorker(formula, slots=1))
    (again,) = (b for b in place.branches if len(b.attempts) == 2)
    assert again.attempts[1].from_step == again.max_train_steps
    assert {branch.executed_steps for branch in place.branches} == {2}


class Mortal(SimulatedWorker):
    """Takes along what it holds, as often as told, as soon as it has begun."""

    deaths = MAX_ATTEMPTS

    def events(self, timeout_seconds: float) -> list[Event]:
        if self._runs and self.deaths:
            self.deaths -= 1
            held = tuple(self._runs)
            self._runs.clear()
            self._said = [Died("hit by a cosmic ray", held)]
        return super().events(timeout_seconds)


def test_a_branch_whose_worker_dies_is_tried_again_and_given_up_in_the_end(
    study: Path, facts: list[Fact]
) -> None:
    place = Place(study, facts)
    place.run(Mortal(formula, slots=1))
    first, *others = sorted(place.branches, key=lambda branch: branch.state != "failed")
    assert (first.state, first.reason, len(first.attempts)) == ("failed", "hit by a cosmic ray", MAX_ATTEMPTS)
    assert [branch.state for branch in others] == ["complete"] * 5


def test_a_branch_without_its_trunk_is_given_up_and_says_why(study: Path, facts: list[Fact]) -> None:
    place = Place(study, facts)
    (trial, *_) = place.store.trials("round1")
    trunk = trial.checkpoint(CheckpointKind.TRUNK, 4)
    assert trunk is not None
    lost = place.plan.checkpoints / trunk.path
    aside = lost.rename(lost.with_name("aside"))
    place.run(SimulatedWorker(formula, slots=1))
    aside.rename(lost)
    given_up = [b for b in place.branches if b.state != "complete"]
    assert [(b.trial, b.max_train_steps, b.state, b.reason) for b in given_up] == [
        (0, 6, "failed", "its stable checkpoint is missing")
    ]
    place = Place(study, [*facts, CheckpointsRemoved("round1", 0, (trunk.path,))])
    place.run(SimulatedWorker(formula, slots=1))
    assert {(b.trial, b.max_train_steps) for b in place.branches} == ENDS - {(0, 6)}


# --- one branch, event by event -----------------------------------------------------------------------


@pytest.fixture
def place(study: Path, facts: list[Fact]) -> Iterator[Place]:
    place = Place(study, facts)
    yield place
    for left in place.plan.checkpoints.glob("branch-*"):
        shutil.rmtree(left)


@dataclass
class Run:
    """What a worker says of the branch that it was given."""

    place: Place
    branches: ComparisonRuns
    assignment: Assignment

    def say(self, event: type[Any], *arguments: Any) -> Branch:
        """Record it; the branch as it is then."""
        name = (self.assignment.round, self.assignment.trial, self.assignment.attempt)
        self.branches.record(event(*name, *arguments, horizon=self.assignment.horizon))
        return self.place.branches[0]

    def save(self, step: int, *, kind: CheckpointKind = CheckpointKind.LAST) -> Path:
        """Save a checkpoint, and say so; its directory."""
        path = Path(self.assignment.directory, kind, f"step-{step}.a{self.assignment.attempt}")
        path.mkdir(parents=True, exist_ok=True)
        named = str(path.relative_to(self.place.plan.checkpoints))
        self.say(Saved, Checkpoint(kind, step, named, 1, f"sha of {named}"))
        return path

    def again(self) -> Run:
        """The next attempt of it."""
        assignment = self.branches.next_assignment()
        assert assignment is not None
        assert assignment.run == self.assignment.run
        return Run(self.place, self.branches, assignment)


def begun(place: Place) -> Run:
    branches = place.opened()
    assignment = branches.next_assignment()
    assert assignment is not None
    return Run(place, branches, assignment)


def test_a_worker_is_given_a_run_that_decays_from_the_trunk(place: Place) -> None:
    best = read_round(round_results(place.store.rounds()[0], place.store.trials("round1"))).leading[0].trial
    leftover = place.plan.checkpoints / f"branch-{best.number:04d}-000004" / "last" / "step-000003.a9"
    leftover.mkdir(parents=True)
    run = begun(place)
    trunk = best.checkpoint(CheckpointKind.TRUNK, 2)
    assert trunk is not None
    assert run.assignment == Assignment(
        round="round1",
        trial=best.number,
        attempt=1,
        hyperparameters={**best.hyperparameters, "decay_steps": 2},
        max_train_steps=4,
        evaluate_every=2,
        directory=str(leftover.parent.parent),
        resume_from=str(place.plan.checkpoints / trunk.path),
        resume_sha256=trunk.sha256,
        is_comparison=True,
    )
    assert not leftover.exists()
    others = [run.branches.next_assignment() for _ in range(6)]
    assert others[5] is None
    given = [each for each in (run.assignment, *others) if each is not None]
    assert len({each.run for each in given if each.is_comparison}) == 6
    assert place.said[0] == f"comparison run of trial {best.number} to step 4 starts at step 2"


def test_what_a_worker_says_of_a_branch_is_recorded_as_it_comes(place: Place) -> None:
    run = begun(place)
    assert run.say(Started, 2).attempts[0].to_step == 2
    assert run.say(Progressed, 3, 1.0).attempts[0].to_step == 3
    inherited = run.say(Evaluated, Evaluation(2, 1.5))
    assert (inherited.evaluation, inherited.executed_steps) == (None, 1)
    run.save(3, kind=CheckpointKind.BEST)
    run.save(3, kind=CheckpointKind.TRUNK)
    assert place.branches[0].checkpoint is None
    old = run.save(3)
    assert run.save(3) == old
    assert old.is_dir()
    new = run.save(4)
    assert (old.exists(), new.is_dir()) == (False, True)
    assert place.branches[0].executed_steps == 2
    last = Evaluation(4, 1.25)
    assert run.say(Evaluated, last).evaluation == last
    ended = run.say(Ended, 4, "complete")
    assert (ended.state, ended.evaluation, ended.attempts[0].outcome) == ("complete", last, "complete")
    assert not Path(run.assignment.directory).exists()
    assert place.said[-1].endswith("to step 4: complete, loss 1.2500")
    run.branches.died([run.assignment.trial], "later")
    assert place.branches[0] == ended


def test_steps_are_counted_whoever_says_them_first(place: Place) -> None:
    run = begun(place)
    assert run.say(Evaluated, Evaluation(3, 1.5)).executed_steps == 1
    run.save(4)
    assert place.branches[0].executed_steps == 2
    assert run.say(Ended, 3, "stopped").executed_steps == 2
    assert run.again().say(Ended, 5, "stopped").executed_steps == 3
    assert run.again().say(Ended, 6, "complete").executed_steps == 5


def test_an_infeasible_branch_is_not_tried_again(place: Place) -> None:
    run = begun(place)
    run.say(Evaluated, Evaluation(4, 9.0))
    ended = run.say(Ended, 4, "infeasible", "its loss diverged")
    assert (ended.state, ended.reason) == ("infeasible", "its loss diverged")
    assert place.said[-1].endswith("to step 4: infeasible, its loss diverged")
    assert ended not in run.branches.left()


def test_a_stopped_attempt_goes_on_and_a_failed_one_leaves_the_trunk_anew(place: Place) -> None:
    run = begun(place)
    saved = run.save(3)
    assert run.say(Ended, 3, "stopped").state == "open"
    second = run.again()
    assert (second.assignment.attempt, second.assignment.resume_from) == (2, str(saved))
    assert second.assignment.resume_sha256 == f"sha of {saved.relative_to(place.plan.checkpoints)}"
    assert place.said[-1].endswith("to step 4 resumes at step 3")
    assert place.branches[0].attempts[1].to_step == 3
    assert second.say(Ended, 3, "failed", "unreadable").checkpoint is None
    assert saved.is_dir()
    third = second.again()
    assert third.assignment.resume_from == run.assignment.resume_from
    assert not saved.exists()


def test_a_trunk_that_cannot_be_read_is_done_without(place: Place) -> None:
    """The run to T/2 starts from scratch, as where the trunk is gone."""
    run = begun(place)
    assert run.assignment.resume_from is not None
    failed = run.say(Ended, 2, "failed", "its checkpoint cannot be read")
    assert (failed.state, failed.from_step) == ("open", 0)
    second = run.again()
    assert (second.assignment.attempt, second.assignment.resume_from) == (2, None)
    assert place.said[-1].endswith("to step 4 starts at step 0")


def test_a_checkpoint_that_is_gone_is_made_good_from_the_trunk(place: Place) -> None:
    run = begun(place)
    saved = run.save(3)
    run.say(Ended, 3, "stopped")
    shutil.rmtree(saved)
    assert run.again().assignment.resume_from == run.assignment.resume_from


def test_deaths_are_counted_from_the_last_progress_and_only_of_what_the_worker_held(place: Place) -> None:
    run = begun(place)
    run.save(3)
    for _ in range(MAX_ATTEMPTS):
        run.branches.died([replace(run.assignment.run, horizon=None)], "another worker")
        assert place.branches[0].attempts[-1].ended_at is None
        run.branches.died([run.assignment.run], "lost")
        last = place.branches[0].attempts[-1]
        assert (place.branches[0].state, last.outcome, last.message) == ("open", "died", "lost")
        run = run.again()
    failed = run.say(Ended, 3, "failed")
    assert (failed.state, failed.reason) == ("failed", "failed")


def test_a_process_that_goes_on_keeps_what_a_branch_can_go_on_from(place: Place) -> None:
    run = begun(place)
    saved = run.save(3)
    later = place.opened()
    later.recover()
    assert place.branches[0].attempts[0].outcome == "interrupted"
    goes_on = later.next_assignment()
    assert goes_on is not None
    assert goes_on.resume_from == str(saved)
    assert saved.is_dir()


def test_files_go_after_the_fact_that_the_branch_has_ended(place: Place) -> None:
    run = begun(place)
    saved = run.save(4)
    dying = replace(run, branches=place.opened(fuse=Fuse(1)))
    with pytest.raises(Crash):
        dying.say(Ended, 4, "complete")
    assert saved.is_dir()


def test_branches_that_the_file_has_given_up_are_not_owed(study: Path, facts: list[Fact]) -> None:
    place = Place(study, facts)
    assert place.opened().left()
    best = read_round(round_results(place.store.rounds()[0], place.store.trials("round1"))).leading[0].trial
    for rule, owed in (("false", ()), ("auto", ((best.number, 4, 2),))):
        storage = f"sqlite:///tuner.db\nrun: {{decay_branches: {rule}}}"
        place.plan = RoundPlan(round_file(study, **{**CHANGES, "storage": storage}))
        left = place.opened().left()
        assert tuple((b.trial, b.max_train_steps, b.from_step) for b in left) == owed


# --- from scratch -------------------------------------------------------------------------------------

COSINE = {"schedule": "cosine", "decay_steps": 0, "storage": "sqlite:///tuner.db"}
"""`decay_branches` is left at its default, `auto`."""


@pytest.fixture(scope="module")
def cosine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("cosine")
    simulate(directory, **{**CHANGES, **COSINE})
    return directory


def begun_cosine(study: Path) -> list[Fact]:
    """That study as its last trial left it."""
    found: list[Fact] = [RoundBegun(rounds(study)[0])]
    return found + [fact for trial in trials(study, **{**CHANGES, **COSINE}) for fact in history(trial)]


def test_the_best_trial_of_a_cosine_round_is_run_to_the_half_from_scratch(cosine: Path) -> None:
    (record,), found = rounds(cosine), trials(cosine, **{**CHANGES, **COSINE})
    reading = read_round(round_results(record, found))
    (branch,) = record.branches
    assert branch.trial == reading.leading[0].trial.number
    assert (branch.state, branch.from_step, branch.max_train_steps, branch.executed_steps) == (
        "complete",
        0,
        4,
        4,
    )
    assert reading.gain_source == GainSource.COMPARISON
    assert not list((cosine / "runs" / "round1").glob("branch-*"))
    planned = planned_work(round_file(cosine, **{**CHANGES, **COSINE}).spec)
    assert (planned.branches, planned.branch_steps) == (1, 4)


def test_one_from_scratch_dies_at_every_seam_in_turn(cosine: Path) -> None:
    facts, whole = begun_cosine(cosine), Fuse(-1)
    Place(cosine, facts, **COSINE).run(SimulatedWorker(formula, slots=1), fuse=whole)
    wanted = losses(rounds(cosine)[0])
    for seam in range(1, len(whole.passed) + 1):
        place = Place(cosine, facts, **COSINE)
        with pytest.raises(Crash):
            place.run(SimulatedWorker(formula, slots=1), fuse=Fuse(seam))
        place.run(SimulatedWorker(formula, slots=1))
        assert losses(place.store.rounds()[0]) == wanted, whole.passed[seam - 1]
        assert 4 <= place.branches[0].executed_steps <= 8
        assert not list(place.plan.checkpoints.glob("branch-*"))


def test_a_worker_is_given_one_from_scratch_with_the_trials_schedule(cosine: Path) -> None:
    place = Place(cosine, begun_cosine(cosine), **COSINE)
    run = begun(place)
    best = place.store.trials("round1")[place.branches[0].trial]
    assert run.assignment.hyperparameters == best.hyperparameters
    assert (run.assignment.max_train_steps, run.assignment.resume_from) == (4, None)
    assert run.assignment.run == RunId("round1", best.number, 4)
    assert place.said == [f"comparison run of trial {best.number} to step 4 starts at step 0"]
    run.save(2)
    run.say(Ended, 2, "stopped")
    assert run.again().assignment.resume_from is not None
    assert place.said[-1].endswith("resumes at step 2")
    shutil.rmtree(run.assignment.directory)


@pytest.mark.parametrize("is_recorded", [True, False])
def test_the_half_starts_from_scratch_where_its_stable_checkpoint_is_gone(
    study: Path, facts: list[Fact], *, is_recorded: bool
) -> None:
    """Given up by a fact, or deleted by hand."""
    auto = {"storage": "sqlite:///tuner.db"}
    best = read_round(round_results(rounds(study)[0], trials(study, **CHANGES))).leading[0].trial
    trunk = best.checkpoint(CheckpointKind.TRUNK, 2)
    assert trunk is not None
    removed = [CheckpointsRemoved("round1", best.number, (trunk.path,))] if is_recorded else []
    place = Place(study, [*facts, *removed], **auto)
    lost = place.plan.checkpoints / trunk.path
    aside = lost.rename(lost.with_name("aside"))
    place.run(SimulatedWorker(formula, slots=1))
    aside.rename(lost)
    (branch,) = place.branches
    assert (branch.trial, branch.state, branch.from_step) == (best.number, "complete", 0)
    assert branch.executed_steps == 4
    assert losses(place.store.rounds()[0]).items() <= losses(rounds(study)[0]).items()


def _seconds() -> Iterator[float]:
    now = 1000.0
    while True:
        now += 1.0
        yield now
