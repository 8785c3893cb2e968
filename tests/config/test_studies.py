"""The round files of the studies that no other test runs."""

from __future__ import annotations

import runpy
import shutil
from pathlib import Path

import pytest

from tests.studies import trials_of, tuner
from tuner.config import load_round, new_round, read_round

STUDIES = Path(__file__).parents[2] / "studies"
LLAMA_2 = STUDIES / "alpaca-llama2"


def test_alpaca_llama2_is_the_recipe() -> None:
    written = load_round(LLAMA_2 / "round1.yaml").spec
    text = new_round(
        study="alpaca-llama2",
        model="meta-llama/Llama-2-7b-hf",
        data="tatsu-lab/alpaca",
        train_rows=52_002,
        eval_fraction=0.02,
        recipe="alpaca-qlora",
    )
    recipe = read_round(text, Path("round1.yaml")).spec
    assert written == recipe.model_copy(update={"run": written.run})
    assert recipe.run.production_steps == 19_000
    assert written.run.production_steps == 2_000


def test_its_second_round_goes_on_from_the_first() -> None:
    first, second = (load_round(LLAMA_2 / f"round{number}.yaml").spec for number in (1, 2))
    assert (second.study, second.round, second.model, second.data) == (
        first.study,
        "round2",
        first.model,
        first.data,
    )
    assert second.run == first.run
    assert second.max_train_steps == 180
    assert [entry["continues"].split("/")[0] for entry in second.search.enqueue] == ["round1"] * 3


def test_the_rows_of_chat_are_those_that_its_script_makes(tmp_path: Path) -> None:
    for name in ("chat", "quickstart"):
        shutil.copytree(STUDIES / name, tmp_path / name)
    shutil.rmtree(tmp_path / "chat" / "rows")
    runpy.run_path(str(tmp_path / "chat" / "prepare.py"), run_name="__main__")
    made = {path.name: path.read_text() for path in (tmp_path / "chat" / "rows").iterdir()}
    assert made == {path.name: path.read_text() for path in (STUDIES / "chat" / "rows").iterdir()}
    assert len(made) == 2


@pytest.mark.acceptance
@pytest.mark.parametrize("name", ["chat", "cluster"])
def test_it_runs_on_a_cpu(name: str, tmp_path: Path) -> None:
    """A minute: `pytest -m acceptance tests/config/test_studies.py`."""
    if name == "cluster":
        pytest.importorskip("ray", reason="the extra ray is not installed")
    for each in (name, "quickstart"):
        shutil.copytree(STUDIES / each, tmp_path / each)
    done = tuner("study", "run", "round1.yaml", directory=tmp_path / name)
    assert done.returncode == 0, done.stderr
    assert [trial["state"] for trial in trials_of(tmp_path / name)] == ["complete"] * 3
