"""`--set` of `study new` and `study promote`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.studies import QUICKSTART
from tests.study.simulation import simulate
from tuner.cli import run
from tuner.config import load_round
from tuner.records import Choices, Fixed


def test_promote_writes_what_is_set_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    simulate(tmp_path, trials=4)
    monkeypatch.chdir(tmp_path)
    typed = ["study", "promote", "--to", "round2", "--max-train-steps", "16", "--json"]
    settings = ["--set", "hyperparameters.lora_dropout=0.05", "--set", "evaluation.batch_size=4"]
    assert run([*typed, *settings]) == 0
    document = json.loads(capsys.readouterr().out)
    changed = document["hyperparameters"]["lora_dropout"]
    assert (changed["to"], changed["reason"]) == (0.05, "set by --set")
    assert "evaluation.batch_size: set by --set to 4" in document["notes"]
    file = load_round(tmp_path / "round2.yaml")
    assert file.spec.space()["lora_dropout"] == Fixed(0.05)
    assert "# set by --set" in file.text
    assert run([*typed, *settings]) == 0, "again, and nothing changes"
    assert json.loads(capsys.readouterr().out) == document
    assert run([*typed, "--set", "max_train_steps=20"]) == 2
    assert "use --max-train-steps" in capsys.readouterr().err


@pytest.mark.slow
def test_new_writes_what_is_set_or_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    typed = ["study", "new", str(tmp_path / "made"), "--model", str(QUICKSTART / "base")]
    typed += ["--data", str(QUICKSTART / "data" / "train.jsonl")]
    assert run([*typed, "--set", "hyperparameters.lora_rank=4,8"]) == 2
    assert "--set hyperparameters.lora_rank=4,8: " in capsys.readouterr().err
    assert not (tmp_path / "made").exists()
    assert run([*typed, "--set", "hyperparameters.lora_r=4,8", "--set", "data.max_length=64"]) == 0
    spec = load_round(tmp_path / "made" / "round1.yaml").spec
    assert (spec.space()["lora_r"], spec.data.max_length) == (Choices((4, 8)), 64)
