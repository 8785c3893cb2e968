"""`study sweep`: rounds that double and widen, go on instead of starting again, and are never promoted."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from tests.studies import record_sweep, silent_view, write_round
from tuner.config import RoundFile, load_round, read_round
from tuner.engines import SimulatedWorker
from tuner.errors import InputError, Interrupted
from tuner.playbook.sweep import ComputeBound, FirstHorizon, SweepDecision, SweepProblem, default_grid
from tuner.records import Evaluation, Hyperparameters, Trial, TrialState
from tuner.store import Store
from tuner.study.dashboard import lineage
from tuner.study.folder import open_folder
from tuner.study.promotion import Overrides, promote
from tuner.study.results import earlier_results
from tuner.study.run import run_round
from tuner.study.sweep import first_sweep, next_sweep, with_first_horizon

FITTED_AT_ONCE = math.log(3.0 / 0.05)


@dataclass(frozen=True)
class Fit:
    """Training loss 3 exp(-t): one step at the best rate takes t on by 1 / pace, at others by less."""

    best_rate: float
    pace: float

    def __call__(self, hyperparameters: Hyperparameters, step: int, horizon: int) -> Evaluation:
        rate = float(hyperparameters["learning_rate"])  # type: ignore[arg-type]
        assert hyperparameters["schedule"] == "constant"
        assert hyperparameters["lora_dropout"] == 0
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


def test_a_range_is_fixed_at_its_default_and_the_warmup_as_it_is(tmp_path: Path) -> None:
    """A range's default where that lies in it; the file's default warmup is 4, the sweep's would be 5."""
    path = swept_file(tmp_path, steps=8, every=2).path
    ranges = "  adam_beta2: {low: 0.9, high: 0.9999}\n  adam_beta1: {low: 0.5, high: 0.6}\n"
    old = "  batch_size: 2\n  warmup_steps: 1\n"
    path.write_text(path.read_text().replace(old, f"  batch_size: [4, 2]\n{ranges}"))
    path.write_text(first_sweep(load_round(path)))
    written = load_round(path).spec.hyperparameters
    names = ("adam_beta2", "adam_beta1", "batch_size", "warmup_steps")
    assert [written[n] for n in names] == [0.999, 0.5, 4, 4]


def test_what_would_disturb_the_fit_is_left_out(tmp_path: Path) -> None:
    """Held-out rows, the pruner, and defaults that would move with the doubling; modules stay a list."""
    path = swept_file(tmp_path).path
    text = path.read_text()
    for old, new in (
        ("train.jsonl, format: alpaca}", "train.jsonl, format: alpaca, weight: 2}"),
        ("eval: [{path: no/data/eval.jsonl, format: alpaca}]", "eval_fraction: 0.1"),
        ("max_length: 64", "max_length: 64\n  test: [{path: no/data/eval.jsonl, format: alpaca}]"),
        ("lora_r: [2, 4]", "lora_r: 2\n  weight_decay: 0.1\n  target_modules: [[q_proj, v_proj], [q_proj]]"),
        ("warmup_steps: 1", "warmup_steps: {low: 6, high: 9}"),
        ("every_steps: 5, ", ""),
        ("sampler: quasi-random", "sampler: tpe"),
        ("run: {production_steps: 80}", "run: {production_steps: 80, pruner: halving}"),
    ):
        assert old in text
        text = text.replace(old, new)
    path.write_text(text)
    first = load_round(path)
    spec = read_round(first_sweep(first), path).spec
    (train,), (evaluated,) = spec.data.train, spec.data.eval
    assert (train.path, train.weight) == (evaluated.path, 2 * evaluated.weight)
    assert (spec.data.eval_fraction, spec.data.test, spec.data.allow_overlap) == (None, [], True)
    assert (spec.run.pruner, spec.run.production_steps, spec.search.sampler) == ("none", 80, "quasi-random")
    assert spec.evaluation.every_steps == first.spec.evaluation.every_steps
    assert f"every_steps: {spec.evaluation.every_steps}" in first_sweep(first)
    values = {name: spec.hyperparameters[name] for name in ("weight_decay", "target_modules", "warmup_steps")}
    assert values == {"weight_decay": 0, "target_modules": ["q_proj", "v_proj"], "warmup_steps": 6}
    assert spec.hyperparameters["schedule"] == "constant"
    assert "decay_steps" not in spec.hyperparameters, "a constant rate has none"


def test_a_sweep_is_never_longer_than_the_production_length(tmp_path: Path) -> None:
    file = swept_file(tmp_path, steps=18, production_steps=19)
    spec = read_round(first_sweep(file), file.path).spec
    assert (spec.round, spec.max_train_steps) == ("sweep-19", 19)
    assert with_first_horizon(file, FirstHorizon(19, 1e-4)).spec.max_train_steps == 19


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
    assert "study sweep: about 10% of run.production_steps" in longer.text
    assert "need more" not in longer.text
    between = swept_file(tmp_path, steps=18, decay_steps=16)
    assert with_first_horizon(between, FirstHorizon(5, 1e-4)).spec.max_train_steps == 18


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
            patience += 160
    assert stops
    for name, of in trials(undisturbed).items():
        by_rate = {t.hyperparameters["learning_rate"]: t.evaluations for t in of}
        assert {t.hyperparameters["learning_rate"]: t.evaluations for t in trials(file)[name]} == by_rate


RATES = default_grid()


def following(file: RoundFile) -> RoundFile:
    found = next_sweep(file)
    assert isinstance(found, RoundFile)
    return found


