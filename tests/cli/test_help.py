"""Every verb shows an example that can be typed, and says which command comes next."""

from __future__ import annotations

import re
import runpy
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.main import get_command

from tests.studies import round_file
from tests.study.simulation import simulate
from tuner.cli import app, run
from tuner.store import hold_study


def verbs() -> dict[str, Any]:
    """`study run` and the like, with Typer's commands."""
    root: Any = get_command(app)
    found = {
        f"{group} {name}".strip(): command
        for group, commands in root.commands.items()
        for name, command in getattr(commands, "commands", {"": commands}).items()
    }
    assert len(found) >= 11
    return found


@pytest.mark.parametrize("name", verbs())
def test_the_example_of_a_verb_can_be_typed(name: str) -> None:
    command = verbs()[name]
    example = re.search(r"Example: `tuner ([^`]+)`", command.help)
    assert example is not None
    assert example[1].startswith(name)
    command.make_context(name, shlex.split(example[1].removeprefix(name)))
    with pytest.raises(Exception, match="No such option") as refused:
        command.make_context(name, ["--no-such-option"])
    assert isinstance(refused.value, typer.BadParameter.__mro__[2])


def test_the_short_option_for_help(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("", "study", "trial", *verbs()):
        assert run([*name.split(), "-h"]) == 0
        assert f"Usage: tuner {name}".strip() in capsys.readouterr().out


def test_every_option_is_explained() -> None:
    silent = [
        f"{name} {parameter.name}"
        for name, command in verbs().items()
        for parameter in command.params
        if not parameter.help and not parameter.hidden
    ]
    assert silent == []


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("study")
    simulate(directory, trials=6)
    return directory


@pytest.mark.parametrize(
    ("command", "following"),
    [
        ("study status", "study promote --to round2"),
        ("study report", "study promote --to round2"),
        ("study clean", "study clean --yes"),
        ("study clean --yes", "study status"),
        ("study clean", "study status"),
        ("trial list", "trial show best"),
        ("trial show best", "trial generate round1/"),
        ("study promote --to round2 --max-train-steps 16", "study run round2.yaml"),
        ("study status", "study run round2.yaml"),
    ],
)
def test_a_verb_ends_with_the_next_command(
    study: Path,
    command: str,
    following: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The study is the same for all: the last ones see what `promote` wrote."""
    monkeypatch.chdir(study)
    assert run(command.split()) == 0
    said = capsys.readouterr()
    assert said.out
    assert said.err.splitlines()[-1].startswith(f"next: tuner {following}")


def test_before_anything_has_begun(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    round_file(tmp_path)
    for command in (["study", "status"], ["trial", "list"]):
        assert run(command) == 0
        assert capsys.readouterr().err.splitlines()[-1] == "next: tuner study run round1.yaml"
    for command in (["study", "promote", "--to", "round2"], ["study", "report"], ["trial", "show"]):
        assert run(command) == 2
        assert "tuner study run round1.yaml" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["round1.yaml"]


def test_a_pipe_gets_every_column_and_a_narrow_terminal_is_told_what_is_missing(
    study: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(study)
    monkeypatch.delenv("COLUMNS", raising=False)
    assert run(["trial", "list"]) == 0
    piped = capsys.readouterr()
    names = ["trial", "learning_rate", "lora_r", "best loss", "best step", "settled", "state", "remarks"]
    assert re.split(r"  +", piped.out.splitlines()[0].strip()) == names
    assert "too narrow" not in piped.err
    monkeypatch.setenv("COLUMNS", "60")
    assert run(["trial", "list"]) == 0
    narrow = capsys.readouterr()
    shown = re.split(r"  +", narrow.out.splitlines()[0].strip())
    missing = [name for name in names if name not in shown]
    assert missing
    assert f"too narrow to show {', '.join(missing)}: widen the window, or use --json" in narrow.err


def test_while_a_round_runs_status_names_no_command_that_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    simulate(tmp_path)
    monkeypatch.chdir(tmp_path)
    with hold_study(tmp_path, f"sqlite:///{tmp_path / 'tuner.db'}", "tiny"):
        assert run(["study", "status"]) == 0
        following = capsys.readouterr().err.splitlines()[-1].removeprefix("next: tuner ")
        assert following == "trial list"
        assert run(shlex.split(following)) == 0


@pytest.mark.parametrize("module", ["tuner", "tuner.cli"])
def test_the_package_can_be_run_as_a_module(
    module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", [module, "--version"])
    monkeypatch.setattr("tuner.cli.keep_others_out", lambda: None)
    monkeypatch.setattr("gc.freeze", lambda: None)
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(module, run_name="__main__", alter_sys=False)
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("tuner ")
