"""Every kind of command over two rounds and under kills: what takes too long for `make test`.

Run by `make acceptance-commands`, or `pytest -m acceptance tests/commands`.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests import studies
from tests.commands.driving import KINDS, TORCHRUN, Ran, of_kind, trainer, trl, written
from tests.commands.test_rounds import curve, environment, living, searching, tuner, wait_for
from tuner.commands import process_tree

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(1500)]
STUDIES = Path(__file__).parents[2] / "studies"


@pytest.mark.parametrize("kind", KINDS)
def test_two_rounds_with_a_promotion_that_resumes(tmp_path: Path, kind: str) -> None:
    content = of_kind(kind, tmp_path) | {"run": {"gpus_per_worker": 0, "decay_branches": False}}
    path = written(tmp_path, content)
    tuner(tmp_path, "study", "run", path.name)
    longer = content["max_train_steps"] + 12
    wish = ("--to", "round2", "--max-train-steps", str(longer), "--json")
    assert json.loads(tuner(tmp_path, "study", "promote", *wish))["continues"]
    tuner(tmp_path, "study", "run", "round2.yaml")
    shown = json.loads(tuner(tmp_path, "trial", "show", "round2/0", "--json"))
    assert shown["continues"].startswith("round1/0@")
    start = int(shown["continues"].partition("@")[2])
    assert shown["executed_steps"] == longer - start > 0
    assert Path(shown["adapter"]).is_dir()

    values = {**content["hyperparameters"], "decay_steps": shown["hyperparameters"]["decay_steps"]}
    scratch = content | {"round": "scratch", "max_train_steps": longer, "hyperparameters": values}
    written(tmp_path, scratch, "scratch.yaml")
    tuner(tmp_path, "study", "run", "scratch.yaml")
    resumed, again = curve(tmp_path, "round2/0"), curve(tmp_path, "scratch/0")
    later = [step for step in again if step > start]
    assert later[-1] == longer
    assert [resumed[step] for step in later] == [again[step] for step in later]


@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_random_each_trial_ends_once_and_no_process_is_left(tmp_path: Path, kind: str) -> None:
    """Parent, command and the whole tree are killed, one after another, at random times."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    written(whole, of_kind(kind, whole) | {"run": {"gpus_per_worker": 0, "decay_branches": False}})
    tuner(whole, "study", "run", "round1.yaml")
    shutil.copytree(whole, killed, ignore=shutil.ignore_patterns("runs", "tuner.db*"))
    draw = random.Random(kind)
    for victim in draw.sample(["parent", "command", "tree"], 3):
        parent = subprocess.Popen(
            [sys.executable, "-m", "tuner.cli", "study", "run", "round1.yaml"],
            cwd=killed, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        wait_for(lambda parent=parent: living(killed) or parent.poll() is not None, seconds=300)  # type: ignore[misc]
        time.sleep(draw.uniform(0.0, 1.0 if kind == "plain" else 20.0))
        _kill(parent, victim, [process.pid for process in living(killed)])
        parent.wait(timeout=600)
    tuner(killed, "study", "run", "round1.yaml")
    assert curve(killed, "round1/0") == curve(whole, "round1/0")
    trials = json.loads(tuner(killed, "trial", "list", "--json"))
    assert [trial["state"] for trial in trials] == ["complete"]
    wait_for(lambda: not living(killed))


def _kill(parent: subprocess.Popen[bytes], victim: str, command: list[int]) -> None:
    if parent.poll() is not None:
        return
    everything: list[int] = []
    with contextlib.suppress(psutil.NoSuchProcess):  # the round has just ended
        everything = [each.pid for each in psutil.Process(parent.pid).children(recursive=True)]
    victims = {"parent": [parent.pid], "command": command, "tree": [parent.pid, *everything, *command]}[
        victim
    ]
    for pid in victims:
        with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("seed", range(4))
def test_a_plain_script_killed_anywhere(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    values = {**searching()["hyperparameters"], "pause": 0.03}
    written(tmp_path / "whole", searching())
    tuner(tmp_path / "whole", "study", "run", "round1.yaml")
    folder = tmp_path / "killed"
    written(folder, searching(hyperparameters=values))
    for _ in range(4):
        parent = subprocess.Popen(
            [sys.executable, "-m", "tuner.cli", "study", "run", "round1.yaml"],
            cwd=folder, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        time.sleep(draw.uniform(2.0, 8.0))
        tree = psutil.Process(parent.pid).children(recursive=True) if parent.poll() is None else []
        victims = draw.choice(
            [
                [parent.pid],
                [p.pid for p in tree[:1]],
                [p.pid for p in tree[1:]],
                [parent.pid, *(p.pid for p in tree)],
            ]
        )
        for pid in victims:
            if psutil.pid_exists(pid):
                os.kill(pid, signal.SIGKILL)
        if parent.pid in victims:
            parent.wait()
            continue
        parent.wait(timeout=120)
        break
    assert studies.tuner("study", "run", "round1.yaml", directory=folder).returncode == 0
    for trial in ("round1/0", "round1/1"):
        assert curve(folder, trial) == curve(tmp_path / "whole", trial)
    wait_for(lambda: not living(folder))


def test_auto_stops_after_two_rounds_that_cannot_tell_and_says_what_is_missing(tmp_path: Path) -> None:
    values = {"learning_rate": [0.003, 0.05], "schedule": "linear", "decay_steps": 2}
    content = searching(max_train_steps=8, hyperparameters=values, evaluation={"every_steps": 8})
    written(tmp_path, content)
    done = studies.tuner("study", "auto", "round1.yaml", directory=tmp_path)
    assert done.returncode == 0, done.stderr
    said = " ".join((done.stdout + done.stderr).split())
    assert "enough after round2: for the second time in a row the round cannot tell" in said
    assert "per-example losses are unknown. Repeat the best trial with other seeds." in said


def test_the_study_of_trl_runs_two_rounds(tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="TRL is not installed")
    for name in ("dpo-trl", "quickstart"):
        shutil.copytree(STUDIES / name, tmp_path / name, ignore=shutil.ignore_patterns("runs", "tuner.db*"))
    folder = tmp_path / "dpo-trl"
    path = folder / "round1.yaml"
    path.write_text(
        path.read_text()
        .replace("trials: 4", "trials: 2")
        .replace("max_train_steps: 30", "max_train_steps: 20")
    )
    tuner(folder, "study", "run", "round1.yaml")
    tuner(folder, "study", "promote", "--to", "round2", "--max-train-steps", "30")
    tuner(folder, "study", "run", "round2.yaml")
    shown = json.loads(tuner(folder, "trial", "show", "round2/0", "--json"))
    assert shown["continues"]
    assert shown["executed_steps"] < 30
    assert Path(shown["adapter"], "adapter_config.json").is_file()


def test_torchruns_checkpoints_have_the_state_of_both_processes(tmp_path: Path) -> None:
    content = trainer()
    content["command"] = {**content["command"], "run": [*TORCHRUN, *content["command"]["run"][1:]]}
    short = Ran(tmp_path, content | {"run": {"gpus_per_worker": 2}})
    assert short.end.outcome == "complete"
    assert len(list((short.directory / "trunk").glob("step-*/checkpoint/rng_state_*.pth"))) == 2


def test_stopping_torchrun_leaves_no_process(tmp_path: Path) -> None:
    content = trainer(max_train_steps=100_000, evaluation={"every_steps": 50_000})
    content["hyperparameters"]["decay_steps"] = 10
    content["command"] = {**content["command"], "run": [*TORCHRUN, *content["command"]["run"][1:]]}
    ran = Ran(tmp_path, content, stopping=lambda events: len(events) > 1)
    assert ran.end.outcome == "stopped"
    assert not list(process_tree.with_token(ran.tokens[0]))


def test_a_merged_checkpoint_and_its_estimated_size(tmp_path: Path) -> None:
    """TRL's own adapter is merged; what `study check` said of the disk is near what was written."""
    from transformers import AutoModelForCausalLM

    written(tmp_path, trl(tmp_path, "sft", max_train_steps=12))
    plan = json.loads(tuner(tmp_path, "study", "check", "round1.yaml", "--json"))["plan"]
    tuner(tmp_path, "study", "run", "round1.yaml")
    kept = list(tmp_path.glob("runs/round1/trial-0000/last/step-*/checkpoint"))
    size = max(sum(path.stat().st_size for path in place.rglob("*") if path.is_file()) for place in kept)
    assert 0.5 * size <= plan["checkpoint_bytes"] / 4 <= 2 * size
    tuner(tmp_path, "trial", "export", "best", "--to", "merged", "--merge")
    AutoModelForCausalLM.from_pretrained(tmp_path / "merged")


FINISHED = Path(__file__).parent / "finished_runs"


def test_eight_runs_of_trl_that_no_one_prepared_become_a_round(tmp_path: Path) -> None:
    """Real `trl sft` runs without tuner's hook; `tests/commands/finished_runs` has what they left."""
    pytest.importorskip("trl", reason="TRL is not installed")
    content = trl(tmp_path, "sft")
    config = yaml.safe_load((tmp_path / "trl.yaml").read_text())
    for number, rate in enumerate((1e-4, 3e-4, 1e-3, 2e-3, 3e-3, 5e-3, 1e-2, 2e-2)):
        own = {
            **config, "learning_rate": rate, "max_steps": 20, "eval_strategy": "steps", "eval_steps": 4,
            "save_steps": 4, "logging_steps": 4, "output_dir": f"outputs/run-{number}", "lora_r": 4,
            "warmup_steps": 2, "lr_scheduler_type": "linear",
        }  # fmt: skip
        (tmp_path / f"own-{number}.yaml").write_text(yaml.safe_dump(own))
        subprocess.run(
            [Path(sys.executable).parent / "trl", "sft", "--config", f"own-{number}.yaml"],
            cwd=tmp_path, env=environment(), check=True, capture_output=True, timeout=600,
        )  # fmt: skip
    if os.environ.get("RECORD_FINISHED_RUNS"):
        _record(tmp_path / "outputs", FINISHED)
    (tmp_path / "study").mkdir()
    given = ("--set", "lr_scheduler_type=linear", "--set", "warmup_steps=2")
    tuner(tmp_path / "study", "study", "import", "../outputs", *given)
    trials = json.loads(tuner(tmp_path / "study", "trial", "list", "--json"))
    assert len(trials) == 8
    for number, trial in enumerate(trials):
        state = json.loads(_last_state(tmp_path / "outputs" / f"run-{number}").read_text())
        assert trial["best_step"] == best_step(state)
        assert trial["hyperparameters"]["decay_steps"] == 18
        assert "q_proj" in trial["hyperparameters"]["target_modules"], "not the names of single layers"
    assert content["max_train_steps"] == 20


def best_step(state: dict[str, Any]) -> int:
    """The step of the lowest evaluation loss in a Trainer's history, the earliest of equal ones."""
    found = [(entry["eval_loss"], entry["step"]) for entry in state["log_history"] if "eval_loss" in entry]
    return int(min(found)[1])


def _last_state(run: Path) -> Path:
    return max(run.glob("checkpoint-*/trainer_state.json"), key=lambda path: int(path.parent.name[11:]))


def _record(outputs: Path, target: Path) -> None:
    """Copy what is needed of finished runs to learn from them: no weights, and no pickle."""
    for run in sorted(outputs.iterdir()):
        place = target / run.name / _last_state(run).parent.name
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy(_last_state(run), place)
        shutil.copy(_last_state(run).with_name("adapter_config.json"), place)
