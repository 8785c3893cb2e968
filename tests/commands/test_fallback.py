"""Commands that report nothing: the logs of their tools are read instead, in their order."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from tests.commands.driving import PYTHON, Ran, document, trainer
from tuner.commands.fallback import Fallback
from tuner.errors import InputError
from tuner.records import LOSS, CheckpointKind, Direction, Objective

ACCURACY = Objective("eval_accuracy", Direction.MAXIMIZE)


def state(output: Path, step: int, *, whole: bool = True) -> None:
    """A Trainer's checkpoint, and its history up to there."""
    place = output / f"checkpoint-{step}"
    place.mkdir(parents=True)
    history = []
    for at in range(4, step + 1, 4):
        history += [
            {"step": at, "loss": 2.0, "learning_rate": 0.1, "grad_norm": 1.0},
            {"step": at, "eval_loss": 40.0 - at, "eval_accuracy": at / 100},
        ]
    history += [{"step": step, "train_runtime": 1.0}, {"step": step, "eval_loss": 99.0}]
    text = json.dumps({"global_step": step, "log_history": history})
    (place / "trainer_state.json").write_text(text if whole else text[:40])


def factory_log(output: Path, *steps: int) -> None:
    """LLaMA-Factory's log, whose last line is still being written."""
    output.mkdir(parents=True, exist_ok=True)
    lines = [{"current_steps": at, "total_steps": 24, "eval_loss": 20.0 + at} for at in steps]
    lines.insert(0, {"current_steps": 2, "loss": 3.0, "lr": 0.1, "accuracy": 0.5})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (output / "trainer_log.jsonl").write_text(text + '{"current_steps": 9')


def events(output: Path, *steps: int) -> None:
    tensorboard = pytest.importorskip("torch.utils.tensorboard", reason="TensorBoard is not installed")
    with tensorboard.SummaryWriter(str(output / "runs")) as writer:
        for at in steps:
            writer.add_scalar("train/loss", 1.5, at)
            writer.add_scalar("eval/loss", 30.0 + at, at)
            writer.add_scalar("eval/accuracy", 0.5, at)


def losses(fallback: Fallback) -> list[tuple[int, float]]:
    return [(line["step"], line["eval_loss"]) for line in fallback.new_lines() if "eval_loss" in line]


def test_the_first_log_in_order_that_has_the_metric_is_read(tmp_path: Path) -> None:
    fallback = Fallback(tmp_path, LOSS)
    assert losses(fallback) == []
    assert fallback.source is None
    events(tmp_path, 4)
    assert losses(fallback) == [(4, 34.0)]
    state(tmp_path, 8)
    assert losses(fallback) == [(8, 32.0)]  # what was read already stays as it was
    factory_log(tmp_path, 4, 8, 12)
    assert losses(fallback) == [(12, 32.0)]
    assert fallback.source == "trainer_log.jsonl"
    (own,) = losses(Fallback(tmp_path, ACCURACY, from_step=4))
    assert own == (8, 32.0)


def test_a_checkpoint_is_said_once_it_is_whole(tmp_path: Path) -> None:
    fallback = Fallback(tmp_path, LOSS, gpus=2)
    state(tmp_path, 4)
    state(tmp_path, 8, whole=False)
    (tmp_path / "checkpoint-4" / "rng_state_0.pth").touch()
    assert [(line["step"], line["processes"]) for line in fallback.new_lines() if "checkpoint" in line] == [
        (4, 2)
    ]
    (tmp_path / "checkpoint-8" / "trainer_state.json").write_text('{"global_step": 8}')
    assert [line["step"] for line in fallback.new_lines() if "checkpoint" in line] == [8]


