"""`study run --engine simulated`: a dry run of a whole study, which leaves the real one alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.studies import write_round
from tuner.cli import run
from tuner.config import load_round
from tuner.errors import InputError
from tuner.study.dry_run import forgotten_if_refused

BANNER = "Dry run: losses are made up by a formula, nothing was trained"


def write(directory: Path, *, steps: int = 40) -> None:
    """A round whose model and data are nowhere, and whose database is no matter of the folder's."""
    write_round(
        directory,
        base="no/such/model",
        data="no/such/data",
        trials=6,
        steps=steps,
        every=8,
        decay_steps=10,
        storage=f"sqlite:///{directory}/real.db",
    )


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def tuner(*arguments: str, within: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.chdir(within)  # -C leaves the process elsewhere
    monkeypatch.setenv("COLUMNS", "200")  # narrower tables break a cell's words apart
    return run(list(arguments))


def documents(text: str) -> Any:
    return json.loads(text)


def files(directory: Path) -> set[str]:
    return {path.relative_to(directory).parts[0] for path in directory.rglob("*")}


def test_a_dry_run_of_two_rounds_and_nothing_real_is_touched(
    study: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def does(*arguments: str) -> tuple[str, str]:
        assert tuner(*arguments, within=study, monkeypatch=monkeypatch) == 0, capsys.readouterr().err
        said = capsys.readouterr()
        return said.out, said.err

    before = (study / "round1.yaml").read_text()
    out, err = does("study", "run", "round1.yaml", "--engine", "simulated")
    assert BANNER in err
    assert "seconds simulated" in err
    assert "synthetic losses" in out
    assert err.rstrip().endswith("next: tuner -C dry-run study promote --to round2")
    assert files(study) == {"round1.yaml", "dry-run"}
    assert (study / "round1.yaml").read_text() == before

    out, err = does("-C", "dry-run", "study", "promote", "--to", "round2")
    assert err.startswith(BANNER)
    assert err.rstrip().endswith("next: tuner -C dry-run study run round2.yaml")
    out, err = does("-C", "dry-run", "study", "run", "round2.yaml")
    assert BANNER in err
    trials = documents(does("-C", "dry-run", "trial", "list", "--json")[0])
    carried = [trial for trial in trials if trial["continues"]]
    assert len(carried) == 3
    assert all(trial["executed_steps"] < trial["evaluations"][-1]["step"] for trial in carried)
    assert {trial["state"] for trial in trials} <= {"complete", "infeasible"}

    out, err = does("study", "status", "--json")
    assert BANNER not in err
    assert documents(out)["rounds"][0]["state"] == "open"
    out, err = does("-C", "dry-run", "study", "report")
    assert BANNER in err
    page = (study / "dry-run" / "report-round2.html").read_text()
    assert "synthetic losses" in page
    for text in (out, page):
        assert "How the study went" in text
        assert "3 of round1" in text
        assert "The rank correlation of their losses" in " ".join(text.split())
        assert "Throughput" not in text, "a dry run measures nothing"
    first, _ = does("-C", "dry-run", "study", "report", "round1")
    assert "How the study went" not in first


def test_a_dry_run_is_repeatable_and_run_again_changes_nothing(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def curves() -> Any:
        tuner("-C", "dry-run", "trial", "list", "--json", within=study, monkeypatch=monkeypatch)
        trials = documents(capsys.readouterr().out)
        return [(t["hyperparameters"], t["state"], t["evaluations"], t["executed_steps"]) for t in trials]

    def again() -> None:
        arguments = ("study", "run", "round1.yaml", "--engine", "simulated", "--slots", "2")
        assert tuner(*arguments, within=study, monkeypatch=monkeypatch) == 0
        capsys.readouterr()

    again()
    first = curves()
    assert len(first) == 6
    again()
    assert curves() == first
    (study / "dry-run").rename(tmp_path / "elsewhere")
    again()
    assert curves() == first


def test_a_changed_file_is_refused_with_the_way_out_and_leaves_the_dry_run_alone(
    study: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("study", "run", "round1.yaml", "--engine", "simulated")
    assert tuner(*arguments, within=study, monkeypatch=monkeypatch) == 0
    copy = (study / "dry-run" / "round1.yaml").read_text()
    write(study, steps=60)
    capsys.readouterr()
    assert tuner(*arguments, within=study, monkeypatch=monkeypatch) == 2
    said = capsys.readouterr().err
    assert "max_train_steps" in said
    assert "delete" in said
    assert (study / "dry-run" / "round1.yaml").read_text() == copy


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("study", "run", "round1.yaml", "--engine", "ray3"), "local, ray, simulated"),
        (("study", "run", "dry-run/round1.yaml", "--engine", "local"), "this file belongs to a dry run"),
        (("-C", "dry-run", "trial", "generate", "best", "--prompt", "x"), "a dry run trains nothing"),
    ],
)
def test_what_cannot_be_done_is_refused(
    study: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    words: str,
) -> None:
    assert (
        tuner("study", "run", "round1.yaml", "--engine", "simulated", within=study, monkeypatch=monkeypatch)
        == 0
    )
    capsys.readouterr()
    assert tuner(*arguments, within=study, monkeypatch=monkeypatch) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("verb", "sampler", "words"),
    [
        (("run",), "no_such:Sampler", "no module no_such"),
        (("auto",), "no_such:Sampler", "no module no_such"),
        (("sweep",), "quasi-random", "run.production_steps"),
    ],
    ids=["run", "auto", "sweep"],
)
def test_a_dry_run_that_is_refused_at_once_leaves_nothing(
    study: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    verb: tuple[str, ...],
    sampler: str,
    words: str,
) -> None:
    file = study / "round1.yaml"
    file.write_text(file.read_text().replace("sampler: quasi-random", f'sampler: "{sampler}"'))
    arguments = ("study", *verb, "round1.yaml", "--engine", "simulated")
    assert tuner(*arguments, within=study, monkeypatch=monkeypatch) == 2
    assert words in capsys.readouterr().err
    assert list(study.iterdir()) == [file]


