"""`study sweep` as typed: what it says, what it writes, and what it leaves alone."""

from __future__ import annotations

import json
import re
import threading
from pathlib import Path

import pytest

from tests.studies import record_sweep, tuner, write_round
from tuner.api.auto import sweep_round
from tuner.api.run import Where, prepared_quietly, run_here, unsaid, view_of
from tuner.cli import run
from tuner.config import RoundFile, load_round
from tuner.playbook.sweep import default_grid
from tuner.study.sweep import next_sweep


def swept(directory: Path, *, production_steps: int = 80, **changes: object) -> Path:
    path = write_round(directory, **changes)
    path.write_text(path.read_text() + f"run: {{production_steps: {production_steps}}}  # mine\n")
    return path


@pytest.mark.slow
def test_a_dry_run_says_what_it_found_and_ends_with_the_next_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = swept(tmp_path, base="no/model", data="no/data", steps=20, every=5)
    before = path.read_text()
    monkeypatch.chdir(tmp_path)
    command = ["study", "sweep", "round1.yaml", "--engine", "simulated"]
    assert run([*command, "--for", "0.001s 0s"]) == 0
    said = capsys.readouterr().err
    assert said.splitlines()[-1] == "next: tuner study sweep round1.yaml --for '0.001s 0s' --engine simulated"
    monkeypatch.chdir(tmp_path / "dry-run")
    assert run(["study", "run", "sweep-20.yaml", "--for", "0.001s"]) == 0
    capsys.readouterr()
    assert run(["study", "status"]) == 0
    assert capsys.readouterr().err.splitlines()[-1] == "next: tuner study sweep round1.yaml"
    assert run(["study", "auto", "sweep-20.yaml"]) == 2
    assert "sweep-20 is a round of a sweep" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    assert run(command) == 0
    said = capsys.readouterr()
    assert "compute-bound" in said.out
    assert said.out.splitlines()[-1].endswith("max_train_steps 20 -> 10")
    assert said.err.splitlines()[-1] == "next: tuner -C dry-run study run round1.yaml"
    assert path.read_text() == before
    assert "max_train_steps: 10  # study sweep: about 10%" in (tmp_path / "dry-run/round1.yaml").read_text()

    monkeypatch.chdir(tmp_path / "dry-run")
    assert run(["study", "run", "round1.yaml"]) == 0
    capsys.readouterr()
    assert run(["study", "status", "--json"]) == 0
    rounds = json.loads(capsys.readouterr().out)["rounds"]
    assert [r["round"] for r in rounds] == ["sweep-20", "sweep-40", "sweep-80", "round1"]
    begun = (tmp_path / "dry-run/round1.yaml").read_text()
    monkeypatch.chdir(tmp_path.parent)
    assert run(["study", "sweep", f"{tmp_path.name}/dry-run/round1.yaml"]) == 0
    said = capsys.readouterr()
    assert "has started, so round1.yaml keeps 10 steps" in said.out
    assert said.err.splitlines()[-1] == f"next: tuner -C {tmp_path.name}/dry-run study run round1.yaml"
    assert (tmp_path / "dry-run/round1.yaml").read_text() == begun


def test_a_database_that_goes_between_two_rounds_of_a_sweep_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = swept(tmp_path, production_steps=40, base="no/model", data="no/data", steps=20, every=5)
    monkeypatch.chdir(tmp_path)
    where = Where(engine="simulated")
    names: list[str] = []

    def run_and_lose(file: RoundFile) -> None:
        run_here(file, where, open_view=view_of(False), stopping=lambda: False)
        names.append(file.spec.round)
        database = tmp_path / "dry-run" / "tuner.db"
        database.rename(tmp_path / "away.db")
        threading.Timer(1.0, lambda: (tmp_path / "away.db").rename(database)).start()

    said: list[str] = []
    sweep_round(
        where.file(path),
        epochs=None,
        run=run_and_lose,
        prepare=prepared_quietly,
        tell=unsaid,
        say=said.append,
    )
    assert names == ["sweep-20", "sweep-40"]
    assert sum("is gone; put it back. Nothing runs meanwhile" in text for text in said) == 2


def test_a_training_set_that_cannot_be_seen_twice_is_answered_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = swept(tmp_path, production_steps=60, steps=8, every=2, decay_steps=3)
    path.write_text(path.read_text().replace("batch_size: 2", "batch_size: [2, 64]"))  # the first counts
    monkeypatch.chdir(tmp_path)
    assert run(["study", "sweep", "round1.yaml"]) == 0
    said = capsys.readouterr()
    assert "60 steps are fewer than two epochs" in said.out
    assert said.err.splitlines()[-1] == "next: tuner study run round1.yaml"
    assert load_round(path).spec.max_train_steps == 6
    assert not (tmp_path / "tuner.db").exists()
    assert not list(tmp_path.glob("sweep-*"))


