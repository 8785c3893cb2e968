import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from tests.config.rounds import FULL, MINIMAL, document, mistake_in, spec_of, with_hyperparameters
from tests.config.strategies import dimensions
from tuner.config import HYPERPARAMETERS, RoundSpec, SourceSpec, dimension_to_yaml, new_round
from tuner.config.__main__ import main, reference_pages
from tuner.config.parsing import _KNOWN_KEYS
from tuner.config.yaml_text import parse

REFERENCE = Path(__file__).parents[2] / "docs" / "reference"
SCHEMA: dict[str, Any] = json.loads(reference_pages()["round-file.schema.json"])
VALIDATOR = Draft202012Validator(SCHEMA)


def test_the_reference_is_fresh():
    pages = reference_pages()
    assert set(pages) == {"round-file.schema.json", "keys.md", "hyperparameters.md"}
    for name, page in pages.items():
        found = (REFERENCE / name).read_text(encoding="utf-8")
        assert found == page, f"{name} is stale; refresh it by `python -m tuner.config docs/reference`"


def test_the_page_about_the_file_shows_one_that_loads_and_messages_that_exist():
    page = (REFERENCE / "round-file.md").read_text(encoding="utf-8")
    example = page.split("```yaml\n")[1].split("```")[0]
    assert spec_of(example).study == "greeting"
    [shown] = [block for block in page.split("```") if "did you mean" in block]
    for name, value, line in [("lora_rank", "8", 0), ("learning_rate", '"1e-5"', 1)]:
        mistake = mistake_in(with_hyperparameters(**{name: value}))
        assert shown.strip().splitlines()[line].endswith(f": {mistake.key}: {mistake.message}")


def test_the_page_of_keys_has_each_key_of_each_section_by_the_name_that_a_reader_searches_for():
    page = reference_pages()["keys.md"]
    named = {line.split("`")[1] for line in page.splitlines() if line.startswith("| `")}
    assert {
        "max_train_steps",
        "run.storage_patience",
        "evaluation.answers.metric",
        "data.train[].path",
    } <= named
    for section in [SCHEMA, *SCHEMA["$defs"].values()]:
        for key in section["properties"]:
            assert any(name.rpartition(".")[2] == key for name in named), key
    assert len(named) == sum(len(s["properties"]) for s in [SCHEMA, *SCHEMA["$defs"].values()])


def test_writing_and_checking(tmp_path, capsys):
    directory = tmp_path / "docs" / "reference"
    assert main([str(directory), "--check"]) == 1
    assert "python -m tuner.config docs/reference" in capsys.readouterr().err
    assert not directory.exists()
    assert main([str(directory)]) == 0
    assert main([str(directory), "--check"]) == 0
    page = directory / "hyperparameters.md"
    page.write_text(page.read_text() + "\n")
    capsys.readouterr()
    assert main([str(directory), "--check"]) == 1
    assert [line.split(" is stale")[0] for line in capsys.readouterr().err.splitlines()] == [str(page)]


def test_the_schema_is_one():
    Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize(
    "text", [FULL, MINIMAL, new_round(study="s", model="m", data="d.csv", train_rows=99)]
)
def test_the_schema_accepts_files_as_people_type_them(text):
    assert list(VALIDATOR.iter_errors(parse(text).document)) == []


@settings(deadline=None)
@given(
    st.sampled_from(list(HYPERPARAMETERS)).flatmap(lambda name: st.tuples(st.just(name), dimensions(name)))
)
def test_the_schema_accepts_every_form_of_a_hyperparameter(named):
    name, dimension = named
    condition = HYPERPARAMETERS[name].only_with
    chosen = {} if condition is None else {condition.chosen_by: condition.values[-1]}
    written = document(hyperparameters={**chosen, name: dimension_to_yaml(dimension)})
    assert list(VALIDATOR.iter_errors(written)) == []


