"""`tuner doctor` tells what is there and what is broken, and changes nothing."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from rich.console import Console
from sqlalchemy import text

from tests.studies import write_round
from tuner.api.doctor import Check, Health, check_package, is_healthy
from tuner.cli import run
from tuner.cli.output import health_table
from tuner.errors import StorageError
from tuner.installation import installation
from tuner.store import open_store, revision
from tuner.store.database import open_engine, parse_url
from tuner.store.schema import VERSION_TABLE


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def doctor(capsys: pytest.CaptureFixture[str], *, code: int) -> dict[str, dict[str, Any]]:
    """The checks by name."""
    assert run(["doctor", "--json"]) == code
    said = capsys.readouterr()
    document = json.loads(said.out)
    assert (document["ok"], said.err) == (code == 0, "")
    return {check["name"]: check for check in document["checks"]}


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


def test_without_a_study(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_not_to_be_seen")
    checks = doctor(capsys, code=0)
    assert {"tuner", "python", "torch", "transformers", "peft", "bitsandbytes", "optuna"} <= checks.keys()
    assert {"cpu", "memory", "disk", "hub cache", "extra postgres", "extra gguf"} <= checks.keys()
    assert checks["study"]["found"] == "none in this folder"
    assert "storage" not in checks
    assert checks["hub token"]["found"] == "found"
    assert "hf_not_to_be_seen" not in str(checks)
    assert list(here.iterdir()) == []


def test_a_study_before_and_after_its_first_round(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_round(here)
    before = content(here)
    checks = doctor(capsys, code=0)
    assert checks["study"]["found"] == "tiny: round1.yaml"
    assert "empty; the first run creates it" in checks["storage"]["found"]
    assert str(here / "runs" / "round1") in checks["disk"]["found"]
    assert content(here) == before
    open_store(f"sqlite:///{here}/tuner.db", study="tiny").close()
    before = content(here)
    newest = revision(f"sqlite:///{here}/tuner.db").newest
    assert doctor(capsys, code=0)["storage"]["found"] == f"{here}/tuner.db: revision {newest}"
    assert content(here) == before


def test_a_database_of_a_newer_version(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_round(here)
    url = f"sqlite:///{here}/tuner.db"
    open_store(url, study="tiny").close()
    engine = open_engine(parse_url(url))
    with engine.begin() as connection:
        connection.execute(text(f"UPDATE {VERSION_TABLE} SET version_num = '9999'"))
    engine.dispose()
    storage = doctor(capsys, code=1)["storage"]
    assert storage["status"] == "problem"
    assert "revision 9999" in storage["found"]
    assert installation().upgrade in storage["advice"]


def test_what_is_broken_is_told(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_round(here, storage="sqlite:///round1.yaml")
    (here / "round2.yaml").write_text("study: tiny\nround: 7\n")
    checks = doctor(capsys, code=1)
    assert (checks["study"]["status"], checks["storage"]["status"]) == ("warning", "problem")
    assert "round2.yaml:2: round: " in checks["study"]["found"]
    assert "not a database" in checks["storage"]["found"]
    (here / "round1.yaml").unlink()
    checks = doctor(capsys, code=1)
    assert checks["study"]["status"] == "problem"
    assert "round2.yaml:2: round: " in checks["study"]["found"]
    assert checks["disk"]["status"] == "ok"
    assert run(["doctor"]) == 1
    shown = capsys.readouterr()
    assert "1 problem, " in shown.out
    assert shown.err == "next: tuner study new --help\n"


def test_checkpoints_that_cannot_be_written(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_round(here)
    (here / "runs").write_text("a file")
    disk = doctor(capsys, code=1)["disk"]
    assert (disk["status"], disk["advice"]) == ("problem", "choose another checkpoints.directory")


@pytest.mark.parametrize(
    ("installed", "status", "found"),
    [
        ("5.1", Health.OK, "5.1"),
        ("6.0.dev1", Health.OK, "6.0.dev1"),
        ("4.9", Health.PROBLEM, "4.9; requires <7,>=5"),
        (None, Health.PROBLEM, "not installed; requires <7,>=5"),
    ],
)
def test_a_package_and_its_range(installed: str | None, status: Health, found: str) -> None:
    check = check_package(Requirement("optuna>=5,<7"), installed=installed)
    assert (check.name, check.status, check.found) == ("optuna", status, found)
    assert (check.advice == "pip install 'optuna<7,>=5'") == (status is Health.PROBLEM)


@pytest.mark.parametrize(
    "text", ["[/y]", "x[/y]", "[red]", "tuner[wandb]", "[link=x]", ":smile:", "[", "\\[b]"]
)
def test_no_text_is_markup(text: str) -> None:
    out = io.StringIO()
    checks = [Check(text, text, health, text) for health in Health]
    Console(file=out, width=80).print(health_table(checks))
    assert out.getvalue().count(text) == 3 * len(checks)


def test_only_a_problem_is_unhealthy() -> None:
    assert is_healthy([Check("a", ""), Check("b", "", Health.WARNING)])
    assert not is_healthy([Check("a", ""), Check("b", "", Health.PROBLEM)])


def test_a_server_that_nobody_reaches() -> None:
    pytest.importorskip("psycopg", reason="the driver psycopg is not installed")
    with pytest.raises(StorageError) as refused:
        revision("postgresql+psycopg://me:secret@127.0.0.1:1/none")
    assert "secret" not in str(refused.value)
