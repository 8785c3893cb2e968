from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuner.report.terminal import ASCII, UNICODE, Marks, curve, sparkline

from . import synthetic


def evaluations(*losses: float, every: int = 5) -> list[synthetic.Evaluation]:
    return [synthetic.evaluation(every * i, loss) for i, loss in enumerate(losses)]


class TestSparkline:
    def test_the_lowest_loss_is_the_lowest_mark(self) -> None:
        line = sparkline(evaluations(3.0, 2.0, 1.0), step=10, max_train_steps=10, scale=(1.0, 3.0), width=2)
        assert line == UNICODE.levels[4] + UNICODE.levels[0]

    def test_what_is_still_to_come_is_marked(self) -> None:
        line = sparkline(evaluations(3.0, 2.0), step=5, max_train_steps=20, scale=(2.0, 3.0), width=8)
        assert line[2:] == UNICODE.ahead * 6

    def test_a_loss_that_is_not_finite(self) -> None:
        assert (
            sparkline(evaluations(1.0, math.nan), step=10, max_train_steps=10, scale=(1.0, 1.0), width=2)[-1]
            == "×"
        )

    def test_before_the_first_evaluation(self) -> None:
        assert sparkline([], step=0, max_train_steps=60, scale=(0.0, 0.0), width=4) == UNICODE.ahead * 4

    @given(
        st.lists(st.floats(width=32), max_size=20),
        st.integers(0, 200),
        st.integers(1, 100),
        st.integers(1, 30),
    )
    def test_always_as_wide_as_asked(self, losses: list[float], step: int, steps: int, width: int) -> None:
        line = sparkline(
            evaluations(*losses), step=step, max_train_steps=steps, scale=(0.5, 2.0), width=width, marks=ASCII
        )
        assert len(line) == width
        assert line.isascii()


class TestCurve:
    def test_axes_and_marks(self) -> None:
        lines = curve(evaluations(2.0, 1.0, 1.5), max_train_steps=10, width=11, height=5)
        assert lines[0].startswith("2.0000 │●")
        assert lines[4].startswith("0.9800 │")
        assert "★" in lines[4]
        assert lines[4].index("★") - lines[4].index("│") == 6, "step 5 of 10 is half-way"
        assert lines[-1].endswith("step 10")
        assert len(lines) == 7

    def test_a_divergence_is_drawn_at_the_edge_and_does_not_flatten_the_rest(self) -> None:
        lines = curve(evaluations(2.0, 1.0, 50.0), max_train_steps=10, width=11, height=5)
        assert lines[0].startswith("4.0000 │")
        assert "▲" in lines[0]

    @pytest.mark.parametrize("losses", [[], [math.nan], [math.inf, math.nan]])
    def test_nothing_to_draw(self, losses: list[float]) -> None:
        assert curve(evaluations(*losses), max_train_steps=10) == []

    @given(st.lists(st.floats(width=32), min_size=1, max_size=20), st.sampled_from([ASCII, UNICODE]))
    def test_any_losses_fit_into_the_plot(self, losses: list[float], marks: Marks) -> None:
        lines = curve(evaluations(*losses), max_train_steps=60, width=20, height=6, marks=marks)
        assert len(lines) in (0, 8)
        assert all(len(line.partition(marks.axis)[2]) <= 20 for line in lines[:6])
