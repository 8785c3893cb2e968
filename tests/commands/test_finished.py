"""Runs that tuner did not start: Trainer folders, JSON lines and tables become a round with a verdict."""

from __future__ import annotations

import csv
import errno
import hashlib
import json
import math
import os
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests import studies
from tuner.commands.finished import read_runs
from tuner.errors import InputError, StorageError, StudyTaken
from tuner.records import LOSS, Direction, Objective
from tuner.store import hold_study, open_store
from tuner.study.imported import Said, import_runs

RECORDED = Path(__file__).parent / "finished_runs"
DIAGNOSIS = "undetermined"
"""Of the recorded runs, whose rates fall from the warmup on: nothing tells what more steps would bring."""
T = 24
ACCURACY = Objective("eval_accuracy", Direction.MAXIMIZE)


def loss(step: int, rate: float) -> float:
    return 1.0 + math.exp(-step * rate * 100) + 0.002 * (step % 3)


def trainer_folder(
    folder: Path,
    rate: float,
    *,
    steps: int = T,
    ended: int | None = None,
    checkpoints: tuple[int, ...] = (16, T),
) -> Path:
    """What a run of TRL leaves behind, without weights."""
    history: list[dict[str, Any]] = []
    for step in range(4, (ended or steps) + 1, 4):
        history.append(
            {"step": step, "loss": loss(step, rate), "learning_rate": rate if step <= 16 else rate / 2}
        )
        history.append(
            {"step": step, "eval_loss": loss(step, rate), "eval_accuracy": step / 100, "eval_runtime": 0.1}
        )
    history.append({"step": ended or steps, "train_runtime": 1.0, "train_loss": 1.0})
    history.append({"step": ended or steps, "eval_loss": 99.0})
    for step in checkpoints:
        place = folder / f"checkpoint-{step}"
        place.mkdir(parents=True)
        state = {
            "global_step": step,
            "max_steps": steps,
            "log_history": history if step == max(checkpoints) else [],
        }
        (place / "trainer_state.json").write_text(json.dumps(state))
        (place / "adapter_config.json").write_text(
            json.dumps(
                {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": ["v_proj", "q_proj"]}
            )
        )
        for name in ("optimizer.pt", "scheduler.pt", "training_args.bin"):
            (place / name).write_bytes(b"a pickle that is never loaded")
    return folder


def content(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return hashlib.sha256(b"".join(str(p).encode() + p.read_bytes() for p in files)).hexdigest()


def tuner(folder: Path, *arguments: str, code: int = 0) -> str:
    done = studies.tuner(*arguments, directory=folder)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout if "--json" in arguments else done.stdout + done.stderr


def test_a_folder_of_eight_runs_becomes_a_round_and_is_only_read(tmp_path: Path) -> None:
    rates = [0.0003, 0.0005, 0.001, 0.002, 0.003, 0.004]
    for number, rate in enumerate(rates):
        trainer_folder(tmp_path / "outputs" / f"run-{number}", rate)
    trainer_folder(tmp_path / "outputs" / "run-6", 0.003, ended=16, checkpoints=(8, 16))
    trainer_folder(tmp_path / "outputs" / "run-7", 0.003, steps=40, checkpoints=(16, 40))
    before = content(tmp_path / "outputs")
    (tmp_path / "study").mkdir()
    given = ("--set", "hyperparameters.schedule=linear", "--set", "decay_steps=8", "--set", "warmup_steps=0")
    said = tuner(tmp_path / "study", "study", "import", "../outputs", *given)
    assert "Hint: --set decay_steps=8 is now written --set hyperparameters.decay_steps=8" in said
    assert content(tmp_path / "outputs") == before
    assert "run-7 is left out: it trains for 40 steps" in said
    assert "run-6): ended at step 16 of 24" in said
    assert "unknown: command, training_seed" in said
    trials = json.loads(tuner(tmp_path / "study", "trial", "list", "--json"))
    assert [trial["state"] for trial in trials] == ["complete"] * 6 + ["pruned"]
    assert [trial["best_step"] for trial in trials[:3]] == [T, T, T]
    assert [trial["hyperparameters"]["learning_rate"] for trial in trials[:6]] == rates
    assert trials[0]["hyperparameters"]["target_modules"] == ["q_proj", "v_proj"]
    assert trials[0]["executed_steps"] == 0
    status = json.loads(tuner(tmp_path / "study", "study", "status", "--json"))
    assert status["rounds"][0]["state"] == "complete"
    assert Path(status["rounds"][0]["best"]["adapter"], "adapter_config.json").is_file()
    promoted = json.loads(tuner(tmp_path / "study", "study", "promote", "--to", "round2", "--json"))
    assert promoted["diagnosis"]
    assert promoted["continues"]
    assert promoted["hyperparameters"]["target_modules"]["to"] == ["q_proj", "v_proj"]
    for name in ("imported", "round2"):  # one list of names, not names to choose from
        assert "target_modules: [[q_proj, v_proj]]\n" in (tmp_path / "study" / f"{name}.yaml").read_text()
    refused = tuner(tmp_path / "study", "study", "check", "round2.yaml", code=2)
    assert "write the command that trains a trial" in refused


@pytest.mark.parametrize("failure", ["disk", "database", "lock"])
def test_an_import_that_fails_leaves_nothing(
    tmp_path: Path, failure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer_folder(tmp_path / "run", 0.001)
    directory = tmp_path / "study"
    directory.mkdir()

    def imported() -> None:
        import_runs(directory, read_runs([tmp_path / "run"], LOSS), Said(), clock=lambda: 1e9)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def refused(*_: Any) -> None:
        raise StorageError("No space left in the database")

    with monkeypatch.context() as failing, ExitStack() as held:
        if failure == "disk":
            failing.setattr("tuner.study.imported.written_whole", full)
        elif failure == "database":

            def opened(*arguments: Any, **named: Any) -> Any:
                store = open_store(*arguments, **named)
                failing.setattr(store, "record", refused)
                return store

            failing.setattr("tuner.study.imported.open_store", opened)
        else:
            storage = f"sqlite:///{directory}/tuner.db"
            held.enter_context(hold_study(directory, storage, "study"))
        with pytest.raises(InputError, match=r"No space left|is being run by"):
            imported()
    assert list(directory.iterdir()) == []
    imported()


def test_an_import_that_is_killed_can_be_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer_folder(tmp_path / "run", 0.001)
    directory = tmp_path / "study"

    def imported() -> None:
        import_runs(directory, read_runs([tmp_path / "run"], LOSS), Said(), clock=lambda: 1e9)

    with monkeypatch.context() as killing:
        killing.setattr("tuner.whole.replaced_whole", lambda *_: os._exit(9))  # a checkpoint is copied
        if not (pid := os.fork()):
            imported()
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    (unfinished,) = (directory / "runs").rglob(".imported.*.tmp")
    imported()
    assert not unfinished.exists()
    assert [path.name for path in unfinished.parent.iterdir()] == ["imported"]
    assert (unfinished.parent / "imported" / "trial-0000" / "best" / "adapter_config.json").is_file()


def test_of_two_imports_at_once_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer_folder(tmp_path / "run", 0.001)
    directory, runs = tmp_path / "study", read_runs([tmp_path / "run"], LOSS)

    def imported() -> None:
        import_runs(directory, runs, Said(), clock=lambda: 1e9)

    with monkeypatch.context() as waiting:

        def while_the_other_ends(*arguments: Any) -> Any:
            waiting.undo()
            imported()
            return hold_study(*arguments)

        waiting.setattr("tuner.study.imported.hold_study", while_the_other_ends)
        with pytest.raises(InputError, match=r"exists; name another round"):
            imported()
    files = ("imported.yaml", "tuner.db", "runs/imported/trial-0000/best/adapter_config.json")
    assert all((directory / name).is_file() for name in files)


def test_while_another_import_runs_nothing_of_it_is_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer_folder(tmp_path / "run", 0.001)
    mine = tmp_path / "study" / "runs" / "imported" / "adapter"

    def taken(*_: Any) -> None:
        mine.parent.mkdir(parents=True)
        mine.touch()
        raise StudyTaken("another process runs it")

    monkeypatch.setattr("tuner.study.imported.hold_study", taken)
    with pytest.raises(StudyTaken):
        import_runs(tmp_path / "study", read_runs([tmp_path / "run"], LOSS), Said(), clock=lambda: 1e9)
    assert mine.exists()


def test_a_round_that_was_imported_before_is_refused_when_its_files_are_gone(tmp_path: Path) -> None:
    for name in ("run", "other"):
        trainer_folder(tmp_path / name, 0.001)
    directory = tmp_path / "study"
    import_runs(directory, read_runs([tmp_path / "run"], LOSS), Said(), clock=lambda: 1e9)
    shutil.rmtree(directory / "runs")
    (directory / "imported.yaml").unlink()
    with pytest.raises(InputError, match="database has a round of this name"):
        import_runs(directory, read_runs([tmp_path / "other"], LOSS), Said(), clock=lambda: 1e9)
    assert not (directory / "imported.yaml").exists()
    assert not (directory / "runs").exists()


def test_eight_runs_of_trl_that_no_one_prepared(tmp_path: Path) -> None:
    """What eight real runs of `trl sft` left, without weights; `make acceptance-commands` makes new ones."""
    runs = sorted(path for path in RECORDED.iterdir() if path.is_dir())
    assert len(runs) == 8
    (tmp_path / "study").mkdir()
    given = ("--set", "lr_scheduler_type=linear", "--set", "warmup_steps=2")
    said = tuner(tmp_path / "study", "study", "import", str(RECORDED), *given)
    trials = json.loads(tuner(tmp_path / "study", "trial", "list", "--json"))
    assert [trial["state"] for trial in trials] == ["complete"] * 8
    rates = [trial["hyperparameters"]["learning_rate"] for trial in trials]
    assert rates == [1e-4, 3e-4, 1e-3, 2e-3, 3e-3, 5e-3, 1e-2, 2e-2]  # the peaks, which were not logged
    for run, trial in zip(runs, trials, strict=True):
        (state,) = (json.loads(path.read_text()) for path in run.rglob("trainer_state.json"))
        found = [(each["eval_loss"], each["step"]) for each in state["log_history"] if "eval_loss" in each]
        assert (trial["best_eval_loss"], trial["best_step"]) == min(found)
        assert trial["hyperparameters"]["decay_steps"] == state["max_steps"] - 2
    wish = ("--max-train-steps", "40", "--to", "round2", "--json")
    promoted = json.loads(tuner(tmp_path / "study", "study", "promote", *wish))
    assert promoted["diagnosis"] == DIAGNOSIS, said


FULL = [f"model.layers.{layer}.self_attn.{name}" for layer in range(2) for name in ("q_proj", "v_proj")]


@pytest.mark.parametrize(
    ("targets", "base", "imported"),
    [
        (FULL, "there", ["q_proj", "v_proj"]),
        (FULL[:2], "there", FULL[:2]),  # of the first layer alone
        (["v_proj"], "there", ["v_proj"]),
        (FULL, "elsewhere", FULL),
        (FULL, "broken", FULL),
    ],
)
def test_layers_have_the_short_names_that_mean_the_same(
    tmp_path: Path, targets: list[str], base: str, imported: list[str]
) -> None:
    run = trainer_folder(tmp_path / "outputs" / "run", 0.001, checkpoints=(T,))
    config = {"r": 8, "target_modules": targets, "base_model_name_or_path": "models/base"}
    (run / f"checkpoint-{T}" / "adapter_config.json").write_text(json.dumps(config))
    folder = tmp_path / ("models" if base != "elsewhere" else "other") / "base"
    folder.mkdir(parents=True)
    weights = {f"{name}.weight": torch.zeros(2, 2) for name in (*FULL, "model.embed_tokens", "lm_head")}
    save_file(weights, folder / "model.safetensors")
    if base == "broken":
        (folder / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    (found,) = read_runs([tmp_path / "outputs"], LOSS)
    assert list(found.hyperparameters["target_modules"]) == imported  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "schedule", "decay"),
    [
        ({"lr_scheduler_type": "linear", "warmup_steps": 5}, "linear", T - 5),
        ({"lr_scheduler_type": "linear", "warmup_ratio": 0.1}, "linear", T - 3),
        ({"lr_scheduler_type": "linear", "warmup_steps": 0.25}, "linear", T - 6),
        ({"schedule": "linear", "warmup_steps": 0}, "linear", T),
        ({"schedule": "linear", "decay_steps": 8}, "linear", 8),
        ({"lr_scheduler_type": "warmup_stable_decay", "num_decay_steps": 6}, "linear", 6),
        ({"lr_scheduler_type": "cosine"}, "cosine", None),
        ({"lr_scheduler_type": "polynomial"}, "unknown", None),
    ],
)
def test_a_trainers_schedule_by_tuners_names(
    tmp_path: Path, given: dict[str, Any], schedule: str, decay: int | None
) -> None:
    trainer_folder(tmp_path / "run", 0.001, checkpoints=(T,))
    (tmp_path / "study").mkdir()
    options = [part for name, value in given.items() for part in ("--set", f"{name}={value}")]
    tuner(tmp_path / "study", "study", "import", "../run", *options)
    (trial,) = json.loads(tuner(tmp_path / "study", "trial", "list", "--json"))
    assert trial["hyperparameters"]["schedule"] == schedule
    assert trial["hyperparameters"].get("decay_steps") == decay
    assert "lr_scheduler_type" not in trial["hyperparameters"]


def test_rates_that_do_not_follow_the_schedule_are_said(tmp_path: Path) -> None:
    trainer_folder(tmp_path / "run", 0.001, checkpoints=(T,))
    (tmp_path / "study").mkdir()
    given = ("--set", "schedule=cosine", "--set", "warmup_steps=3")
    said = tuner(tmp_path / "study", "study", "import", "../run", *given)
    assert "run: its logged learning rates do not follow cosine with a warmup of 3 steps" in said
    (trial,) = json.loads(tuner(tmp_path / "study", "trial", "list", "--json"))
    assert trial["hyperparameters"]["learning_rate"] == 0.001


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            ("--set", "schedule=linear", "--set", "warmup_steps=200"),
            "warmup_steps: 200 is above the 24 steps",
        ),
        (("--set", "schedule=[a,b]"), "schedule: expects constant.*, got [a, b]"),
        (
            ("--set", "learning_rate=[1e-4, 1e-3]"),
            "learning_rate: expects a number.*, got [0.0001, 0.001]",
        ),
        (("--round", "a\n"), r"--round 'a\n': expects letters"),
    ],
)
def test_what_a_round_cannot_have_is_refused(tmp_path: Path, options: tuple[str, ...], expected: str) -> None:
    trainer_folder(tmp_path / "run", 0.001, checkpoints=(T,))
    (tmp_path / "study").mkdir()
    said = tuner(tmp_path / "study", "study", "import", "../run", *options, code=2)
    before, _, after = expected.partition(".*")
    assert before in said
    assert after in said
    assert list((tmp_path / "study").iterdir()) == []