def test_a_dry_run_keeps_its_file_and_what_else_is_in_its_folder(
    study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("study", "run", "round1.yaml", "--engine", "simulated")
    assert tuner(*arguments, within=study, monkeypatch=monkeypatch) == 0
    copy = study / "dry-run" / "round1.yaml"
    with pytest.raises(InputError), forgotten_if_refused(load_round(copy)):
        raise InputError("refused")
    assert copy.exists(), "its round has begun"
    (study / "dry-run" / "tuner.db").unlink()
    written = copy.read_text()
    copy.write_text(f"{written}# mine\n")
    with pytest.raises(InputError), forgotten_if_refused(load_round(copy)):
        raise InputError("refused")
    assert copy.exists(), "the user has changed it"
    copy.write_text(written)
    with pytest.raises(InputError), forgotten_if_refused(load_round(copy)):
        raise InputError("refused")
    assert [path.name for path in (study / "dry-run").iterdir()] == ["runs"]


def test_a_file_that_says_simulated_needs_no_torch(study: Path) -> None:
    path = study / "round1.yaml"
    path.write_text(path.read_text() + "run: {engine: simulated}\n")
    code = (
        "import sys; from tuner.cli import run; code = run(['study', 'run', 'round1.yaml']);"
        "sys.exit(code or any(name in sys.modules for name in ('torch', 'transformers')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=study, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert files(study) == {"round1.yaml", "dry-run"}


def test_a_dry_run_of_an_earlier_version_stays_in_its_folder(
    study: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Which was called rehearsal; a folder of that name with something else in it is left alone."""

    def does(*arguments: str) -> str:
        assert tuner(*arguments, within=study, monkeypatch=monkeypatch) == 0
        said = capsys.readouterr()
        return said.out + said.err

    (study / "rehearsal").mkdir()
    (study / "rehearsal" / "notes.yaml").write_text("songs: [1, 2]\n")
    does("study", "run", "round1.yaml", "--engine", "simulated")
    (study / "rehearsal" / "notes.yaml").unlink()
    (study / "rehearsal").rmdir()
    (study / "dry-run").rename(study / "rehearsal")

    said = does("study", "run", "round1.yaml", "--engine", "simulated")
    assert "Hint: dry runs are now in dry-run/; this one stays in rehearsal/" in said
    assert said.rstrip().endswith("next: tuner -C rehearsal study promote --to round2")
    assert files(study) == {"round1.yaml", "rehearsal"}
    assert BANNER in does("-C", "rehearsal", "study", "status")
    does("-C", "rehearsal", "study", "promote", "--to", "round2", "--max-train-steps", "80")
    assert "rehearsal/round1/" in does("study", "clean")
    assert (
        tuner(
            "study",
            "run",
            "rehearsal/round1.yaml",
            "--engine",
            "local",
            within=study,
            monkeypatch=monkeypatch,
        )
        == 2
    )


@pytest.mark.parametrize("sampler", ["quasi-random", "grid"])
def test_a_round_without_points_for_all_its_trials_ends_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], sampler: str
) -> None:
    write_round(tmp_path, learning_rate="1e-3", trials=6, sampler=sampler, run="run: {engine: simulated}")
    directory = tmp_path / "dry-run"

    def does(*arguments: str) -> tuple[str, str]:
        assert tuner(*arguments, within=tmp_path, monkeypatch=monkeypatch) == 0, capsys.readouterr().err
        said = capsys.readouterr()
        return said.out, said.err

    plan = documents(does("study", "check", "round1.yaml", "--json")[0])
    why = "The search space has 2 points, so the round ends after 2 of 6 trials."
    assert plan["plan"]["trials"] == 2
    assert why in plan["remarks"]
    said = does("study", "run", "round1.yaml")[1]
    assert said.count(why) == 1
    assert "2 trials of 8 steps" in said
    assert "(2 of 2 trials done)" in said
    status = documents(does("-C", str(directory), "study", "status", "--json")[0])
    (round1,) = status["rounds"]
    assert (round1["state"], round1["trials"]["complete"], round1["trials"]["waiting"]) == ("complete", 2, 0)
    report = does("-C", str(directory), "study", "report", "round1")[0]
    assert "The search space has 2 points, so the round ended after 2 of 6 trials." in report
    assert "Finish the round first" not in report
    assert len(documents(does("-C", str(directory), "trial", "list", "--json")[0])) == 2


def test_comparison_runs_may_be_asked_for_at_any_time(
    study: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A finished round is open again until they have run, and one that began without stays as it was."""
    file = study / "dry-run" / "round1.yaml"

    def does(*arguments: str, within: str = "dry-run") -> tuple[str, str]:
        assert tuner("-C", within, *arguments, within=study, monkeypatch=monkeypatch) == 0
        said = capsys.readouterr()
        return said.out, said.err

    def status() -> tuple[str, int]:
        (found,) = documents(does("study", "status", "--json")[0])["rounds"]
        return found["state"], found["branches_left"]

    def rewrite(old: str, new: str) -> None:
        text = file.read_text()
        assert old in text
        file.write_text(text.replace(old, new))

    with (study / "round1.yaml").open("a") as round_file:
        round_file.write("run: {decay_branches: false}\n")
    does("study", "run", "round1.yaml", "--engine", "simulated", within=".")
    before = documents(does("trial", "list", "--json")[0])
    assert status() == ("complete", 0)

    rewrite("decay_branches: false, ", "")
    assert status() == ("complete", 0)
    assert "comparison run" not in does("study", "run", "round1.yaml")[1]
    assert status() == ("complete", 0)

    rewrite("{engine: simulated}", "{decay_branches: auto, engine: simulated}")
    assert status() == ("open", 1)
    out, err = does("study", "report")
    assert "the comparison runs, which" in " ".join(out.split())
    assert err.rstrip().endswith("study run round1.yaml")
    _, err = does("study", "run", "round1.yaml")
    assert "starts at step 0" in err
    assert status() == ("complete", 0)

    rewrite("decay_branches: auto", "decay_branches: true")
    # The other two leading trials, to the half alone: they kept no checkpoints for a longer one.
    assert status() == ("open", 2)
    does("study", "run", "round1.yaml")
    assert status() == ("complete", 0)
    assert documents(does("trial", "list", "--json")[0]) == before
    does("study", "clean", "--yes")
    does("study", "promote", "--to", "round2", "--max-train-steps", "80")