def test_epochs_are_the_longest_run_and_are_shown_and_written_as_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of 421 rows that are not cut off, 2 a step; one epoch is not two, so nothing is trained."""
    path = write_round(tmp_path, steps=8, every=2, decay_steps=3)
    before = path.read_text()
    monkeypatch.chdir(tmp_path)
    for epochs, more, words in (
        ("0", (), "--epochs 0: expects a number above 0"),
        ("-1", (), "--epochs -1: expects a number above 0"),
        ("nan", (), "--epochs nan: expects a number above 0"),
        ("inf", (), "--epochs inf: expects a number above 0"),
        ("1e308", (), "--epochs 1e+308: expects a number above 0, and at most 1,000,000"),
        ("3", ("--engine", "simulated"), "--epochs: a dry run does not open the data"),
        ("0.01", (), "run.production_steps: 3 is below max_train_steps (8)"),
    ):
        assert run(["study", "sweep", "round1.yaml", "--epochs", epochs, *more]) == 2
        assert words in capsys.readouterr().err
        assert [each.name for each in tmp_path.iterdir()] == ["round1.yaml"]
    assert path.read_text() == before
    assert run(["study", "sweep", "round1.yaml", "--epochs", "1.5"]) == 0
    assert "--epochs 1.5: of 421 rows, 2 a step: 316 steps" in capsys.readouterr().out
    spec = load_round(path).spec
    assert (spec.run.production_steps, spec.max_train_steps) == (316, 32)
    assert "{production_steps: 316}  # production_steps: 1.5 x 421 rows" in path.read_text()
    for folder in ("dry-run", "again"):
        write_round(tmp_path / folder, run="run: {engine: simulated, production_steps: 80}\n")
        assert run(["study", "sweep", f"{folder}/round1.yaml", "--epochs", "3"]) == 2
        assert "--epochs: a dry run does not open the data" in capsys.readouterr().err
        assert [each.name for each in (tmp_path / folder).iterdir()] == ["round1.yaml"]


def test_an_answer_is_said_and_written_and_what_has_begun_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = swept(tmp_path, production_steps=500, steps=18, every=5)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").touch()
    assert run(["study", "sweep", "round1.yaml"]) == 2
    assert "runs" in capsys.readouterr().err
    assert not (tmp_path / "sweep-20.yaml").exists()
    (tmp_path / "runs").unlink()
    first = next_sweep(load_round(path))
    assert isinstance(first, RoundFile)
    rates = default_grid()
    record_sweep(first, dict.fromkeys(rates[:3], 0.2))
    text = first.path.read_text()
    first.path.write_text(text.replace("lora_r: 2", "lora_r: 4"))
    assert run(["study", "sweep", "round1.yaml"]) == 2
    assert "hyperparameters.lora_r: the round began with 2" in capsys.readouterr().err
    assert "lora_r: 4" in first.path.read_text()
    first.path.write_text(text)
    record_sweep(first, dict.fromkeys(rates, 0.2) | {rates[3]: 0.05})
    assert run(["study", "sweep", "round1.yaml"]) == 0
    said = capsys.readouterr()
    assert (
        "The training set is fitted in 20 steps, fastest at a constant learning rate of 0.000115: the "
        "mean loss of a sample of training rows reaches 0.05 or less, or 99% of its target tokens"
    ) in said.out
    assert said.out.splitlines()[-1] == "wrote round1.yaml: max_train_steps 18 -> 20"
    assert said.err.splitlines()[-1] == "next: tuner study run round1.yaml"
    assert load_round(path).spec.max_train_steps == 20


def test_a_sweep_without_an_answer_fails_and_leaves_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = swept(tmp_path, production_steps=500, steps=20, every=5)
    before = path.read_text()
    monkeypatch.chdir(tmp_path)
    for _ in range(3):
        found = next_sweep(load_round(path))
        assert isinstance(found, RoundFile)
        rates = [entry["learning_rate"] for entry in found.spec.search.enqueue]
        record_sweep(found, {rate: 1 + rate for rate in rates})
    assert run(["study", "sweep", "round1.yaml"]) == 1
    assert "still at the edge of the grid, 1e-07, after 2 widenings" in capsys.readouterr().err
    assert path.read_text() == before


def test_a_model_or_rows_that_cannot_be_loaded_leave_the_folder_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "rows").mkdir()
    for name in ("train", "eval"):
        (tmp_path / "rows" / f"{name}.jsonl").write_text('{"instruction": "a", "output": "b"}\n{"instr')
    for changes, said in (
        ({"base": "no/such/model"}, "no/such/model"),
        ({"data": tmp_path / "rows"}, "train.jsonl:2: not one JSON object"),
    ):
        swept(tmp_path / "study", production_steps=8000, steps=8, every=2, **changes)
        monkeypatch.chdir(tmp_path / "study")
        assert run(["study", "sweep", "round1.yaml"]) == 2
        assert said in capsys.readouterr().err
        assert [path.name for path in (tmp_path / "study").iterdir()] == ["round1.yaml"]


@pytest.mark.slow
def test_a_few_rows_are_fitted_by_real_training(tmp_path: Path) -> None:
    """Four rows, evaluated on themselves, which a round refuses unless it is a sweep's."""
    path = swept(tmp_path, production_steps=48, steps=24, every=4, decay_steps=3, lora_r="16")
    rows = (Path(re.search(r"path: (\S+train.jsonl)", path.read_text())[1])).read_text().splitlines()[:4]  # type: ignore[index]
    (tmp_path / "few.jsonl").write_text("\n".join(rows) + "\n")
    path.write_text(re.sub(r"train: .*", "train: [{path: few.jsonl, format: alpaca}]", path.read_text()))
    done = tuner("study", "sweep", "round1.yaml", "--slots", "8", directory=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"fitted in (4|8|12|16|20|24|28|32|36|40|44|48) steps", done.stdout), done.stdout
    status = json.loads(tuner("study", "status", "--json", directory=tmp_path).stdout)
    assert status["rounds"][0]["round"] == "sweep-24"
    assert "study sweep:" in path.read_text()
    assert status["rounds"][0]["best"]["eval_loss"] < 0.5