def test_a_trainers_linear_needs_its_warmup(tmp_path: Path) -> None:
    trainer_folder(tmp_path / "run", 0.001, checkpoints=(T,))
    (tmp_path / "study").mkdir()
    said = tuner(tmp_path / "study", "study", "import", "../run", "--set", "schedule=linear", code=2)
    assert "add --set warmup_steps=N" in said
    assert list((tmp_path / "study").iterdir()) == []


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("warmup_steps=abc", "run: warmup_steps: expects a whole number of steps, got 'abc'"),
        ("warmup_steps=2.5", "run: warmup_steps: expects a whole number of steps, got 2.5"),
        ("warmup_steps=.inf", "run: warmup_steps: expects a whole number of steps, got inf"),
        ("decay_steps=true", "run: decay_steps: expects a whole number of steps, got true"),
        ("lora_r={a: b}", "run: lora_r: expects a value or a list of values, got {a: b}"),
    ],
)
def test_a_value_that_no_hyperparameter_can_have(tmp_path: Path, given: str, said: str) -> None:
    trainer_folder(tmp_path / "run", 0.001, checkpoints=(T,))
    (tmp_path / "study").mkdir()
    given = f"hyperparameters.{given}"
    assert said in tuner(tmp_path / "study", "study", "import", "../run", "--set", given, code=2)
    assert list((tmp_path / "study").iterdir()) == []


