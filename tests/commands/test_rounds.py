"""Rounds of a plain script from the command line: a promotion that resumes, kills, and what is said."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests import studies
from tests.cli.conftest import MountTmpfs
from tests.commands.driving import document, written
from tuner.commands import process_tree
from tuner.commands.fallback import files_below

REPOSITORY = Path(__file__).parents[2]


def tuner(folder: Path, *arguments: str, code: int = 0) -> str:
    """Standard output of a command; its error output where it fails."""
    done = studies.tuner(*arguments, directory=folder)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout if not code else done.stdout + done.stderr


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


def searching(**changes: Any) -> dict[str, Any]:
    values = {"learning_rate": [0.003, 0.05], "schedule": "linear", "decay_steps": 8}
    return document(hyperparameters=values, search={"trials": 2, "sampler": "grid"}) | changes


def curve(folder: Path, trial: str) -> dict[int, float]:
    shown = json.loads(tuner(folder, "trial", "show", trial, "--json"))
    return {each["step"]: each["eval_loss"] for each in shown["evaluations"]}


def test_two_rounds_with_a_promotion_that_resumes(tmp_path: Path) -> None:
    written(tmp_path, searching())
    assert (
        json.loads(tuner(tmp_path, "study", "check", "round1.yaml", "--json"))["plan"]["train_rows"] is None
    )
    ran = studies.tuner("study", "run", "round1.yaml", directory=tmp_path, merged=True)
    assert "loading the command's files" in ran.stdout
    assert "base and data" not in ran.stdout
    promoted = json.loads(
        tuner(tmp_path, "study", "promote", "--to", "round2", "--max-train-steps", "48", "--json")
    )
    assert promoted["continues"]
    tuner(tmp_path, "study", "run", "round2.yaml")
    shown = json.loads(tuner(tmp_path, "trial", "show", "round2/0", "--json"))
    assert shown["continues"] == "round1/1@16"
    assert shown["executed_steps"] == 32
    rate = shown["hyperparameters"]["learning_rate"]
    scratch = {
        "learning_rate": rate,
        "schedule": "linear",
        "decay_steps": shown["hyperparameters"]["decay_steps"],
    }
    content = document(round="scratch", max_train_steps=48, hyperparameters=scratch)
    written(tmp_path, content, "scratch.yaml")
    tuner(tmp_path, "study", "run", "scratch.yaml")
    assert curve(tmp_path, "scratch/0") == curve(tmp_path, "round2/0")
    status = json.loads(tuner(tmp_path, "study", "status", "--json"))
    best = status["rounds"][1]["best"]
    assert Path(best["adapter"], "state.json").is_file()
    assert "command" in tuner(tmp_path, "study", "report")
    tuner(tmp_path, "trial", "export", "best", "--to", "out")
    assert (tmp_path / "out" / "state.json").is_file()
    for wish in (("trial", "generate", "best", "--prompt", "x"), ("study", "sweep", "round2.yaml")):
        assert "runs a command" in tuner(tmp_path, *wish, code=2)
    assert "digit for digit" in tuner(tmp_path, "trial", "reproduce", "round1/0")


def test_a_change_of_the_script_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, searching(search={"trials": 1}))
    tuner(tmp_path, "study", "run", "round1.yaml")
    script = tmp_path / "train.py"
    script.write_text(script.read_text() + "# another\n")
    path.write_text(path.read_text().replace("trials: 1", "trials: 2"))
    assert "the command is not the one" in tuner(tmp_path, "study", "run", "round1.yaml", code=2)


@pytest.mark.parametrize(("fault", "said"), [("silent", "TUNER_METRICS"), ("early", "TUNER_MAX_STEPS")])
def test_a_command_that_cannot_work_ends_the_round_at_its_first_trial(
    tmp_path: Path, fault: str, said: str
) -> None:
    values = {"learning_rate": [0.003, 0.05], "fault": fault}
    content = document(hyperparameters=values)
    content["command"] = {"run": content["command"]["run"]}
    written(tmp_path, content)
    assert said in tuner(tmp_path, "study", "run", "round1.yaml", code=1)
    trials = json.loads(tuner(tmp_path, "trial", "list", "--json"))
    assert [(trial["attempts"], trial["state"]) for trial in trials] == [(1, "waiting")]


def test_a_probe_shows_what_arrives_and_a_check_runs_nothing(tmp_path: Path) -> None:
    written(tmp_path, searching())
    before = sorted(path.name for path in tmp_path.iterdir())
    said = studies.tuner("study", "check", "round1.yaml", directory=tmp_path)
    assert "the command was not run" in said.stdout + said.stderr
    done = studies.tuner("study", "check", "round1.yaml", "--probe", directory=tmp_path)
    assert done.returncode == 0, done.stderr
    found = " ".join((done.stdout + done.stderr).split())
    assert "the command reported accuracy, eval_loss at steps 0, 4, 8" in found
    assert "its checkpoints arrive" in found
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("elsewhere", "not inside TUNER_OUTPUT_DIR"),
        ("linked", "not inside TUNER_OUTPUT_DIR"),
        ("silent", "METRICS"),
    ],
)
def test_a_probe_refuses_what_no_trial_could_do(tmp_path: Path, fault: str, said: str) -> None:
    """Two trials that wrote to one place would overwrite each other's checkpoints."""
    content = document(hyperparameters={"learning_rate": 0.05, "fault": fault})
    content["command"] = {"run": content["command"]["run"]}
    written(tmp_path, content)
    assert said in tuner(tmp_path, "study", "check", "round1.yaml", "--probe", code=2)
    assert not (tmp_path / "tuner.db").exists()


