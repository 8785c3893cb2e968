"""Bad input ends with exit 2 and one clear message, and leaves nothing half-made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.studies import write_round
from tuner.cli import run


def files(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*")}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"trials": 0}, ["search.trials"]),
        ({"steps": "[20, 40]"}, ["max_train_steps"]),
        ({"every": 9}, ["evaluation.every_steps"]),
        ({"decay_steps": 8}, ["decay_steps", "warmup_steps"]),
        ({"lora_r": "[2, 4]\n  lora_rank: 4"}, ["hyperparameters.lora_rank", "did you mean lora_r"]),
        ({"lora_r": "[2, 4]\n  max_steps: 60"}, ["max_steps"]),
        ({"lora_r": "[2, 4]\n  use_dora: [false, true]"}, ["use_dora", "plain LoRA"]),
        ({"storage": "mysql://localhost/x"}, ["storage"]),
    ],
)
def test_mistakes_in_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], words: list[str]
) -> None:
    path = write_round(tmp_path, **changes)
    assert run(["study", "run", str(path)]) == 2
    message = capsys.readouterr().err
    assert "round1.yaml:" in message
    assert all(word in message for word in words)
    assert files(tmp_path) == {"round1.yaml"}


@pytest.mark.parametrize(
    "arguments",
    [
        ["study", "run"],
        ["study", "sweep", "x"],
        ["study", "status", "--foo"],
        ["-C", "nowhere", "study", "status"],
        ["study", "run", "round1.yaml", "--for", "soon"],
        ["study", "run", "round1.yaml", "--slots", "0"],
        ["study", "promote", "--to", "round2", "--decay", "most"],
    ],
)
def test_a_wrong_command_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments) == 2
    message = capsys.readouterr().err
    assert message
    assert "Traceback" not in message


def test_a_missing_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["study", "run", str(tmp_path / "round9.yaml")]) == 2
    assert "round9.yaml" in capsys.readouterr().err
    assert files(tmp_path) == set()


def test_a_database_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_round(tmp_path)
    (tmp_path / "tuner.db").write_text("this is a shopping list\n" * 100)
    assert run(["study", "run", str(path)]) == 2
    assert "tuner.db" in capsys.readouterr().err
    assert files(tmp_path) == {"round1.yaml", "tuner.db"}


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ("", ["train.jsonl"]),
        ('{"question": "?"}\n', ["train.jsonl", "instruction", "question"]),
        ("{not json\n", ["train.jsonl"]),
    ],
)
def test_data_that_cannot_be_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], rows: str, words: list[str]
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text(rows)
    (tmp_path / "data" / "eval.jsonl").write_text('{"instruction": "a", "output": "b"}\n')
    path = write_round(tmp_path, data=tmp_path / "data")
    assert run(["study", "check", str(path), "--json"]) == 2
    out = capsys.readouterr()
    document = json.loads(out.out)
    assert document["ok"] is False
    assert all(word in document["errors"][0]["message"] for word in words)


def test_evaluation_rows_among_the_training_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "data").mkdir()
    row = '{"instruction": "Name a river.", "output": "The Ebb."}\n'
    (tmp_path / "data" / "train.jsonl").write_text(row + '{"instruction": "a", "output": "b"}\n')
    (tmp_path / "data" / "eval.jsonl").write_text(row)
    path = write_round(tmp_path, data=tmp_path / "data")
    assert run(["study", "run", str(path)]) == 2
    message = capsys.readouterr().err
    assert "eval.jsonl" in message
    assert "train.jsonl" in message
    assert not (tmp_path / "tuner.db").exists()
    assert not (tmp_path / "runs" / "round1").exists()


def test_check_accepts_a_good_round_and_records_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_round(tmp_path)
    assert run(["study", "check", str(path), "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)["plan"]
    assert (plan["trials"], plan["max_train_steps"]) == (3, 8)
    assert plan["eval_rows"] == 8
    assert plan["checkpoint_bytes"] > 0
    assert files(tmp_path).isdisjoint({"tuner.db", "runs"})


def test_new_writes_a_round_that_checks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.studies import QUICKSTART
    from tuner.spec import load_round

    arguments = ["--model", str(QUICKSTART / "base"), "--data", str(QUICKSTART / "data" / "train.jsonl")]
    assert run(["study", "new", str(tmp_path / "mine"), *arguments]) == 0
    spec = load_round(tmp_path / "mine" / "round1.yaml").spec
    assert (spec.study, spec.data.train[0].format) == ("mine", "alpaca")
    assert run(["study", "new", str(tmp_path / "mine"), *arguments]) == 2
    assert "exists" in capsys.readouterr().err
