from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from tests.config.rounds import FULL, MINIMAL, document, spec_of
from tests.config.strategies import dimensions
from tuner.config import HYPERPARAMETERS, RoundSpec, dimension_to_yaml
from tuner.config.dimensions import complete_space, read_dimension
from tuner.config.rules import adapter_refusals
from tuner.records import Choices, Fixed, possible, searched


def test_defaults():
    spec = spec_of(MINIMAL)
    assert (spec.goal, spec.storage) == ("", "sqlite:///tuner.db")
    assert (spec.model.dtype, spec.model.quantization, spec.model.trust_remote_code) == (
        "bfloat16",
        "none",
        False,
    )
    assert (spec.data.max_length, spec.data.loss_on, spec.data.train[0].weight) == (512, "completion", 1.0)
    assert (spec.search.trials, spec.search.sampler, spec.search.seed) == (16, "quasi-random", 0)
    assert (spec.evaluation.every_steps, spec.evaluation.batch_size, spec.evaluation.max_examples) == (
        5,
        16,
        200,
    )
    assert (spec.checkpoints.directory, spec.checkpoints.keep_best) == ("runs", 1)
    assert (spec.run.engine, spec.run.slots, spec.run.production_steps) == ("local", "auto", None)
    values = {name: dimension.value for name, dimension in spec.space().items()}
    assert values == {
        "learning_rate": 3e-4,
        "lora_r": 16,
        "lora_alpha": 16.0,
        "target_modules": "all-linear",
        "batch_size": 8,
        "optimizer": "adamw_8bit",
        "warmup_steps": 5,
        "schedule": "linear",
        "decay_steps": 24,
        "decay_shape": "linear",
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
        "loraplus_ratio": 1.0,
        "lora_init": "default",
        "weight_decay": 0.0,
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "adam_epsilon": 1e-8,
        "max_grad_norm": 1.0,
        "training_seed": 0,
    }
    assert list(values) == [name for name in HYPERPARAMETERS if name in values], "in the table's order"


def test_hyperparameters_are_parsed_once_also_for_copies_and_again_where_something_changed():
    spec = spec_of(MINIMAL)
    rate = spec.space()["learning_rate"]
    assert spec.space()["learning_rate"] is rate
    assert spec.model_copy(update={"goal": "another"}).space()["learning_rate"] is rate
    assert spec.model_copy(update={"max_train_steps": 10}).space()["decay_steps"] == Fixed(4)
    other = spec.model_copy(update={"hyperparameters": {"learning_rate": [1e-4, 1e-3]}})
    assert other.space()["learning_rate"] == Choices((1e-4, 1e-3))
    spec.space().pop("lora_r")  # type: ignore[attr-defined]
    assert "lora_r" in spec.space(), "what a caller does with its answer is its own"


@pytest.mark.parametrize(("horizon", "every"), [(1, 1), (6, 1), (60, 5), (100, 8), (2000, 167)])
def test_a_twelfth_of_the_horizon_between_evaluations(horizon, every):
    spec = RoundSpec.model_validate(document(max_train_steps=horizon, evaluation={"batch_size": 4}))
    assert (spec.evaluation.every_steps, spec.evaluation.batch_size) == (every, 4)


def test_the_space_begins_in_the_order_of_the_file():
    written = {"weight_decay": [0, 0.1], "lora_r": 8, "learning_rate": {"low": 1e-5, "high": 1e-3}}
    space = RoundSpec.model_validate(document(hyperparameters=written)).space()
    assert list(space)[:3] == list(written)
    assert list(searched(space)) == ["weight_decay", "learning_rate"]
    assert space["lora_r"] == Fixed(8)
    others = {
        "lion_beta1",
        "lion_beta2",
        "muon_momentum",
        "muon_nesterov",
        "muon_rate",
        "layers_to_transform",
        "variant",
    }
    assert set(space) == set(HYPERPARAMETERS) - others, (
        "what other optimizers know, and what is not written, has no place in it"
    )


def test_a_round_survives_json():
    spec = spec_of(FULL.replace("enqueue: []", "enqueue: [{learning_rate: 1e-4, continues: r0/1}]"))
    again = RoundSpec.model_validate(spec.model_dump(mode="json"))
    assert again == spec
    assert again.model_dump_json() == spec.model_dump_json()
    assert RoundSpec.model_validate_json(spec.model_dump_json()) == spec


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_any_space_survives_the_file_and_json(data):
    free = [name for name in HYPERPARAMETERS if name not in ("warmup_steps", "decay_steps")]
    names = data.draw(st.lists(st.sampled_from(free), unique=True))
    space = {name: data.draw(dimensions(name)) for name in names}
    assume(not any(adapter_refusals({**complete_space({}, max_train_steps=60), **space})))
    read = {name: read_dimension(HYPERPARAMETERS[name], dimension_to_yaml(d)) for name, d in space.items()}
    kept = possible({"optimizer": Fixed("adamw_8bit"), "schedule": Fixed("linear"), **read})
    space = {name: dimension for name, dimension in space.items() if name in kept}
    names = list(space)
    written = {name: dimension_to_yaml(dimension) for name, dimension in space.items()}
    spec = RoundSpec.model_validate(document(hyperparameters=written))
    assert {name: spec.space()[name] for name in space} == space
    assert list(spec.space())[: len(names)] == names
    assert RoundSpec.model_validate(spec.model_dump(mode="json")) == spec


