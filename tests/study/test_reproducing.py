"""A trial run again beside its study: from where, how far, and that nothing of it stays."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.studies import formula, silent_view
from tests.study.simulation import simulate, trials
from tuner.engines import SimulatedWorker
from tuner.errors import InputError, Interrupted
from tuner.playbook.reproduction import Agreement, Reproduction
from tuner.records import Continuation, Evaluation, Hyperparameters, Ready, TrialState
from tuner.report.reproduction import reproduction_page
from tuner.study.folder import open_folder
from tuner.study.reproduction import FOLDER, Rerun, planned_rerun, reproduce

READY = Ready(1, "simulated", workload="same")


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three trials of eight steps, evaluated at every second one; trial 2 is infeasible at step 2."""
    directory = tmp_path_factory.mktemp("study")
    simulate(directory)
    return directory


def planned(
    study: Path, number: int, *, to_step: int | None = None, engine: str | None = None, **changes: Any
) -> Rerun:
    trial = replace(trials(study)[number], **changes)
    return planned_rerun(open_folder(study), trial, to_step=to_step, engine=engine)


def again(
    rerun: Rerun,
    *,
    curve: Callable[[Hyperparameters, int, int], Evaluation] = formula,
    ready: Ready = READY,
    stopping: Callable[[], bool] = lambda: False,
) -> Reproduction:
    def make_worker(spec: object, *, cache: Path, place: Path) -> SimulatedWorker:
        assert place.is_dir()
        return SimulatedWorker(curve, slots=1, ready=ready)

    return reproduce(rerun, make_worker=make_worker, view=silent_view(), stopping=stopping)


def said(found: Reproduction) -> str:
    console = Console(width=400, file=io.StringIO(), record=True)
    console.print(reproduction_page("tiny", found))
    return console.export_text()


def test_a_trial_is_reproduced_and_the_study_stays_as_it_was(study: Path) -> None:
    before = repr(trials(study)), sorted(study.rglob("*"))
    found = again(planned(study, 0))
    assert found.agreement is Agreement.EQUAL
    assert [pair.step for pair in found.pairs] == [0, 2, 4, 6, 8]
    assert "round1/0 is reproduced digit for digit: 5 evaluations up to step 8" in said(found)
    assert (repr(trials(study)), sorted(study.rglob("*"))) == before


def test_another_engine_is_used_and_said(study: Path) -> None:
    """By its path: nothing imports it before it runs."""
    rerun = planned(study, 0, engine="my_cluster:Engine")
    assert rerun.spec.run.engine == "my_cluster:Engine"
    assert rerun.remarks == ("It runs on the engine my_cluster:Engine; its round names local.",)
    assert planned(study, 0, engine="local").remarks == ()


def test_an_infeasible_trial_ends_again(study: Path) -> None:
    found = again(planned(study, 2))
    assert found.trial.state is found.ended_as is TrialState.INFEASIBLE
    assert found.agreement is Agreement.EQUAL
    cured = again(planned(study, 2), curve=lambda h, s, t: formula({**h, "learning_rate": 1e-3}, s, t))
    assert cured.agreement is Agreement.DIFFERS
    assert cured.pairs[-1].step == 4  # it is not run on when it has outlived the recorded trial
    assert "Recorded as infeasible (evaluation loss is nan at step 2); again: running." in said(cured)


def test_a_curve_that_moved_says_from_where_and_what_else_changed(study: Path) -> None:
    def moved(hyperparameters: Hyperparameters, step: int, horizon: int) -> Evaluation:
        made = formula(hyperparameters, step, horizon)
        return replace(made, eval_loss=made.eval_loss * {0: 1.0, 2: 1.0, 4: 1.5}.get(step, 1.1))

    found = again(planned(study, 0), curve=moved, ready=replace(READY, workload="other", train_rows=3))
    assert found.agreement is Agreement.DIFFERS
    assert found.first_beyond is not None
    assert found.first_beyond.step == 4
    text = said(found)
    assert (
        "not reproduced: losses differ by more than rounding (0.01%) from step 4 on, at most 33% at step 4"
        in text
    )
    assert "0 train rows and 0 eval rows then, 3 train rows and 0 eval rows now" in text


@pytest.mark.parametrize(("wanted", "last"), [(2, 2), (5, 4), (8, 8)])
def test_the_first_steps_are_run_at_the_same_schedule(study: Path, wanted: int, last: int) -> None:
    seen: list[int] = []

    def watched(hyperparameters: Hyperparameters, step: int, horizon: int) -> Evaluation:
        seen.append(horizon)
        return formula(hyperparameters, step, horizon)

    found = again(planned(study, 0, to_step=wanted), curve=watched)
    assert (found.agreement, found.to_step, set(seen)) == (Agreement.EQUAL, last, {8})
    assert [pair.step for pair in found.pairs] == list(range(0, last + 1, 2))


def test_a_pruned_trial_is_run_as_far_as_it_came(study: Path) -> None:
    curve = trials(study)[0].evaluations[:3]
    found = again(planned(study, 0, state=TrialState.PRUNED, evaluations=curve))
    assert (found.agreement, found.pairs[-1].step) == (Agreement.EQUAL, 4)


class TestContinued:
    """As if trial 1 went on from trial 0, whose trunk ends at step 5."""

    CONTINUES = Continuation("round1", 0, 5)

    def planned(self, study: Path, **changes: Any) -> Rerun:
        source = trials(study)[0]
        changes = {"hyperparameters": source.hyperparameters, "evaluations": source.evaluations, **changes}
        return planned(study, 1, continues=self.CONTINUES, **changes)

    def test_goes_on_from_the_trunk(self, study: Path) -> None:
        found = again(self.planned(study))
        assert (found.agreement, found.from_step) == (Agreement.EQUAL, 5)
        assert [pair.step for pair in found.pairs] == [6, 8]

    @pytest.mark.parametrize(
        ("changes", "why"),
        [
            ({"to_step": 4}, "nothing would be left to run"),
            ({"continues": Continuation("round1", 0, 3)}, "its checkpoint is missing"),
        ],
    )
    def test_or_from_the_beginning(
        self, study: Path, changes: dict[str, Any], why: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if "continues" in changes:
            monkeypatch.setattr(self, "CONTINUES", changes.pop("continues"))
        found = again(self.planned(study, **changes))
        assert (found.agreement, found.from_step, found.pairs[0].step) == (Agreement.EQUAL, 0, 0)
        assert why in said(found)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"state": TrialState.FAILED, "reason": "died"}, r"round1/0 is failed \(died\)"),
        ({"state": TrialState.WAITING}, "round1/0 is waiting"),
        ({"to_step": 1}, "--to-step 1: .* from step 2"),
        ({"to_step": 9}, "--to-step 9: .* to step 8"),
        ({"engine": "steam"}, "--engine steam: expects one of local"),
        ({"engine": "simulated"}, "--engine simulated: a dry run trains nothing"),
    ],
)
def test_what_cannot_be_reproduced(study: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        planned(study, 0, **changes)


def test_stopping_leaves_nothing(study: Path) -> None:
    before = sorted(study.rglob("*"))
    calls = iter([False, False, True])
    with pytest.raises(Interrupted, match="nothing"):
        again(planned(study, 0), stopping=lambda: next(calls, True))
    assert sorted(study.rglob("*")) == before
    assert not (study / FOLDER).exists()
