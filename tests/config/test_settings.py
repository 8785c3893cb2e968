"""`--set KEY=VALUE`: what is written into the file, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tuner.config import new_round, read_round
from tuner.config.settings import typed_values, with_settings
from tuner.errors import InputError
from tuner.records import Choices, Fixed, Range

PATH = Path("round1.yaml")
TEXT = new_round(study="s", model="m", data="rows.jsonl", train_rows=1000)


@pytest.mark.parametrize(
    ("setting", "line"),
    [
        ("hyperparameters.lora_r=16,32", "  lora_r: [16, 32]  # rank of the adapters"),
        ("hyperparameters.lora_r=64", "  lora_r: 64  # rank of the adapters"),
        ("data.max_length=1024", "  max_length: 1024  # tokens; longer rows are cut"),
        ("goal=Find a rate, and a rank", "goal: 'Find a rate, and a rank'  # shown in reports"),
        ("hyperparameters.weight_decay=1e-4:1e-1:log", "  weight_decay: {low: 0.0001, high: 0.1, log: true}"),
        ("hyperparameters.lora_dropout=0:0.1", "  lora_dropout: {low: 0, high: 0.1, log: false}"),
        ("data.loss_on=all", "  loss_on: all  # or all, to learn the prompts too"),
    ],
)
def test_a_value_is_written_as_a_person_would(setting: str, line: str) -> None:
    text, _ = with_settings(TEXT, [setting], PATH)
    assert line in text.splitlines()
    changed = [new for new in text.splitlines() if new not in TEXT.splitlines()]
    assert changed == [line], "no other line changes"


def test_keys_of_sections_on_one_line_and_lists() -> None:
    text, values = with_settings(
        TEXT, ["run.report_to=wandb,mlflow", "evaluation.batch_size=4", "storage=sqlite:///x.db"], PATH
    )
    spec = read_round(text, PATH).spec
    assert spec.run.report_to == ["wandb", "mlflow"] == values["run.report_to"]
    assert (spec.evaluation.batch_size, spec.storage) == (4, "sqlite:///x.db")


def test_settings_that_need_each_other_are_given_in_any_order() -> None:
    pair = ["hyperparameters.muon_momentum=0.9", "hyperparameters.optimizer=muon"]
    for given_so in (pair, pair[::-1]):
        space = read_round(with_settings(TEXT, given_so, PATH)[0], PATH).spec.space()
        assert space["muon_momentum"] == Fixed(0.9)


def test_what_is_set_is_searched() -> None:
    space = read_round(
        with_settings(
            TEXT,
            [
                "hyperparameters.learning_rate=1e-5:1e-4:log",
                "hyperparameters.optimizer=adamw,lion",
                "hyperparameters.lora_alpha=32",
            ],
            PATH,
        )[0],
        PATH,
    ).spec.space()
    assert space["learning_rate"] == Range(1e-5, 1e-4, log=True)
    assert space["optimizer"] == Choices(("adamw", "lion"))
    assert space["lora_alpha"] == Fixed(32)


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["lora_r"], "expects KEY=VALUE"),
        (["=3"], "expects KEY=VALUE"),
        (["hyperparameters.lora_r="], "expects KEY=VALUE"),
        (["hyperparameters.lora_rank=8"], "lora_rank"),
        (["hyperparameters.lora_r=many"], "hyperparameters.lora_r"),
        (["hyperparameters.learning_rate=1e-5:1e-3:lin"], "LOW:HIGH:log"),
        (["hyperparameters.learning_rate=1:2:3:4"], "LOW:HIGH:log"),
        (["data.max_lenght=3"], "max_length"),
        (["round=round7"], "cannot be set"),
        (["max_train_steps=9"], "use --max-train-steps"),
        (["data.max_length=3", "data.max_length=4"], "set twice"),
        (["data.max_length=[1"], "cannot be read"),
    ],
)
def test_what_is_refused_names_the_setting_and_an_example(typed: list[str], said: str) -> None:
    with pytest.raises(InputError) as refused:
        with_settings(TEXT, typed, PATH, refused=("max_train_steps",))
    assert str(refused.value).startswith(f"--set {typed[-1]}: ")
    assert "round1.yaml" not in str(refused.value), "that file does not exist yet"
    assert said in str(refused.value)
    assert "Example: --set" in str(refused.value)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 512), min_size=1, max_size=5, unique=True))
def test_lists_mean_the_same_as_in_the_file(ranks: list[int]) -> None:
    written = ",".join(map(str, ranks))
    assert typed_values(written) == ranks
    text, _ = with_settings(TEXT, [f"hyperparameters.lora_r={written}"], PATH)
    by_hand = TEXT.replace("lora_r: [8, 16, 32]", f"lora_r: {ranks if len(ranks) > 1 else ranks[0]}")
    assert read_round(text, PATH).spec.space() == read_round(by_hand, PATH).spec.space()