@pytest.mark.parametrize(
    ("rates", "given", "is_said"),
    [
        ((0.004, 0.003, 0.002), (), True),
        ((0.004, 0.004, 0.002), (), False),
        ((0.004, 0.003, 0.002), ("--set", "learning_rate=0.005"), False),
        ((0.004, 0.003, 0.002), ("--set", "schedule=cosine", "--set", "warmup_steps=0"), False),
    ],
)
def test_a_rate_that_may_not_be_the_peak_is_said(
    tmp_path: Path, rates: tuple[float, ...], given: tuple[str, ...], is_said: bool
) -> None:
    folder = trainer_folder(tmp_path / "run", 0.001, checkpoints=(T,))
    path = folder / f"checkpoint-{T}" / "trainer_state.json"
    state = json.loads(path.read_text())
    logged = [entry for entry in state["log_history"] if "learning_rate" in entry]
    for entry, rate in zip(logged, (*rates, *(0.001 / n for n in range(1, 9))), strict=False):
        entry["learning_rate"] = rate
    path.write_text(json.dumps(state))
    (tmp_path / "study").mkdir()
    said = tuner(tmp_path / "study", "study", "import", "../run", *given)
    assert ("learning_rate is the highest rate that a run logged" in said) == is_said


def test_what_is_not_said_stays_unknown(tmp_path: Path) -> None:
    trainer_folder(tmp_path / "run", 0.001, checkpoints=(T,))
    (tmp_path / "study").mkdir()
    tuner(tmp_path / "study", "study", "import", "../run")
    (trial,) = json.loads(tuner(tmp_path / "study", "trial", "list", "--json"))
    assert trial["hyperparameters"]["schedule"] == "unknown"
    assert "warmup_steps" not in trial["hyperparameters"]
    assert "batch_size" not in trial["hyperparameters"]
    again = tuner(tmp_path / "study", "study", "import", "../run", code=2)
    assert "exists; name another round" in again


