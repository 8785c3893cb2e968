"""A small study trained for real: its decay branches, and the score on `data.test` that is taken once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.studies import QUICKSTART, write_round
from tests.training.driving import curve, run_loop
from tuner.api.generate import score_at_the_end
from tuner.api.run import prepared_quietly, unsaid
from tuner.cli import run
from tuner.config import load_round
from tuner.playbook.comparison_runs import branch_hyperparameters
from tuner.records import Assignment, RoundRecord, Trial
from tuner.store import open_store
from tuner.study.folder import open_folder
from tuner.study.plan import RoundPlan
from tuner.training.startup import load_worker_state

NUM_ROWS = 8


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight steps, decay branches that end at 4 and 6, and the evaluation rows as test rows, too."""
    directory = tmp_path_factory.mktemp("study")
    path = write_round(
        directory, trials=2, learning_rate="[0.005, 0.008]", lora_r=2, sampler="grid", dropout=0.1
    )
    rows = (QUICKSTART / "data" / "eval.jsonl").read_text().splitlines(keepends=True)[:NUM_ROWS]
    (directory / "held-out.jsonl").write_text("".join(rows))
    text = path.read_text().replace(f"{QUICKSTART}/data/eval.jsonl", "held-out.jsonl")
    test = "  test: [{path: held-out.jsonl, format: alpaca}]\n  allow_overlap: true\n"
    text = text.replace("  max_length: 64\n", f"  max_length: 64\n{test}")
    path.write_text(text + "run: {production_steps: 8, decay_branches: true}\n")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(directory)
        assert run(["study", "auto", "round1.yaml"]) == 0
    return directory


def facts(study: Path) -> tuple[RoundRecord, tuple[Trial, ...]]:
    store = open_store(f"sqlite:///{study}/tuner.db", study="tiny")
    try:
        return store.rounds()[0], store.trials("round1")
    finally:
        store.close()


def shown(capsys: pytest.CaptureFixture[str], study: Path, *arguments: str) -> Any:
    capsys.readouterr()
    assert run(["-C", str(study), "trial", "show", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_branches_equal_fresh_runs_of_their_horizon(study: Path, tmp_path: Path) -> None:
    """Digit for digit: alone in its worker, on a CPU, in float32, dropout included."""
    record, trials = facts(study)
    assert [(b.trial, b.max_train_steps, b.state) for b in record.branches] == [
        (0, horizon, "complete") for horizon in (4, 6)
    ], "of the one trial that beat the base model by more than its noise"
    plan = RoundPlan(load_round(study / "round1.yaml"))
    state, _ = load_worker_state(plan.absolute, cache=plan.cache, slots=1)
    for branch in record.branches:
        fresh = Assignment(
            round="fresh",
            trial=0,
            attempt=1,
            hyperparameters=branch_hyperparameters(branch, trials[branch.trial].hyperparameters, 8),
            max_train_steps=branch.max_train_steps,
            evaluate_every=2,
            directory=str(tmp_path / f"{branch.max_train_steps}"),
        )
        assert curve(run_loop(state, [fresh]))[-1] == branch.evaluation
        assert branch.executed_steps == branch.max_train_steps - branch.from_step < branch.max_train_steps


def test_a_study_that_comes_to_its_end_scores_its_best_trial(
    study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the same rows the score is the best evaluation, to the last digit."""
    best = shown(capsys, study)
    assert best["test"] == {
        "loss": best["best_eval_loss"],
        "standard_error": best["test"]["standard_error"],
        "step": best["best_step"],
        "examples": NUM_ROWS,
        "tokens": best["test"]["tokens"],
        "scored_before": [],
    }
    (at_best,) = [e for e in best["evaluations"] if e["step"] == best["best_step"]]
    assert 0 < at_best["token_accuracy"] < 1
    assert shown(capsys, study, str(1 - best["number"]))["test"] is None


def test_rows_that_were_looked_at_are_not_looked_at_again_by_themselves(
    study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    best = shown(capsys, study)["number"]
    remark = score_at_the_end(
        open_folder(study), facts(study)[1][1 - best], prepare=prepared_quietly, tell=unsaid
    )
    assert remark is not None
    assert f"already scored for round1/{best}" in remark
    assert facts(study)[1][1 - best].final_score is None


def test_a_score_is_taken_once_and_a_second_trial_is_told_that_it_is_not_the_first(
    study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    best = shown(capsys, study)
    before = facts(study)[1][best["number"]].final_score
    assert shown(capsys, study, "--test")["test"] == best["test"]
    assert facts(study)[1][best["number"]].final_score == before
    other = str(1 - best["number"])
    assert shown(capsys, study, other, "--test")["test"]["scored_before"] == [f"round1/{best['number']}"]
    assert run(["-C", str(study), "trial", "show", other]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"no longer unbiased: round1/{best['number']} had been scored" in said
    assert run(["-C", str(study), "study", "report"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert (
        f"round1/{best['number']}: On data.test ({NUM_ROWS} rows, not used for any choice), its loss is"
        in said
    )
