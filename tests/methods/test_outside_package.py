"""A package outside of tuner brings one of everything, each in one short file, and a round uses them all."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import tuner
from tests.studies import ENVIRONMENT, installed, write_round

LAB = Path(__file__).parent / "lab"
ENTRY_POINTS = {
    "optimizers": "sgd = lab.optimizer:SGD_MOMENTUM",
    "schedules": "power = lab.schedule:POWER",
    "metrics": "worst_quarter = lab.metric:WORST",
    "samplers": "ladder = lab.sampler:Ladder",
    "trackers": "diary = lab.tracker:Diary",
    "engines": "announced = lab.engine:Announced",
    "variants": "scaled = lab.variant:SCALED",
}


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the package and what an installation says of it, on the path."""
    site = installed(tmp_path / "site", "lab", **ENTRY_POINTS)
    shutil.copytree(LAB, site / "lab")
    monkeypatch.syspath_prepend(str(site))
    return site


def test_each_is_one_file_of_at_most_forty_lines() -> None:
    files = sorted(path for path in LAB.glob("*.py") if path.name != "__init__.py")
    assert [path.stem for path in files] == sorted(group.removesuffix("s") for group in ENTRY_POINTS)
    assert all(len(path.read_text().splitlines()) <= 40 for path in files)


@pytest.mark.slow
def test_a_round_uses_all_of_them(site: Path, tmp_path: Path) -> None:
    study = tmp_path / "study"
    path = write_round(
        study, optimizer="[sgd, adamw]", schedule="power", sampler="ladder", trials=4, steps=6, every=3,
        run="run: {report_to: [diary], slots: 1, engine: announced}",
    )  # fmt: skip
    own = "  sgd_momentum: [0.5, 0.9]\n  decay_power: 1.5\n  variant: [lora, scaled]\n  scaled_by: 2.0\n"
    text = path.read_text().replace("search:\n", f"{own}search:\n") + "\nobjective: {metric: worst_quarter}\n"
    path.write_text(text)
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": f"{site}:{Path.cwd()}"}
    command = [sys.executable, "-m", "tuner.cli", "study", "run", "round1.yaml"]
    done = subprocess.run(command, cwd=study, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

    trials = tuner.Study(study).round("round1").trials
    assert len(trials) == 4
    assert {trial.hyperparameters["optimizer"] for trial in trials} == {"sgd", "adamw"}
    for trial in trials:
        is_scaled = trial.hyperparameters["variant"] == "scaled"
        assert ("scaled_by" in trial.hyperparameters) == is_scaled
        written = json.loads((Path(str(trial.adapter)) / "adapter_config.json").read_text())
        alpha = 2.0 * float(trial.hyperparameters["lora_r"]) if is_scaled else 16.0
        assert (written["lora_alpha"], written["init_lora_weights"]) == (
            alpha,
            "gaussian" if is_scaled else True,
        )
        assert ("sgd_momentum" in trial.hyperparameters) == (trial.hyperparameters["optimizer"] == "sgd")
        peak, last = float(trial.hyperparameters["learning_rate"]), trial.evaluations[-1]
        assert last.learning_rate == pytest.approx(peak * (1 / 5) ** 1.5), "by `power`, before the last step"
        assert trial.best_value == min(made.metrics["worst_quarter"] for made in trial.evaluations)
        assert trial.best_value > min(made.eval_loss for made in trial.evaluations)
    rates = [float(trial.hyperparameters["learning_rate"]) for trial in trials]
    assert rates == sorted(rates, reverse=True), "the ladder goes down"
    lines = (study / "runs" / "diary.jsonl").read_text().splitlines()
    assert sorted(map(tuple, map(json.loads, lines))) == [(n, s) for n in range(4) for s in (0, 3, 6)]
    assert (study / "runs" / "round1" / "starts.log").read_text() == "round1\n"
