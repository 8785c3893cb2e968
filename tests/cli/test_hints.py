"""Wrong words on the command line: each says what to type instead."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from tests.studies import round_file, write_round
from tests.study.simulation import simulate
from tuner.cli import app, run
from tuner.cli.hints import _MEANT


@pytest.mark.parametrize(
    ("typed", "hint"),
    [
        ("run round1.yaml", "tuner study run round1.yaml"),
        ("study list", "tuner study status, or trial list"),
        ("study init", "tuner study new"),
        ("study rnu round1.yaml", "tuner study run round1.yaml"),
        ("stduy status", "tuner study status"),
        ("trial ls", "tuner trial list"),
        ("trial check round1.yaml", "tuner study check round1.yaml"),
        ("generate best --prompt x", "tuner trial generate best --prompt x"),
    ],
)
def test_an_unknown_word_is_answered_with_a_command(
    typed: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(shlex.split(typed)) == 2
    said = capsys.readouterr()
    assert said.err.splitlines()[-1].endswith(f"Did you mean: {hint}")
    assert said.out == ""


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("study check round1.yaml --show all", "'--show': expects a whole number, got all"),
        ("study check round1.yaml --show -1", "'--show': expects at least 0, got -1"),
        ("study promote --to x --max-train-steps 2.5", "expects a whole number, got 2.5"),
        ("study dashboard --port 99999", "expects at most 65535, got 99999"),
        ("trial generate best --temperature hot", "expects a number, got hot"),
        ("trial export best --to x --dtype fp16", "'--dtype': 'fp16' is not one of 'bfloat16', "),
        (
            "study run round1.yaml --max-steps 20",
            "--max-steps; it is a key of the round file: max_train_steps",
        ),
        (
            "study run round1.yaml --lr 1",
            "--lr; it is a key of the round file: hyperparameters.learning_rate",
        ),
        ("study run round1.yaml --n-jobs 2", "No such option: --n-jobs; did you mean --slots?"),
        (
            "study check round1.yaml --set run.slots=2",
            "No such option: --set; it is an option of study new, study import and study promote",
        ),
        ("study check round1.yaml --add lora_r=4", "--add; it is an option of study promote"),
        ("study status -C x", "No such option: -C; it comes before the command: tuner -C ... study status"),
        ("trial list --yes", "--yes; it is an option of study clean"),
        ("trial list round1", "unexpected extra argument(s) (round1); did you mean --round round1?"),
    ],
)
def test_a_wrong_option_says_what_was_read_and_what_was_meant(
    typed: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(shlex.split(typed)) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("study run db", "db is not a text file; name a round file, such as round1.yaml"),
        ("study run empty", "empty is a directory; it has no round file"),
        ("study run full", "full is a directory; name the round file in it, such as full/mine.yaml"),
        ("study report full nowhere", "there is no folder nowhere"),
        ("-C db study status", "-C db: Not a directory; pass the folder of a study"),
        (
            "study import rows.jsonl",
            """rows.jsonl, line 1: has no step; expects a line such as {"step": 6, "eval""",
        ),
    ],
)
def test_a_wrong_file_says_what_is_there(
    typed: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "db").write_bytes(b"SQLite format 3\0\xf6\x80")
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.yaml").touch()
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    assert run(shlex.split(typed)) == 2
    assert said in capsys.readouterr().err


def test_a_word_like_no_other_lists_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["study", "zzz"]) == 2
    assert "Known: new, " in capsys.readouterr().err


def test_every_hint_is_a_command() -> None:
    root = get_command(app)
    hinted = [
        command for group in _MEANT.values() for meant in group.values() for command in meant.split(", or ")
    ]
    assert len(hinted) > 20
    for command in hinted:
        words = [word for word in command.split() if not word.startswith("-")]
        found = root
        for word in words:
            found = found.commands[word]  # type: ignore[attr-defined]


def test_no_help_shows_a_flag_with_a_value(capsys: pytest.CaptureFixture[str]) -> None:
    for verb in ([], ["study"], ["study", "clean"], ["study", "status"], ["trial", "export"], ["doctor"]):
        assert run([*verb, "--help"]) == 0
        said = capsys.readouterr().out
        assert "--help" in said
        assert "<bool>" not in said


def test_promote_takes_the_name_as_an_argument_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    simulate(tmp_path, trials=4)
    monkeypatch.chdir(tmp_path)
    assert run(["study", "promote"]) == 2
    assert "--to round2" in capsys.readouterr().err
    assert run(["study", "promote", "round2", "--to", "round3"]) == 2
    assert run(["study", "promote", "round2", "--max-train-steps", "16"]) == 0
    assert (tmp_path / "round2.yaml").exists()


def test_a_round_may_be_named_without_its_suffix(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    round_file(tmp_path)
    for verb in ("check", "run"):
        run(["study", verb, "round1"])
        assert "there is no round file" not in capsys.readouterr().err
    assert run(["study", "check", "round9"]) == 2
    assert "there is no round file round9" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("missing", "key"),
    [({"base": "no/such"}, "model.path"), ({"data": "rows"}, r"data.train\[0\].path")],
)
def test_a_missing_path_is_reported_with_its_line(
    missing: dict[str, str],
    key: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_round(tmp_path, **missing)  # type: ignore[arg-type]
    lines = (tmp_path / "round1.yaml").read_text().splitlines()
    for verb in ("check", "run"):
        assert run(["study", verb, "round1.yaml"]) == 2
        said = re.search(rf"error: round1.yaml:(\d+): {key}: ", capsys.readouterr().err)
        assert said is not None
        assert next(iter(missing.values())) in lines[int(said[1]) - 1]
