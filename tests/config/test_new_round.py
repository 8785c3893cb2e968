import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.config.rounds import spec_of
from tuner.config import load_round, new_round
from tuner.errors import InputError, RoundFileError
from tuner.records import Choices, Range, searched


def test_the_file_it_writes(tmp_path):
    text = new_round(
        study="greeting",
        model="some/model",
        data="train.jsonl",
        train_rows=5200,
        eval="eval.jsonl",
        format="messages",
    )
    path = tmp_path / "round1.yaml"
    path.write_text(text)
    spec = load_round(path).spec
    assert (spec.study, spec.round, spec.model.path) == ("greeting", "round1", "some/model")
    assert [(source.path, source.format) for source in spec.data.train] == [("train.jsonl", "messages")]
    assert [(source.path, source.format) for source in spec.data.eval] == [("eval.jsonl", "messages")]
    assert spec.data.eval_fraction is None
    assert (spec.max_train_steps, spec.run.production_steps) == (223, 2000)
    assert (spec.evaluation.every_steps, spec.search.trials) == (19, 24)
    assert searched(spec.space()) == {
        "learning_rate": Range(1e-5, 3e-3, log=True),
        "lora_r": Choices((8, 16, 32)),
    }
    assert (spec.hyperparameters["warmup_steps"], spec.hyperparameters["decay_steps"]) == (5, 89)
    assert "0.34 epochs of 5200 rows" in text
    assert "3.1 epochs" in text


def test_lines_are_in_the_order_of_the_reference_and_explained():
    lines = new_round(study="s", model="m", data="d.jsonl", train_rows=52).splitlines()
    top = [line.split(":")[0] for line in lines if line[0] not in " #"]
    assert top == [
        *("study", "round", "goal", "model", "data", "max_train_steps", "hyperparameters"),
        *("search", "evaluation", "checkpoints", "run", "storage"),
    ]
    bare = [line for line in lines if "#" not in line]
    assert [line.split(":")[0] for line in bare] == ["study", "round", "data", "hyperparameters", "search"]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 10**8))
def test_lengths_follow_the_rows(rows):
    spec = spec_of(new_round(study="s", model="m", data="d.jsonl", train_rows=rows, eval="e.jsonl"))
    production, horizon = spec.run.production_steps, spec.max_train_steps
    assert production is not None
    assert production == 60 or abs(production * 8 / rows - 3) <= 0.2
    assert horizon >= 20
    rounds_left = 2 if production > 9 * 19 else 1
    assert horizon == -(-production // 3**rounds_left)
    assert horizon * 3**rounds_left >= production
    assert spec.hyperparameters["warmup_steps"] == min(5, horizon // 10) >= 2
    assert abs(spec.evaluation.every_steps - horizon / 12) <= 0.5
    assert spec.hyperparameters["decay_steps"] == round(0.4 * horizon)


@pytest.mark.parametrize(
    ("rows", "production", "horizon"),
    [(8, 60, 20), (400, 150, 50), (453, 170, 57), (480, 180, 20), (2_667, 1000, 112), (52_002, 20_000, 2223)],
)
def test_rounds_begin_at_a_ninth_that_holds_twenty_steps(rows: int, production: int, horizon: int) -> None:
    spec = spec_of(new_round(study="s", model="m", data="d.jsonl", train_rows=rows, eval="e.jsonl"))
    assert (spec.run.production_steps, spec.max_train_steps) == (production, horizon)


def test_held_out_rows_are_not_trained_on():
    assert "of 950 rows" in new_round(study="s", model="m", data="d.jsonl", train_rows=1000)
    text = new_round(study="s", model="m", data="d.jsonl", train_rows=1000, eval_fraction=0.5)
    assert "of 500 rows" in text
    assert spec_of(text).data.eval_fraction == 0.5


@pytest.mark.parametrize(
    "path", ["a b.jsonl", "x: y", "# no comment", "{curly}", "übung.jsonl", "it's", "a,b]"]
)
def test_any_path_is_quoted_as_needed(path):
    spec = spec_of(new_round(study="s", model=path, data=path, train_rows=10, goal=path))
    assert (spec.model.path, spec.data.train[0].path, spec.goal) == (path, path, path)


def test_what_a_round_cannot_say_is_refused():
    with pytest.raises(RoundFileError, match=r"round1\.yaml:3: study: expects letters"):
        new_round(study="my study", model="m", data="d.jsonl", train_rows=10)
    with pytest.raises(RoundFileError, match="did you mean sharegpt"):
        new_round(study="s", model="m", data="d.jsonl", train_rows=10, format="share_gpt")
    with pytest.raises(RoundFileError, match="combined with eval"):
        new_round(study="s", model="m", data="d.jsonl", train_rows=10, eval="e.jsonl", eval_fraction=0.1)
    with pytest.raises(InputError, match=r"d\.jsonl has no rows"):
        new_round(study="s", model="m", data="d.jsonl", train_rows=0)


def test_the_recipe_of_alpaca_and_qlora():
    text = new_round(
        study="s", model="m", data="d.jsonl", train_rows=52_002, eval_fraction=0.02, recipe="alpaca-qlora"
    )
    spec = spec_of(text)
    space = {name: dimension.value for name, dimension in spec.space().items() if hasattr(dimension, "value")}
    assert (spec.model.quantization, spec.max_train_steps, spec.search.trials) == ("nf4", 60, 8)
    expected = {
        **{
            "lora_r": 16,
            "lora_alpha": 16,
            "target_modules": "all-linear",
            "batch_size": 8,
            "warmup_steps": 5,
        },
        **{"optimizer": "adamw_8bit", "decay_steps": 24},
    }
    assert {name: space[name] for name in expected} == expected
    assert searched(spec.space()) == {"learning_rate": Range(2e-5, 2e-3, log=True)}
    assert spec.search.enqueue == [{"learning_rate": 2e-4}]
    assert spec.run.production_steps == 19_000
    assert "0.0094 epochs of 50962 rows" in text


def test_an_unknown_recipe_is_refused():
    with pytest.raises(InputError, match="unknown template alpaca; expects alpaca-qlora"):
        new_round(study="s", model="m", data="d.jsonl", train_rows=10, recipe="alpaca")
