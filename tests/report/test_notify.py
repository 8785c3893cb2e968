"""`run.notify`: what the command is told, and that nothing it does touches the round."""

from __future__ import annotations

import io
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from tests.studies import round_file
from tuner.api.run import Where
from tuner.cli import run
from tuner.records import Ended, Evaluation, Trial, TrialState
from tuner.report import open_view
from tuner.report.notify import NotifiedRound, Notifier

from . import synthetic

KEEP = "import sys; open('told.jsonl', 'a').write(sys.stdin.read() + '\\n')"


def notifier(tmp_path: Path, code: str, *, patience_seconds: float = 10) -> tuple[Notifier, io.StringIO]:
    out = io.StringIO()
    view = open_view(
        console=Console(file=out, force_terminal=False), title="s/r", trials_total=8, max_train_steps=60
    )
    command = (sys.executable, "-c", code) if code else ("no-such-program",)
    told = NotifiedRound("s", "r", tmp_path, 60, command)
    return Notifier(view, told, patience_seconds=patience_seconds), out


def told(tmp_path: Path) -> list[dict[str, object]]:
    path = tmp_path / "told.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def waiting(trial: Trial) -> Trial:
    return replace(trial, state=TrialState.WAITING, evaluations=(), attempts=())


def test_new_best_trials_and_the_end_are_told(tmp_path: Path) -> None:
    view, _ = notifier(tmp_path, KEEP)
    trials = synthetic.trials()
    view.trials([waiting(trial) for trial in trials])
    for trial in (trials[1], trials[0], trials[6], trials[7]):
        view.event(Ended("r", trial.number, 1, 60, "complete"))
        view.trials([trial])
    view.ended("complete")
    view.close()
    documents = told(tmp_path)
    assert [(d["event"], d["best"]["trial"]) for d in documents] == [  # type: ignore[index]
        ("best", 1),
        ("best", 6),
        ("complete", 6),
    ], "trial 0 is worse than trial 1, and trial 7 infeasible"
    last = documents[-1]
    assert last["trials"] == {"complete": 3, "waiting": 4, "infeasible": 1}
    assert last["message"] == "s/r: complete; best: trial 6, 1.3734 at step 60"
    assert (last["study"], last["round"], last["directory"]) == ("s", "r", str(tmp_path))


def test_what_an_earlier_run_found_is_no_news(tmp_path: Path) -> None:
    view, _ = notifier(tmp_path, KEEP)
    view.trials(synthetic.trials())
    view.ended("complete")
    view.close()
    assert told(tmp_path) == [], "nothing ran"


@pytest.mark.parametrize("event", ["stopped", "failed"])
def test_why_a_round_stopped(event: str, tmp_path: Path) -> None:
    view, _ = notifier(tmp_path, KEEP)
    view.trials([waiting(synthetic.trial(0, 1e-4))])
    view.ended(event, "no disk: 3 bytes left")
    view.close()
    assert [(d["event"], d["message"], d["best"]) for d in told(tmp_path)] == [
        (event, "s/r: no disk: 3 bytes left", None)
    ]


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("", "run.notify: no-such-program cannot be run: No such file or directory"),
        ("import sys; sys.exit('[red]nobody')", "failed with exit code 1: [red]nobody"),
        ("raise SystemExit(7)", "failed with exit code 7."),
        (r"import os; os.write(2, b'caf\xe9'); os._exit(7)", "failed with exit code 7: caf\ufffd."),
        ("import os; os.kill(os.getpid(), 9)", "was ended by signal 9."),
    ],
)
def test_a_command_that_fails_is_a_message(code: str, said: str, tmp_path: Path) -> None:
    view, out = notifier(tmp_path, code)
    view.trials([waiting(synthetic.trial(0, 1e-4))])
    view.ended("failed", "x")
    view.close()
    assert said in out.getvalue()
    assert "The round is not affected" in out.getvalue()


def test_a_command_that_hangs_is_ended_with_its_children(tmp_path: Path) -> None:
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)'])"
    view, out = notifier(tmp_path, code, patience_seconds=0.5)
    begun = time.monotonic()
    view.ended("failed", "x")
    view.close()
    assert time.monotonic() - begun < 120
    assert "took more than 0 seconds and was ended" in out.getvalue()


def test_a_command_that_always_hangs_is_told_the_end_and_is_never_left(tmp_path: Path) -> None:
    code = "import os, sys, time; open('told.jsonl', 'a').write(sys.stdin.read() + '\\n')\n"
    code += "open('pids', 'a').write(f'{os.getpid()} '); time.sleep(600)"
    view, _ = notifier(tmp_path, code, patience_seconds=5)
    view.trials([waiting(trial) for trial in synthetic.trials()])
    for number in range(6):
        view.trials([replace(synthetic.trial(number, 1e-4), evaluations=(Evaluation(60, 1 - number / 10),))])
    view.ended("failed", "x")
    view.close()
    documents = told(tmp_path)
    assert documents[-1]["event"] == "failed"
    assert 2 <= len(documents) <= 4, "the best trials in between are old news"
    for pid in (tmp_path / "pids").read_text().split():
        assert not Path("/proc", pid).exists()


def test_the_options_are_repeated_in_the_command_that_resumes_without_secrets() -> None:
    assert Where().options == ""
    assert Where("auto", 3, "ray", "10.0.0.1:6379").options == (
        " --slots auto --workers 3 --engine ray --ray-address 10.0.0.1:6379"
    )
    assert Where(notify=("sh", "-c", "cat > x")).options == """ --notify 'sh -c '"'"'cat > x'"'"''"""
    secret = Where(slots=2, notify=("curl", "-H", "Authorization: Bearer abcdefghijk", "https://me:pw@x.org"))
    assert secret.options.startswith(" --slots 2 --notify ")
    assert "Bearer ***" in secret.options
    assert "https://me:***@x.org" in secret.options


def test_neither_check_nor_a_dry_run_runs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    round_file(tmp_path, run="run: {notify: [touch, told.jsonl]}")
    run(["study", "check", "round1.yaml"])
    assert run(["study", "run", "round1.yaml", "--engine", "simulated"]) == 0
    assert run(["study", "run", "round1.yaml", "--notify", "'"]) == 2
    assert not list(tmp_path.rglob("told.jsonl"))


@pytest.mark.parametrize(
    ("command", "missing"),
    [
        ("[no-such-program, --now]", "no-such-program"),
        ("[bin/tell.sh]", "bin/tell.sh"),
        ("[bin/plain.txt]", "bin/plain.txt"),
        ("[bin/there.sh]", None),
        ("[sh, -c, cat]", None),
    ],
)
def test_check_warns_of_a_program_that_does_not_exist(
    command: str, missing: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A path is relative to the round file, wherever `check` is called; a name is looked up on the PATH."""
    round_file(tmp_path, run=f"run: {{notify: {command}}}")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "plain.txt").touch()
    (tmp_path / "bin" / "there.sh").touch(mode=0o755)
    assert run(["study", "check", str(tmp_path / "round1.yaml")]) == 0
    captured = capsys.readouterr()
    said = " ".join((captured.out + captured.err).split())  # lines are as wide as the terminal
    wanted = f"warning: run.notify: the program {missing} was not found, so it will not be called"
    assert said.count("run.notify") == (missing is not None)
    assert missing is None or wanted in said
