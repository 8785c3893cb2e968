"""What a worker is told and says survives the pipe; so does what the store keeps as JSON."""

from __future__ import annotations

import json
import math
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuner.records import (
    AnswerScore,
    Assignment,
    Branch,
    Checkpoint,
    Direction,
    Evaluated,
    Evaluation,
    Event,
    Objective,
    Value,
    assignment_from_json,
    branch_from_json,
    checkpoint_from_json,
    evaluation_from_json,
    event_from_json,
    event_to_json,
    to_json,
)

_LOSSES = st.floats(allow_nan=False)
_VALUES: st.SearchStrategy[Value] = st.one_of(
    *(st.booleans(), st.integers(), _LOSSES, st.text()),
    *(st.lists(st.text()).map(tuple), st.lists(st.integers()).map(tuple)),
)
_HYPERPARAMETERS = st.dictionaries(st.text(min_size=1), _VALUES, max_size=3)


@st.composite
def _evaluations(draw: st.DrawFn) -> Evaluation:
    examples = draw(st.lists(st.tuples(_LOSSES, st.integers(1, 99)), max_size=3))
    return Evaluation(
        step=draw(st.integers(0, 10_000)),
        eval_loss=draw(_LOSSES),
        train_loss=draw(st.none() | _LOSSES),
        learning_rate=draw(st.none() | _LOSSES),
        clipped_updates=draw(st.integers(0, 9)),
        example_nll=tuple(nll for nll, _ in examples),
        example_tokens=tuple(tokens for _, tokens in examples),
        correct_tokens=draw(st.none() | st.integers(0, 9)),
        metrics=draw(st.dictionaries(st.text(min_size=1), _LOSSES, max_size=2)),
        objective=draw(
            st.none()
            | st.builds(
                Objective,
                st.text(min_size=1),
                st.sampled_from(Direction),
                st.sampled_from(("evaluation", "trial")),
                st.booleans(),
            )
        ),
    )


st.register_type_strategy(Evaluation, _evaluations())
st.register_type_strategy(float, _LOSSES)
_SCORES = st.builds(AnswerScore, mean=st.floats(allow_nan=False, allow_infinity=False))
st.register_type_strategy(AnswerScore, _SCORES)


def _piped(document: Any) -> Any:
    return json.loads(json.dumps(document))


@pytest.mark.parametrize("kind", get_args(Event), ids=lambda kind: kind.__name__)
@given(data=st.data())
def test_an_event_comes_out_of_the_pipe_as_it_went_in(kind: type[Event], data: st.DataObject) -> None:
    event = data.draw(st.from_type(kind))
    assert event_from_json(_piped(event_to_json(event))) == event


@given(data=st.data())
def test_an_assignment_keeps_its_hyperparameters_types(data: st.DataObject) -> None:
    told = data.draw(st.builds(Assignment, hyperparameters=_HYPERPARAMETERS))
    read = assignment_from_json(_piped(to_json(told)))
    assert read == told
    assert {name: type(value) for name, value in read.hyperparameters.items()} == {
        name: type(value) for name, value in told.hyperparameters.items()
    }


@given(st.from_type(Branch))
def test_a_branch_is_read_as_it_was_written(branch: Branch) -> None:
    assert branch_from_json(_piped(to_json(branch))) == branch


@given(st.from_type(Checkpoint))
def test_a_checkpoint_is_read_as_it_was_written(checkpoint: Checkpoint) -> None:
    assert checkpoint_from_json(_piped(to_json(checkpoint))) == checkpoint


def test_a_loss_that_is_no_number_passes_the_pipe() -> None:
    told = Evaluated("round1", 3, 1, Evaluation(5, math.nan, train_loss=math.inf))
    read = event_from_json(_piped(event_to_json(told)))
    assert isinstance(read, Evaluated)
    assert math.isnan(read.evaluation.eval_loss)
    assert read.evaluation.train_loss == math.inf


def test_an_event_of_another_kind_is_refused() -> None:
    with pytest.raises(KeyError, match="retired"):
        event_from_json({"event": "retired"})


def test_an_evaluation_written_without_examples_has_none() -> None:
    assert evaluation_from_json({"step": 0, "eval_loss": 2.5}) == Evaluation(0, 2.5)
