"""The loop of the page for programs runs, here over a dry run, and ends where the study says it is enough."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.docs.test_documents import ROOT, prose_and_blocks
from tests.recorded.test_unchanged import copy_quickstart
from tests.studies import tuner
from tuner import Study

PAGE = ROOT / "docs" / "how-to" / "drive-from-a-program.md"


def typed_here(folder: Path, seen: list[tuple[str, ...]]) -> Any:
    """`subprocess.run` for `tuner`, without the seconds that a process of its own takes to load."""

    def run(words: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        program, *arguments = words
        assert (program, options) == ("tuner", {"capture_output": True, "text": True})
        seen.append(tuple(arguments[:2]))
        done = tuner(*arguments, directory=folder)
        return subprocess.CompletedProcess(words, done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A dry run of the quickstart, whose first round is complete."""
    copy_quickstart(tmp_path)
    file = tmp_path / "round1.yaml"
    text = file.read_text().replace("max_train_steps: 45", "max_train_steps: 100")
    file.write_text(text.replace("trials: 8", "trials: 3"))
    Study(tmp_path).run("round1.yaml", engine="simulated", progress=False)
    return tmp_path / "dry-run"


@pytest.mark.timeout(900)
def test_the_loop_runs_until_longer_is_no_better(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (program,) = (body for language, body in prose_and_blocks(PAGE)[1] if language == "python")
    typed: list[tuple[str, ...]] = []
    monkeypatch.setattr(subprocess, "run", typed_here(folder, typed))
    exec(compile(program, str(PAGE), "exec"), {})
    best = ast.literal_eval(capsys.readouterr().out.strip().splitlines()[-1])
    assert {"trial", "eval_loss", "step", "adapter"} <= set(best)
    rounds = Study(folder).rounds
    assert len(rounds) >= 2
    assert str(rounds[-1].advice.diagnosis) in ("right", "saturated", "overfitting") or (
        typed[-1] == ("study", "promote")
    )
    assert {words[1] for words in typed} == {"check", "run", "status", "promote"}


def test_bad_input_is_told_with_its_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (program,) = (body for language, body in prose_and_blocks(PAGE)[1] if language == "python")
    copy_quickstart(tmp_path)
    file = tmp_path / "round1.yaml"
    file.write_text(re.sub(r"^max_train_steps: .*$", "max_train_steps: soon", file.read_text(), flags=re.M))
    monkeypatch.setattr(subprocess, "run", typed_here(tmp_path, []))
    with pytest.raises(SystemExit) as stopped:
        exec(compile(program, str(PAGE), "exec"), {})
    assert "max_train_steps" in str(stopped.value)
