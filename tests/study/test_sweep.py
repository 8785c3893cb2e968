"""`study sweep`: rounds that double and widen, go on instead of starting again, and are never promoted."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.studies import silent_view, write_round
from tuner.errors import InputError, Interrupted
from tuner.playbook.sweep import ComputeBound, FirstHorizon, SweepDecision, SweepProblem
from tuner.records import Evaluation, Hyperparameters, Trial
from tuner.spec import RoundFile, load_round
from tuner.store import Store
from tuner.study.folder import open_folder
from tuner.study.pages import lineage
from tuner.study.promotion import Overrides, promote
from tuner.study.results import earlier_results
from tuner.study.running import run_round
from tuner.study.sweep import first_sweep, next_sweep, with_first_horizon
from tuner.workers import SimulatedWorker

FITTED_AT_ONCE = math.log(3.0 / 0.05)


@dataclass(frozen=True)
class Fit:
    """Training loss 3 exp(-t): one step at the best rate takes t on by 1 / pace, at others by less."""

    best_rate: float
    pace: float
    diverges_above: float = math.inf

    def __call__(self, hyperparameters: Hyperparameters, step: int, horizon: int) -> Evaluation:
        rate = float(hyperparameters["learning_rate"])  # type: ignore[arg-type]
        assert hyperparameters["schedule"] == "constant"
        assert hyperparameters["lora_dropout"] == 0
        if rate > self.diverges_above and step:
            return Evaluation(step, math.nan, train_loss=math.nan, learning_rate=rate)
        speed = math.exp(-abs(math.log(rate / self.best_rate)))
        loss = 3.0 * math.exp(-step * speed / self.pace)
        return Evaluation(step, loss, train_loss=loss if step else None, learning_rate=rate if step else None)


def swept_file(directory: Path, *, production_steps: int | None = 80, **changes: Any) -> RoundFile:
    path = write_round(
        directory, **{"base": "no/model", "data": "no/data", "steps": 20, "every": 5, **changes}
    )
    run = "" if production_steps is None else f"run: {{production_steps: {production_steps}}}  # mine\n"
    path.write_text(path.read_text() + run)
    return load_round(path)


def sweep(file: RoundFile, curve: Fit, *, stopping: Callable[[], bool] = lambda: False) -> SweepDecision:
    while isinstance(found := next_sweep(file), RoundFile):
        run_round(
            found,
            make_worker=lambda plan, base: SimulatedWorker(curve, slots=3),
            view=silent_view(),
            stopping=stopping,
        )
    return found


def facts(file: RoundFile) -> Store:
    return open_folder(file.directory).open()


def trials(file: RoundFile) -> dict[str, tuple[Trial, ...]]:
    store = facts(file)
    try:
        return {record.name: store.trials(record.name) for record in store.rounds()}
    finally:
        store.close()


def fitted(curve: Fit, rate: float) -> int:
    """The evaluation at which a rate has fitted."""
    steps = FITTED_AT_ONCE * curve.pace * math.exp(abs(math.log(rate / curve.best_rate)))
    return math.ceil(steps / 5) * 5


def test_the_first_round_fixes_everything_but_the_rate(tmp_path: Path) -> None:
    file = swept_file(tmp_path, lora_r="[4, 8]", steps=18, evaluation=", answers: {objective: true}")
    found = next_sweep(file)
    assert isinstance(found, RoundFile)
    spec = found.spec
    assert (spec.round, spec.max_train_steps, spec.search.trials) == ("sweep-20", 20, 8)
    assert [entry["learning_rate"] for entry in spec.search.enqueue][::7] == [1e-5, 3e-3]
    assert spec.data.eval == spec.data.train
    assert (spec.evaluation.max_examples, spec.evaluation.answers) == (256, None)
    assert spec.hyperparameters["lora_r"] == 4
    assert spec.hyperparameters["lora_dropout"] == spec.hyperparameters["weight_decay"] == 0
    assert "# mine" in found.text
    assert found.text == first_sweep(file)
    assert not (tmp_path / "tuner.db").exists()


def test_a_range_is_fixed_at_its_default_where_that_lies_in_it(tmp_path: Path) -> None:
    path = swept_file(tmp_path).path
    ranges = "  adam_beta2: {low: 0.9, high: 0.9999}\n  adam_beta1: {low: 0.5, high: 0.6}\n"
    path.write_text(path.read_text().replace("  batch_size: 2\n", f"  batch_size: [4, 2]\n{ranges}"))
    path.write_text(first_sweep(load_round(path)))
    written = load_round(path).spec.hyperparameters
    assert [written[n] for n in ("adam_beta2", "adam_beta1", "batch_size")] == [0.999, 0.5, 4]


def test_the_fastest_fit_is_the_answer_and_goes_into_the_file(tmp_path: Path) -> None:
    file, curve = swept_file(tmp_path, decay_steps=2), Fit(best_rate=2.6e-4, pace=3.0)
    answer = sweep(file, curve)
    assert answer == FirstHorizon(fitted(curve, 2.6e-4), 2.6e-4) == FirstHorizon(15, 2.6e-4)
    found = with_first_horizon(file, answer)
    assert found.spec.max_train_steps == 15
    changed = [
        (old, new)
        for old, new in zip(file.text.splitlines(), found.text.splitlines(), strict=True)
        if old != new
    ]
    assert len(changed) == 1
    assert changed[0][1].startswith("max_train_steps: 15  # study sweep: fits the training set fastest")


def test_a_horizon_that_the_file_cannot_hold_is_lengthened(tmp_path: Path) -> None:
    file = swept_file(tmp_path, decay_steps=12)
    found = with_first_horizon(file, FirstHorizon(5, 1e-4))
    assert found.spec.max_train_steps == 15
    assert "(5 steps; warmup, decay and evaluations need more)" in found.text
    longer = with_first_horizon(file, ComputeBound(33, "slow"))
    assert longer.spec.max_train_steps == 35


def test_trials_go_on_while_the_steps_double(tmp_path: Path) -> None:
    file, curve = swept_file(tmp_path), Fit(best_rate=2.6e-4, pace=15.0)
    assert sweep(file, curve) == FirstHorizon(fitted(curve, 2.6e-4), 2.6e-4) == FirstHorizon(65, 2.6e-4)
    ran = trials(file)
    assert list(ran) == ["sweep-20", "sweep-40", "sweep-80"]
    for name, executed in (("sweep-20", 20), ("sweep-40", 20), ("sweep-80", 40)):
        assert [trial.executed_steps for trial in ran[name]] == [executed] * 8
    assert {str(trial.continues) for trial in ran["sweep-80"]} == {f"sweep-40/{n}@40" for n in range(8)}


def test_nothing_fits_within_the_production_length(tmp_path: Path) -> None:
    file = swept_file(tmp_path, production_steps=30)
    answer = sweep(file, Fit(best_rate=2.6e-4, pace=100.0))
    assert isinstance(answer, ComputeBound)
    assert answer.max_train_steps == 3
    assert list(trials(file)) == ["sweep-20", "sweep-30"]
    more = swept_file(tmp_path, production_steps=60)
    found = next_sweep(more)
    assert isinstance(found, RoundFile)
    assert found.spec.max_train_steps == 60


@pytest.mark.slow
def test_the_grid_is_widened_twice_at_most(tmp_path: Path) -> None:
    file, curve = swept_file(tmp_path / "once"), Fit(best_rate=1.4e-2, pace=3.0)
    answer = sweep(file, curve)
    assert isinstance(answer, FirstHorizon)
    assert 3e-3 < answer.learning_rate < 3e-2
    assert {name: len(of) for name, of in trials(file).items()} == {"sweep-20": 8, "sweep-20b": 3}
    below = swept_file(tmp_path / "twice", production_steps=20)
    answer = sweep(below, Fit(best_rate=1e-8, pace=3.0))
    assert isinstance(answer, SweepProblem)
    assert "after 2 widenings" in answer.message
    assert list(trials(below)) == ["sweep-20", "sweep-20b", "sweep-20c"]


@pytest.mark.slow
def test_rates_that_diverge_are_not_run_again_and_are_no_edge(tmp_path: Path) -> None:
    file, curve = swept_file(tmp_path), Fit(best_rate=2e-3, pace=4.0, diverges_above=1e-3)
    answer = sweep(file, curve)
    assert answer == FirstHorizon(fitted(curve, 5.88e-4), 5.88e-4)
    ran = trials(file)
    assert [len(of) for of in ran.values()] == [8, 6, 6]


@pytest.mark.slow
def test_stopped_again_and_again_it_comes_to_the_same_answer(tmp_path: Path) -> None:
    patience = 1
    curve = Fit(best_rate=2.6e-4, pace=15.0)
    undisturbed = swept_file(tmp_path / "one")
    answer = sweep(undisturbed, curve)
    file, stops = swept_file(tmp_path / "two"), 0
    while True:
        left = iter(range(patience))
        try:
            assert sweep(file, curve, stopping=lambda: next(left, None) is None) == answer  # noqa: B023
            break
        except Interrupted:
            stops += 1
            patience += 60
    assert stops
    for name, of in trials(undisturbed).items():
        by_rate = {t.hyperparameters["learning_rate"]: t.evaluations for t in of}
        assert {t.hyperparameters["learning_rate"]: t.evaluations for t in trials(file)[name]} == by_rate


def test_a_sweep_is_never_promoted_nor_compared_with(tmp_path: Path) -> None:
    file, curve = swept_file(tmp_path), Fit(best_rate=2.6e-4, pace=3.0)
    sweep(file, curve)
    folder, store = open_folder(tmp_path), facts(file)
    try:
        for from_round in ("sweep-20", None):
            with pytest.raises(InputError, match=r"never promoted|tuner study run round1.yaml"):
                promote(
                    folder,
                    store,
                    to="round2",
                    from_round=from_round,
                    overrides=Overrides(),
                    force=False,
                    clock=lambda: 0.0,
                )
        run_round(
            file,
            make_worker=lambda plan, base: SimulatedWorker(_linear, slots=3),
            view=silent_view(),
            stopping=lambda: False,
        )
        assert folder.latest(store).name == "round1"
        assert earlier_results(store, folder.latest(store)) == []
        assert [report.record.name for report in lineage(folder, store, folder.latest(store))] == ["round1"]
        assert [record.name for record in store.rounds()] == ["sweep-20", "round1"]
    finally:
        store.close()


def _linear(hyperparameters: Hyperparameters, step: int, horizon: int) -> Evaluation:
    return Evaluation(step, 3.0 - step / 100, train_loss=1.0 if step else None)


def test_what_cannot_be_swept_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"run.production_steps: missing"):
        next_sweep(swept_file(tmp_path / "endless", production_steps=None))
    file = swept_file(tmp_path)
    sweep(file, Fit(best_rate=2.6e-4, pace=3.0))
    with pytest.raises(InputError, match=r"data.train is not that of sweep-20.yaml"):
        next_sweep(swept_file(tmp_path, data="other/data"))
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "sweep-20.yaml").write_text(first_sweep(file) + "# mine\n")
    with pytest.raises(InputError, match="exists and says something else; move it away"):
        next_sweep(swept_file(tmp_path / "x"))
