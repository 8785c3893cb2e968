"""`study auto`: rounds and promotions as by hand, ended by the playbook, and gone on with anywhere."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest

import tuner
from tests.studies import write_round
from tuner.api.auto import Automatic
from tuner.api.run import Where, run_here, view_of
from tuner.cli import run
from tuner.config import read_round
from tuner.errors import RoundStopped

AUTO = ("study", "auto", "round1.yaml", "--engine", "simulated")
ROUND_FILES = ["round1.yaml", "round2.yaml", "round3.yaml"]


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A round of 20 steps, of which 90 may be paid for, whose model and data are nowhere."""
    path = write_round(
        tmp_path,
        base="no/such/model",
        data="no/such/data",
        trials=4,
        steps=20,
        every=10,
        decay_steps=5,
        learning_rate="{low: 1e-4, high: 1e-3, log: true}",
        storage=f"sqlite:///{tmp_path}/real.db",
    )
    path.write_text(path.read_text() + "run: {production_steps: 90}\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def of_two_rounds(study: Path) -> None:
    """Let the second round be the last."""
    path = study / "round1.yaml"
    path.write_text(path.read_text().replace("production_steps: 90", "production_steps: 60"))


def round_files(directory: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted(directory.glob("*.yaml"))}


def curves(capsys: pytest.CaptureFixture[str], study: Path) -> Any:
    """Everything of all trials but what interruptions may change."""
    capsys.readouterr()
    try:
        assert run(["-C", "dry-run", "trial", "list", "--json"]) == 0
    finally:
        os.chdir(study)
    trials = json.loads(capsys.readouterr().out)
    return [
        {
            k: v
            for k, v in t.items()
            if k not in ("attempts", "executed_steps", "executed_steps_exact", "adapter")
        }
        for t in trials
    ]


def by_hand(study: Path, *commands: tuple[str, ...]) -> None:
    for command in commands:
        try:
            assert run(["-C", "dry-run", *command] if command[1] == "promote" else list(command)) == 0
        finally:
            os.chdir(study)


def test_rounds_are_run_and_promoted_as_by_hand_until_the_production_length(
    study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Run again it says the same and changes nothing."""
    assert run(list(AUTO)) == 0
    said = capsys.readouterr()
    assert "enough after round3: run.production_steps, 90, does not allow longer runs" in said.err
    assert "tiny/round3" in said.out
    assert said.err.splitlines()[-1].startswith("next: tuner -C dry-run trial show best")
    automatic, trials = round_files(study / "dry-run"), curves(capsys, study)
    assert list(automatic) == ROUND_FILES
    assert "max_train_steps: 90" in automatic["round3.yaml"]

    assert run(list(AUTO)) == 0
    again = capsys.readouterr()
    assert "tiny/round3:" in again.err
    assert "tiny/round1:" not in again.err
    assert again.err.splitlines()[-2:] == said.err.splitlines()[-2:]
    assert (round_files(study / "dry-run"), curves(capsys, study)) == (automatic, trials)

    (study / "dry-run").rename(tmp_path / "automatic")
    by_hand(
        study,
        ("study", "run", "round1.yaml", "--engine", "simulated"),
        ("study", "promote", "--to", "round2"),
        ("study", "run", "dry-run/round2.yaml"),
        ("study", "promote", "--to", "round3"),
        ("study", "run", "dry-run/round3.yaml"),
    )
    assert round_files(study / "dry-run") == automatic
    assert curves(capsys, study) == trials


@pytest.mark.slow
def test_a_promotion_cut_in_two_is_finished_and_one_made_by_hand_is_gone_on_from(
    study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = ("study", "run", "round1.yaml", "--engine", "simulated")
    by_hand(study, first, ("study", "promote", "--to", "longer"))
    longer = (study / "dry-run" / "longer.yaml").read_text()
    assert run(list(AUTO)) == 0
    assert list(round_files(study / "dry-run")) == ["longer-2.yaml", "longer.yaml", "round1.yaml"]

    (study / "dry-run").rename(tmp_path / "before")
    by_hand(study, first)
    (study / "dry-run" / "round2.yaml").write_text(longer.replace("round: longer", "round: round2"))
    assert run(list(AUTO)) == 0, capsys.readouterr().err
    assert list(round_files(study / "dry-run")) == ROUND_FILES


def test_a_file_in_the_way_is_refused_and_kept(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    by_hand(study, ("study", "run", "round1.yaml", "--engine", "simulated"))
    mine = (study / "dry-run" / "round1.yaml").read_text().replace("round: round1", "round: round2")
    (study / "dry-run" / "round2.yaml").write_text(mine)
    assert run(list(AUTO)) == 2
    assert "exists with other content" in capsys.readouterr().err
    assert (study / "dry-run" / "round2.yaml").read_text() == mine


@pytest.mark.slow
def test_a_time_that_is_over_is_no_failure_and_the_same_command_goes_on(
    study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    of_two_rounds(study)
    command = [*AUTO[:3], "--for", "0.001s 0s", "--restarts", "1", *AUTO[3:]]
    assert run(command) == 0
    said = capsys.readouterr()
    assert "time limit of 0.001s 0s reached" in said.err
    assert said.err.splitlines()[-1] == "next: tuner " + shlex.join(command)
    assert "Nothing to conclude yet" in said.out
    os.chdir(study.parent)
    assert run(["study", "auto", f"{study.name}/dry-run/round1.yaml"]) == 0
    following = f"next: tuner -C {study.name}/dry-run trial show best"
    assert capsys.readouterr().err.splitlines()[-1].startswith(following)
    assert list(round_files(study / "dry-run")) == ROUND_FILES[:2]


class Interrupting(io.StringIO):
    """Standard output that presses Ctrl-C when some words are written to it."""

    def __init__(self, words: str) -> None:
        super().__init__()
        self.words = words

    def write(self, text: str) -> int:
        if self.words in text:
            signal.raise_signal(signal.SIGINT)
        return super().write(text)


def test_interrupted_between_two_rounds_it_has_promoted_its_own_and_begun_no_other(
    study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another round, run by hand since, is none of its own."""
    by_hand(study, ("study", "run", "round1.yaml", "--engine", "simulated"))
    text = (study / "dry-run" / "round1.yaml").read_text()
    other = text.replace("round: round1", "round: other").replace("trials: 4", "trials: 1")
    (study / "dry-run" / "other.yaml").write_text(other.replace("max_train_steps: 20", "max_train_steps: 60"))
    by_hand(study, ("study", "run", "dry-run/other.yaml"))
    for restarts in ((), ("--restarts", "1")):
        with redirect_stdout(Interrupting("wrote ")) as said:
            assert run([*AUTO[:3], *restarts, *AUTO[3:]]) == 130
        assert "tiny: round1 -> round2, 20 -> 60 steps (too_short)" in said.getvalue()
        goes_on = shlex.join(["tuner", *AUTO[:3], *restarts, *AUTO[3:]])
        where_it_is = f"round1 is complete and round2.yaml is written; resume with: {goes_on}"
        assert where_it_is in capsys.readouterr().err
        (study / "dry-run" / "round2.yaml").unlink()
    assert {trial["round"] for trial in curves(capsys, study)} == {"round1", "other"}


def test_a_round_that_teaches_no_horizon_ends_it_with_1(
    study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = study / "round1.yaml"
    path.write_text(re.sub(r"learning_rate: .*", "learning_rate: 0.9", path.read_text()))
    assert run(list(AUTO)) == 1
    said = capsys.readouterr()
    assert "enough after round1: no trial is complete" in said.err
    assert list(round_files(study / "dry-run")) == ["round1.yaml"]


@pytest.mark.slow
def test_restarts_come_back_to_the_first_horizon_with_what_was_learned(
    study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = study / "round1.yaml"
    path.write_text(
        path.read_text().replace("trials: 4", "trials: 5") + "checkpoints: {keep_best_trials: 1}\n"
    )
    of_two_rounds(study)
    command = [*AUTO, "--restarts", "1"]
    assert run(command) == 0
    said = capsys.readouterr()
    assert "enough after round4: " in said.err
    files = round_files(study / "dry-run")
    specs = {name: read_round(text, study / name).spec for name, text in files.items()}
    assert [(s.max_train_steps, s.search.trials) for s in specs.values()] == 2 * [(20, 5), (60, 2)]
    anew = specs["round3.yaml"]
    assert (anew.search.sampler, anew.search.seed, anew.search.enqueue) == ("tpe", 1, [])
    assert anew.space() == specs["round1.yaml"].space()
    assert "learns from the trials of all rounds" in files["round3.yaml"]
    # What leads is of either pass; whatever it is, its trunk was kept, and it goes on from there.
    kept = list((study / "dry-run" / "runs" / "round1").glob("trial-*/trunk/*"))
    assert len(kept) == 8  # two passes, each with two of five, at both steps that were planned
    trials = curves(capsys, study)
    assert all(t["continues"] for t in trials if t["round"] not in ("round1", "round3"))
    assert all(t["state"] == "complete" for t in trials)
    taken = [t["continues"].split("@")[0] for t in trials if t["continues"]]
    assert len(set(taken)) == len(taken) == 4

    assert run(command) == 0
    assert "enough after round4: " in capsys.readouterr().err
    assert run([*AUTO, "--passes", "2"]) == 0
    assert "hint: --passes 2 is now --restarts 1" in capsys.readouterr().err
    with pytest.warns(DeprecationWarning, match="passes=2 is now restarts=1"):
        assert tuner.Study(study / "dry-run").auto("round1.yaml", passes=2, progress=False).name == "round4"
    assert round_files(study / "dry-run") == files


def test_bad_options_are_refused_before_anything(study: Path) -> None:
    for wrong in (
        ["--for", "soon"],
        ["--passes", "0"],
        ["--restarts", "-1"],
        ["--restarts", "1", "--passes", "2"],
        ["--slots", "none"],
        ["--workers", "0"],
        ["--engine", "steam"],
    ):
        assert run([*AUTO[:3], *wrong]) == 2
    assert [path.name for path in study.iterdir()] == ["round1.yaml"]


@pytest.mark.slow
def test_interrupted_and_killed_anywhere_it_comes_to_the_same_end(
    study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(list(AUTO)) == 0
    files, trials = round_files(study / "dry-run"), curves(capsys, study)
    (study / "dry-run").rename(tmp_path / "undisturbed")

    code, said = _stopped_at("trial 2  step 10/", signal.SIGINT, study)
    assert code == 130
    assert f"resume with: tuner {' '.join(AUTO)}" in said
    for line in ("tiny/round2:", "trial 1  resumes"):
        code, _ = _stopped_at(line, signal.SIGKILL, study)
        assert code == -signal.SIGKILL
    assert run(list(AUTO)) == 0
    assert round_files(study / "dry-run") == files
    assert curves(capsys, study) == trials


def _stopped_at(line: str, number: int, directory: Path) -> tuple[int, str]:
    """Exit code and standard error of the command, which gets a signal when it says a line."""
    started = subprocess.Popen(
        [sys.executable, "-u", "-m", "tuner.cli", *AUTO],
        cwd=directory,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert started.stderr is not None
    said = ""
    for read in started.stderr:
        said += read
        if line in read:
            started.send_signal(number)
            break
    else:
        pytest.fail(f"{line!r} was never said:\n{said}")
    said += started.stderr.read()
    return started.wait(60), said


def between_rounds(study: Path, act: Callable[[Path], object], said: list[str]) -> Automatic:
    """`study auto` as a dry run, which calls `act` with the database's file after each promotion."""
    where = Where(engine="simulated")
    file = where.file(study / "round1.yaml")
    database = Path(file.spec.absolute(file.directory).storage.removeprefix("sqlite:///"))
    return Automatic(
        first=file,
        run=lambda file: run_here(file, where, open_view=view_of(False), stopping=lambda: False),
        promoted=lambda document: act(database),
        stopping=lambda: False,
        say=said.append,
    )


def test_a_database_that_goes_between_two_rounds_is_waited_for(study: Path) -> None:
    of_two_rounds(study)

    def go_away(database: Path) -> None:
        database.rename(study / "away.db")
        threading.Timer(1.0, lambda: (study / "away.db").rename(database)).start()

    said: list[str] = []
    between_rounds(study, go_away, said).run_until_enough()
    assert list(round_files(study / "dry-run")) == ROUND_FILES[:2]
    gone, back = said
    assert "is gone; put it back. Nothing runs meanwhile" in gone
    assert back.startswith("the database is back")


def test_one_that_stays_away_ends_it_and_the_same_call_goes_on(study: Path) -> None:
    path = study / "round1.yaml"
    path.write_text(path.read_text().replace("90}", "60, storage_patience: 1s}"))
    stays: list[Path] = []

    def go_away(database: Path) -> None:
        if not stays:
            stays.append(database)
            database.rename(study / "away.db")

    said: list[str] = []
    with pytest.raises(RoundStopped, match=r"is gone; put it back\. Earlier records are kept") as stopped:
        between_rounds(study, go_away, said).run_until_enough()
    assert stopped.value.exit_code == 1
    assert not stays[0].exists(), "no database is begun in its place"
    (study / "away.db").rename(stays[0])
    between_rounds(study, go_away, said).run_until_enough()
    assert list(round_files(study / "dry-run")) == ROUND_FILES[:2]