HELD_OUT = {"eval_fraction": 0.1}
VALID: list[dict[str, Any]] = [
    {"evaluation": {"batch_size": 4}},
    {"run": {"slots": 4, "production_steps": None}},
    {"search": {"enqueue": [{"lora_r": 16, "target_modules": "all-linear", "continues": "r0/3"}]}},
    {"search": {"enqueue": [{}]}},
    {"hyperparameters": {"target_modules": ["q_proj"], "lora_alpha": {"times_sqrt_r": 4}}},
    {"hyperparameters": {"target_modules": r".*\.q_proj", "lora_init": "orthogonal"}},
    {"hyperparameters": {"target_modules": ["all-linear", ".*q_proj"]}},
    {"hyperparameters": {"layers_to_transform": [0, 1]}},
    {"hyperparameters": {"layers_to_transform": ["all", [0, 1]]}},
    {"hyperparameters": {"optimizer": ["adamw", "lion"], "lion_beta1": [0.9, 0.95], "adam_beta1": 0.9}},
    {"hyperparameters": {"adam_beta2": 0.95}},
    {"hyperparameters": {"schedule": "cosine", "decay_steps": 5}},
    {
        "hyperparameters": {"optimizer": ["adamw", "mine:SGD"], "momentum": 0.9, "muon_rate": "original"},
        "search": {"enqueue": [{"optimizer": "mine:SGD"}]},
    },
    {"storage": "postgresql+psycopg://me@host/db"},
    {
        "data": {
            "train": [{"path": "x", "format": "alpaca", "columns": {"output": "a"}, "template": None}],
            **HELD_OUT,
        }
    },
    {
        "data": {
            "train": [{"path": "x", "format": "text", "split_on": "line", "group_records": "fill"}],
            **HELD_OUT,
        }
    },
]
INVALID: list[dict[str, Any]] = [
    {"extra": 1},
    {"study": "../up"},
    {"max_train_steps": [60, 120]},
    {"max_train_steps": {"low": 60, "high": 120}},
    {"max_train_steps": 0},
    {"model": {"path": "m", "dtype": "float16"}},
    {"model": {}},
    {"data": {"train": [{"path": "x", "format": "alpaca"}]}},
    {"data": {"train": [{"path": "x", "format": "shargpt"}], "eval_fraction": 0.1}},
    {"data": {"train": [], "eval_fraction": 0.1}},
    {"data": {"train": [{"path": "x", "format": "alpaca", "columns": {"response": "a"}}], **HELD_OUT}},
    {"data": {"train": [{"path": "x", "format": "alpaca", "template": "vicuna"}], **HELD_OUT}},
    {
        "data": {
            "train": [{"path": "x", "format": "text", "split_on": "line", "group_records": 0}],
            **HELD_OUT,
        }
    },
    {"data": {"train": [{"path": "x", "format": "text", "overlap_tokens": -1}], **HELD_OUT}},
    {"hyperparameters": {"lora_rank": 8}},
    {"hyperparameters": {"max_train_steps": 60}},
    {"hyperparameters": {"lora_r": 0}},
    {"hyperparameters": {"lora_r": []}},
    {"hyperparameters": {"lora_r": {"low": 4}}},
    {"hyperparameters": {"lora_r": {"low": 4, "high": 8.5}}},
    {"hyperparameters": {"learning_rate": "1e-5"}},
    {"hyperparameters": {"learning_rate": {"low": 1e-5, "high": 1e-3, "step": 1e-5}}},
    {"hyperparameters": {"schedule": {"low": 1, "high": 2}}},
    {"hyperparameters": {"lora_r": {"times_sqrt_r": 4}}},
    {"hyperparameters": {"target_modules": "q_proj"}},
    {"hyperparameters": {"target_modules": [[".*q_proj"]]}},
    {"hyperparameters": {"layers_to_transform": 1}},
    {"hyperparameters": {"layers_to_transform": [-1]}},
    {"hyperparameters": {"lora_init": "pissa"}},
    {"hyperparameters": {"lion_beta1": 0.9}},
    {"hyperparameters": {"optimizer": ["adamw", "lion_8bit"], "muon_momentum": 0.9}},
    {"hyperparameters": {"schedule": "cosine", "decay_shape": "sqrt"}},
    {"search": {"enqueue": [{"continues": "r0"}]}},
    {"search": {"enqueue": [{"lora_r": [8, 16]}]}},
    {"search": {"sampler": "qmc"}},
    {"run": {"slots": 0}},
    {"storage": "mysql://host/db"},
]


@pytest.mark.parametrize("change", VALID, ids=str)
def test_schema_and_loader_accept(change):
    assert list(VALIDATOR.iter_errors(document(**change))) == []
    assert RoundSpec.model_validate(document(**change)).study


@pytest.mark.parametrize("change", INVALID, ids=str)
def test_schema_and_loader_refuse(change):
    assert not VALIDATOR.is_valid(document(**change))
    with pytest.raises(ValueError, match="validation error"):
        RoundSpec.model_validate(document(**change))


def test_every_key_is_explained_in_the_schema():
    unexplained = [path for path, key in keys_of(SCHEMA) if not key.get("description")]
    assert unexplained == []
    assert len(list(keys_of(SCHEMA))) == len(_KNOWN_KEYS) - 2 * len(SourceSpec.model_fields), (
        "train, eval and test share one definition"
    )


def keys_of(schema: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Every documented key of the file: those of the sections, and the hyperparameters."""
    sections = {"": schema, **schema["$defs"], "hyperparameters": schema["properties"]["hyperparameters"]}
    return [
        (f"{name}.{key}", of)
        for name, section in sections.items()
        for key, of in section["properties"].items()
    ]


def test_the_table_has_every_hyperparameter_and_no_broken_cell():
    page = reference_pages()["hyperparameters.md"]
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == list(HYPERPARAMETERS)
    assert all(row.count("|") == 7 for row in rows)
