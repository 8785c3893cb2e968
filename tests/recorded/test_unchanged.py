"""What users measured does not change while the code is moved: studies and replays, as they were recorded.

`python -m tests.recorded.test_unchanged` records them again, after a change that is meant. Sentences are not
compared, their numbers are. Two of the quickstart's trials are trained here; both of its rounds are those of
the tutorial, which `tests/docs/test_walkthrough.py` types in `make acceptance`.
"""

import importlib
import json
import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

import tuner
from tests.studies import QUICKSTART

HERE = Path(__file__).parent
DRY_RUN, QUICKSTART_ROUNDS, REPLAYS = (
    HERE / name for name in ("dry_run.json", "quickstart_rounds.json", "taskset_replays.json")
)
BENCHMARKS = HERE.parents[1] / "benchmarks"
TASKSET = HERE.parents[2] / "shared" / "data" / "taskset"

METHODS = ("tuner", "tuner-promotions")
"""`study auto` with passes, and promotions one after another."""
SEEDS = (0, 1)
STEADY = 5e-3
"""Below this rate the quickstart's trials forget a rounding error; above, it grows to a tenth of the loss."""

ADDED_SINCE = {"decay_shape": "linear"}
"""Hyperparameters that were added after the recording, and the value with which nothing changes."""

_NUMBER = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?(?:e[+-]?\d+)?")


# --- what is recorded -----------------------------------------------------------------------------


def measured(each: tuner.Round) -> dict[str, Any]:
    """A round: its trials, and what it says of its horizon."""
    advice = each.advice
    gain = advice.gain(2 * each.max_train_steps)
    return {
        "round": each.name,
        "max_train_steps": each.max_train_steps,
        "diagnosis": str(advice.diagnosis),
        "suggested": advice.suggested_max_train_steps,
        "evidence": numbers_in(advice.evidence),
        "rules": [finding.rule for finding in advice.findings],
        "statistics": {
            **({} if gain is None else {"gain": gain}),
            **{f"{f.rule}.{name}": value for f in advice.findings for name, value in f.numbers.items()},
        },
        "trials": [
            {
                "hyperparameters": {
                    name: value
                    for name, value in trial.hyperparameters.items()
                    if ADDED_SINCE.get(name) != value
                },
                "continues": trial.continues,
                "best_step": trial.best_step,
                "steps": [made.step for made in trial.evaluations],
                "losses": [made.eval_loss for made in trial.evaluations],
                "train_losses": [
                    made.train_loss for made in trial.evaluations if made.train_loss is not None
                ],
                "learning_rates": [made.learning_rate for made in trial.evaluations],
            }
            for trial in each.trials
        ],
    }


def numbers_in(sentences: Iterable[str]) -> list[float]:
    """The numbers of some sentences, whatever the words and their order."""
    return sorted({float(text.replace(",", "")) for text in _NUMBER.findall(" ".join(sentences))})


def dry_run(directory: Path) -> list[dict[str, Any]]:
    """Rounds of the quickstart's file with made-up losses, promoted until it is enough."""
    copy_quickstart(directory)
    tuner.Study(directory).auto("round1.yaml", engine="simulated", progress=False)
    return [measured(each) for each in tuner.Study(directory / "dry-run").rounds]


def train_quickstart(directory: Path) -> None:
    """Train the two rounds of `make quickstart`."""
    copy_quickstart(directory)
    study = tuner.Study(directory)
    study.run("round1.yaml", progress=False)
    study.promote("round2")
    study.run("round2.yaml", progress=False)


def quickstart_rounds(directory: Path) -> dict[str, Any]:
    """The two rounds of a study that is trained, and the promotion between them, planned again."""
    study = tuner.Study(directory)
    rounds = [measured(each) for each in study.rounds]
    promotion = study.promote("again", from_round="round1").document
    return {
        "machine": machine(),
        "rounds": rounds,
        "promotion": {
            **{key: promotion[key] for key in ("max_train_steps", "diagnosis", "trials", "continues")},
            "rules": [finding["rule"] for finding in promotion["findings"]],
            "hyperparameters": {
                name: {key: change[key] for key in ("from", "to", "tier")}
                for name, change in promotion["hyperparameters"].items()
                if not ADDED_SINCE.get(name) == change["from"] == change["to"]
            },
        },
    }


def taskset_replays(directory: Path, *, every: int = 1) -> list[dict[str, Any]]:
    """Replays of recorded learning curves, or every n-th: each improvement, and what was spent until then."""
    sys.path.insert(0, str(BENCHMARKS))
    taskset = importlib.import_module("taskset")
    jobs = [
        taskset.Job(path, method, seed, 600)
        for path in sorted(directory.glob("*.npz"))
        for method in METHODS
        for seed in SEEDS
    ]
    return [taskset.replay_job(job)._asdict() for job in jobs[::every]]


def copy_quickstart(directory: Path) -> None:
    for name in ("base", "data"):
        shutil.copytree(QUICKSTART / name, directory / name)
    shutil.copy(QUICKSTART / "round1.yaml", directory)


