"""What every metric has to do: one value, in its bounds, that follows from the scores of the examples."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tuner.methods.metrics import ExampleScores, Metric, metric, values
from tuner.records import Direction

_ONE_CLASS_A_METRIC = [HealthCheck.differing_executors, HealthCheck.function_scoped_fixture]


@st.composite
def example_scores(draw: st.DrawFn) -> ExampleScores:
    """Of one evaluation; of one example at least."""
    tokens = draw(st.lists(st.integers(1, 50), min_size=1, max_size=8))
    nll = [draw(st.floats(0.0, 12.0)) * count for count in tokens]
    correct = [draw(st.integers(0, count)) for count in tokens]
    return ExampleScores(np.array(nll), np.array(tokens), np.array(correct))


class MetricContract:
    """Tests of one metric; a class of them names it."""

    name: str

    def test_it_is_found_by_name_and_says_which_way_is_better(self) -> None:
        found = metric(self.name)
        assert isinstance(found, Metric)
        assert found.direction in tuple(Direction)
        assert found.meaning.endswith(".")
        objective = found.objective(self.name)
        assert (objective.metric, objective.direction, objective.per) == (
            self.name,
            found.direction,
            found.per,
        )
        assert pickle.loads(pickle.dumps(objective)) == objective

    @settings(max_examples=40, deadline=None, suppress_health_check=_ONE_CLASS_A_METRIC)
    @given(example_scores())
    def test_an_evaluation_has_one_value_within_its_bounds(self, scores: ExampleScores) -> None:
        found = metric(self.name)
        numbers = values(self.name, found, scores)
        if found.per == "trial":
            assert numbers == {}
            return
        assert found.compute is not None
        value = numbers.get(self.name, found.compute(scores))
        assert isinstance(value, float)
        low, high = found.bounds
        assert low is None or value >= low
        assert high is None or value <= high
        assert values(self.name, found, scores) == numbers, "the same scores, the same value"

    @settings(max_examples=40, deadline=None, suppress_health_check=_ONE_CLASS_A_METRIC)
    @given(example_scores(), st.randoms(use_true_random=False))
    def test_the_order_of_the_examples_is_no_matter(self, scores: ExampleScores, random: object) -> None:
        found = metric(self.name)
        if found.compute is None:
            pytest.skip("one value for each trial")
        order = list(range(len(scores.tokens)))
        random.shuffle(order)  # type: ignore[attr-defined]
        shuffled = ExampleScores(scores.nll[order], scores.tokens[order], scores.correct[order])
        assert found.compute(shuffled) == pytest.approx(found.compute(scores), abs=1e-9)

    def test_a_loss_that_is_not_finite_has_no_value(self) -> None:
        found = metric(self.name)
        diverged = ExampleScores(np.array([1.0, math.nan]), np.array([2, 2]), np.array([1, 0]))
        assert all(math.isnan(value) for value in values(self.name, found, diverged).values())
