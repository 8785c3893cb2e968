"""A best adapter that is not as it was recorded: nobody uses it; `reproduce --restore` puts it back."""

from __future__ import annotations

import json
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.studies import trials_of, tuner, write_round
from tuner import Study
from tuner.errors import CheckpointError
from tuner.whole import digest

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study with one trial that was really trained."""
    directory = tmp_path_factory.mktemp("trained")
    write_round(directory, trials=1, steps=4, every=2, decay_steps=1, learning_rate="1e-3", lora_r=2)
    done = tuner("study", "run", "round1.yaml", directory=directory)
    assert done.returncode == 0, done.stderr
    return directory


@pytest.fixture
def study(trained: Path, tmp_path: Path) -> Path:
    return shutil.copytree(trained, tmp_path / "study", symlinks=True)


def best(study: Path) -> Path:
    return (study / "runs" / "round1" / "trial-0000" / "best").resolve()


def last(study: Path) -> Path:
    (found,) = (study / "runs" / "round1" / "trial-0000" / "last").iterdir()
    return found


def flipped(path: Path, seed: int, *, count: int = 50) -> None:
    dice, content = random.Random(seed), bytearray(path.read_bytes())
    for _ in range(count):
        content[dice.randrange(len(content))] ^= dice.randrange(1, 256)
    path.write_bytes(content)


def changed(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


DAMAGE: dict[str, Callable[[Path], object]] = {
    "50 bytes of the weights": lambda at: flipped(at / WEIGHTS, 1),
    "one byte of the weights": lambda at: flipped(at / WEIGHTS, 2, count=1),
    "one byte of the configuration": lambda at: flipped(at / CONFIG, 3, count=1),
    "truncated weights": lambda at: (at / WEIGHTS).write_bytes((at / WEIGHTS).read_bytes()[:-9]),
    "empty weights": lambda at: (at / WEIGHTS).write_bytes(b""),
    "a pickle": lambda at: (at / WEIGHTS).write_bytes(pickle.dumps({"a": 1})),
    "no weights": lambda at: (at / WEIGHTS).unlink(),
    "broken JSON": lambda at: (at / CONFIG).write_text("{"),
    "a JSON list": lambda at: (at / CONFIG).write_text("[]"),
    "another rank": lambda at: changed(at / CONFIG, '"r": 2', '"r": 4'),
    "a further file": lambda at: (at / "adapter_model.bin").write_bytes(pickle.dumps({})),
}


COMMANDS = (
    ("trial", "generate", "0", "--prompt", "Name a river."),
    ("trial", "export", "best", "--to", "out"),
    ("trial", "generate", "best", "--prompt", "Name a river.", "--compare"),
    ("trial", "export", "0", "--to", "out", "--merge"),
    ("trial", "export", "0", "--to", "out", "--as", "trl"),
)


@pytest.mark.parametrize("damage", DAMAGE)
def test_nobody_uses_it(study: Path, damage: str) -> None:
    DAMAGE[damage](best(study))
    for command in COMMANDS if damage == "broken JSON" else COMMANDS[:2]:
        done = tuner(*command, directory=study)
        assert done.returncode == 1, command
        assert done.stdout == ""
        assert done.stderr.startswith("error: ")
        assert "tuner trial reproduce round1/0 --restore" in done.stderr
        assert not (study / "out").exists()


def test_no_script_uses_it(study: Path) -> None:
    DAMAGE["50 bytes of the weights"](best(study))
    trial = Study(study).trial(0)
    for use in (trial.load, lambda: trial.generate("Name a river."), lambda: trial.export(study / "out")):
        with pytest.raises(CheckpointError, match="--restore"):
            use()
    assert not (study / "out").exists()


def test_the_base_model_answers_all_the_same(study: Path) -> None:
    DAMAGE["broken JSON"](best(study))
    done = tuner("trial", "generate", "best", "--prompt", "Name a river.", "--base", directory=study)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("damage", ["50 bytes of the weights", "broken JSON", "a pickle", "missing"])
def test_it_is_put_back_from_a_checkpoint(study: Path, damage: str) -> None:
    place, before = best(study), digest(best(study))
    if damage == "missing":
        shutil.rmtree(place)
    else:
        DAMAGE[damage](place)
    done = tuner("trial", "reproduce", "0", "--restore", directory=study)
    assert done.returncode == 0, done.stderr
    assert "put back from trial-0000/last/step-000004.a1" in done.stdout
    assert digest(place) == before
    assert best(study) == place
    assert not [path for path in study.rglob("*") if path.name.endswith(".tmp")]
    again = tuner("trial", "reproduce", "0", "--restore", "--json", directory=study)
    assert again.returncode == 0
    assert "nothing to restore" in json.loads(again.stdout)["restored"]


@pytest.mark.slow
def test_it_is_trained_again_where_no_checkpoint_has_it(study: Path) -> None:
    place, before = best(study), digest(best(study))
    DAMAGE["50 bytes of the weights"](place)
    flipped(last(study) / "optimizer.safetensors", 4, count=3)
    for path in (study / "runs" / "round1" / "trial-0000" / "trunk").glob("*"):
        shutil.rmtree(path)
    done = tuner("trial", "reproduce", "0", "--restore", directory=study)
    assert done.returncode == 0, done.stderr
    assert "put back from a new run, as it was saved (by its SHA-256)" in done.stdout
    assert digest(place) == before
    assert not (study / "runs" / "reproduced").exists()
    assert [trial["state"] for trial in trials_of(study)] == ["complete"]


def test_a_trial_without_an_adapter_has_none_to_restore(tmp_path: Path) -> None:
    write_round(tmp_path, trials=1, learning_rate="9e-2")
    assert tuner("study", "run", "round1.yaml", "--engine", "simulated", directory=tmp_path).returncode == 0
    done = tuner("trial", "reproduce", "0", "--restore", "--to-step", "2", directory=tmp_path / "dry-run")
    assert done.returncode == 2
    assert "remove --to-step" in done.stderr