def test_nothing_counts_after_the_end_of_training_and_the_first_evaluation_of_a_step_does(
    tmp_path: Path,
) -> None:
    (run,) = read_runs([trainer_folder(tmp_path / "run", 0.001)], LOSS)
    assert run.evaluations[-1].eval_loss == loss(T, 0.001)
    assert run.max_train_steps == T
    assert sorted(run.checkpoints) == [16, T]
    assert run.evaluations[0].metrics == {"eval_accuracy": 0.04}


def test_json_lines_and_tables(tmp_path: Path) -> None:
    lines = tmp_path / "a.jsonl"
    lines.write_text(
        '{"hyperparameters": {"learning_rate": 0.1, "width": 8}}\n'
        '{"step": 5, "eval_loss": 2.0, "eval_accuracy": 0.5}\n'
        '{"step": 10, "eval_loss": 1.0, "eval_accuracy": 0.7}\n'
    )
    (run,) = read_runs([lines], ACCURACY)
    assert [evaluation.value for evaluation in run.evaluations] == [0.5, 0.7]
    assert run.hyperparameters == {"learning_rate": 0.1, "width": 8}

    table = tmp_path / "runs.csv"
    table.write_text(
        "run,step,eval_loss,width,lr\na,5,2.0,8,0.1\na,10,1.5,8,0.1\nb,5,1.9,16,0.1\nb,10,1.2,16,0.1\n"
    )
    a, b = read_runs([table], LOSS)
    assert [evaluation.eval_loss for evaluation in b.evaluations] == [1.9, 1.2]
    assert (a.hyperparameters["width"], b.hyperparameters["width"]) == (8, 16)

    wandb = tmp_path / "wandb.csv"
    wandb.write_text(
        '"train/global_step","one - eval/loss","one - eval/loss__MIN","two - eval/loss"\n'
        "5,2.0,2.0,\n10,1.5,1.5,1.4\n"
    )
    one, two = read_runs([wandb], LOSS)
    assert [evaluation.step for evaluation in one.evaluations] == [5, 10]
    assert [evaluation.eval_loss for evaluation in two.evaluations] == [1.4]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.jsonl", "step 5\n", "line 1: is not JSON"),
        ("a.jsonl", '{"step": 5, "loss": 1.0}\n', "no evaluation of eval_loss"),
        ("a.jsonl", '\n{"hyperparameters": [8]}\n', "line 2: hyperparameters: expects values by name"),
        ("a.csv", "loss\n1\n", "has no column step"),
    ],
)
def test_what_cannot_be_read_says_where(tmp_path: Path, name: str, text: str, said: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=said):
        read_runs([tmp_path / name], LOSS)
    with pytest.raises(InputError, match=r"trainer_state\.json"):
        read_runs([tmp_path], LOSS)


