"""The schedules that tuner has, beside transformers' and over all shapes, and one that a user brings."""

import itertools
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import get_scheduler

import tuner
from tests.contracts.methods import ScheduleContract
from tests.studies import ENVIRONMENT, write_round
from tuner.methods.kinds import OneOf
from tuner.methods.plug_ins import PlugIn
from tuner.methods.registry import BUILT_IN
from tuner.methods.schedules import Schedule, decay_names, known_schedule, schedule
from tuner.methods.schedules.linear import DECAY_SHAPE
from tuner.playbook import can_continue
from tuner.playbook.schedule import (
    decay_length,
    multiplier,
    step_at_rate_share,
    step_at_recorded_share,
    tiny_rate_share,
    trunk_end,
)
from tuner.records import Evaluation, Value

SHAPES = ("linear", "sqrt", "cosine")
STEPPED = '''
"""Half the peak over the last `low_steps`."""

from tuner.methods.hyperparameters import Hyperparameter
from tuner.methods.kinds import Integer
from tuner.methods.schedules import Schedule

LOW_STEPS = Hyperparameter("low_steps", 10, Integer(at_least=0), "Steps at half the peak.", in_decay="length")


def _multiplier(updates_done, values, max_train_steps):
    return 1.0 if updates_done < max_train_steps - LOW_STEPS.number(values) else 0.5


STEPPED = Schedule(name="stepped:STEPPED", multiplier=_multiplier, hyperparameters=(LOW_STEPS,))
'''


def theirs(name: str, warmup: int, steps: int, **arguments: object) -> list[float]:
    """Rates of a scheduler of transformers over a run."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    made = get_scheduler(
        name,
        optimizer,
        num_warmup_steps=warmup,
        num_training_steps=steps,
        scheduler_specific_kwargs=arguments,
    )
    rates = []
    for _ in range(steps):
        rates.append(made.get_last_lr()[0])
        optimizer.step()
        made.step()
    return rates


def values_of(shape: str, *, warmup: int = 0, decay: int) -> dict[str, Value]:
    """A trial with a decay."""
    return {"schedule": "linear", "warmup_steps": warmup, "decay_steps": decay, "decay_shape": shape}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("warmup", "decay", "horizon"), [(0, 1, 1), (4, 24, 60), (0, 40, 40), (7, 0, 50)])
def test_a_decay_of_each_shape_is_transformers(shape: str, warmup: int, decay: int, horizon: int) -> None:
    values = values_of(shape, warmup=warmup, decay=decay)
    named = schedule("linear").trainer_scheduler
    assert named is not None
    name, arguments = named(values, horizon, horizon)
    ours = [multiplier(done, values, horizon) for done in range(horizon)]
    assert ours == pytest.approx(theirs(name, warmup, horizon, **arguments), abs=1e-12)


@pytest.mark.parametrize("warmup", [0, 1, 5, 30])
def test_inverse_sqrt_is_transformers_and_vaswanis(warmup: int) -> None:
    values: dict[str, Value] = {"schedule": "inverse_sqrt", "warmup_steps": warmup}
    named = schedule("inverse_sqrt").trainer_scheduler
    assert named is not None
    name, arguments = named(values, 100, 100)
    ours = [multiplier(done, values, 100) for done in range(100)]
    assert ours == pytest.approx(theirs(name, warmup, 100, **arguments), abs=1e-12)
    if warmup:
        published = [min(step**-0.5, step * warmup**-1.5) / warmup**-0.5 for step in range(1, 100)]
        assert ours[1:] == pytest.approx(published, abs=1e-12)


def test_inverse_sqrt_is_stable_to_the_end_and_goes_on_from_there() -> None:
    values: dict[str, Value] = {"schedule": "inverse_sqrt", "warmup_steps": 5}
    assert trunk_end(values, 60) == 60
    assert decay_length(values) == 0
    assert can_continue(values, 60, values, 180, 60) is None


def test_an_inverse_sqrt_gains_steps_at_its_low_rates() -> None:
    values: dict[str, Value] = {"schedule": "inverse_sqrt", "warmup_steps": 1}
    assert tiny_rate_share(values, old=values, old_horizon=50, new_horizon=100) == 0.0
    assert tiny_rate_share(values, old=values, old_horizon=50, new_horizon=150) == pytest.approx(
        0.49, abs=0.01
    )


@given(
    shape=st.sampled_from(SHAPES),
    warmup=st.integers(0, 50),
    decay=st.integers(1, 200),
    stable=st.integers(0, 200),
    longer=st.integers(1, 200),
)
def test_a_decay_falls_from_the_peak_to_zero(
    shape: str, warmup: int, decay: int, stable: int, longer: int
) -> None:
    values, horizon = values_of(shape, warmup=warmup, decay=decay), warmup + stable + decay
    rates = [multiplier(done, values, horizon) for done in range(horizon + 1)]
    falling = rates[horizon - decay :]
    assert (falling[0], falling[-1]) == (1.0, 0.0)
    assert falling == sorted(falling, reverse=True)
    largest = {"linear": 1 / decay, "sqrt": decay**-0.5, "cosine": math.pi / 2 / decay}[shape]
    assert max(a - b for a, b in itertools.pairwise(falling)) <= largest + 1e-12
    after = values_of(shape, warmup=warmup, decay=decay + longer)
    common = range(horizon - decay)
    assert rates[: len(common)] == [multiplier(done, after, horizon + 2 * longer) for done in common]


def test_runs_that_differ_in_the_shape_of_their_decay_share_their_stable_phase() -> None:
    one, other = values_of("linear", decay=24), values_of("sqrt", decay=72)
    assert can_continue(one, 60, other, 180, 36) is None
    assert set(decay_names(one)) == {"decay_steps", "decay_shape"}
    kind = DECAY_SHAPE.kind
    assert isinstance(kind, OneOf)
    assert kind.names == SHAPES


@pytest.fixture
def stepped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The path of a schedule in a file of the user's."""
    (tmp_path / "stepped.py").write_text(STEPPED)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path.cwd()}")
    return "stepped:STEPPED"


