"""Names of a round file that lead outside of tuner: by path, and by an installed package's entry point."""

import subprocess
import sys
from pathlib import Path

import pytest

import tuner
from tests.studies import ENVIRONMENT, installed, write_round
from tuner.cli import run
from tuner.config import load_round
from tuner.errors import InputError, RoundFileError
from tuner.methods import registry

PLUG_INS = '''
import json
from pathlib import Path

import optuna


class Ladder(optuna.samplers.BaseSampler):
    """Each proposal a rung below the best one told so far."""

    def __init__(self, seed, factor=0.5):
        self.factor = factor

    def infer_relative_search_space(self, study, trial):
        return {}

    def sample_relative(self, study, trial, search_space):
        return {}

    def sample_independent(self, study, trial, name, distribution):
        told = [t for t in study.get_trials() if t.value is not None]
        if name != "learning_rate":
            return distribution.choices[len(told) % len(distribution.choices)]
        if not told:
            return distribution.high
        best = min(told, key=lambda t: t.value)
        return max(distribution.low, self.factor ** len(told) * best.params[name])


class Diary:
    """Writes what it is told into a file beside the study's checkpoints."""

    def __init__(self, followed):
        self.path = Path(followed.checkpoints) / "diary.jsonl"

    def begin(self, trial):
        return frozenset()

    def point(self, trial, evaluation):
        with self.path.open("a") as lines:
            lines.write(json.dumps([trial.number, evaluation.step]) + "\\n")

    def end(self, trial):
        pass

    def close(self):
        pass
'''


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package that registers a sampler and a tracker."""
    site = installed(
        tmp_path / "site", "plug_ins", samplers="ladder = plug_ins:Ladder", trackers="diary = plug_ins:Diary"
    )
    (site / "plug_ins.py").write_text(PLUG_INS)
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("PYTHONPATH", str(site))
    return site


def test_names_are_those_built_in_and_those_registered(package: Path) -> None:
    assert registry.names("sampler") == (*registry.BUILT_IN["sampler"], "ladder")
    assert registry.is_known("tracker", "diary")
    assert not registry.is_known("tracker", "ladder")
    assert "plug_ins" not in sys.modules, "names are read without importing what they lead to"
    assert registry.load("sampler", "ladder").__name__ == "Ladder"
    assert registry.load("sampler", "plug_ins:Ladder") is registry.load("sampler", "ladder")


@pytest.mark.parametrize("path", ["no_such_module:Name", "optuna.samplers:NoSuchSampler"])
def test_what_cannot_be_imported_is_named_with_what_to_do(path: str) -> None:
    with pytest.raises(InputError, match=f"sampler {path}: .* cannot be imported: .*PYTHONPATH"):
        registry.load("sampler", path)


def test_a_round_uses_what_an_installed_package_brings(package: Path, tmp_path: Path) -> None:
    """In processes of their own, as a user would; twice the same facts."""
    rates = []
    for name in ("one", "two"):
        study = tmp_path / name
        path = write_round(study, trials=3, sampler="ladder", run="run: {report_to: [diary], slots: 1}")
        text = path.read_text().replace(
            "  sampler: ladder\n", "  sampler: ladder\n  sampler_arguments: {factor: 0.25}\n"
        )
        path.write_text(text)
        command = [sys.executable, "-m", "tuner.cli", "study", "run", "round1.yaml"]
        environment = {**ENVIRONMENT, "PYTHONPATH": f"{package}:{Path.cwd()}", "PATH": "/usr/bin:/bin"}
        done = subprocess.run(
            command, cwd=study, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        trials = tuner.Study(study).round("round1").trials
        rates.append([trial.hyperparameters["learning_rate"] for trial in trials])
        told = (study / "runs" / "diary.jsonl").read_text().splitlines()
        assert len(told) == sum(len(trial.evaluations) for trial in trials)
    assert rates[0] == rates[1]
    assert rates[0][0] == 0.1
    assert rates[0][1] == pytest.approx(0.025)


@pytest.mark.parametrize("sampler", ["optuna.samplers:TPESampler", "optuna.samplers:QMCSampler"])
def test_a_dry_run_with_a_sampler_of_optunas_goes_on_as_it_would_have(tmp_path: Path, sampler: str) -> None:
    def proposed(name: str, *lengths: int) -> list[object]:
        for trials in lengths:
            write_round(tmp_path / name, trials=trials, sampler=sampler)
            tuner.Study(tmp_path / name).run("round1.yaml", engine="simulated", slots=1, progress=False)
        found = tuner.Study(tmp_path / name / "dry-run").round("round1")
        return [trial.hyperparameters["learning_rate"] for trial in found.trials]

    whole = proposed("whole", 8)
    assert len(set(whole)) == 8
    assert proposed("in pieces", 3, 8) == whole


def test_a_promotion_keeps_a_sampler_of_the_users(tmp_path: Path) -> None:
    write_round(tmp_path, trials=4, sampler="optuna.samplers:TPESampler")
    study = tuner.Study(tmp_path)
    study.run("round1.yaml", engine="simulated", progress=False)
    written = tuner.Study(tmp_path / "dry-run").promote("round2", max_train_steps=24)
    assert load_round(written.path).spec.search.sampler == "optuna.samplers:TPESampler"


@pytest.mark.parametrize(
    ("sampler", "more", "message"),
    [
        ("qmc", "", "search.sampler: expects one of quasi-random, .* or package.module:Name, got 'qmc'"),
        (
            "tpe",
            "  sampler_arguments: {seed: 1}\n",
            "search.sampler_arguments: applies only to a sampler",
        ),
    ],
)
def test_a_wrong_name_is_refused_where_it_stands(
    tmp_path: Path, sampler: str, more: str, message: str
) -> None:
    path = write_round(tmp_path, sampler=sampler)
    path.write_text(path.read_text().replace(f"  sampler: {sampler}\n", f"  sampler: {sampler}\n{more}"))
    with pytest.raises(RoundFileError, match=message):
        load_round(path)


@pytest.mark.parametrize(
    ("sampler", "arguments", "message"),
    [
        ("no_such_module:Name", "{}", "cannot be imported"),
        ("optuna.samplers:TPESampler", "{no_such: 1}", "cannot be created with"),
        ("pathlib:Path", "{}", "expects an Optuna sampler, got"),
    ],
)
def test_a_sampler_that_cannot_be_made_is_bad_input_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    sampler: str, arguments: str, message: str,
) -> None:  # fmt: skip
    path = write_round(tmp_path, sampler=sampler)
    more = f"  sampler: {sampler}\n  sampler_arguments: {arguments}\n"
    path.write_text(path.read_text().replace(f"  sampler: {sampler}\n", more))
    monkeypatch.chdir(tmp_path)
    assert run(["study", "run", "round1.yaml"]) == 2
    assert message in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["round1.yaml"]
