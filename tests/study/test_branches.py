"""Decay branches run after the last trial, survive a crash at every seam, and leave nothing but a loss."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import optuna
import pytest

from tests.studies import formula, round_file, silent_view
from tests.study.rehearsal import Crash, DyingStore, Fuse, rehearse, rounds, trials
from tuner.playbook import read_round
from tuner.playbook.gain import GainSource
from tuner.records import Branch, CheckpointKind, Died, Event, RoundRecord, Trial
from tuner.store import MemoryStore, Store
from tuner.store.facts import CheckpointsRemoved, Fact, RoundBegun
from tuner.study.attempts import MAX_ATTEMPTS
from tuner.study.branches import DecayBranches
from tuner.study.checking import planned_work
from tuner.study.checkpoints import CheckpointFolder
from tuner.study.mirror import history
from tuner.study.plan import RoundPlan
from tuner.study.results import num_branches_left, round_results
from tuner.study.sampling import optuna_storage
from tuner.workers import SimulatedWorker, Worker

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
    rehearse(directory, **CHANGES)
    return directory


def losses(record: RoundRecord) -> dict[tuple[int, int], float]:
    ended = [branch for branch in record.branches if branch.state == "complete"]
    return {(b.trial, b.max_train_steps): b.evaluation.eval_loss for b in ended if b.evaluation}


def expected(found: tuple[Trial, ...]) -> dict[tuple[int, int], float]:
    return {(t, end): formula(found[t].hyperparameters, end, end).eval_loss for t, end in ENDS}


def test_a_round_is_complete_after_the_branches_of_its_leading_trials(study: Path) -> None:
    (record,), found = rounds(study), trials(study, **CHANGES)
    assert losses(record) == expected(found)
    assert {(b.from_step, b.max_train_steps, b.executed_steps) for b in record.branches} == {
        (2, 4, 2),
        (4, 6, 2),
    }
    assert num_branches_left(record, found) == 0
    assert num_branches_left(replace(record, branches=record.branches[2:]), found) == 2


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
    assert reading.gain_source == GainSource.DECAY_BRANCHES
    assert reading.gain == pytest.approx((half - whole) / half)


# --- crashes, at every seam ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def facts(study: Path) -> list[Fact]:
    """The study as its last trial left it."""
    found: list[Fact] = [RoundBegun(rounds(study)[0])]
    return found + [fact for trial in trials(study, **CHANGES) for fact in history(trial)]


class Place:
    """That study in memory, with the branches that a process has begun; its trunks are on disk."""

    def __init__(self, study: Path, facts: list[Fact]) -> None:
        self.plan = RoundPlan(round_file(study, **CHANGES))
        self.store = MemoryStore()
        self.store.record(*facts)

    def run(self, worker: Worker, *, fuse: Fuse | None = None) -> None:
        """One process: what an earlier one left is healed, then branches run to the end."""
        store: Store = self.store if fuse is None else DyingStore(self.store, fuse)  # type: ignore[assignment]
        folder = CheckpointFolder(self.plan.checkpoints)
        branches = DecayBranches(self.plan, store, folder, _seconds().__next__, silent_view().message)
        branches.heal()
        while branches.left():
            while worker.capacity() > 0 and (assignment := branches.next_assignment()) is not None:
                worker.start(assignment)
            for event in worker.events(0.0):
                if isinstance(event, Died):
                    branches.died(event.trials, event.reason)
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
        (0, 6, "failed", "its trunk's checkpoint is gone")
    ]
    place = Place(study, [*facts, CheckpointsRemoved("round1", 0, (trunk.path,))])
    place.run(SimulatedWorker(formula, slots=1))
    assert {(b.trial, b.max_train_steps) for b in place.branches} == ENDS - {(0, 6)}


def _seconds() -> Iterator[float]:
    now = 1000.0
    while True:
        now += 1.0
        yield now
