"""The samplers in plain Optuna studies, where nothing of tuner's hands them facts."""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from tuner.study import samplers
from tuner.study.samplers import (
    GridSampler,
    PointSampler,
    QuasiRandomSampler,
    RandomSampler,
    RankGPSampler,
    RankTPESampler,
)
from tuner.study.samplers.points import contains, every_point, num_points, unit_of, value_at

PACKAGE = Path(samplers.__file__).parent
SPACE: dict[str, BaseDistribution] = {
    "rate": FloatDistribution(1e-4, 1.0, log=True),
    "layers": IntDistribution(1, 8),
    "share": FloatDistribution(0.0, 1.0, step=0.25),
    "width": IntDistribution(16, 64, step=16),
    "optimizer": CategoricalDistribution(["sgd", "adam"]),
    "momentum": FloatDistribution(0.0, 0.99),
}
FINITE = {name: SPACE[name] for name in ("layers", "share", "optimizer")}
SAMPLERS = (QuasiRandomSampler, RandomSampler, RankTPESampler, RankGPSampler)


def objective(trial: optuna.Trial) -> float:
    """A bowl with its bottom inside; `momentum` is a parameter of one of two optimizers."""
    rate = trial.suggest_float("rate", 1e-4, 1.0, log=True)
    layers = trial.suggest_int("layers", 1, 8)
    share = trial.suggest_float("share", 0.0, 1.0, step=0.25)
    width = trial.suggest_int("width", 16, 64, step=16)
    loss = (math.log10(rate) + 2) ** 2 + (layers - 3) ** 2 / 8 + (share - 0.5) ** 2 + (width - 32) ** 2 / 2000
    if trial.suggest_categorical("optimizer", ["sgd", "adam"]) == "sgd":
        loss += 0.1 + (trial.suggest_float("momentum", 0.0, 0.99) - 0.9) ** 2
    return loss


def run(sampler: optuna.samplers.BaseSampler, num: int = 20, **study: Any) -> list[optuna.trial.FrozenTrial]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        found = optuna.create_study(sampler=sampler, load_if_exists=True, **study)
        found.optimize(objective, n_trials=num)
    return found.get_trials()


@pytest.mark.parametrize("space", [None, SPACE], ids=["by run", "given"])
@pytest.mark.parametrize("kind", SAMPLERS)
def test_twenty_trials_of_a_study(kind: type[PointSampler], space: Any) -> None:
    trials = run(kind(space, seed=1))
    assert [trial.state.name for trial in trials] == ["COMPLETE"] * 20
    for trial in trials:
        assert all(contains(SPACE[name], value) for name, value in trial.params.items())
        assert ("momentum" in trial.params) == (trial.params["optimizer"] == "sgd")
    assert len({trial.params["rate"] for trial in trials}) >= 18  # a model may stay at a bound
    assert len({trial.params["layers"] for trial in trials}) > 3
    assert {trial.params["optimizer"] for trial in trials} == {"sgd", "adam"}
    again, other = (run(kind(space, seed=seed), 3) for seed in (1, 2))
    assert [trial.params for trial in again] == [trial.params for trial in trials[:3]]
    assert again[2].params != other[2].params


@pytest.mark.parametrize(
    ("kind", "space"), [(RankTPESampler, None), (RankGPSampler, SPACE)], ids=["by run", "given"]
)
def test_a_model_of_ranks_finds_more_than_chance(kind: type[PointSampler], space: Any) -> None:
    """By the median of what is tried after the start-up trials, in each of two studies."""
    for seed in range(2):
        late, anywhere = (
            sorted(float(trial.value or 0) for trial in run(sampler, 24)[10:])[7]
            for sampler in (kind(space, seed=seed), RandomSampler(seed=seed))
        )
        assert late < 0.8 * anywhere


