from __future__ import annotations

import json
import math
from typing import Any

import pytest

from tuner.records import Trial, TrialState
from tuner.report import best_steps_figure, curves_figure, learning_rate_figure
from tuner.report.plots import ACCENT, WARNING

from . import synthetic


def traces(figure: Any) -> dict[str, Any]:
    """The figure's named traces as the browser gets them."""
    return {trace.get("name"): trace for trace in json.loads(figure.to_json())["data"]}


EMPTY: list[tuple[Trial, ...]] = [
    (),
    (synthetic.trial(0, 1e-4, state=TrialState.WAITING, evaluations=()),),
    (synthetic.trial(0, 1e-4, evaluations=[synthetic.evaluation(0, math.nan)]),),
]


@pytest.mark.parametrize("trials", EMPTY)
def test_figures_of_nothing_say_so(trials: tuple[Trial, ...]) -> None:
    for figure in (
        best_steps_figure(trials, max_train_steps=60),
        curves_figure(trials, max_train_steps=60),
        learning_rate_figure(trials),
    ):
        assert len(figure.data) == 0
        assert "No trial" in figure.layout.annotations[0].text


class TestBestSteps:
    def test_best_and_settled_steps_of_complete_trials_best_on_top(self) -> None:
        losses = [2.0, 1.0005, 1.0, 1.2]
        early = [synthetic.evaluation(20 * i, loss) for i, loss in enumerate(losses)]
        trials = [synthetic.trial(9, 1e-4, evaluations=early), *synthetic.trials()]
        figure = best_steps_figure(trials, max_train_steps=60)
        best = traces(figure)["best step"]
        assert best["y"][:2] == ["trial 9  1.0000", "trial 6  1.3734"]
        assert best["x"][0] == 40
        assert len(best["x"]) == 8, "infeasible trials have no best step to show"
        assert figure.layout.yaxis.autorange == "reversed"

    def test_zones_of_the_rule(self) -> None:
        figure = best_steps_figure(synthetic.trials(), max_train_steps=60)
        zones = [(shape.x0, shape.x1) for shape in figure.layout.shapes if shape.type == "rect"]
        assert zones == [(0, 6.0), (45.0, 60)]


class TestCurves:
    def test_the_best_trial_is_drawn_last_and_marked(self) -> None:
        figure = curves_figure(synthetic.trials(), max_train_steps=60)
        line, star = figure.data[-2:]
        assert (line.name, line.line.color, star.marker.symbol) == ("trial 6", ACCENT, "star")
        assert tuple(star.x) == (60,)

    def test_a_divergence_leaves_out_what_is_not_finite_and_does_not_stretch_the_axis(self) -> None:
        figure = curves_figure(synthetic.trials(), max_train_steps=60)
        lost = next(trace for trace in figure.data if trace.name == "trial 7")
        assert lost.line.color == WARNING
        assert tuple(lost.y) == pytest.approx((2.431, 2.1, 4.9, 9.7))
        low, high = figure.layout.yaxis.range
        assert low < 1.3734
        assert 2.431 < high < 2.6

    def test_reasons_cannot_be_markup_or_fields_in_hover_labels(self) -> None:
        trial = synthetic.trial(0, 1e-4, reason="<b>%{x}</b>")
        figure = curves_figure([trial], max_train_steps=60)
        assert "&lt;b&gt;% {x}&lt;/b&gt;" in figure.data[0].hovertemplate


class TestLearningRates:
    def test_rates_losses_and_infeasible_trials(self) -> None:
        found = traces(learning_rate_figure(synthetic.trials()))
        assert found["best"]["x"] == [9.1e-4]
        assert found["best"]["y"] == [pytest.approx(1.3734, abs=1e-4)]
        assert len(found["complete"]["x"]) == 6
        assert found["infeasible"]["x"] == [2.7e-3]
        assert found["infeasible"]["y"][0] > max(found["complete"]["y"])
        assert found["infeasible"]["customdata"] == [["7", "evaluation loss is nan at step 20"]]

    def test_only_infeasible_trials(self) -> None:
        assert list(traces(learning_rate_figure(synthetic.trials()[7:]))) == ["infeasible"]

    @pytest.mark.parametrize("rates", [(1e-4,), (3e-4, 9e-4), (1e-5, 3e-3)])
    def test_there_are_always_ticks_within_reach(self, rates: tuple[float, ...]) -> None:
        trials = [synthetic.trial(number, rate) for number, rate in enumerate(rates)]
        axis = learning_rate_figure(trials).layout.xaxis
        low, high = axis.range
        assert any(low <= math.log10(tick) <= high for tick in axis.tickvals)

    def test_a_trial_without_a_rate_is_left_out(self) -> None:
        bare = Trial(round="r", number=0, hyperparameters={}, state=TrialState.COMPLETE)
        assert len(learning_rate_figure([bare]).data) == 0
