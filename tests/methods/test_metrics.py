"""Metrics as objectives, built in and from an installed package: trained rounds and dry runs."""

from __future__ import annotations

import json
import sqlite3
import sys
from pathlib import Path

import numpy as np
import optuna
import pytest

import tuner
from tests.contracts.metric import MetricContract
from tests.studies import installed, write_round
from tests.studies import tuner as command
from tuner.cli import run
from tuner.config import load_round
from tuner.errors import InputError, MetricError, RoundFileError
from tuner.methods.metrics import ExampleScores, Metric, metric, values
from tuner.methods.registry import BUILT_IN
from tuner.records import Direction

PLUG_IN = '''
"""The loss of the worst quarter of the evaluation examples."""

import math

import numpy as np

from tuner.methods.metrics import Direction, Metric


def worst_quarter(examples):
    losses = np.sort(examples.nll / examples.tokens)
    return float(losses[-max(1, len(losses) // 4) :].mean())


WORST = Metric(Direction.MINIMIZE, "Mean loss of the worst quarter.", compute=worst_quarter, bounds=(0, None))
UNFIT = Metric(Direction.MAXIMIZE, "Never a number.", compute=lambda examples: "much")
BEYOND = Metric(Direction.MAXIMIZE, "Out of its bounds.", compute=lambda examples: 2.0, bounds=(0, 1))
UNDEFINED = Metric(Direction.MAXIMIZE, "Never a number.", compute=lambda examples: math.nan)
BEST_OF_ALL = Metric(Direction.MAXIMIZE, "Better than all.", compute=lambda examples: math.inf)
HOPELESS = Metric(Direction.MINIMIZE, "Worse than all.", compute=lambda examples: math.inf)
LATER = Metric(Direction.MAXIMIZE, "One for each trial.", per="trial")
'''


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package that registers a metric."""
    site = installed(tmp_path / "site", "worst", metrics="worst_quarter = worst_loss:WORST")
    (site / "worst_loss.py").write_text(PLUG_IN)
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("PYTHONPATH", f"{site}:{Path.cwd()}")
    return site


class TestEvalLoss(MetricContract):
    name = "eval_loss"


class TestTokenAccuracy(MetricContract):
    name = "token_accuracy"


class TestAnswers(MetricContract):
    name = "answers"


class TestOneOfAPackage(MetricContract):
    name = "worst_loss:WORST"

    @pytest.fixture(autouse=True)
    def _installed(self, package: Path) -> None:
        """The package is on the path."""


def test_every_built_in_metric_runs_the_contract() -> None:
    assert {TestEvalLoss.name, TestTokenAccuracy.name, TestAnswers.name} == set(BUILT_IN["metric"])


def test_a_metric_is_per_evaluation_if_it_computes_something() -> None:
    with pytest.raises(ValueError, match="compute"):
        Metric(Direction.MAXIMIZE, "Nothing.")
    with pytest.raises(ValueError, match="compute"):
        Metric(Direction.MAXIMIZE, "Both.", compute=lambda examples: 1.0, per="trial")


def test_differences_are_relative_to_what_was_gained_unless_a_metric_is_a_cost_without_a_bound() -> None:
    def is_relative(direction: Direction, high: float | None) -> bool:
        made = Metric(direction, "M.", compute=lambda examples: 1.0, bounds=(0.0, high))
        return made.objective("m").is_relative_to_gained

    assert not is_relative(Direction.MINIMIZE, None)
    assert is_relative(Direction.MINIMIZE, 1.0)
    assert is_relative(Direction.MAXIMIZE, None)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("worst_loss:UNFIT", "it returned 'much', not a number"),
        ("worst_loss:BEYOND", r"it returned 2.0, outside its bounds \(0, 1\)"),
        ("worst_loss:UNDEFINED", "it returned nan though every loss is finite"),
        ("worst_loss:BEST_OF_ALL", "it returned inf though every loss is finite"),
    ],
)
def test_a_metric_at_fault_is_named_with_what_it_did(package: Path, name: str, message: str) -> None:
    scores = ExampleScores(np.array([1.0]), np.array([1]), np.array([1]))
    with pytest.raises(MetricError, match=f"objective.metric: {name}: {message}"):
        values(name, metric(name), scores)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module:NAME", "metric no_such_module:NAME: cannot be imported"),
        ("pathlib:Path", "metric pathlib:Path: expects a tuner.methods.metrics.Metric, got a type"),
        ("worst_loss:LATER", "evaluation.answers.metric"),
    ],
)
def test_a_name_that_leads_to_no_metric_is_bad_input_and_leaves_nothing(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    name: str, message: str,
) -> None:  # fmt: skip
    with pytest.raises(InputError, match=message):
        metric(name)
    study = tmp_path / "study"
    write_round(study, run=f"objective: {{metric: '{name}'}}")
    monkeypatch.chdir(study)
    assert run(["study", "run", "round1.yaml"]) == 2
    assert name in capsys.readouterr().err
    assert sorted(p.name for p in study.iterdir()) == ["round1.yaml"]


def test_a_round_whose_metric_is_infinite_everywhere_ends_and_is_read(package: Path, tmp_path: Path) -> None:
    """As a perplexity overflows where everything diverges: no trial has a value, and none stops the round."""
    write_round(tmp_path / "study", run="objective: {metric: 'worst_loss:HOPELESS'}")
    found = tuner.Study(tmp_path / "study").run("round1.yaml", engine="simulated", progress=False)
    assert {trial.best_value for trial in found.trials} == {None}
    assert found.advice.diagnosis == "no_learning"
    assert run(["-C", str(tmp_path / "study" / "dry-run"), "study", "report"]) == 0


ANSWERS = ", answers: {metric: exact_match}"


@pytest.mark.parametrize(
    ("objective", "evaluation", "line", "key", "message"),
    [
        (
            "objective: {metric: accuracy}", "", 25, "objective.metric",
            "expects one of eval_loss, token_accuracy, answers, or package.module:Name, got 'accuracy'",
        ),
        (
            "objective: {metric: token_accuracy, direction: minimize}", "", 25, "objective.direction",
            "is minimize, but higher values of token_accuracy are better; write maximize, or remove this",
        ),
        ("objective: {direction: maximize}", "", 25, "objective.direction", "lower values of eval_loss"),
        ("objective: {direction: up}", "", 25, "objective.direction", "expects minimize or maximize, got"),
        ("objective: {metric: answers}", "", 25, "objective.metric", "requires evaluation.answers; add"),
        (
            "objective: {metric: eval_loss}", ", answers: {objective: true}", 23,
            "evaluation.answers.objective", "is true, but objective.metric is eval_loss",
        ),
        (
            "objective: {metric: answers}", ", answers: {objective: false}", 23,
            "evaluation.answers.objective", "is false, but objective.metric is answers",
        ),
        ("objective: {name: answers}", "", 25, "objective.name", "unknown"),
    ],
)  # fmt: skip
def test_a_wrong_objective_is_refused_with_its_line(
    tmp_path: Path, objective: str, evaluation: str, line: int, key: str, message: str
) -> None:
    path = write_round(tmp_path, evaluation=evaluation, run=objective)
    with pytest.raises(RoundFileError, match=message) as refused:
        load_round(path)
    (mistake,) = refused.value.mistakes
    assert (mistake.line, mistake.key) == (line, key)


def test_the_former_spelling_means_the_same_and_says_how_it_is_written_now(tmp_path: Path) -> None:
    former = load_round(write_round(tmp_path / "a", evaluation=", answers: {objective: true}"))
    now = load_round(write_round(tmp_path / "b", evaluation=ANSWERS, run="objective: {metric: answers}"))
    assert former.spec.objective == now.spec.objective
    assert former.spec.evaluation == now.spec.evaluation
    (hint,) = former.hints
    assert hint.startswith("round1.yaml:23: ")
    assert "`objective: {metric: answers}`" in hint
    assert now.hints == ()


def directions(study: Path) -> list[str]:
    storage = f"sqlite:///{study / 'tuner.db'}"
    names = optuna.get_all_study_names(storage)
    return [optuna.load_study(study_name=name, storage=storage).direction.name for name in names]


def test_a_dry_run_of_two_rounds_by_token_accuracy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_round(
        tmp_path, steps=40, every=4, trials=6, decay_steps=10,
        learning_rate="{low: 1e-5, high: 1e-3, log: true}",
        run="objective: {metric: token_accuracy}",
    )  # fmt: skip
    tuner.Study(tmp_path).run("round1.yaml", engine="simulated", progress=False)
    study = tuner.Study(tmp_path / "dry-run")
    study.promote("round2")
    assert "objective: {metric: token_accuracy}" in (tmp_path / "dry-run" / "round2.yaml").read_text()
    study.run("round2.yaml", progress=False)
    assert directions(tmp_path / "dry-run") == ["MAXIMIZE", "MAXIMIZE"]

    def document(*arguments: str) -> object:
        monkeypatch.chdir(tmp_path)
        capsys.readouterr()
        assert run(["-C", "dry-run", *arguments, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    trials = document("trial", "list")
    assert isinstance(trials, list)
    assert len(trials) > 8
    for trial in trials:
        accuracies = {e["step"]: e["metrics"]["token_accuracy"] for e in trial["evaluations"]}
        losses = {e["step"]: e["eval_loss"] for e in trial["evaluations"]}
        assert (trial["metric"], trial["direction"]) == ("token_accuracy", "maximize")
        assert trial["best_value"] == accuracies[trial["best_step"]] == max(accuracies.values())
        assert trial["best_eval_loss"] == losses[trial["best_step"]]
    status = document("study", "status")
    assert isinstance(status, dict)
    for name, shown in zip(("round1", "round2"), status["rounds"], strict=True):
        best = max((t for t in trials if t["round"] == name), key=lambda t: t["best_value"])
        assert shown["best"]["trial"] == best["number"]
        assert shown["best"]["best_value"] == best["best_value"]
        assert shown["best"]["eval_loss"] == best["best_eval_loss"]
    assert any(trial["continues"] for trial in trials)
    monkeypatch.setenv("COLUMNS", "200")
    assert run(["study", "report"]) == 0
    said = capsys.readouterr().out
    assert "raised token_accuracy by" in " ".join(said.split())


def test_a_trial_does_not_go_on_from_one_that_another_metric_chose_the_best_step_of(tmp_path: Path) -> None:
    write_round(tmp_path, steps=40, every=4, trials=3, decay_steps=10, learning_rate="[1e-4, 2e-4, 3e-4]")
    tuner.Study(tmp_path).run("round1.yaml", engine="simulated", progress=False)
    study = tuner.Study(tmp_path / "dry-run")
    study.promote("round2", max_train_steps=80)
    path = tmp_path / "dry-run" / "round2.yaml"
    path.write_text(path.read_text() + "objective: {metric: token_accuracy}\n")
    study.run("round2.yaml", progress=False)
    reasons = [trial.reason for trial in study.round("round2").trials]
    assert "its best adapter was chosen by eval_loss, and this round chooses by token_accuracy" in str(
        reasons
    )
    assert not any(trial.continues for trial in study.round("round2").trials)
    found = study.round("round2").advice.findings
    assert "objective_changed" in [finding.rule for finding in found]


def test_a_round_is_trained_by_a_metric_of_an_installed_package(package: Path, tmp_path: Path) -> None:
    """The metric chooses each best step."""
    study = tmp_path / "study"
    write_round(study, trials=2, run="objective: {metric: worst_quarter}")
    tuner.Study(study).run("round1.yaml", progress=False)
    assert directions(study) == ["MINIMIZE"]
    trials = [t for t in tuner.Study(study).round("round1").trials if t.state == "complete"]
    assert trials
    for trial in trials:
        for made in trial.evaluations:
            losses = sorted(n / t for n, t in zip(made.example_nll, made.example_tokens, strict=True))
            worst = losses[-max(1, len(losses) // 4) :]
            assert made.value == pytest.approx(sum(worst) / len(worst))
        lowest = min(trial.evaluations, key=lambda e: (e.value, e.step))
        assert trial.best_step == lowest.step
    with sqlite3.connect(study / "tuner.db") as database:
        (recorded,) = database.execute("select spec from tuner_rounds").fetchone()
    assert json.loads(recorded)["objective"] == {"metric": "worst_quarter", "direction": "minimize"}


def test_what_a_metric_of_a_module_came_to_is_read_without_it(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    study = tmp_path / "study"
    write_round(study, trials=3, run="objective: {metric: 'worst_loss:WORST'}")
    tuner.Study(study).run("round1.yaml", engine="simulated", progress=False)
    monkeypatch.setitem(sys.modules, "worst_loss", None)  # as where it is not installed
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(study / "dry-run")
    for verb in (["study", "status"], ["trial", "list"], ["trial", "show", "best"], ["study", "report"]):
        assert run(verb) == 0
        assert "worst_loss:WORST" in capsys.readouterr().out


def test_a_metric_that_fails_while_a_round_runs_stops_it_and_the_same_command_goes_on(
    package: Path, tmp_path: Path
) -> None:
    module = package / "worst_loss.py"
    falling = PLUG_IN.replace("    losses =", "    assert len(examples.nll) > 99, 'too few'\n    losses =")
    study = tmp_path / "study"
    write_round(study, trials=1, run="objective: {metric: worst_quarter}")
    module.write_text(falling)
    stopped = command("study", "run", "round1.yaml", directory=study)
    assert stopped.returncode == 2, stopped.stderr
    assert "objective.metric: worst_quarter: it raised AssertionError: too few" in stopped.stderr
    module.write_text(PLUG_IN)
    assert command("study", "run", "round1.yaml", directory=study).returncode == 0
