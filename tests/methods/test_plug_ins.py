"""An optimizer and a schedule that an installed package brings; the code is that of the how-to page."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import pytest

import tuner
from tests.studies import ENVIRONMENT, installed, write_round
from tests.studies import tuner as command
from tuner.cli import run
from tuner.config import RoundSpec, load_round, with_plug_ins
from tuner.errors import InputError, RoundFileError
from tuner.methods import plug_ins, registry
from tuner.methods.hyperparameters import Hyperparameter
from tuner.methods.kinds import Flag, Integer, Number, OneOf
from tuner.methods.plug_ins import PlugIn
from tuner.methods.table import HYPERPARAMETERS
from tuner.records import Condition

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "your-own-method.md"
(CODE,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
OWN = "  sgd_momentum: [0.5, 0.9]\n  decay_power: 1.5\n"


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the package as an installation leaves it, on the path of this and other processes."""
    site = installed(
        tmp_path / "site",
        "my_methods",
        optimizers="sgd = my_methods:OPTIMIZER",
        schedules="power = my_methods:SCHEDULE",
    )
    (site / "my_methods.py").write_text(CODE)
    monkeypatch.setattr(registry, "_IMPORTED", set())  # nothing yet, as in a new process
    monkeypatch.setattr(registry, "_RECORDED", {})
    registry._found.cache_clear()
    monkeypatch.delitem(sys.modules, "my_methods", raising=False)
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("PYTHONPATH", f"{site}:{Path.cwd()}")
    return site


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """A folder with a round that searches the optimizer and what only one of them knows."""
    folder = tmp_path / "study"
    path = write_round(folder, optimizer="[sgd, adamw]", schedule="power", trials=4, steps=12, every=6)
    path.write_text(path.read_text().replace("search:\n", f"{OWN}search:\n"))
    return folder


def typed_elsewhere(folder: Path, *commands: Sequence[str], path: Path) -> tuple[list[int], str]:
    """Exit codes of commands in one new process, and what they print."""
    program = f"import sys; from tuner.cli import run; print([run(c) for c in {commands!r}], file=sys.stderr)"
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": f"{path}:{Path(__file__).parents[2]}"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=folder, env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return json.loads(done.stderr.splitlines()[-1]), done.stdout


def test_the_page_says_it_in_forty_lines() -> None:
    assert len(CODE.splitlines()) <= 40


def test_a_round_uses_both_and_later_readers_import_nothing(site: Path, study: Path) -> None:
    done = command("study", "run", "round1.yaml", directory=study)
    assert done.returncode == 0, done.stderr
    trials = tuner.Study(study).round("round1").trials
    by_optimizer = {"sgd": set(), "adamw": set()}
    for trial in trials:
        own = {name for name in trial.hyperparameters if name.startswith(("sgd_", "adam_"))}
        by_optimizer[str(trial.hyperparameters["optimizer"])] |= own
        assert trial.hyperparameters["decay_power"] == 1.5
        assert "decay_steps" not in trial.hyperparameters
        last = trial.evaluations[-1]
        peak = float(trial.hyperparameters["learning_rate"])
        assert last.learning_rate == pytest.approx(peak * (1 / 11) ** 1.5)
    assert by_optimizer == {"sgd": {"sgd_momentum"}, "adamw": {"adam_beta1", "adam_beta2", "adam_epsilon"}}

    broken = site.with_name("broken")
    shutil.copytree(site, broken)
    (broken / "my_methods.py").write_text("raise ImportError('nobody needs it')")
    readers = (("study", "status", "--json"), ("study", "report"))
    promote = ("study", "promote", "--to", "round2", "--max-train-steps", "24")
    known = "".join(command(*words, directory=study).stdout for words in readers)
    assert typed_elsewhere(study, *readers, promote, path=broken) == ([0, 0, 2], known)
    assert "sgd_momentum" in known
    assert not (study / "round2.yaml").exists()
    done = command(*promote, directory=study)
    assert done.returncode == 0, done.stderr
    promoted = load_round(study / "round2.yaml").spec
    with_plug_ins(load_round(study / "round2.yaml"))
    assert promoted.hyperparameters["schedule"] == "power"