def machine() -> str:
    """What decides the last digit of a float32 sum on a CPU: its model, and torch with its kernels."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines()[:8] if cpuinfo.exists() else []
    named = ("vendor_id", "cpu family", "model")
    cpu = [line.split(":")[1].strip() for line in lines if line.startswith(named)]
    kernels = torch.backends.cpu.get_cpu_capability()
    return ", ".join([platform.machine(), *cpu, kernels, f"torch {torch.__version__}"])


# --- what is compared -----------------------------------------------------------------------------


def check_round(found: dict[str, Any], recorded: dict[str, Any], *, losses: float) -> None:
    """Hold a round against the recorded one: losses within a relative difference, statistics to 1e-9."""
    check_decisions(found, recorded)
    assert found["evidence"] == recorded["evidence"]
    assert found["statistics"] == pytest.approx(recorded["statistics"], rel=1e-9, abs=0)
    for trial, was in zip(found["trials"], recorded["trials"], strict=True):
        check_trial(trial, was, losses=losses)


def check_round_of_another_machine(found: dict[str, Any], recorded: dict[str, Any]) -> None:
    """Hold a round against one that another CPU trained.

    Its kernels add in another order, and steep rates make that grow: steady trials agree to 1e-5, the
    others before they begin.
    """
    check_decisions(found, recorded)
    for trial, was in zip(found["trials"], recorded["trials"], strict=True):
        check_trial_of_another_machine(trial, was)


def check_trial_of_another_machine(trial: dict[str, Any], was: dict[str, Any]) -> None:
    assert trial["hyperparameters"] == was["hyperparameters"]
    assert trial["losses"][0] == pytest.approx(was["losses"][0], rel=1e-6)
    if was["hyperparameters"]["learning_rate"] < STEADY:
        check_trial(trial, was, losses=1e-5)


def check_decisions(found: dict[str, Any], recorded: dict[str, Any]) -> None:
    for key in ("round", "max_train_steps", "diagnosis", "suggested", "rules"):
        assert found[key] == recorded[key], (found["round"], key)


def check_trial(trial: dict[str, Any], was: dict[str, Any], *, losses: float) -> None:
    for key in ("losses", "train_losses"):
        assert trial[key] == pytest.approx(was[key], rel=losses, abs=0, nan_ok=True), key
    for key in (trial.keys() | was.keys()) - {"losses", "train_losses"}:
        assert trial[key] == was[key], key


def check_quickstart(directory: Path) -> None:
    """Hold the two rounds that were trained in a folder against the recorded ones."""
    now, then = in_json(quickstart_rounds(directory)), json.loads(QUICKSTART_ROUNDS.read_text())
    assert now["promotion"] == then["promotion"]
    for found, recorded in zip(now["rounds"], then["rounds"], strict=True):
        if now["machine"] == then["machine"]:
            check_round(found, recorded, losses=0)
        else:
            check_round_of_another_machine(found, recorded)


def in_json(value: Any) -> Any:
    """A value as it is read back from its file."""
    return json.loads(json.dumps(value))


def test_a_dry_run_is_what_it_was(tmp_path: Path) -> None:
    now, then = in_json(dry_run(tmp_path)), json.loads(DRY_RUN.read_text())
    assert len(now) >= 3
    for found, recorded in zip(now, then, strict=True):
        check_round(found, recorded, losses=1e-9)


@pytest.mark.slow
def test_the_first_trials_of_the_quickstart_are_what_they_were(tmp_path: Path) -> None:
    """A trial depends on no other, so two of eight have the recorded losses."""
    copy_quickstart(tmp_path)
    file = tmp_path / "round1.yaml"
    file.write_text(file.read_text().replace("trials: 8", "trials: 2"))
    study = tuner.Study(tmp_path)
    study.run("round1.yaml", progress=False)
    found = in_json(measured(study.rounds[0]))["trials"]
    recorded = json.loads(QUICKSTART_ROUNDS.read_text())
    assert len(found) == 2
    for trial, was in zip(found, recorded["rounds"][0]["trials"], strict=False):
        if machine() == recorded["machine"]:
            check_trial(trial, was, losses=0)
        else:
            check_trial_of_another_machine(trial, was)


@pytest.mark.slow
@pytest.mark.skipif(not TASKSET.is_dir(), reason=f"the recorded learning curves are not in {TASKSET}")
@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.acceptance)])
def test_replays_of_recorded_curves_are_what_they_were(every: int) -> None:
    """Each fifth is of another file, and they have both methods and both seeds."""
    now, then = in_json(taskset_replays(TASKSET, every=every)), json.loads(REPLAYS.read_text())
    assert len(then) == 6 * len(METHODS) * len(SEEDS)
    for found, recorded in zip(now, then[::every], strict=True):
        assert found == recorded


def test_words_may_differ_and_numbers_may_not() -> None:
    assert numbers_in(["Train for 1,350 steps, 3.5% more.", "Of 3, 2 at 1e-3."]) == [1e-3, 2, 3, 3.5, 1350]
    assert numbers_in(["Loss 1.9797 at step 45"]) != numbers_in(["Loss 1.9798 at step 45"])


# --- recording ------------------------------------------------------------------------------------


def record() -> None:
    """Write all of the files again."""
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryDirectory() as scratch:
        write(DRY_RUN, dry_run(Path(scratch)))
    with tempfile.TemporaryDirectory() as scratch:
        train_quickstart(Path(scratch))
        write(QUICKSTART_ROUNDS, quickstart_rounds(Path(scratch)))
    if TASKSET.is_dir():
        write(REPLAYS, taskset_replays(TASKSET))
    else:
        sys.stdout.write(f"{REPLAYS} stays: the recorded learning curves are not in {TASKSET}\n")


def write(path: Path, value: Any) -> None:
    path.write_text(pretty(value) + "\n", encoding="utf-8")
    sys.stdout.write(f"wrote {path}\n")


def pretty(value: Any, indent: str = "") -> str:
    """JSON with a line for each value, and for a list that holds no mappings."""
    deeper = indent + " "
    if isinstance(value, dict) and value:
        lines = [f"{deeper}{json.dumps(key)}: {pretty(item, deeper)}" for key, item in value.items()]
        return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
    if isinstance(value, list | tuple) and any(isinstance(item, dict) for item in value):
        return "[\n" + ",\n".join(deeper + pretty(item, deeper) for item in value) + f"\n{indent}]"
    return json.dumps(value)


if __name__ == "__main__":
    record()
