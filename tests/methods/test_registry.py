"""Names of a round file that lead outside of tuner: by path, and by an installed package's entry point."""

import re
import sys
from pathlib import Path

import pytest

import tuner
from tests.studies import installed, write_round
from tuner.cli import run
from tuner.config import load_round
from tuner.errors import InputError, RoundFileError
from tuner.methods import registry

LAB = Path(__file__).parent / "lab"
LADDER = '''
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
'''

FAULTY = """
import os

import optuna


class Late(optuna.samplers.RandomSampler):
    def infer_relative_search_space(self, study, trial):
        return optuna.search_space.intersection_search_space(study.get_trials(deepcopy=False))

    def sample_relative(self, study, trial, search_space):
        if search_space:
            import late_library
        return {}


class Outside(optuna.samplers.RandomSampler):
    def sample_independent(self, study, trial, name, distribution):
        return 1e6


class Half:
    def __init__(self, followed):
        pass

    def begin(self, trial):
        return frozenset()

    def close(self):
        pass


class Unmade:
    def __init__(self):
        raise KeyError("HOST")


class Later(optuna.samplers.RandomSampler):
    def before_trial(self, study, trial):
        if len(study.get_trials(deepcopy=False)) - 1 == int(os.environ.get("FAILS_AFTER", -1)):
            raise RuntimeError("no quota")
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package that registers a sampler and a tracker."""
    site = installed(
        tmp_path / "site", "plug_ins", samplers="ladder = plug_ins:Ladder", trackers="diary = plug_ins:Diary"
    )
    (site / "plug_ins.py").write_text((LAB / "tracker.py").read_text() + LADDER)
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("PYTHONPATH", f"{site}:{Path.cwd()}")
    return site


def test_names_are_those_built_in_and_those_registered(package: Path) -> None:
    assert registry.names("sampler") == (*registry.BUILT_IN["sampler"], "ladder")
    assert registry.is_known("tracker", "diary")
    assert not registry.is_known("tracker", "ladder")
    assert "plug_ins" not in sys.modules, "names are read without importing what they lead to"
    assert registry.load("sampler", "ladder").__name__ == "Ladder"
    assert registry.load("sampler", "plug_ins:Ladder") is registry.load("sampler", "ladder")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no_such_module:Name", "cannot be imported: there is no module no_such_module.*PYTHONPATH"),
        ("optuna.no_such_module:Name", "there is no module optuna.no_such_module.*PYTHONPATH"),
        ("optuna.samplers:NoSuchSampler", "'optuna.samplers' has no attribute 'NoSuchSampler'. Correct"),
        ("typing_error:Name", r"typing_error cannot be imported: SyntaxError: .*typing_error.py, line 1"),
        (
            "needs_more:Name",
            r"needs_more cannot be imported: ModuleNotFoundError: .*'no_such_library' \(.*:1\)",
        ),
        ("raises:Name", r"raises cannot be imported: KeyError: 'TOKEN' \(.*raises.py:3\)"),
        ("a_script:Name", r"a_script cannot be imported: SystemExit: 2 \(.*a_script.py:1\)"),
    ],
)
@pytest.mark.parametrize("kind", ["optimizer", "schedule", "metric", "sampler", "tracker", "engine"])
def test_what_cannot_be_imported_is_named_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: registry.Kind, path: str, message: str
) -> None:
    (tmp_path / "typing_error.py").write_text("def Name(:\n")
    (tmp_path / "needs_more.py").write_text("import no_such_library\n")
    (tmp_path / "raises.py").write_text("import os\n\nos.environ.pop('TOKEN')\n")
    (tmp_path / "a_script.py").write_text("raise SystemExit(2)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(InputError, match=f"^{kind} {path}: .*{message}"):
        registry.load(kind, path)


def test_what_a_plug_in_prints_is_kept_out_of_a_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "talks.py").write_text("print('hello')\nName = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert registry.load("sampler", "talks:Name") == 1
    assert capsys.readouterr() == ("", "hello\n")


def test_a_round_uses_what_an_installed_package_brings(package: Path, tmp_path: Path) -> None:
    """Twice the same facts."""
    rates = []
    for name in ("one", "two"):
        study = tmp_path / name
        path = write_round(study, trials=3, sampler="ladder", run="run: {report_to: [diary], slots: 1}")
        text = path.read_text().replace(
            "  sampler: ladder\n", "  sampler: ladder\n  sampler_arguments: {factor: 0.25}\n"
        )
        path.write_text(text)
        tuner.Study(study).run("round1.yaml", progress=False)
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
        ("optuna.samplers:__name__", "{}", "expects a class, got 'optuna.samplers'"),
        # What a sampler finds only when it is asked: after its first random points, and at once.
        ("faulty:Late", "{}", "cannot propose a trial: ModuleNotFoundError: No module named 'late_library'"),
        ("optuna.samplers:GridSampler", "{search_space: {lora_r: [2]}}", "learning_rate, is not found"),
        ("faulty:Outside", "{}", "cannot propose a trial: ValueError: '1000000.0' not in (2, 4)"),
        ("faulty:Unmade", "{}", r"cannot be created with {}: KeyError: 'HOST'"),
    ],
)
def test_a_sampler_that_cannot_be_made_is_bad_input_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    sampler: str, arguments: str, message: str,
) -> None:  # fmt: skip
    study = tmp_path / "study"
    path = write_round(study, sampler=sampler)
    more = f"  sampler: {sampler}\n  sampler_arguments: {arguments}\n"
    path.write_text(path.read_text().replace(f"  sampler: {sampler}\n", more))
    (tmp_path / "faulty.py").write_text(FAULTY)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(study)
    for verb in (["run"], ["check", "--probe"]):
        assert run(["study", *verb, "round1.yaml"]) == 2
        said = capsys.readouterr().err
        assert message in said
        assert re.search(r"error: round1.yaml:\d+: search.sampler: ", said)
    assert sorted(p.name for p in study.iterdir()) == ["round1.yaml"]