class TestOfTheUsers(ScheduleContract):
    """Its rows are not in the table, and its trainer has no name."""

    @pytest.fixture
    def method(self, stepped: str) -> Schedule:
        return schedule(stepped)

    def test_the_table_has_what_it_declares(self, method: Schedule) -> None:  # type: ignore[override]
        assert [row.name for row in method.hyperparameters] == ["low_steps"]


def test_what_was_recorded_of_a_schedule_is_read_without_importing_it(stepped: str) -> None:
    program = f"""
import sys
from tuner.methods.hyperparameters import Hyperparameter
from tuner.methods.kinds import Integer
from tuner.methods.plug_ins import PlugIn
from tuner.methods.registry import BUILT_IN
from tuner.playbook import can_continue
from tuner.playbook.schedule import trunk_end
rows = (Hyperparameter("low_steps", 10, Integer(at_least=0), "", in_decay="length"),)
PlugIn('schedule', {stepped!r}, rows, has_stable_phase=True).stand_in()
values = {{"schedule": {stepped!r}, "low_steps": 20}}
print(trunk_end(values, 60), can_continue(values, 60, {{**values, "low_steps": 60}}, 180, 40))
print("stepped" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["40 None", "False"]


def test_a_schedule_that_is_loaded_is_preferred_to_its_record(stepped: str) -> None:
    loaded = schedule(stepped)
    PlugIn("schedule", stepped, ()).stand_in()
    assert known_schedule(stepped) is loaded


def plain_round(directory: Path, *, steps: int, low_steps: int) -> tuner.Study:
    """A study with one trial on the user's schedule, which fixes everything."""
    path = write_round(
        directory, steps=steps, trials=1, schedule="stepped:STEPPED", learning_rate=1e-2, lora_r=4
    )
    path.write_text(path.read_text().replace("decay_steps: 3", f"low_steps: {low_steps}"))
    return tuner.Study(directory)


def test_a_round_on_the_users_schedule_is_promoted_and_resumes_exactly(stepped: str, tmp_path: Path) -> None:
    study = plain_round(tmp_path / "study", steps=8, low_steps=3)
    study.run("round1.yaml", slots=1, progress=False)
    (first,) = study.round("round1").trials
    peak = [made.learning_rate for made in first.evaluations if made.step == 4]
    assert peak == [1e-2]
    assert first.evaluations[-1].learning_rate == pytest.approx(5e-3)
    promoted = study.promote("round2", max_train_steps=16)
    assert "low_steps: 6" in Path(promoted.path).read_text()
    study.run("round2.yaml", slots=1, progress=False)
    (longer,) = study.round("round2").trials
    assert longer.executed_steps == 16 - 5, "from the end of the stable phase"
    fresh = plain_round(tmp_path / "fresh", steps=16, low_steps=6)
    fresh.run("round1.yaml", slots=1, progress=False)
    (expected,) = fresh.round("round1").trials
    assert [(e.step, e.eval_loss, e.learning_rate) for e in longer.evaluations] == [
        (e.step, e.eval_loss, e.learning_rate) for e in expected.evaluations
    ]
    # Reading it elsewhere, without the file, says the same.
    program = (
        "import tuner; study = tuner.Study('.')\n"
        "print([(str(study.round(name).advice.diagnosis), study.round(name).advice.suggested_max_train_steps)"
        " for name in ('round1', 'round2')])"
    )
    elsewhere = {**ENVIRONMENT, "PYTHONPATH": str(Path.cwd()), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path / "study",
        env=elsewhere,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    readings = [study.round(name).advice for name in ("round1", "round2")]
    here = [(str(advice.diagnosis), advice.suggested_max_train_steps) for advice in readings]
    assert done.stdout.strip() == str(here)


def test_the_step_at_a_share_of_the_recorded_rates_is_that_of_the_multiplier() -> None:
    values = {"schedule": "linear", "warmup_steps": 0, "decay_steps": 400}
    evaluations = [
        Evaluation(step, 1.0, learning_rate=multiplier(step - 1, values, 1000) if step else None)
        for step in range(0, 1001, 20)
    ]
    assert step_at_recorded_share(evaluations, 0.75) == pytest.approx(
        step_at_rate_share(values, 1000, 0.75), abs=10
    )
    assert step_at_recorded_share((), 0.75) == 0.0


def test_a_trainers_name_means_one_schedule() -> None:
    """The one that an imported run of that name gets, and that exports itself by it."""
    named = [(theirs, name) for name in BUILT_IN["schedule"] for theirs in schedule(name).trainer_names]
    assert len(dict(named)) == len(named) >= 4
    for name in BUILT_IN["schedule"]:
        exported = schedule(name).trainer_scheduler
        assert exported is not None
        theirs, _ = exported({"schedule": name, "warmup_steps": 2, "decay_steps": 3}, 10, 10)
        assert dict(named)[theirs] == name