def test_a_log_that_cannot_be_read_says_which(tmp_path: Path) -> None:
    (tmp_path / "trainer_log.jsonl").write_text("not JSON\n")
    with pytest.raises(InputError, match=r"trainer_log\.jsonl: a line is not JSON"):
        list(Fallback(tmp_path, LOSS).new_lines())


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        (
            "trainer_log.jsonl",
            '{"current_steps": null, "eval_loss": 1.0}\n',
            "current_steps: expects a whole",
        ),
        ("trainer_log.jsonl", '{"current_steps": NaN, "eval_loss": 1.0}\n', "current_steps: expects a whole"),
        ("trainer_log.jsonl", "\udcff\n", "a line is not JSON"),
        (
            "checkpoint-5/trainer_state.json",
            '{"global_step": 5, "log_history": null}',
            "log_history: expects",
        ),
        ("checkpoint-5/trainer_state.json", '{"global_step": 5, "log_history": [3]}', "log_history: expects"),
    ],
)
def test_a_log_of_another_kind_says_which_and_why(tmp_path: Path, name: str, content: str, said: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(InputError, match=said):
        list(Fallback(tmp_path, LOSS).new_lines())


@pytest.mark.parametrize("kind", ["trainer_log.jsonl", "trainer_state.json", "TensorBoard's event files"])
def test_a_trial_is_complete_by_any_of_them(tmp_path: Path, kind: str) -> None:
    made = tmp_path / "made"
    match kind:
        case "trainer_log.jsonl":
            factory_log(made, 4, 24)
        case "trainer_state.json":
            state(made, 12)
            state(made, 24)
        case _:
            events(made, 4, 24)
    (tmp_path / "quiet.py").write_text(
        "import os, shutil\nshutil.copytree('made', os.environ['TUNER_OUTPUT_DIR'], dirs_exist_ok=True)\n"
    )
    content = document("quiet.py", hyperparameters={"learning_rate": 0.1})
    content["command"] = {"run": content["command"]["run"]}
    ran = Ran(tmp_path, content)
    assert ran.end.outcome == "complete"
    assert list(ran.curve)[-1] == 24
    assert bool(ran.saved(CheckpointKind.BEST)) == (kind == "trainer_state.json")


def test_a_report_that_begins_while_logs_are_read_counts_alone(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "late.py").write_text(
        "import os, shutil, time\n"
        "shutil.copytree('made', os.environ['TUNER_OUTPUT_DIR'], dirs_exist_ok=True)\n"
        "while not os.path.exists(os.environ['TUNER_METRICS']):\n"
        "    time.sleep(0.01)\n"
    )
    state(tmp_path / "made", 24)
    content = document("late.py", hyperparameters={"learning_rate": 0.1})
    content["command"] = {"run": content["command"]["run"]}
    walked = os.walk

    def reports(place: str | Path) -> object:
        found = list(walked(place))
        if Path(place).name == "output" and len(found) > 1:
            line = json.dumps({"step": 24, "eval_loss": 1.0})
            (Path(place).parent / "metrics.jsonl").write_text(line + "\n")
        return found

    monkeypatch.setattr(os, "walk", reports)
    assert Ran(tmp_path, content).curve == {24: 1.0}


@pytest.mark.acceptance
def test_a_trainer_whose_hook_is_off_is_read_by_its_checkpoints(tmp_path: Path) -> None:
    content = trainer()
    run = content["command"]["run"]
    content["command"] = {**content["command"], "run": [PYTHON, "-E", *run[1:]]}
    without = Ran(tmp_path, content)
    assert without.end.outcome == "complete"
    assert list(without.curve) == list(range(4, 25, 4))
    assert without.saved(CheckpointKind.BEST)


def test_a_folder_that_the_command_deletes_meanwhile_is_no_error(tmp_path: Path, monkeypatch) -> None:
    """A Trainer with `save_total_limit` deletes older checkpoints while they are listed."""
    state(tmp_path, 4)
    state(tmp_path, 8)
    listed = os.scandir

    def deletes(place: str | Path | int = ".") -> object:
        if not isinstance(place, int) and Path(place).name == "checkpoint-4":
            shutil.rmtree(place)
        return listed(place)

    monkeypatch.setattr(os, "scandir", deletes)
    assert 8 in [line["step"] for line in Fallback(tmp_path, LOSS).new_lines()]


def test_lines_of_another_programs_log_are_no_evaluations(tmp_path: Path) -> None:
    (tmp_path / "trainer_log.jsonl").write_text(
        '[1]\n"text"\n{"eval_loss": 3.0}\n{"current_steps": 4, "eval_loss": 2.0}\n'
    )
    assert list(Fallback(tmp_path, LOSS).new_lines()) == [{"step": 4, "eval_loss": 2.0}]