def rates_of(file: RoundFile) -> list[float]:
    return [entry["learning_rate"] for entry in file.spec.search.enqueue]


def around(best: float, rates: Sequence[float]) -> dict[float, float | None]:
    return {rate: 1.0 + abs(math.log(rate / best)) / 100 for rate in rates}


def test_both_widenings_and_a_doubling_follow_from_the_facts(tmp_path: Path) -> None:
    """Twice wider and then longer, where the widened rates go on and those that diverged do not."""
    file = swept_file(tmp_path)
    first = following(file)
    assert first.text == following(file).text
    record_sweep(first, around(1e-9, RATES))
    second = following(file)
    assert (second.spec.round, second.spec.max_train_steps, second.spec.search.trials) == ("sweep-20b", 20, 3)
    assert max(rates_of(second)) < RATES[0]
    record_sweep(second, around(1e-9, rates_of(second)))
    third = following(file)
    assert (third.spec.round, third.spec.max_train_steps, third.spec.search.trials) == ("sweep-20c", 20, 3)
    lowest, best, highest = rates_of(third)
    record_sweep(third, {lowest: None, best: 0.5, highest: 0.7})
    longer = following(file)
    assert (longer.spec.round, longer.spec.max_train_steps, longer.spec.search.trials) == ("sweep-40", 40, 13)
    assert rates_of(longer) == sorted([*RATES, *rates_of(second), best, highest])
    named = [entry["continues"] for entry in longer.spec.search.enqueue]
    assert named[:3] == ["sweep-20c/1", "sweep-20c/2", "sweep-20b/0"]
    record_sweep(longer, around(1e9, rates_of(longer)))
    answer = next_sweep(file)
    assert isinstance(answer, SweepProblem)
    assert "at the edge of the grid, 0.003, after 2 widenings" in answer.message


def test_the_rate_of_a_widened_grid_is_the_answer_where_it_fits(tmp_path: Path) -> None:
    """Even where faster ones fit before they diverge."""
    file = swept_file(tmp_path)
    record_sweep(following(file), around(1e9, RATES) | {RATES[-1]: 0.04})
    wider = following(file)
    assert min(rates_of(wider)) > RATES[-1]
    slower, *rest = rates_of(wider)
    at_first = (Evaluation(5, 0.01), Evaluation(10, math.nan))
    diverged = [
        Trial(wider.spec.round, n, {"learning_rate": rate}, TrialState.INFEASIBLE, evaluations=at_first)
        for n, rate in enumerate(rest, start=1)
    ]
    record_sweep(wider, {slower: 0.03}, *diverged)
    assert next_sweep(file) == FirstHorizon(20, slower)


def test_a_rate_that_is_alone_goes_on_alone_and_fits_by_its_accuracy(tmp_path: Path) -> None:
    file = swept_file(tmp_path)
    record_sweep(following(file), dict.fromkeys(RATES) | {RATES[3]: 0.4})
    longer = following(file)
    assert (longer.spec.hyperparameters["learning_rate"], longer.spec.search.trials) == (RATES[3], 1)
    record_sweep(longer, {RATES[3]: 0.4}, correct=99)
    assert next_sweep(file) == FirstHorizon(40, RATES[3])


def test_a_round_is_gone_on_with_until_every_trial_has_ended(tmp_path: Path) -> None:
    """A failed trial is no result, whatever comes after it."""
    file = swept_file(tmp_path)
    first = following(file)
    failed = Trial("sweep-20", 7, {"learning_rate": RATES[7]}, TrialState.FAILED)
    repeated = replace(failed, number=8, state=TrialState.COMPLETE, evaluations=(Evaluation(20, 2.0),))
    more = Trial("sweep-20", 9, {"learning_rate": RATES[4]})
    for others in ([failed], [failed, repeated, more]):
        record_sweep(first, around(2e-4, RATES[:7]), *others)
        assert following(file).text == first.text
    record_sweep(first, around(2e-4, RATES[:7]), failed, repeated, replace(more, state=TrialState.FAILED))
    longer = following(file)
    assert (longer.spec.round, rates_of(longer)) == ("sweep-40", list(RATES))


def test_a_sweep_is_never_promoted_nor_compared_with(tmp_path: Path) -> None:
    file, curve = swept_file(tmp_path), Fit(best_rate=2.6e-4, pace=3.0)
    sweep(file, curve)
    folder, store = open_folder(tmp_path), facts(file)
    try:
        for from_round in ("sweep-20", None):
            with pytest.raises(InputError, match=r"cannot be promoted|tuner study run round1.yaml"):
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
    record_sweep(following(file), around(2e-4, RATES))
    with pytest.raises(InputError, match=r"data.train is not that of sweep-20.yaml"):
        next_sweep(swept_file(tmp_path, data="other/data"))
    path = swept_file(tmp_path).path
    text = path.read_text()
    for what, old, new in (
        ("model", "float32", "bfloat16"),
        ("data.max_length", "max_length: 64", "max_length: 32"),
        ("data.loss_on", "max_length: 64", "max_length: 64\n  loss_on: all"),
    ):
        path.write_text(text.replace(old, new))
        with pytest.raises(InputError, match=f"round1.yaml: {what} is not that of sweep-20.yaml"):
            next_sweep(load_round(path))
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "sweep-20.yaml").write_text(first_sweep(file) + "# mine\n")
    with pytest.raises(InputError, match="exists with other content; move or delete it"):
        next_sweep(swept_file(tmp_path / "x"))