def test_a_study_is_read_and_not_run_where_the_package_is_not_installed(
    site: Path, study: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a colleague reads it; names that an entry point gave lead nowhere there."""
    path = study / "round1.yaml"
    path.write_text(path.read_text().replace("low: 1e-4, high: 1e-1", "low: 1e-4, high: 1e-3"))
    monkeypatch.chdir(study)
    assert run(["study", "run", "round1.yaml", "--engine", "simulated"]) == 0
    monkeypatch.chdir(study / "dry-run")
    assert run(["study", "promote", "--to", "round2", "--max-train-steps", "24"]) == 0
    entries = load_round(Path("round2.yaml")).spec.search.enqueue
    assert any("sgd_momentum" in entry for entry in entries), "promotion names what only the plug-in has"
    assert run(["study", "run", "round2.yaml"]) == 0
    commands = (["study", "status", "--json"], ["trial", "list", "--json"], ["study", "report"])

    def said() -> list[str]:
        capsys.readouterr()
        assert [run(command) for command in commands] == [0, 0, 0]
        return capsys.readouterr()

    installed = said()
    monkeypatch.setattr(sys, "path", [each for each in sys.path if each != str(site)])
    elsewhere = said()
    assert elsewhere.out == installed.out
    assert "cannot run here: round1.yaml:13: hyperparameters.optimizer: expects adamw" in elsewhere.err
    before = sorted(Path().rglob("*"))
    for verb in (["run", "round2.yaml"], ["promote", "--to", "round3", "--max-train-steps", "48"]):
        assert run(["study", *verb]) == 2
    assert "did you mean sgd_momentum?" not in capsys.readouterr().err
    assert sorted(Path().rglob("*")) == before

    codes, alone = typed_elsewhere(study / "dry-run", commands[-1], path=site.with_name("nothing"))
    assert (codes, "decay_power 1.5" in alone) == ([0], True)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("{optimizer: sgd, sgd_momentum: 0.5}", None),
        ("{optimizer: sgd, sgd_momentum: 0.7}", "sgd_momentum: 0.7 is not in the search space"),
        ("{optimizer: adamw, sgd_momentum: 0.5}", "sgd_momentum: applies only to optimizer: sgd"),
    ],
)
def test_an_entry_names_hyperparameters_of_a_plug_in(
    site: Path, study: Path, entry: str, message: str | None
) -> None:
    path = study / "round1.yaml"
    path.write_text(path.read_text().replace("enqueue: []", f"enqueue: [{entry}]"))
    refused = nullcontext() if message is None else pytest.raises(RoundFileError, match=message)
    with refused:
        with_plug_ins(load_round(path))


def test_whose_hyperparameter_it_is_is_not_guessed_before_plug_ins_of_several_kinds_are_imported(
    site: Path, study: Path
) -> None:
    path = study / "round1.yaml"
    text = path.read_text().replace("schedule: power", "schedule: [power, constant]")
    entry = "{optimizer: adamw, schedule: power, decay_power: 1.5}"
    path.write_text(text.replace("enqueue: []", f"enqueue: [{entry}]"))
    found = with_plug_ins(load_round(path))
    assert found.spec.space()["decay_power"].only_with == Condition("schedule", ("power",))


def test_names_that_nothing_installed_has_are_one_line_for_each_file(
    study: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Names like those of other keys may still be of the package that is missing."""
    path = study / "round1.yaml"
    path.write_text(path.read_text().replace(OWN, f"{OWN}  stairs_steps: 5\n"))
    monkeypatch.chdir(study)
    assert run(["study", "check", "round1.yaml"]) == 2
    said = capsys.readouterr().err
    assert said.count("; if a package registers this name, install the package") == 2
    assert said.count("\n") == 2, said
    run(["study", "status"])
    assert "(and 1 more: tuner study check round1.yaml)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("  sgd_momentun: 0.5\n", "hyperparameters.sgd_momentun: unknown; did you mean sgd_momentum?"),
        ("  unheard_of: 0.5\n", "max_grad_norm, training_seed, sgd_momentum"),
        ("  sgd_momentum: 1.5\n", "hyperparameters.sgd_momentum: expects a number of at least 0 and below 1"),
        ("  adam_beta1: 0.5\n", "hyperparameters.adam_beta1: applies only to optimizer: adamw"),
    ],
)
def test_a_bad_key_is_found_before_anything_changes(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    wrong: str, message: str,
) -> None:  # fmt: skip
    folder = tmp_path / "study"
    path = write_round(folder, optimizer="my_methods:OPTIMIZER")
    path.write_text(path.read_text().replace("search:\n", f"{wrong}search:\n"))
    assert load_round(path).spec.unloaded == (("optimizer", "my_methods:OPTIMIZER"),)
    monkeypatch.chdir(folder)
    assert run(["study", "run", "round1.yaml"]) == 2
    assert message in capsys.readouterr().err
    assert [each.name for each in folder.iterdir()] == ["round1.yaml"]


