"""The report of a command: whole lines only, however they are written, and what each must say."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuner.commands.reported import Curve, MetricsFile, not_finite
from tuner.errors import InputError
from tuner.records import LOSS, Direction, Evaluation, Objective

ACCURACY = Objective("accuracy", Direction.MAXIMIZE)


@given(st.lists(st.floats(allow_nan=False), min_size=1, max_size=8), st.data())
def test_lines_are_read_once_and_whole_wherever_the_file_is_cut(tmp_path_factory, losses, data) -> None:
    text = b"".join(
        json.dumps({"step": at, "eval_loss": loss}).encode() + b"\n" for at, loss in enumerate(losses)
    )
    path = tmp_path_factory.mktemp("report") / "metrics.jsonl"
    report, heard = MetricsFile(path, LOSS), []
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=5)))
    for cut in [*cuts, len(text)]:
        path.write_bytes(text[:cut])
        heard += [line.evaluation for line in report.new_lines()]
    assert [made.eval_loss for made in heard if made is not None] == losses
    assert [made.step for made in heard if made is not None] == list(range(len(losses)))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("no json", "line 1: expects a line such as"),
        ("[1]", "line 1: expects a line such as"),
        pytest.param("[" * 9_999, "line 1: expects a line such as", id="deep"),
        ('{"eval_loss": 1}', "has no step; expects a line such as"),
        ('{"step": -1}', "step: expects a whole number"),
        ('{"step": true}', "step: expects a whole number"),
        ('{"step": 1, "eval_loss": "1e-4"}', "eval_loss: expects a number"),
        ('{"step": 1, "checkpoint": 3}', "checkpoint: expects a path"),
        ('{"step": 1, "checkpoint": "x", "processes": "two"}', "processes: expects a whole number"),
        ('{"step": 1, "checkpoint": "x", "processes": NaN}', "processes: expects a whole number"),
        ('{"began_at": "x"}', "began_at: expects a whole number"),
        pytest.param('{"step": 1, "eval_loss": ' + "9" * 400 + "}", "that a float can be", id="huge"),
    ],
)
def test_a_line_that_cannot_be_read_says_which_and_why(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(InputError, match=said):
        list(MetricsFile(path, LOSS).new_lines())


def test_the_first_evaluation_of_a_step_counts_and_losses_are_averaged_between() -> None:
    curve = Curve("here", ACCURACY)
    said = [
        {"step": 1, "train_loss": 4.0},
        {"step": 2, "train_loss": 2.0, "learning_rate": 0.1},
        {"step": 2, "eval_loss": 1.0, "accuracy": 0.5, "eval_runtime": 3.0},
        {"step": 2, "eval_loss": 9.0, "accuracy": 0.9},
        {"step": 4, "accuracy": 0.6},
    ]
    first, second = (made for line in said if (made := curve.line(line).evaluation) is not None)
    assert (first.train_loss, first.learning_rate, first.value) == (3.0, 0.1, 0.5)
    assert first.metrics == {"accuracy": 0.5}
    assert math.isnan(second.eval_loss)
    assert second.train_loss is None
    assert not_finite(second) is None


def test_what_is_not_finite() -> None:
    assert not_finite(Evaluation(3, math.nan)) == "evaluation loss is nan at step 3"
    assert not_finite(Evaluation(3, 1.0)) is None
    assert "accuracy is nan" in str(not_finite(Evaluation(3, 1.0, objective=ACCURACY)))
    gone = Evaluation(3, math.inf, metrics={"accuracy": 0.5}, objective=ACCURACY)
    assert not_finite(gone) == "evaluation loss is inf at step 3"