@pytest.mark.parametrize("kind", SAMPLERS)
def test_a_study_that_is_loaded_again_goes_on_as_it_would_have(
    kind: type[PointSampler], tmp_path: Path
) -> None:
    whole = run(kind(seed=3), 13)
    storage = f"sqlite:///{tmp_path / 'optuna.db'}"
    for num in (6, 5, 2):
        parts = run(kind(seed=3), num, study_name="parts", storage=storage)
    assert [trial.params for trial in parts] == [trial.params for trial in whole]


@pytest.mark.parametrize("kind", SAMPLERS)
def test_without_a_seed_studies_differ(kind: type[PointSampler]) -> None:
    assert run(kind(), 1)[0].params != run(kind(), 1)[0].params


def test_what_is_enqueued_in_part_is_filled() -> None:
    study = optuna.create_study(sampler=QuasiRandomSampler(SPACE, seed=0))
    study.enqueue_trial({"layers": 2})
    params = study.ask(SPACE).params
    assert params == {**run(QuasiRandomSampler(SPACE, seed=0), 1)[0].params, **params, "layers": 2}


def test_quasi_random_trials_cover_the_space_evenly_whatever_became_of_others() -> None:
    study = optuna.create_study(sampler=QuasiRandomSampler(SPACE, seed=0))
    for number in range(16):
        study.tell(study.ask(SPACE), *([1.0] if number % 3 else [None, optuna.trial.TrialState.FAIL]))
    decades = Counter(math.floor(math.log10(trial.params["rate"])) for trial in study.trials)
    assert decades == {-4: 4, -3: 4, -2: 4, -1: 4}


def test_a_grid_is_gone_through_and_begun_again() -> None:
    study = optuna.create_study(sampler=GridSampler(FINITE))
    points = [tuple(study.ask(FINITE).params.values()) for _ in range(2 * 80)]
    assert len(set(points[:80])) == 80 == num_points(FINITE)
    assert points[80:] == points[:80]
    with pytest.raises(ValueError, match="has no next value: give it a step"):
        optuna.create_study(sampler=GridSampler(SPACE)).ask(SPACE)


@pytest.mark.parametrize("direction", ["minimize", "maximize"])
@pytest.mark.parametrize("kind", [RankTPESampler, RankGPSampler])
def test_the_direction_is_the_studys(kind: type[PointSampler], direction: str) -> None:
    study = optuna.create_study(sampler=kind(seed=0, n_startup_trials=8), direction=direction)
    space: dict[str, BaseDistribution] = {"x": FloatDistribution(0.0, 1.0)}
    for _ in range(14):
        trial = study.ask(space)
        study.tell(trial, trial.params["x"])
    late = sorted(trial.params["x"] for trial in study.trials[8:])[3]
    assert late < 0.3 if direction == "minimize" else late > 0.7