def test_slots_are_refused(tmp_path: Path) -> None:
    written(tmp_path, searching(run={"slots": 2}))
    assert "run.slots: a command trains one trial at a time" in tuner(
        tmp_path, "study", "run", "round1.yaml", code=2
    )
    written(tmp_path, searching())
    assert "--workers" in tuner(tmp_path, "study", "run", "round1.yaml", "--slots", "2", code=2)
    assert not (tmp_path / "tuner.db").exists()


def test_a_dry_run_has_values_of_the_objective(tmp_path: Path) -> None:
    objective = {"metric": "accuracy", "direction": "maximize"}
    values = {"learning_rate": {"low": 1e-4, "high": 1e-2, "log": True}}
    content = document(hyperparameters=values, objective=objective)
    content["command"] = {"run": content["command"]["run"]}
    written(tmp_path, content)
    tuner(tmp_path, "study", "run", "round1.yaml", "--engine", "simulated")
    (trial,) = json.loads(tuner(tmp_path / "dry-run", "trial", "list", "--json"))
    assert (trial["metric"], trial["direction"]) == ("accuracy", "maximize")
    assert 0 < trial["best_value"] < 1


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A round that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    written(folder, searching())
    tuner(folder, "study", "run", "round1.yaml")
    return folder


@pytest.mark.parametrize("victim", ["parent", "worker"])
def test_killed_at_random_each_trial_ends_once_and_no_process_is_left(
    tmp_path: Path, whole: Path, victim: str
) -> None:
    values = {**searching()["hyperparameters"], "pause": 0.05}
    written(tmp_path / "killed", searching(hyperparameters=values))
    folder = tmp_path / "killed"
    parent = subprocess.Popen(
        [sys.executable, "-m", "tuner.cli", "study", "run", "round1.yaml"],
        cwd=folder, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    wait_for(lambda: any('"step": 8' in path.read_text() for path in files_below(folder, "metrics.jsonl")))
    workers = [each for each in psutil.Process(parent.pid).children() if "tuner.commands" in each.cmdline()]
    assert len(workers) == 1
    os.kill(parent.pid if victim == "parent" else workers[0].pid, signal.SIGKILL)
    parent.wait(timeout=60)
    tuner(folder, "study", "run", "round1.yaml")
    for trial in ("round1/0", "round1/1"):
        assert curve(folder, trial) == curve(whole, trial)
    assert tokens_in(folder)
    assert not living(folder)


def test_ctrl_c_twice_ends_the_commands_tree(tmp_path: Path) -> None:
    (tmp_path / "stubborn.py").write_text(
        "import signal, subprocess, sys\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "child = 'import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)'\n"
        "subprocess.run([sys.executable, '-c', child], start_new_session=True)\n"
    )
    content = document("stubborn.py", hyperparameters={"learning_rate": 0.1})
    content["command"] = {"run": content["command"]["run"]}
    written(tmp_path, content)
    parent = subprocess.Popen(
        [sys.executable, "-m", "tuner.cli", "study", "run", "round1.yaml"],
        cwd=tmp_path, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    try:
        wait_for(
            lambda: tokens_in(tmp_path) and len(list(process_tree.with_token(tokens_in(tmp_path)[0]))) == 2
        )
        parent.send_signal(signal.SIGINT)
        assert parent.stderr is not None
        assert any("stopping" in line for line in parent.stderr)
        parent.send_signal(signal.SIGINT)
        assert parent.wait(timeout=60) == 130
        wait_for(lambda: not living(tmp_path))
    finally:
        parent.kill()
        parent.wait()


def tokens_in(folder: Path) -> list[str]:
    found = []
    for path in files_below(folder, "token"):
        with contextlib.suppress(FileNotFoundError):  # an attempt clears its folder when it starts
            found.append(path.read_text())
    return [text for text in found if text]


def living(folder: Path) -> list[psutil.Process]:
    """The processes of all commands that ran in a folder."""
    return [process for token in tokens_in(folder) for process in process_tree.with_token(token)]


def test_a_full_disk_ends_the_round_with_what_to_do(small_disk: MountTmpfs) -> None:
    disk = small_disk(24)
    (disk / "fills.py").write_text(
        "import os\n"
        "with open(os.path.join(os.environ['TUNER_OUTPUT_DIR'], 'film'), 'wb', buffering=0) as file:\n"
        "    while True:\n"
        "        file.write(bytes(65536))\n"
    )
    content = document("fills.py", hyperparameters={"learning_rate": 0.1})
    content["command"] = {"run": content["command"]["run"]}
    content["run"]["storage_patience"] = "2s"
    written(disk, content)
    said = tuner(disk, "study", "run", "round1.yaml", code=1)
    assert "no disk" in said
    assert "Free some space" in said


def wait_for(happened: Any, *, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.02)