ROW = "Hyperparameter('own_rate', {default}, Number(above=0), 'Means.')"
FAULTY = f"""
from tuner.methods.hyperparameters import Hyperparameter
from tuner.methods.kinds import Number
from tuner.methods.schedules import Schedule

DEFAULT = Schedule(name="x", multiplier=lambda *_: 1.0, hyperparameters=({ROW.format(default=-1)},))
NO_DEFAULT = Schedule(name="x", multiplier=lambda *_: 1.0, hyperparameters=({ROW.format(default=None)},))
ONE = Schedule(name="x", multiplier=lambda *_: 1.0, hyperparameters={ROW.format(default=1.0)})
RAISES = Schedule(name="x", multiplier=lambda done, values, horizon: 1 / (horizon - 1 - done))
ABOVE = Schedule(name="x", multiplier=lambda *_: 1.5)
BELOW = Schedule(name="x", multiplier=lambda done, values, horizon: 4 - done)
NOTHING = Schedule(name="x", multiplier=lambda *_: None)
"""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("DEFAULT", "the default of own_rate cannot be used: expects a number above 0, got -1"),
        ("NO_DEFAULT", "the default of own_rate cannot be used: expects a number above 0, but it has no"),
        ("ONE", "expects a tuple of hyperparameters, got Hyperparameter(name='own_rate'"),
        ("RAISES", "round1.yaml:16: hyperparameters.schedule: faulty_rates:RAISES: multiplier(7, hyperp"),
        ("ABOVE", "multiplier(1, hyperparameters, 8) returned 1.5; it must return a number from 0 to 1"),
        ("BELOW", "multiplier(1, hyperparameters, 8) returned 3; it must"),
        ("NOTHING", "multiplier(1, hyperparameters, 8) returned None; it must"),
    ],
)
def test_a_schedule_that_cannot_work_is_bad_input_and_leaves_nothing(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    name: str, message: str,
) -> None:  # fmt: skip
    (site / "faulty_rates.py").write_text(FAULTY)
    folder = tmp_path / "study"
    path = write_round(folder, schedule=f"faulty_rates:{name}")
    path.write_text(path.read_text().replace("  decay_steps: 3\n", ""))
    monkeypatch.chdir(folder)
    for verb in (["run"], ["run", "--engine", "simulated"], ["check", "--probe"]):
        assert run(["study", *verb[:1], "round1.yaml", *verb[1:]]) == 2
        assert message in capsys.readouterr().err
    assert [each.name for each in folder.iterdir() if each.name != "dry-run"] == ["round1.yaml"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("lambda values: 1 / 0", r"its config raised ZeroDivisionError: division by zero \(.*faulty_variant"),
        ("lambda values: None", "its config returned None, expects a mapping"),
    ],
)
def test_a_variant_that_cannot_work_is_bad_input_at_its_line(
    site: Path, tmp_path: Path, config: str, message: str
) -> None:
    (site / "faulty_variant.py").write_text(
        "from tuner.methods.variants import Variant\n"
        f"WRONG = Variant(name='x', title='X', hyperparameters=(), config={config})\n"
    )
    path = write_round(tmp_path / "study")
    path.write_text(path.read_text().replace("search:\n", "  variant: faulty_variant:WRONG\nsearch:\n"))
    said = rf"^round1.yaml:\d+: hyperparameters.variant: variant .*: {message}"
    sys.modules.pop("faulty_variant", None)
    registry._found.cache_clear()
    with pytest.raises(RoundFileError, match=said):
        with_plug_ins(load_round(path))


def test_check_says_what_it_did_not_check(site: Path, study: Path) -> None:
    document = tuner.Study(study).check("round1.yaml")
    assert document["ok"]
    assert document["plan"]["unchecked"] == ["sgd", "power", "decay_power", "sgd_momentum"]
    assert any("not checked: sgd, power" in remark for remark in document["remarks"])


def test_a_file_is_read_without_importing_what_it_names(site: Path, study: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from tuner.config import load_round\n"
        "print(load_round(Path('round1.yaml')).spec.num_trials, 'my_methods' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=study, capture_output=True, text=True, check=True
    )
    assert done.stdout == "4 False\n"


def test_a_name_that_leads_nowhere_is_refused_with_what_is_allowed(study: Path) -> None:
    with pytest.raises(RoundFileError, match=r"optimizer: expects adamw, .*muon or .*, got 'sgd'"):
        load_round(study / "round1.yaml")


def test_a_record_holds_all_of_a_description() -> None:
    kinds = (Number(above=0), Integer(at_least=1), Flag(), OneOf(("a", "b"), (("c", "It is not."),)))
    rows = tuple(
        Hyperparameter(f"own_{i}", None, kind, "Means.", "by itself") for i, kind in enumerate(kinds)
    )
    plug_in = PlugIn("optimizer", "m:X", rows, state_bytes=3, amplifies_rounding=False)
    assert PlugIn.from_json(json.loads(json.dumps(plug_in.to_json()))) == plug_in
    rows_of = plug_ins.table_with([plug_in])
    assert set(rows_of) - set(HYPERPARAMETERS) == {row.name for row in rows}


@pytest.mark.parametrize("name", ["learning_rate", "adam_beta1", "decay_steps"])
def test_a_name_of_tuners_keeps_its_meaning(name: str) -> None:
    row = Hyperparameter(name, 7, Integer(at_least=0), "Another thing.")
    with pytest.raises(InputError, match=f"m:X: declares {name}, which is already another hyperparameter"):
        plug_ins.table_with([PlugIn("optimizer", "m:X", (row,))])


def test_no_file_can_say_what_is_recorded(study: Path) -> None:
    path = write_round(study)
    path.write_text(path.read_text() + "plug_ins: []\n")
    with pytest.raises(RoundFileError, match="plug_ins: unknown"):
        load_round(path)
    assert "plug_ins" not in RoundSpec.model_json_schema()["properties"]