@pytest.mark.parametrize("kind", [RankTPESampler, RankGPSampler])
def test_trials_that_violate_a_constraint_come_last_however_good(kind: type[PointSampler]) -> None:
    study = optuna.create_study(sampler=kind(seed=0, n_startup_trials=8))
    space: dict[str, BaseDistribution] = {"x": FloatDistribution(0.0, 1.0)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        for _ in range(20):
            trial = study.ask(space)
            infeasible = trial.params["x"] > 0.5
            trial.set_constraint("fits", float(infeasible))
            study.tell(trial, -1.0 if infeasible else abs(trial.params["x"] - 0.2))
    assert sum(trial.params["x"] > 0.5 for trial in study.trials[8:]) <= 3


def test_pruned_trials_rank_by_how_far_they_came_and_then_by_their_value() -> None:
    study = optuna.create_study()
    pruned = optuna.trial.TrialState.PRUNED
    space: dict[str, BaseDistribution] = {"x": FloatDistribution(0.0, 1.0)}
    told: list[tuple[float, Any, dict[int, float]]] = [
        (0.1, None, {}),
        (0.2, None, {5: math.nan}),
        (0.3, None, {5: 2.0}),
        (0.4, None, {9: 3.0}),
        (0.5, 4.0, {}),
    ]
    for x, value, curve in told:
        known = {"params": {"x": x}, "distributions": space, "intermediate_values": curve}
        state = pruned if value is None else optuna.trial.TrialState.COMPLETE
        study.add_trial(optuna.create_trial(state=state, value=value, **known))  # type: ignore[arg-type]
    ranked = samplers.sampler._ranked(study, study.get_trials())
    assert [observed.params["x"] for observed in ranked] == [0.5, 0.4, 0.3, 0.2, 0.1]
    assert all(math.isfinite(observed.value) for observed in ranked)


LOWS, NUMS = st.integers(-9, 9), st.integers(1, 9)
DISTRIBUTIONS = st.one_of(
    st.builds(lambda low, span: FloatDistribution(low, low + span), st.floats(-9, 9), st.floats(0.1, 9)),
    st.builds(
        lambda low, by: FloatDistribution(low, low * by, log=True), st.floats(1e-6, 1), st.floats(2, 9)
    ),
    st.builds(lambda low, n, s: FloatDistribution(low, low + n * s, step=s), LOWS, NUMS, st.just(0.25)),
    st.builds(lambda low, n, s: IntDistribution(low, low + n * s, step=s), LOWS, NUMS, st.integers(1, 5)),
    st.builds(lambda low, span: IntDistribution(low, low + span, log=True), NUMS, st.integers(1, 99)),
    st.builds(lambda num: CategoricalDistribution(list(range(num))), NUMS),
)


@given(distribution=DISTRIBUTIONS, unit=st.floats(0.0, 1.0))
def test_a_place_has_a_value_and_the_value_its_place(distribution: BaseDistribution, unit: float) -> None:
    value = value_at(distribution, unit)
    assert contains(distribution, value)
    place = unit_of(distribution, value)
    assert value_at(distribution, place) == pytest.approx(value)
    if math.isinf(num_points({"x": distribution})):
        assert place == pytest.approx(unit, abs=1e-6)
    else:
        assert value in [point["x"] for point in every_point({"x": distribution})]


def test_each_value_of_a_step_is_as_likely_as_the_others() -> None:
    for name in ("layers", "share", "width", "optimizer"):
        counts = Counter(value_at(SPACE[name], (number + 0.5) / 800) for number in range(800))
        assert max(counts.values()) - min(counts.values()) <= 1


def test_the_package_has_the_form_that_optunahub_asks_for_and_needs_nothing_of_tuner(tmp_path: Path) -> None:
    """Copied out of tuner and loaded as `optunahub.load_local_module` does."""
    head = yaml.safe_load((PACKAGE / "README.md").read_text().split("---")[1])
    assert set(head) == {"author", "title", "description", "tags", "optuna_versions", "license"}
    assert "sampler" in head["tags"]
    assert head["optuna_versions"] == [optuna.__version__]
    text = (PACKAGE / "README.md").read_text()
    assert all(f"`{name.__name__}(" in text for name in (*SAMPLERS, GridSampler))
    shutil.copytree(PACKAGE, tmp_path / "samplers", ignore=shutil.ignore_patterns("__pycache__"))
    script = """
import importlib.util, sys
name = "optunahub_registry.package.samplers"
spec = importlib.util.spec_from_file_location(name, sys.argv[1] + "/samplers/__init__.py")
module = importlib.util.module_from_spec(spec)
sys.modules[name] = module
spec.loader.exec_module(module)
import optuna
for kind in (module.QuasiRandomSampler, module.RandomSampler, module.RankTPESampler):
    study = optuna.create_study(sampler=kind(seed=0))
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1) ** 2, n_trials=12)
assert not [name for name in sys.modules if name == "tuner" or name.startswith("tuner.")]
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        cwd=tmp_path, env={"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_the_code_of_the_page_runs() -> None:
    page = Path(__file__).parents[2] / "docs" / "how-to" / "your-own-sampler.md"
    (block,) = (b for b in page.read_text().split("```python\n")[1:] if "create_study" in b)
    found: dict[str, Any] = {}
    exec(block.split("```")[0], found)
    assert len(found["study"].trials) == 32
    assert found["study"].best_value < 0.03
