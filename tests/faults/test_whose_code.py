"""What SECURITY.md says of verbs that read: they import and start nothing that a round file names."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from tests.commands.driving import document, written
from tests.faults.warm import ENVIRONMENT
from tests.studies import QUICKSTART, record_sweep, tuner, write_round
from tuner.adapters.base import load_config
from tuner.config import ModelSpec, load_round

READING = (
    ("study", "check", "round1.yaml"),
    ("study", "status"),
    ("study", "status", "--json"),
    ("study", "report"),
    ("study", "report", "--html", "page.html"),
    ("trial", "list"),
    ("trial", "show", "best"),
)
TRAP = "from pathlib import Path\nPath({mark!r}).touch()\nraise SystemExit('imported or started')\n"
TRAP += "def worth(answer, reference): return 1\n"


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """A file that is there once the trap was imported or started."""
    return tmp_path / "mark"


@pytest.fixture(params=["names", "command", "model"])
def study(
    request: pytest.FixtureRequest, tmp_path: Path, mark: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A round with results, whose file names the trap wherever it can."""
    folder, site = tmp_path / "study", tmp_path / "site"
    site.mkdir()
    (site / "trap.py").write_text(TRAP.format(mark=str(mark)))
    monkeypatch.syspath_prepend(str(site))
    if request.param == "command":
        values = {"learning_rate": [0.01, 0.1], "schedule": "constant"}
        content = document("trap.py", hyperparameters=values, search={"trials": 3})
        path = written(folder, content)
        (folder / "trap.py").write_text(TRAP.format(mark=str(mark)))
    elif request.param == "model":
        base = with_code(tmp_path / "base", mark)
        path = write_round(folder, base=f"{base}, trust_remote_code: true", trials=3)
    else:
        path = write_round(
            folder,
            optimizer="trap:OPTIMIZER",
            schedule="trap:SCHEDULE",
            trials=3,
            evaluation=", answers: {metric: 'trap:worth'}",
            sampler="trap:Sampler",
            run='run: {report_to: ["trap:Tracker"], engine: "trap:Engine"}',
        )
        path.write_text(path.read_text() + "\nobjective: {metric: 'trap:METRIC'}\n")
    record_sweep(load_round(path), {0.01: 2.0, 0.1: 2.5})
    return folder


def with_code(base: Path, mark: Path, **changes: str) -> Path:
    """A model whose repository has code, by the side of what transformers knows."""
    shutil.copytree(QUICKSTART / "base", base)
    (base / "trap.py").write_text(TRAP.format(mark=str(mark)))
    config = json.loads((base / "config.json").read_text())
    classes = {"AutoConfig": "trap.Config", "AutoModelForCausalLM": "trap.Model"}
    (base / "config.json").write_text(json.dumps({**config, "auto_map": classes, **changes}))
    return base


@pytest.mark.parametrize("verb", READING, ids=" ".join)
def test_a_verb_that_reads(study: Path, mark: Path, verb: tuple[str, ...]) -> None:
    done = tuner(*verb, directory=study)
    assert done.returncode == 0, done.stderr
    assert not mark.exists()


def test_check_names_the_probe_for_a_model_that_needs_its_code(tmp_path: Path, mark: Path) -> None:
    base = with_code(tmp_path / "base", mark, model_type="its own")
    write_round(tmp_path / "study", base=f"{base}, trust_remote_code: true")
    done = tuner("study", "check", "round1.yaml", directory=tmp_path / "study")
    assert done.returncode == 2
    assert "`study check --probe` does, and so does `study run`" in done.stderr
    assert not mark.exists()


@pytest.mark.parametrize("study", ["names", "command"], indirect=True)
def test_the_dashboard(study: Path, mark: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tuner.cli", "study", "dashboard", "--port", "0"]
    environment = {**ENVIRONMENT, "PYTHONPATH": f"{tmp_path / 'site'}:{ENVIRONMENT['PYTHONPATH']}"}
    with subprocess.Popen(command, cwd=study, env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        found = re.search(r"http://127\.0\.0\.1:\d+", process.stderr.readline())
        assert found is not None
        with urllib.request.urlopen(f"{found[0]}/api/studies", timeout=60) as answer:
            assert answer.status == 200
        process.terminate()
    assert not mark.exists()


@pytest.mark.parametrize("study", ["names", "command"], indirect=True)
def test_a_run_is_what_springs_the_trap(study: Path, mark: Path) -> None:
    (study / "tuner.db").unlink()
    tuner("study", "run", "round1.yaml", directory=study)
    assert mark.exists()


def test_a_metric_of_answers_springs_it_when_the_round_runs(tmp_path: Path, mark: Path) -> None:
    folder = tmp_path / "study"
    write_round(folder, evaluation=", answers: {metric: 'trap.py:worth'}")
    (folder / "trap.py").write_text(TRAP.format(mark=str(mark)))
    done = tuner("study", "check", "round1.yaml", directory=folder)
    assert (done.returncode, mark.exists()) == (0, False), done.stderr
    assert "not checked: trap.py:worth" in done.stdout
    assert tuner("study", "check", "round1.yaml", "--probe", directory=folder).returncode == 2
    assert mark.exists()


def test_a_model_that_is_trusted_springs_it(tmp_path: Path, mark: Path) -> None:
    base = with_code(tmp_path / "base", mark)
    with pytest.raises(SystemExit):
        load_config(ModelSpec(path=str(base), trust_remote_code=True), max_length=8)
    assert mark.exists()
