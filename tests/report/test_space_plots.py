"""Plots of the search space: every value at its place, the best standing out, no texts over each other."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from tuner.playbook.selection import ranked
from tuner.records import Choices, Range, Trial, TrialState
from tuner.report.plots import MANY_TRIALS, best_steps_figure, curves_figure, ends_figure
from tuner.report.space_plots import hyperparameter_figure, importance_figure, parallel_figure

from . import synthetic


def traces(figure: Any) -> dict[str, Any]:
    return {trace.get("name"): trace for trace in json.loads(figure.to_json())["data"]}


def with_value(name: str, values: list[Any]) -> list[Trial]:
    """Trials of the formula, each with a value of one hyperparameter."""
    return [
        synthetic.with_hyperparameters(synthetic.trial(number, 1e-4 * (number + 1)), {name: value})
        for number, value in enumerate(values)
    ]


class TestOneHyperparameter:
    def test_a_searched_logarithm_has_a_logarithmic_axis(self) -> None:
        trials = with_value("weight_decay", [1e-4, 1e-2, 1e-1])
        figure = hyperparameter_figure(trials, "weight_decay", Range(1e-4, 0.1, log=True))
        assert figure.layout.xaxis.type == "log"
        found = traces(figure)
        assert sorted([*found["best"]["x"], *found["complete"]["x"]]) == [1e-4, 1e-2, 1e-1]

    def test_choices_stand_side_by_side_in_the_order_of_the_file(self) -> None:
        values = ["all-linear", ("q_proj", "v_proj"), "all-linear"]
        choices = Choices((("q_proj", "v_proj"), "all-linear"))
        figure = hyperparameter_figure(with_value("target_modules", values), "target_modules", choices)
        assert figure.layout.xaxis.type == "category"
        assert list(figure.layout.xaxis.categoryarray) == ["q_proj,v_proj", "all-linear"]

    def test_flags_and_values_outside_of_the_choices(self) -> None:
        figure = hyperparameter_figure(
            with_value("use_rslora", [True, False]), "use_rslora", Choices((True,))
        )
        assert list(figure.layout.xaxis.categoryarray) == ["true", "false"]

    def test_zero_on_a_linear_scale_is_a_value(self) -> None:
        figure = hyperparameter_figure(with_value("lora_dropout", [0.0, 0.1]), "lora_dropout", Range(0, 0.1))
        assert sum(len(trace["x"]) for trace in traces(figure).values()) == 2

    def test_infeasible_trials_are_marked_at_the_worse_end(self) -> None:
        found = traces(hyperparameter_figure(synthetic.trials(), "lora_r", Choices((8, 16, 32))))
        assert found["infeasible"]["x"] == ["32"]
        assert found["infeasible"]["y"][0] > max(found["complete"]["y"])

    def test_a_name_is_no_markup(self) -> None:
        trials = with_value("target_modules", ["<b>%{x}</b>", "q"])
        text = json.dumps(hyperparameter_figure(trials, "target_modules").layout.to_plotly_json())
        assert "<b>" not in text

    @pytest.mark.parametrize("trials", [[], [synthetic.trial(0, 1e-4, evaluations=())]])
    def test_nothing_to_plot(self, trials: list[Trial]) -> None:
        for figure in (hyperparameter_figure(trials, "lora_r"), parallel_figure(trials, ["lora_r"], {})):
            assert "No trial" in figure.layout.annotations[0].text


class TestManyTrials:
    def many(self) -> list[Trial]:
        return synthetic.many_trials(60)

    def test_best_steps_become_a_histogram_that_counts_every_trial(self) -> None:
        trials = self.many()
        figure = best_steps_figure(trials, max_train_steps=60)
        complete = sum(trial.state is TrialState.COMPLETE for trial in trials)
        assert complete > MANY_TRIALS
        assert sum(sum(trace["y"]) for trace in traces(figure).values()) == complete
        assert figure.layout.height <= 400

    def test_curves_become_bands_and_ten_lines(self) -> None:
        for draw in (curves_figure, ends_figure):
            figure = draw(self.many(), max_train_steps=60)
            names = [trace.name for trace in figure.data if trace.mode == "lines" and "trial " in trace.name]
            assert len(names) == 10
            found = traces(figure)
            assert {"10% to 90% of all trials", "25% to 75% of all trials", "median"} <= found.keys()
            assert all(math.isfinite(y) for y in found["median"]["y"])

    def test_the_bands_hold_their_share_of_the_trials(self) -> None:
        trials = self.many()
        band = traces(curves_figure(trials, max_train_steps=60))["10% to 90% of all trials"]
        half = len(band["x"]) // 2
        high = dict(zip(band["x"][:half], band["y"][:half], strict=True))
        low = dict(zip(band["x"][half:], band["y"][half:], strict=True))
        last = [t.evaluations[-1].eval_loss for t in trials if t.evaluations[-1].step == 60]
        inside = sum(low[60] <= loss <= high[60] for loss in last)
        assert 0.75 <= inside / len(last) <= 0.95

    def test_the_best_ten_stand_out(self) -> None:
        found = traces(hyperparameter_figure(self.many(), "learning_rate", Range(1e-5, 1e-2, log=True)))
        assert len(found["best"]["x"]) == 1
        assert len(found["best ten"]["x"]) == 9
        assert max(found["best ten"]["y"]) <= min(found["other trials"]["y"])


class TestNumbersOfTrials:
    """They lie over no point and no other number; the best trial always has one."""

    def test_points_in_a_row_have_theirs(self) -> None:
        assert numbers_of(hyperparameter_figure(synthetic.trials(), "lora_r", RANKS)) >= {"4", "5", "6"}

    def test_of_many_trials_some_have(self) -> None:
        trials = synthetic.many_trials(200)
        best = str(ranked(trials)[0][0].number)
        for name in ("learning_rate", "lora_r", "weight_decay"):
            shown = numbers_of(hyperparameter_figure(trials, name, synthetic.WIDE_SPACE[name]))
            assert best in shown
            assert len(shown) < 10

    def test_they_stand_where_no_better_point_can_be(self) -> None:
        for name, where in (("learning_rate", "bottom center"), ("lora_r", "middle right")):
            figure = hyperparameter_figure(synthetic.trials(), name, synthetic.SPACE[name])
            assert traces(figure)["best"]["textposition"] == where


RANKS = Choices((8, 16, 32))


def numbers_of(figure: Any) -> set[str]:
    return {text for trace in traces(figure).values() for text in trace.get("text", ()) if text}


def test_parallel_coordinates_end_at_the_result_with_the_best_at_the_top() -> None:
    names = ["learning_rate", "lora_r"]
    figure = parallel_figure(synthetic.trials(), names, synthetic.SPACE)
    best = figure.data[-1]
    assert best.name == "best"
    assert list(best.x) == [0, 1, 2]
    assert best.y[-1] == 1.0
    assert list(figure.layout.xaxis.ticktext) == ["learning_<br>rate", "lora_r", "loss"]
    heights = [y for trace in figure.data for y in trace.y if y is not None]
    assert all(0 <= y <= 1 for y in heights)


def test_importance_puts_the_largest_on_top() -> None:
    figure = importance_figure({"lora_r": 0.2, "learning_rate": 0.8})
    assert list(figure.data[0].y) == ["lora_r", "learning_rate"]
    assert list(figure.data[0].text) == ["20%", "80%"]
