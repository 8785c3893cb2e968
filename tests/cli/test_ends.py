"""A base that is made to stop elsewhere than answers are trained to end."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.studies import QUICKSTART, write_round
from tuner.cli import run

pytestmark = pytest.mark.slow

TRAINED, OTHER = 2, 0
"""The tokenizer's EOS, and the one that the base's files are changed to name."""
LIMIT = 60
ASKED = [{"role": "user", "content": "In which town is Petra?"}]


def base_that_stops_at(directory: Path, *ends: int) -> Path:
    shutil.copytree(QUICKSTART / "base", directory)
    for name in ("config.json", "generation_config.json"):
        written = json.loads((directory / name).read_text())
        (directory / name).write_text(json.dumps({**written, "eos_token_id": list(ends)}))
    return directory


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("study")
    base = base_that_stops_at(directory / "base", OTHER)
    path = write_round(directory, trials=1, steps=30, learning_rate="3e-3", decay_steps=10)
    path.write_text(path.read_text().replace(str(QUICKSTART / "base"), str(base)))
    assert run(["-C", str(directory), "study", "run", "round1.yaml"]) == 0
    return directory


@pytest.fixture(autouse=True)
def _in_the_study(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(study)


def answered(model: Any, tokenizer: Any) -> list[int]:
    """By transformers, with the limit alone as argument."""
    ids = tokenizer.apply_chat_template(
        ASKED, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    made = model.generate(**ids, max_new_tokens=LIMIT, do_sample=False)
    said: list[int] = made[0, ids["input_ids"].shape[1] :].tolist()
    return said


def test_the_merged_model_stops_where_it_was_trained_to(study: Path) -> None:
    assert run(["trial", "export", "best", "--to", "merged", "--merge", "--dtype", "float32"]) == 0
    model, tokenizer = (kind.from_pretrained("merged") for kind in (AutoModelForCausalLM, AutoTokenizer))
    assert model.generation_config.eos_token_id == [TRAINED, OTHER]
    said = answered(model, tokenizer)
    assert said.index(TRAINED) == len(said) - 1 < LIMIT - 1
    model.generation_config.eos_token_id = [OTHER]
    assert len(answered(model, tokenizer)) > len(said)


def test_the_adapter_stops_with_what_its_card_says(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["trial", "export", "best", "--to", "adapter"]) == 0
    assert f"eos_token_id = [{TRAINED}, {OTHER}]" in capsys.readouterr().err
    card = Path("adapter", "README.md").read_text()
    [code] = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    [line] = [line for line in code.splitlines() if "eos_token_id" in line]
    said: dict[str, list[int]] = {}
    for name, text in (("with", code), ("without", code.replace(line, ""))):
        made: dict[str, Any] = {}
        exec(text, made)
        said[name] = answered(made["model"], made["tokenizer"])
    assert said["with"].index(TRAINED) == len(said["with"]) - 1 < LIMIT - 1
    assert len(said["without"]) > len(said["with"])


def test_check_warns(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["study", "check", "round1.yaml", "--json"]) == 0
    [said] = [remark for remark in json.loads(capsys.readouterr().out)["remarks"] if "EOS" in remark]
    assert "the tokenizer's EOS, '</s>' (2), and the base's generation_config stops at '<pad>' (0)" in said


@pytest.mark.parametrize("ends", [(TRAINED,), (OTHER, TRAINED)])
def test_a_base_that_stops_there_is_left_alone(
    tmp_path: Path, ends: tuple[int, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    base = base_that_stops_at(tmp_path / "base", *ends)
    path = write_round(tmp_path, trials=1, steps=6)
    path.write_text(path.read_text().replace(str(QUICKSTART / "base"), str(base)))
    assert run(["study", "check", str(path), "--json"]) == 0
    assert "EOS" not in capsys.readouterr().out
