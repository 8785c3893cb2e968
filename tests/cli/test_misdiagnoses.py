"""What is wrong is said as it is: damaged and lost databases, damaged checkpoints, data that has changed."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

import pytest
from sqlalchemy import create_engine, make_url, text

from tests.studies import QUICKSTART, formula, tuner, write_round
from tests.study.simulation import simulate, trials
from tuner.data import load_tokenizer, prepare
from tuner.data.pretrained import model_fingerprint
from tuner.engines import SimulatedWorker
from tuner.errors import InputError, Interrupted, StorageError
from tuner.records import LOSS, Ended, Event, Ready, Saved
from tuner.store import open_store
from tuner.store.database import refusal_of
from tuner.study.folder import open_folder
from tuner.study.run import _begin


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("simulated")
    write_round(directory)
    assert tuner("study", "run", "round1.yaml", "--engine", "simulated", directory=directory).returncode == 0
    return directory / "dry-run"


@pytest.fixture
def study(simulated: Path, tmp_path: Path) -> Path:
    return shutil.copytree(simulated, tmp_path / "dry-run", symlinks=True)


def truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2 // 4096 * 4096)


def damaged_page(path: Path) -> None:
    dice, content = random.Random(1), bytearray(path.read_bytes())
    for page in range(4, len(content) // 4096):
        content[page * 4096 : page * 4096 + 64] = dice.randbytes(64)
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [truncated, damaged_page])
@pytest.mark.parametrize("verb", ["check", "run"])
def test_a_damaged_database(study: Path, damage, verb: str) -> None:
    database = study / "tuner.db"
    damage(database)
    for file in study.glob("tuner.db-*"):
        file.unlink()
    done = tuner("study", verb, "round1.yaml", directory=study)
    assert done.returncode == 2
    assert done.stderr.count("error:") == 1
    assert str(database) in done.stderr
    assert "the file is damaged" in done.stderr
    assert ".recover" in done.stderr
    assert "disk full" not in done.stderr
    assert "invalid data" not in done.stderr


def test_the_doctor_finds_it(study: Path) -> None:
    damaged_page(study / "tuner.db")
    done = tuner("doctor", directory=study)
    assert done.returncode == 1
    assert "damaged" in done.stdout


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        ("database disk image is malformed", "the file is damaged"),
        ("database or disk is full", "is the disk full?"),
        ("disk I/O error", "is the disk full?"),
        ("file is not a database", "must name a database"),
    ],
)
def test_what_sqlite_says_and_what_to_do(reason: str, words: str) -> None:
    assert words in str(refusal_of(make_url("sqlite:////x/tuner.db"), reason))


@pytest.mark.parametrize("verb", ["check", "run"])
def test_a_database_that_is_gone_while_its_checkpoints_are_there(study: Path, verb: str) -> None:
    for file in study.glob("tuner.db*"):
        file.unlink()
    before = sorted(path.name for path in (study / "runs").rglob("*"))
    done = tuner("study", verb, "round1.yaml", directory=study)
    assert done.returncode == 2
    assert "has checkpoints of 3 trials" in done.stderr
    assert "does not know the round round1" in done.stderr
    assert sorted(path.name for path in (study / "runs").rglob("*")) == before
    shutil.move(study / "runs" / "round1", study / "before")
    assert tuner("study", "run", "round1.yaml", directory=study).returncode == 0


def test_a_damaged_checkpoint_sends_a_trial_to_the_one_before_and_says_so(tmp_path: Path) -> None:
    """Two are kept until the trial ends, and one afterwards."""
    changes = {"trials": 1, "steps": 12, "every": 2, "learning_rate": "1e-3", "lora_r": 2, "decay_steps": 11}
    seen: list[Event] = []

    class Watched(SimulatedWorker):
        def events(self, timeout_seconds: float) -> list[Event]:
            found = super().events(timeout_seconds)
            seen.extend(found)
            return found

    def saved() -> int:
        return sum(isinstance(event, Saved) and event.checkpoint.kind == "last" for event in seen)

    with pytest.raises(Interrupted):
        simulate(
            tmp_path,
            make_worker=lambda: Watched(formula, slots=1),
            stopping=lambda: saved() >= 3,
            **changes,
        )
    (trial,) = trials(tmp_path, **changes)
    kept = [c for c in trial.checkpoints if c.kind == "last"]
    assert len(kept) == 2
    assert all((tmp_path / "runs" / "round1" / c.path).is_dir() for c in kept)
    newest, before = max(c.step for c in kept), min(c.step for c in kept)

    class Refusing(SimulatedWorker):
        """As the real worker does where the hash is another."""

        def start(self, assignment) -> None:
            if assignment.resume_from and f"/last/step-{newest:06d}" in assignment.resume_from:
                name = (assignment.round, assignment.trial, assignment.attempt)
                self._refused.append(Ended(*name, 0, "failed", "the checkpoint was changed or damaged"))
                return
            super().start(assignment)

        _refused: list[Event] = []  # noqa: RUF012

        def events(self, timeout_seconds: float) -> list[Event]:
            refused, self._refused[:] = list(self._refused), []
            return refused or super().events(timeout_seconds)

    simulate(tmp_path, make_worker=lambda: Refusing(formula, slots=1), **changes)
    (trial,) = trials(tmp_path, **changes)
    assert trial.state == "complete"
    assert trial.attempts[-1].from_step == before > 0
    assert trial.reason == (
        f"resumed from step {before} instead of {newest}: the checkpoint was changed or damaged"
    )
    last = [c for c in trial.checkpoints if c.kind == "last"]
    assert [c.step for c in last] == [12]
    assert len(list((tmp_path / "runs" / "round1" / "trial-0000" / "last").iterdir())) == 1


def test_check_says_that_the_data_has_changed(tmp_path: Path) -> None:
    """As `run` would, before anything is loaded; the same rows elsewhere are the same data."""
    data = shutil.copytree(QUICKSTART / "data", tmp_path / "data")
    write_round(tmp_path, data=data)
    assert tuner("study", "check", "round1.yaml", directory=tmp_path).returncode == 0
    plan = open_folder(tmp_path).plan("round1")
    found = prepare(plan.absolute, load_tokenizer(plan.absolute.model), plan.cache)
    store = open_store(plan.absolute.storage, study="tiny")
    ready = Ready(1, "cpu", workload="same", data_fingerprint=found.fingerprint)
    _begin(plan, store, ready, lambda: 0.0, LOSS)
    store.close()
    assert tuner("study", "check", "round1.yaml", directory=tmp_path).returncode == 0
    lines = (data / "train.jsonl").read_text().splitlines()
    row = json.loads(lines[0])
    lines[0] = json.dumps({**row, "output": row["output"] + " Indeed."})
    (data / "train.jsonl").write_text("\n".join(lines) + "\n")
    done = tuner("study", "check", "round1.yaml", directory=tmp_path)
    assert done.returncode == 2
    assert "the model or the data are not those that round1 started with" in done.stderr


def test_check_says_that_the_model_has_changed(tmp_path: Path) -> None:
    """Without loading it: another configuration is refused, other files are said to need a closer look."""
    base = shutil.copytree(QUICKSTART / "base", tmp_path / "base")
    write_round(tmp_path, base=base)
    plan = open_folder(tmp_path).plan("round1")
    store = open_store(plan.absolute.storage, study="tiny")
    ready = Ready(1, "cpu", workload="same", model_fingerprint=model_fingerprint(plan.absolute.model))
    _begin(plan, store, ready, lambda: 0.0, LOSS)
    store.close()

    def checked() -> tuple[int, str]:
        done = tuner("study", "check", "round1.yaml", directory=tmp_path)
        return done.returncode, done.stdout + done.stderr

    assert checked()[0] == 0
    assert "have changed" not in checked()[1]
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "transformers_version": "0.1", "dtype": "x"}))
    assert "have changed" not in checked()[1]  # says where it is stored, not what it is
    (base / "config.json").write_text(json.dumps(config))
    [weights] = base.glob("*.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1000:] = bytes(1000)
    weights.write_bytes(content)
    code, said = checked()
    assert code == 0
    assert "have changed since round1 started" in said
    assert "--probe" in said
    (base / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    code, said = checked()
    assert code == 2
    assert "the model or the data are not those that round1 started with" in said


@pytest.mark.slow
def test_a_server_that_keeps_no_utf8(postgres_server: str) -> None:
    engine = create_engine(postgres_server, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(
            text("CREATE DATABASE ascii ENCODING 'SQL_ASCII' TEMPLATE template0 LC_COLLATE 'C' LC_CTYPE 'C'")
        )
    try:
        url = make_url(postgres_server).set(database="ascii").render_as_string(hide_password=False)
        with pytest.raises(StorageError, match=r"SQL_ASCII, and tuner needs UTF8.*createdb --encoding UTF8"):
            open_store(url, study="tiny")
    finally:
        with engine.connect() as connection:
            connection.execute(text("DROP DATABASE ascii WITH (FORCE)"))
        engine.dispose()


@pytest.mark.parametrize(
    "verb", [("check", "round1.yaml"), ("run", "round1.yaml"), ("status",), ("report",)], ids=" ".join
)
def test_a_server_that_refuses_is_named_with_the_line_and_without_the_password(
    tmp_path: Path, verb: tuple[str, ...]
) -> None:
    """Port 1 of this machine has no server."""
    url = "postgresql://u:secret@127.0.0.1:1/studies?password=hidden"
    path = write_round(tmp_path, storage=url)
    line = 1 + path.read_text().splitlines().index(f"storage: {url}")
    refused = tuner("study", *verb, directory=tmp_path)
    assert refused.returncode == 2
    shown = "postgresql+psycopg://u:***@127.0.0.1:1/studies?password=***"
    assert f"round1.yaml:{line}: storage: {shown}: connection failed" in refused.stderr
    assert "see that the server runs, and that `storage` has its host" in refused.stderr
    assert "secret" not in refused.stderr
    assert "hidden" not in refused.stderr


def test_round_files_that_do_not_belong_together_are_named_with_their_lines(tmp_path: Path) -> None:
    path = write_round(tmp_path)
    line = 1 + path.read_text().splitlines().index("round: round1")
    (tmp_path / "round2.yaml").write_text(path.read_text())
    with pytest.raises(InputError, match=f"round1.yaml:{line}, round2.yaml:{line}: the same `round: round1`"):
        open_folder(tmp_path)
    (tmp_path / "round2.yaml").write_text(path.read_text().replace("round: round1", "round: round2"))
    open_folder(tmp_path)
    renamed = path.read_text().replace("round: round1", "round: round2").replace("study: ", "study: an")
    (tmp_path / "round2.yaml").write_text(renamed)
    with pytest.raises(
        InputError, match=r"share one study; here round1.yaml:\d has .*, round2.yaml:\d has an"
    ):
        open_folder(tmp_path)
