"""Errors of the library name the arguments of the method that was called."""

import re
from collections.abc import Sequence
from pathlib import Path

import pytest

import tuner
from tests.studies import write_round
from tuner.api.arguments import naming_arguments, with_arguments
from tuner.errors import InputError, Mistake, RoundFileError

FORMS = {"to": "str", "force": "bool", "max_train_steps": "int | None", "settings": "Sequence[str]"}


@pytest.mark.parametrize(
    ("message", "read"),
    [
        ("--to /x: is a file; pass a directory", "to=/x: is a file; pass a directory"),
        ("exists; replace it with --force", "exists; replace it with force=True"),
        ("Pass --max-train-steps to promote it anyway.", "Pass `max_train_steps` to promote it anyway."),
        ("--set a.b=1,2: unknown key", "settings=['a.b=1,2']: unknown key"),
        ("Example: --set a=1 or --set b=2", "Example: settings=['a=1'] or settings=['b=2']"),
        ("exists; choose another --to", "exists; choose another `to`"),
        ("see `tuner x --to DIR --force`", "see `tuner x --to DIR --force`"),
        ("add --merge, --to-step or --forced", "add --merge, --to-step or --forced"),
    ],
)
def test_an_option_is_read_as_its_argument(message: str, read: str) -> None:
    assert with_arguments(message, FORMS) == read


def test_values_of_runs_are_those_of_a_mapping() -> None:
    message = "add --set warmup_steps=N, or --set hyperparameters.schedule=linear"
    read = "add hyperparameters={'warmup_steps': N}, or hyperparameters={'schedule': linear}"
    assert with_arguments(message, {"hyperparameters": "Mapping[str, Any] | None"}) == read


def test_an_error_stays_the_one_that_was_raised() -> None:
    error = RoundFileError("round1.yaml", [Mistake(3, "run.slots", "wrong; pass --slots 2")])

    @naming_arguments
    def method(slots: int, *, settings: Sequence[str] = ()) -> None:
        """Do it."""
        raise error

    with pytest.raises(RoundFileError) as raised:
        method(2)
    assert raised.value is error
    assert str(error) == "round1.yaml:3: run.slots: wrong; pass `slots` 2"
    assert (error.mistakes[0].line, method.__doc__) == (3, "Do it.")


def test_no_method_is_refused_with_an_option(tmp_path: Path) -> None:
    """Every message to a script names what a script can pass."""
    write_round(tmp_path, trials=2, lora_r="[2, 4]")
    study = tuner.Study(tmp_path)
    trial = study.run("round1.yaml", engine="simulated", progress=False).trials[0]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    dry = tuner.Study(tmp_path / "dry-run")
    calls = {
        "to=": lambda: dry.promote("a/b", max_train_steps=99),
        "settings=": lambda: dry.promote("r2", max_train_steps=99, settings=["nonsense"]),
        "add=": lambda: dry.promote("r2", max_train_steps=99, add=["nonsense=1"]),
        "engine=": lambda: study.run("round1.yaml", engine="nowhere"),
        "ray_address=": lambda: study.run("round1.yaml", ray_address="x:1"),
        "epochs=": lambda: study.sweep("round1.yaml", epochs=-1.0),
        "`dtype` requires merge=True": lambda: trial.export(tmp_path / "out", dtype="float32"),
        "`model`: is empty": lambda: tuner.Study.new(tmp_path / "new", model="", data="x"),
        "expects the folder of a study": lambda: tuner.Study(tmp_path / "nowhere"),
    }
    for expected, call in calls.items():
        with pytest.raises(InputError) as raised:
            call()
        said = str(raised.value)
        assert expected in said
        assert not re.search(r"(?<!\w)--?[a-zA-Z]", re.sub("`[^`]*`", "", said)), said