def test_a_csv_field_without_an_end_says_where(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(f"step,eval_loss\n5,{'9' * 200_000}\n")
    before = csv.field_size_limit(131_072)  # Python's; reading rows raises it for the whole process
    try:
        with pytest.raises(InputError, match=r"a\.csv: is not a CSV file: field larger than"):
            read_runs([tmp_path / "a.csv"], LOSS)
    finally:
        csv.field_size_limit(before)


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({"log_history": None}, "log_history: expects a list of JSON objects"),
        ({"log_history": [{"step": 5, "eval_loss": 1.0}, 3]}, "log_history: expects a list of JSON objects"),
        ({"log_history": [{"step": math.nan, "learning_rate": 0.1, "loss": 1.0}]}, "step: expects a whole"),
        ({"log_history": [], "max_steps": "ten"}, "max_steps: expects a whole number, got 'ten'"),
        ({"log_history": [], "max_steps": math.inf}, "max_steps: expects a whole number"),
    ],
)
def test_a_trainers_state_that_is_none_says_what_is_wrong(
    tmp_path: Path, state: dict[str, Any], said: str
) -> None:
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    with pytest.raises(InputError, match=said):
        read_runs([tmp_path], LOSS)


@pytest.mark.parametrize("step", ["", "1.5", "nan", "inf"])
def test_a_table_without_a_step_in_a_row_names_the_row(tmp_path: Path, step: str) -> None:
    (tmp_path / "runs.csv").write_text(f"step,eval_loss\n4,1.0\n{step},0.9\n")
    with pytest.raises(InputError, match=r"runs\.csv, row 3: the step is not a whole number"):
        read_runs([tmp_path / "runs.csv"], LOSS)


@pytest.mark.parametrize("name", ["runs.csv", "run.jsonl"])
def test_a_file_that_is_no_text_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04\x95 a pickle")
    with pytest.raises(InputError, match="is not UTF-8 text"):
        read_runs([tmp_path / name], LOSS)


@pytest.mark.parametrize("given", [("lr_scheduler_type=warmup_stable_decay", "num_decay_steps=6"), ()])
def test_how_a_trainers_stable_schedule_decays_is_said(tmp_path: Path, given: tuple[str, ...]) -> None:
    trainer_folder(tmp_path / "run", 0.001, checkpoints=(T,))
    (tmp_path / "study").mkdir()
    options = [part for each in given for part in ("--set", each)]
    said = " ".join(tuner(tmp_path / "study", "study", "import", "../run", *options).split())
    assert ("own default is a cosine" in said) == bool(given)