def test_a_sampler_that_fails_in_the_middle_leaves_a_round_that_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    study = tmp_path / "study"
    write_round(study, sampler="faulty_later:Later", trials=4)
    (tmp_path / "faulty_later.py").write_text(FAULTY)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(study)
    command = ["study", "run", "round1.yaml", "--engine", "simulated", "--slots", "1"]
    monkeypatch.setenv("FAILS_AFTER", "2")
    assert run(command) == 1
    said = capsys.readouterr().err
    assert "search.sampler faulty_later:Later: cannot propose a trial: RuntimeError: no quota" in said
    assert "All progress is saved. Fix the sampler; then resume with: tuner study run round1.yaml" in said
    assert len(tuner.Study("dry-run").round("round1").trials) == 2
    monkeypatch.delenv("FAILS_AFTER")
    assert run(command) == 0
    trials = tuner.Study("dry-run").round("round1").trials
    assert [trial.state.is_result for trial in trials] == [True] * 4


def test_check_imports_no_sampler_tracker_metric_or_engine_and_lists_them(tmp_path: Path) -> None:
    """Without an import even where they cannot be imported."""
    path = write_round(
        tmp_path, sampler="no_such:Sampler", run='run: {report_to: ["no_such:Tracker"], engine: "no_such:E"}'
    )
    path.write_text(path.read_text() + "\nobjective: {metric: 'no_such:METRIC'}\n")
    found = tuner.Study(tmp_path).check("round1.yaml")
    names = ["no_such:Sampler", "no_such:METRIC", "no_such:E", "no_such:Tracker"]
    assert found["ok"]
    assert found["plan"]["unchecked"] == names
    assert any(f"not checked: {', '.join(names)}; " in remark for remark in found["remarks"])


@pytest.mark.parametrize(
    ("run_section", "message"),
    [
        ('{report_to: ["no_such:Tracker"]}', "tracker no_such:Tracker: cannot be imported"),
        (
            '{report_to: ["optuna:__name__"]}',
            "round1.yaml:25: run.report_to: tracker optuna:__name__: expects a class or a function, got",
        ),
        (
            '{report_to: ["faulty_other:Half"]}',
            "run.report_to: tracker faulty_other:Half: Half has no method point or end",
        ),
        (
            '{engine: "faulty_other:Unmade"}',
            "round1.yaml:25: run.engine: engine faulty_other:Unmade: cannot be created without arguments",
        ),
    ],
)
def test_a_tracker_or_an_engine_that_cannot_be_used_is_bad_input_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    run_section: str, message: str,
) -> None:  # fmt: skip
    study = tmp_path / "study"
    write_round(study, run=f"run: {run_section}")
    (tmp_path / "faulty_other.py").write_text(FAULTY)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(study)
    for verb in (["run"], ["check", "--probe"]):
        assert run(["study", *verb, "round1.yaml"]) == 2
        assert message in capsys.readouterr().err
    assert sorted(p.name for p in study.iterdir()) == ["round1.yaml"]
