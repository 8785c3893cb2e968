"""Every format of rows, from a file to what `study check` shows of it and a round that a recipe began."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from tests.studies import QUICKSTART, write_round
from tuner.cli import run
from tuner.config import load_round

ASKED, ANSWER = "Name river {n}.", "River {n} is the Ebb."
FORMATS: dict[str, tuple[dict[str, Any], str]] = {
    "alpaca": ({"instruction": ASKED, "output": ANSWER}, ""),
    "alpaca-chat": ({"instruction": ASKED, "input": "here", "output": ANSWER}, ", template: chatml"),
    "messages": (
        {"messages": [{"role": "user", "content": ASKED}, {"role": "assistant", "content": ANSWER}]},
        ", template: llama3",
    ),
    "sharegpt": (
        {"dialog": [{"from": "human", "value": ASKED}, {"from": "gpt", "value": ANSWER}]},
        ", template: alpaca, columns: {conversations: dialog}",
    ),
    "completion": ({"q": ASKED, "a": ANSWER}, ", columns: {prompt: q, completion: a}"),
    "text": ({"text": f"{ASKED} {ANSWER}"}, ""),
}


def with_data(directory: Path, train: str, held_out: str) -> Path:
    """A round whose data section has these sources, as YAML."""
    path = write_round(directory)
    lines = path.read_text().splitlines()
    changed = {"  train:": f"  train: [{train}]", "  eval:": f"  eval: [{held_out}]"}
    path.write_text("\n".join(changed.get(line.split(" [")[0], line) for line in lines) + "\n")
    return path


@pytest.mark.parametrize("name", list(FORMATS))
def test_check_shows_what_the_loss_sees(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    row, more = FORMATS[name]
    for part, numbers in (("train", range(20)), ("eval", range(20, 25))):
        lines = [json.dumps(row).replace("{n}", str(number)) for number in numbers]
        (tmp_path / f"{part}-rows.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode(), mtime=0))
    format = name.partition("-")[0]
    sources = [f"{{path: '{part}-*.jsonl.gz', format: {format}{more}}}" for part in ("train", "eval")]
    path = with_data(tmp_path, *sources)
    path.write_text(path.read_text().replace("max_length: 64", "max_length: 256"))
    assert run(["study", "check", str(path), "--show", "1"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("--- train-rows.jsonl.gz:1: ")
    learned = shown.partition("[[")[2].partition("]]")[0]
    assert "Name river 0." in shown.replace("[[", "")
    assert ("river 0." in learned) == (format == "text")
    assert "River 0 is the Ebb." in learned


def test_check_shows_a_log_and_counts_what_became_of_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logs = tmp_path / "logs"
    logs.mkdir()
    (logs / "a.log").write_text("".join(f"line {n} says so\n" for n in range(40)) + "word " * 200 + "\n")
    (logs / "b.log").write_text("a line of the other day\n" * 2)
    path = with_data(
        tmp_path,
        "{path: 'logs/a*', format: text, split_on: line, group_records: fill, overlap_tokens: 8}",
        "{path: 'logs/b*', format: text, split_on: line}",
    )
    assert run(["study", "check", str(path), "--show", "1"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("--- logs/a.log:1: 6"), "of 64 tokens"
    assert "in the loss\nl[[ine 0 says so\nline 1 says so\n" in said, "nothing predicts a first token"
    assert "train rows continue a text longer than max_length" in " ".join(said.split())
    assert "1 eval rows repeat an earlier one" in " ".join(said.split())


def test_a_mix_and_an_allowed_overlap_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, numbers in (("a", range(10)), ("b", range(10, 15)), ("c", range(9, 12))):
        rows = [json.dumps({"text": f"Row {number} of them."}) for number in numbers]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    train = "{path: a.jsonl, format: text}, {path: b.jsonl, format: text, weight: 2}"
    path = with_data(tmp_path, train, "{path: c.jsonl, format: text}")
    assert run(["study", "check", str(path)]) == 2
    assert "allow_overlap: true" in " ".join(capsys.readouterr().err.split())
    path.write_text(path.read_text().replace("  max_length:", "  allow_overlap: true\n  max_length:"))
    assert run(["study", "check", str(path)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "shares of the rows in an epoch: 50.0% from a.jsonl, 50.0% from b.jsonl" in said
    assert "3 of 3 eval rows are train rows too, word for word" in said


def test_a_round_from_a_recipe_checks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, rows = str(QUICKSTART / "base"), str(QUICKSTART / "data" / "train.jsonl")
    arguments = ["study", "new", str(tmp_path / "mine"), "--model", base, "--data", rows]
    assert run([*arguments, "--template", "alpaca"]) == 2
    assert "expects alpaca-qlora" in capsys.readouterr().err
    assert run([*arguments, "--template", "alpaca-qlora"]) == 0
    path = tmp_path / "mine" / "round1.yaml"
    spec = load_round(path).spec
    assert (spec.model.quantization, spec.max_train_steps) == ("nf4", 60)
    assert run(["study", "check", str(path)]) == 0
