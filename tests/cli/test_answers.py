"""A small study whose trials are ranked by a function of the user's on their answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import optuna
import pytest

from tests.studies import Done, trials_of, tuner, write_round
from tuner.study.sampling import optuna_storage

METRIC = """
def worth(answer, reference):
    print("not a document")
    assert reference, "rows have completions"
    return len(answer) / 10
"""
ANSWERS = "answers: {metric: metrics.py:worth, max_examples: 5, max_new_tokens: 6, objective: true}"
LINE = 23
"""Of the key in the round file."""


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two trials of four steps; the better loss is not the longer answer."""
    directory = tmp_path_factory.mktemp("study")
    write_round(
        directory,
        steps=4,
        decay_steps=1,
        trials=2,
        learning_rate="[0.0001, 0.02]",
        lora_r=2,
        sampler="grid",
        evaluation=f", {ANSWERS}",
    )
    (directory / "metrics.py").write_text(METRIC)
    done = tuner("study", "run", "round1.yaml", directory=directory)
    assert done.returncode == 0, done.stderr
    return directory


def check(directory: Path, *options: str) -> Done:
    return tuner("study", "check", "round1.yaml", *options, directory=directory)


def shown(directory: Path, *arguments: str) -> Any:
    done = tuner(*arguments, "--json", directory=directory)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_trials_are_ranked_by_their_answers_wherever_they_are_shown(study: Path) -> None:
    scores = {trial["number"]: trial["answers"] for trial in trials_of(study)}
    first, second = sorted(scores, key=lambda number: -scores[number]["score"])
    assert scores[first]["score"] > scores[second]["score"]
    assert {**scores[first], "score": 0, "standard_error": 0, "step": 0} == {
        **{"score": 0, "standard_error": 0, "step": 0},
        **{"metric": "metrics.py:worth", "examples": 5, "is_objective": True},
    }
    best = shown(study, "trial", "show", "best")
    assert (best["number"], best["answers"]) == (first, scores[first])
    assert best["answers"]["step"] == best["best_step"]
    [status] = shown(study, "study", "status")["rounds"]
    assert (status["best"]["trial"], status["best"]["answer_score"]) == (first, scores[first]["score"])
    listed = tuner("trial", "list", directory=study).stdout.splitlines()
    assert "answers" in listed[0]
    assert [line.split()[0] for line in listed[1:3]] == [f"round1/{first}", f"round1/{second}"]
    told = optuna.load_study(study_name="tiny/round1", storage=optuna_storage(f"sqlite:///{study}/tuner.db"))
    assert (told.best_trial.user_attrs["trial"], told.best_value) == (first, scores[first]["score"])
    planned = shown(study, "study", "promote", "--to", "round2", "--max-train-steps", "8")
    assert [entry["trial"] for entry in planned["continues"]] == [f"round1/{first}"], "half of two"


def test_check_says_what_answering_means_and_looks_for_the_metric(study: Path, tmp_path: Path) -> None:
    plan = check(study)
    assert (
        "each complete trial answers 5 evaluation rows with up to 6 tokens; the score by metrics.py:worth "
        in (plan.stdout)
    )
    assert "of their completions are longer than evaluation.answers.max_new_tokens (6)" in plan.stdout
    document = json.loads(check(study, "--json").stdout)
    assert (document["ok"], document["plan"]["unchecked"]) == (True, ["metrics.py:worth"])
    write_round(tmp_path, evaluation=f", {ANSWERS}")
    place = f"round1.yaml:{LINE}: evaluation.answers.metric: metrics.py:worth: "
    for source in (None, METRIC.replace("worth", "values"), METRIC.replace("answer, reference)", "answer)")):
        if source is not None:
            (tmp_path / "metrics.py").write_text(source)
        refused = check(tmp_path)
        assert (refused.returncode, place in refused.stderr) == (2, True), refused.stderr
    (tmp_path / "metrics.py").write_text("raise SystemExit('imported')\n" + METRIC)
    assert check(tmp_path).returncode == 0


@pytest.mark.parametrize("verb", [("check", "--probe"), ("run",)], ids=" ".join)
def test_a_metric_that_raises_is_refused_before_anything_is_recorded(
    tmp_path: Path, verb: tuple[str, ...]
) -> None:
    write_round(tmp_path, evaluation=f", {ANSWERS}")
    (tmp_path / "metrics.py").write_text(METRIC.replace("assert reference", "assert answer"))
    before = sorted(tmp_path.iterdir())
    raising = tuner("study", *verb, "round1.yaml", directory=tmp_path)
    assert raising.returncode == 2, raising.stderr
    assert f"round1.yaml:{LINE}: evaluation.answers.metric: metrics.py:worth, called with " in raising.stderr
    assert "called with answer '' and reference" in raising.stderr
    assert "it raised AssertionError: rows have completions" in raising.stderr
    assert [path for path in sorted(tmp_path.iterdir()) if path.name != "__pycache__"] == before


def test_a_round_ranked_by_answers_has_no_dry_run(study: Path) -> None:
    done = tuner("study", "run", "round1.yaml", "--engine", "simulated", directory=study)
    assert done.returncode == 2
    assert "evaluation.answers.objective: a dry run trains no model" in done.stderr
    assert not (study / "dry-run").exists()