def test_a_spec_is_frozen():
    with pytest.raises(ValidationError):
        spec_of(MINIMAL).max_train_steps = 5


def test_absolute_paths(tmp_path: Path):
    (tmp_path / "base").mkdir()
    text = (
        MINIMAL.replace("some/model", "base")
        .replace("eval_fraction: 0.1", "eval: [{path: tatsu-lab/alpaca, format: alpaca}]")
        .replace("data: {", "data: {test: [{path: 'https://host/x.jsonl', format: text}], ")
    )
    spec = spec_of(text).absolute(tmp_path)
    assert spec.model.path == str(tmp_path / "base")
    assert spec.data.train[0].path == str(tmp_path / "train.jsonl")
    assert spec.data.eval[0].path == "tatsu-lab/alpaca"
    assert spec.data.test[0].path == "https://host/x.jsonl"
    assert spec.checkpoints.directory == str(tmp_path / "runs")
    assert spec.storage == f"sqlite:///{tmp_path}/tuner.db"
    assert spec.absolute(tmp_path / "elsewhere") == spec


@pytest.mark.parametrize(
    ("path", "absolute"),
    [
        ("some/model", "some/model"),
        ("./some/model", "/study/some/model"),
        ("../model", "/model"),
        ("/models/x", "/models/x"),
        ("~/x", f"{Path.home()}/x"),
    ],
)
def test_models_are_paths_when_they_look_so(path, absolute):
    spec = spec_of(MINIMAL.replace("some/model", path)).absolute(Path("/study"))
    assert spec.model.path == absolute


@pytest.mark.parametrize(
    ("url", "absolute"),
    [
        ("sqlite:///tuner.db", "sqlite:////study/tuner.db"),
        ("sqlite:///a/../tuner.db?timeout=3", "sqlite:////study/tuner.db?timeout=3"),
        ("sqlite:////data/tuner.db", "sqlite:////data/tuner.db"),
        ("sqlite+pysqlite:///tuner.db", "sqlite+pysqlite:////study/tuner.db"),
        ("postgresql+psycopg://me@host/db", "postgresql+psycopg://me@host/db"),
        ("postgresql://me@host/db", "postgresql://me@host/db"),
    ],
)
def test_storage_is_relative_to_the_file(url, absolute):
    spec = spec_of(f"{MINIMAL}storage: {url}\n").absolute(Path("/study"))
    assert spec.storage == absolute


def test_a_relative_directory_is_taken_from_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert spec_of(MINIMAL).absolute(Path("sub")).checkpoints.directory == str(tmp_path / "sub" / "runs")


def test_a_metric_is_a_file_beside_the_round_or_a_module(tmp_path: Path):
    (tmp_path / "beside.py").write_text("")
    text = FULL.replace("every_steps: 5", "every_steps: 5, answers: {metric: METRIC}")
    written = ("exact_match", "scores.py:overlap", "beside:overlap", "somewhere.else:overlap", "/a/b.py:f")
    found = [spec_of(text.replace("METRIC", name)).absolute(tmp_path) for name in written]
    again = [spec.absolute(tmp_path / "other") for spec in found]
    assert [spec.evaluation.answers.metric for spec in again] == [
        "exact_match",
        f"{tmp_path}/scores.py:overlap",
        f"{tmp_path}/beside.py:overlap",
        "somewhere.else:overlap",
        "/a/b.py:f",
    ]


@pytest.mark.parametrize(
    ("hyperparameters", "trials", "expected"),
    [
        ({"lora_r": [4, 8]}, 6, 2),
        ({"lora_r": [4, 8, 16]}, 3, 3),
        ({"lora_r": [4, 8], "training_seed": [0, 1, 2]}, 16, 6),
        ({"lora_r": {"low": 4, "high": 8}}, 16, 5),
        ({"lora_r": {"low": 1, "high": 8, "log": True}, "use_dora": [True, False]}, 99, 16),
        ({"lora_alpha": {"low": 8, "high": 10, "integer": True}}, 16, 3),
        ({"lora_alpha": {"low": 8, "high": 10}, "lora_r": [4, 8]}, 16, 16),
        ({"lora_alpha": {"times_sqrt_r": 4}}, 5, 1),
        ({}, 1, 1),
    ],
)
def test_a_round_has_no_more_trials_than_points(hyperparameters, trials, expected):
    spec = RoundSpec.model_validate(document(hyperparameters=hyperparameters, search={"trials": trials}))
    assert spec.num_trials == expected
    assert (spec.ends_early is None) == (expected == trials)
    if spec.ends_early is not None:
        points = "1 point" if expected == 1 else f"{expected} points"
        assert spec.ends_early == (
            f"The search space has {points}, so the round ends after {expected} of {trials} trials."
        )
