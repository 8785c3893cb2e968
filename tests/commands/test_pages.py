"""The how-to pages of commands: their files and snippets, and the files that `study new` writes."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest
import yaml

from tests.commands.test_rounds import tuner
from tuner.commands.check import mistakes
from tuner.config import read_round
from tuner.methods.registry import BUILT_IN

PAGES = Path(__file__).parents[2] / "docs" / "how-to"
NAMES = (
    "run-your-own-command", "train-with-trl", "train-with-axolotl", "train-with-llama-factory",
    "train-with-unsloth-scripts", "train-on-several-gpus",
)  # fmt: skip
DPO = "model_name_or_path: base\ndataset_name: rows\nuse_peft: true\n"


def blocks(page: str, language: str) -> list[str]:
    return re.findall(
        rf"^```{language}\n(.*?)^```", (PAGES / f"{page}.md").read_text(), re.MULTILINE | re.DOTALL
    )


@pytest.mark.parametrize("page", NAMES)
def test_the_files_of_a_page_can_be_used_as_they_are(tmp_path: Path, page: str) -> None:
    (tmp_path / "dpo.yaml").write_text(DPO)
    (tmp_path / "train.py").touch()
    found = blocks(page, "yaml")
    for text in found:
        if name := re.match(r"# (\w+\.yaml):", text):
            (tmp_path / name[1]).write_text(text)
    rounds = [text for text in found if text.startswith("study:")]
    assert len(rounds) == 1
    spec = read_round(rounds[0], tmp_path / "round1.yaml").spec.absolute(tmp_path)
    said = [f"{name}: {message}" for name, message in mistakes(spec, tmp_path)]
    assert [each for each in said if "cannot be found; install it" not in each] == []
    for code in blocks(page, "python"):
        ast.parse(code)


def test_the_snippet_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = blocks("run-your-own-command", "python")
    exec(code, {})  # outside a trial it does nothing
    monkeypatch.setenv("TUNER_OUTPUT_DIR", "/trial/output")
    monkeypatch.setenv("TUNER_METRICS", str(tmp_path / "metrics.jsonl"))
    exec(code, {})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[0] == {
        "step": 5, "eval_loss": 1.2, "accuracy": 0.6, "train_loss": 1.3, "learning_rate": 0.01,
    }  # fmt: skip
    assert lines[1]["checkpoint"] == "/trial/output/step-5"


@pytest.mark.parametrize("tool", BUILT_IN["tool"])
def test_a_first_round_of_every_tool(tmp_path: Path, tool: str) -> None:
    config = {
        "trl": yaml.safe_load(DPO),
        "axolotl": {"base_model": "base", "val_set_size": 0.1, "learning_rate": 1e-4},
        "llamafactory": {"model_name_or_path": "base", "val_size": 0.1},
    }.get(tool, {"any": 1})
    (tmp_path / "tool.yaml").write_text(yaml.safe_dump(config))
    tuner(tmp_path, "study", "new", "mine", "--command", tool, "--config", "tool.yaml")
    folder = tmp_path / "mine"
    (folder / "train.py").touch()
    path = folder / "round1.yaml"
    spec = read_round(path.read_text(), path).spec
    assert spec.command is not None
    assert spec.command.tool == tool
    said = [f"{name}: {message}" for name, message in mistakes(spec.absolute(folder), folder)]
    assert [each for each in said if "cannot be found; install it" not in each] == []
