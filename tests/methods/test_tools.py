"""Tools of commands: what a trial sets by the tool's names, and what cannot work.

`make acceptance-methods` asks the parsers of Axolotl and LLaMA-Factory, where their unpacked wheels are on
PYTHONPATH (LLaMA-Factory's needs omegaconf, too).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tuner.commands.check import mistakes, remarks
from tuner.commands.launch import Place, prepared
from tuner.config import read_round
from tuner.errors import InputError, RoundFileError
from tuner.methods.registry import BUILT_IN
from tuner.methods.tools import TrialSettings, known_names, options_of, tool
from tuner.records import Assignment, complete_hyperparameters

DPO = ["trl", "dpo", "--config", "${config}"]
CONFIG = {
    "model_name_or_path": "base", "dataset_name": "rows", "use_peft": True, "per_device_train_batch_size": 4,
    "lr_scheduler_type": "cosine", "eval_strategy": "no", "save_total_limit": 2,
}  # fmt: skip


def round_of(folder: Path, hyperparameters: dict[str, Any], **command: Any) -> Any:
    (folder / "dpo.yaml").write_text(yaml.safe_dump(CONFIG | command.pop("config_changes", {})))
    document = {
        "study": "s", "round": "r",
        "command": {"run": DPO, "tool": "trl", "config": "dpo.yaml"} | command,
        "max_train_steps": 60, "hyperparameters": hyperparameters, "evaluation": {"every_steps": 6},
    }  # fmt: skip
    return read_round(yaml.safe_dump(document), folder / "r.yaml").spec.absolute(folder)


def settings(spec: Any, **more: Any) -> dict[str, Any]:
    chosen = tool(spec.command.tool)
    values = complete_hyperparameters(spec.space(), {})
    given = {"config": CONFIG, "gpus": 2, "output": "out"} | more
    return dict(chosen.settings(TrialSettings(values, spec.max_train_steps, 6, **given)))


def test_a_trial_of_trl_is_written_in_its_names(tmp_path: Path) -> None:
    spec = round_of(
        tmp_path,
        {
            "learning_rate": 1e-5, "lora_r": 8, "target_modules": "all-linear", "batch_size": 16,
            "optimizer": "adamw",
            "warmup_steps": 3, "schedule": "linear", "decay_steps": 24, "extra": {"beta": 0.1},
        },
    )  # fmt: skip
    made = settings(spec)
    assert made["learning_rate"] == 1e-5
    assert made["lora_target_modules"] == ["all-linear"]
    assert made["gradient_accumulation_steps"] == 2
    assert (made["optim"], made["beta"], made["max_steps"]) == ("adamw_torch", 0.1, 60)
    assert (made["lr_scheduler_type"], made["warmup_steps"]) == ("warmup_stable_decay", 3)
    assert made["lr_scheduler_kwargs"] == {
        "num_stable_steps": 33,
        "num_decay_steps": 24,
        "decay_type": "linear",
    }
    assert (made["save_total_limit"], made["save_only_model"], made["load_best_model_at_end"]) == (
        None,
        False,
        False,
    )
    assert "resume_from_checkpoint" not in made
    assert settings(spec, resume_from="there")["resume_from_checkpoint"] == "there"


def test_a_trial_of_llamafactory_is_written_in_its_names(tmp_path: Path) -> None:
    changes = {"finetuning_type": "lora", "val_size": 0.1}
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump({"dataset": "demo", **changes}))
    document = {
        "study": "s", "round": "r", "max_train_steps": 60,
        "command": {"run": ["python", "${config}"], "tool": "llamafactory", "config": "sft.yaml"},
        "hyperparameters": {
            "lora_r": 8, "target_modules": ["q_proj", "v_proj"], "extra": {"pref_beta": 0.1},
        },
    }  # fmt: skip
    spec = read_round(yaml.safe_dump(document), tmp_path / "r.yaml").spec.absolute(tmp_path)
    assert list(mistakes(spec, tmp_path)) == []
    made = settings(spec)
    assert (made["lora_rank"], made["lora_target"], made["pref_beta"]) == (8, "q_proj,v_proj", 0.1)
    assert made["lr_scheduler_kwargs"]["num_stable_steps"] == 60 - 24 - 5
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump({"dataset": "demo", "finetuning_type": "full"}))
    said = [f"{name}: {message}" for name, message in mistakes(spec, tmp_path)]
    assert any("lora_r: has no effect" in each for each in said)
    assert any("evaluates nothing" in each for each in said)


AXOLOTL = {
    "base_model": "base", "adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_target_linear": True,
    "datasets": [{"path": "rows", "type": "alpaca"}], "val_set_size": 0.1, "micro_batch_size": 2,
    "sequence_len": 64, "evals_per_epoch": 4, "saves_per_epoch": 1, "num_epochs": 3, "batch_size": 9,
    "early_stopping_patience": 3, "warmup_ratio": 0.1, "lr_scheduler": "cosine", "learning_rate": 1e-4,
    "optimizer": "adamw_torch",
}  # fmt: skip
FACTORY = {
    "model_name_or_path": "base", "dataset": "demo", "template": "default", "finetuning_type": "lora",
    "stage": "sft", "val_size": 0.1, "num_train_epochs": 3.0, "lr_scheduler_type": "cosine",
}  # fmt: skip
NAMED = {
    "learning_rate": 1e-4, "lora_r": 8, "lora_dropout": 0.1, "weight_decay": 0.01, "optimizer": "adamw",
    "batch_size": 16, "warmup_steps": 3, "schedule": "linear", "decay_steps": 24,
}  # fmt: skip


def round_of_tool(
    folder: Path, name: str, config: dict[str, Any], values: dict[str, Any], **more: Any
) -> Any:
    folder.mkdir(exist_ok=True)
    (folder / "tool.yaml").write_text(yaml.safe_dump(config))
    document = {
        "study": "s", "round": "r", "max_train_steps": 60, "hyperparameters": values,
        "command": {"run": ["python", "-m", name, "train", "${config}"], "tool": name, "config": "tool.yaml"},
        "evaluation": {"every_steps": 6}, **more,
    }  # fmt: skip
    return read_round(yaml.safe_dump(document), folder / "r.yaml").spec.absolute(folder)


def said_of(spec: Any, folder: Path) -> list[str]:
    return [f"{name}: {message}" for name, message in mistakes(spec, folder)]


def file_of_a_trial(spec: Any, folder: Path, *, resume: bool = False) -> Path:
    """The configuration of one trial as its command reads it."""
    assignment = Assignment(
        round="r", trial=0, attempt=1, hyperparameters=complete_hyperparameters(spec.space(), {}),
        max_train_steps=60, evaluate_every=6, directory=str(folder / "trial"),
    )  # fmt: skip
    place = Place(folder / f"attempt{resume:d}")
    start = folder / "checkpoint-33" if resume else None
    prepared(
        spec.command, assignment, place, gpus=2, token="t", resume_from=start, evaluate_at_start=True
    )  # fmt: skip
    return place.folder / "tool.yaml"


def test_a_trial_of_axolotl_is_written_in_its_names(tmp_path: Path) -> None:
    spec = round_of_tool(
        tmp_path, "axolotl", AXOLOTL,
        {**NAMED, "target_modules": ["q_proj", "v_proj"], "use_dora": True, "extra": {"rl_beta": 0.1}},
        run={"gpus_per_worker": 2},
    )  # fmt: skip
    assert said_of(spec, tmp_path) == []
    made = yaml.safe_load(file_of_a_trial(spec, tmp_path, resume=True).read_text())
    assert (made["lr_scheduler"], made["optimizer"], made["rl_beta"]) == (
        "warmup_stable_decay",
        "adamw_torch",
        0.1,
    )
    assert made["lr_scheduler_kwargs"] == {
        "num_stable_steps": 33, "num_decay_steps": 24, "decay_type": "linear",
    }  # fmt: skip
    assert made["gradient_accumulation_steps"] == 16 // (2 * 2)
    assert made["lora_target_modules"] == ["q_proj", "v_proj"]
    assert (made["lora_target_linear"], made["peft_use_dora"]) == (False, True)
    assert (made["max_steps"], made["eval_steps"], made["save_steps"]) == (60, 6, 6)
    assert made["save_total_limit"] > 1000
    assert made["resume_from_checkpoint"].endswith("checkpoint-33")
    for name in (
        "evals_per_epoch",
        "saves_per_epoch",
        "early_stopping_patience",
        "warmup_ratio",
        "batch_size",
    ):
        assert name not in made
    assert set(made) <= known_names("axolotl", "all").names
    whole = round_of_tool(tmp_path, "axolotl", AXOLOTL, {"target_modules": "all-linear"})
    assert settings(whole, config=AXOLOTL)["lora_target_linear"] is True


@pytest.mark.parametrize(
    ("values", "changes", "said"),
    [
        ({"warmup_steps": 1}, {}, "warmup_steps: may not be 1"),
        ({"warmup_steps": {"low": 0, "high": 4}}, {}, "warmup_steps: may not be 1"),
        ({"lora_r": 8}, {"adapter": None}, "lora_r: has no effect without `adapter: lora`"),
        ({}, {"val_set_size": 0}, "evaluates nothing"),
        ({}, {"micro_batch": 2}, "command.config: tool.yaml: micro_batch: is not a name of Axolotl"),
        ({"extra": {"beta": 0.1}}, {}, "extra.beta: is not a name of Axolotl"),
        ({"batch_size": 9}, {}, "9 is no multiple of 2, the sequences of one pass (micro_batch_size 2"),
        ({}, {"cosine_min_lr_ratio": 0.1}, "cosine_min_lr_ratio: changes the learning rate"),
        ({}, {"resume_from_checkpoint": "x"}, "resume_from_checkpoint: would let every trial start"),
        ({}, {"hub_model_id": "me/x"}, "hub_model_id: would let every trial push to one place"),
    ],
)
def test_what_cannot_work_with_axolotl(
    tmp_path: Path, values: dict[str, Any], changes: dict[str, Any], said: str
) -> None:
    spec = round_of_tool(tmp_path, "axolotl", AXOLOTL | changes, values)
    assert any(said in each for each in said_of(spec, tmp_path)), said_of(spec, tmp_path)


def test_axolotl_reads_a_file_and_no_options(tmp_path: Path) -> None:
    spec = round_of_tool(tmp_path, "axolotl", AXOLOTL, {})
    command = spec.command.model_copy(update={"run": [*spec.command.run, "${args}", "--max-steps=9"]})
    said = said_of(spec.model_copy(update={"command": command}), tmp_path)
    assert any("Axolotl reads a file" in each for each in said)
    assert any("sets --max_steps" in each for each in said)


@pytest.mark.acceptance
@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("changes", [{}, {"schedule": "cosine"}, {"schedule": "constant"}])
def test_axolotls_own_parser_accepts_the_file(tmp_path: Path, changes: dict[str, Any], resume: bool) -> None:
    schemas = pytest.importorskip("axolotl.utils.schemas.config", reason="Axolotl is not on the path")
    values = {
        name: value for name, value in (NAMED | changes).items() if changes == {} or name != "decay_steps"
    }
    spec = round_of_tool(tmp_path, "axolotl", AXOLOTL, {**values, "target_modules": "all-linear"})
    written = yaml.safe_load(file_of_a_trial(spec, tmp_path, resume=resume).read_text())
    read = schemas.AxolotlInputConfig(**written).model_dump()
    for name, value in written.items():
        if name != "datasets":
            assert read[name] == value, name


@pytest.mark.acceptance
@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("changes", [{}, {"schedule": "cosine"}, {"schedule": "constant"}])
def test_llamafactorys_own_parser_accepts_the_file(
    tmp_path: Path, changes: dict[str, Any], resume: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISABLE_VERSION_CHECK", "1")
    parser = pytest.importorskip("llamafactory.hparams", reason="LLaMA-Factory is not on the path")
    values = {
        name: value for name, value in (NAMED | changes).items() if changes == {} or name != "decay_steps"
    }
    spec = round_of_tool(tmp_path, "llamafactory", FACTORY, {**values, "extra": {"pref_beta": 0.2}})
    path = file_of_a_trial(spec, tmp_path, resume=resume)
    written = yaml.safe_load(path.read_text())
    if resume:
        (tmp_path / "checkpoint-33").mkdir()
    _, _, training, finetuning, _ = parser.get_train_args(written)
    assert (training.max_steps, training.eval_steps, training.save_steps) == (60, 6, 6)
    assert training.lr_scheduler_type == written["lr_scheduler_type"]
    assert (training.lr_scheduler_kwargs or None) == written["lr_scheduler_kwargs"]
    assert (finetuning.lora_rank, finetuning.pref_beta) == (8, 0.2)
    assert training.resume_from_checkpoint == written.get("resume_from_checkpoint")


@pytest.mark.parametrize(
    ("hyperparameters", "changes", "said"),
    [
        (
            {"lora_r": 8},
            {"use_peft": False},
            "hyperparameters.lora_r: has no effect without `use_peft: true`",
        ),
        ({"extra": {"betta": 0.1}}, {}, "hyperparameters.extra.betta: is not a name of trl dpo"),
        ({}, {"learning_rte": 1e-3}, "command.config: dpo.yaml: learning_rte: is not a name of trl dpo"),
        ({"batch_size": [8, 12]}, {"per_device_train_batch_size": 8}, "12 is no multiple of 8"),
        ({}, {"warmup_steps": 0.1}, "warmup_steps: is 0.1, a share of the run"),
        (
            {},
            {"resume_from_checkpoint": "x"},
            "dpo.yaml: resume_from_checkpoint: would let every trial start",
        ),
        (
            {"batch_size": 8},
            {"per_device_train_batch_size": "auto"},
            "batch_size: cannot be divided into passes of per_device_train_batch_size auto",
        ),
        ({"batch_size": 8}, {"per_device_train_batch_size": 0.5}, "passes of per_device_train_batch_size 0."),
        ({"extra": {"resume_from_checkpoint": "x"}}, {}, "extra.resume_from_checkpoint: would let every"),
        ({}, {"push_to_hub": True}, "push_to_hub: would let every trial push to one place"),
        ({}, {"auto_find_batch_size": True}, "auto_find_batch_size: would let a trial train with another"),
        ({}, {"ignore_data_skip": True}, "ignore_data_skip: would let a trial that resumes"),
        ({"extra": {"max_steps": 9}}, {}, "hyperparameters.extra.max_steps: is set by tuner for each trial"),
        ({"learning_rate": 1e-3, "extra": {"learning_rate": 1}}, {}, "extra.learning_rate: is set by tuner"),
        (
            {"batch_size": 8, "extra": {"per_device_train_batch_size": [1, 2]}},
            {},
            "extra.per_device_train_batch_size: divides batch_size",
        ),
    ],
)
def test_what_cannot_work_is_said_before_it_runs(
    tmp_path: Path, hyperparameters: dict[str, Any], changes: dict[str, Any], said: str
) -> None:
    spec = round_of(tmp_path, hyperparameters, config_changes=changes)
    found = [f"{name}: {message}" for name, message in mistakes(spec, tmp_path)]
    assert any(said in each for each in found), found


def test_what_is_set_or_kept_as_it_is_may_stand_there(tmp_path: Path) -> None:
    changes = {
        "resume_from_checkpoint": None, "push_to_hub": False, "hub_model_id": "me/x", "run_name": "mine",
        "learning_rate": 1e-3,
    }  # fmt: skip
    values = {"learning_rate": 1e-4, "extra": {"logging_steps": 1}}
    own = ["--push_to_hub=False", "--output_dir", "${output_dir}"]
    spec = round_of(tmp_path, values, config_changes=changes, run=[*DPO, *own])
    assert list(mistakes(spec, tmp_path)) == []


def test_what_the_round_file_replaces_is_said(tmp_path: Path) -> None:
    (said,) = remarks(round_of(tmp_path, {}))
    assert "lr_scheduler_type" in said
    assert "save_total_limit" in said
    config = {"output_dir": "out", "logging_steps": 1, "learning_rate": 1.0, "report_to": ["wandb", "mlflow"]}
    said, logged = remarks(round_of(tmp_path, {"learning_rate": [1e-4, 1e-3]}, config_changes=config))
    for name in ("output_dir", "logging_steps", "learning_rate"):
        assert name in said
    assert "report_to (wandb, mlflow) logs every attempt as a run of its own" in logged
    _, logged = remarks(round_of(tmp_path, {}, config_changes={"report_to": True}))
    assert "report_to (True) logs" in logged


@pytest.mark.parametrize(
    ("option", "gpus", "said"),
    [
        ("--nproc_per_node=2", 0, "2 times batch_size"),
        ("--nproc-per-node=2", 4, "0.5 times batch_size"),
        ("--num_processes=4", 4, ""),
    ],
)
def test_other_processes_than_gpus_change_the_batch(
    tmp_path: Path, option: str, gpus: int, said: str
) -> None:
    spec = round_of(tmp_path, {"batch_size": 16}, run=["torchrun", option, *DPO])
    spec = spec.model_copy(update={"run": spec.run.model_copy(update={"gpus_per_worker": gpus})})
    found = [each for each in remarks(spec) if "processes" in each]
    assert [said in each for each in found] == ([True] if said else [])


@pytest.mark.parametrize("option", ["learning_rate=1", "warmup_steps=3", "lora_r=4", "output_dir=x"])
def test_an_option_that_would_win_over_the_trials_own_is_refused(tmp_path: Path, option: str) -> None:
    """`--name value` beats `--config`, so that the hyperparameter would not reach the command."""
    spec = round_of(tmp_path, {"learning_rate": 1e-4, "lora_r": [8, 16]}, run=[*DPO, f"--{option}"])
    (said,) = said_of(spec, tmp_path)
    assert f"command.run: sets --{option.partition('=')[0]}, which tuner sets for each trial" in said


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ({"run": ["trl", "dpo"]}, "no hyperparameter reaches the command"),
        ({"run": ["trl", "dpo", "${args}"]}, "command.config: is not used"),
        ({"run": ["trl", "dpo", "${confg}", "${config}"]}, "${confg} is unknown"),
        ({"run": ["no-such-program", "${config}"]}, "no-such-program cannot be found"),
        ({"run": ["python", "absent.py", "${config}"]}, "there is no file"),
        ({"run": ["trl", "dpo", "--max_steps=9", "${config}"]}, "sets --max_steps"),
    ],
)
def test_commands_that_cannot_run(tmp_path: Path, command: dict[str, Any], said: str) -> None:
    spec = round_of(tmp_path, {}, **command)
    assert any(said in f"{name}: {message}" for name, message in mistakes(spec, tmp_path))


@pytest.mark.parametrize("text", ["a: [", "- 1", "{1: 2}"])
def test_a_configuration_that_cannot_be_read(tmp_path: Path, text: str) -> None:
    spec = round_of(tmp_path, {})
    (tmp_path / "dpo.yaml").write_text(text)
    with pytest.raises(InputError, match=r"command\.config"):
        list(mistakes(spec, tmp_path))


def test_an_unknown_hyperparameter_names_extra(tmp_path: Path) -> None:
    with pytest.raises(RoundFileError, match=r"beta: unknown with tool: trl.*extra"):
        round_of(tmp_path, {"beta": 0.1})


def test_without_a_tool_any_name_may_be_searched_and_reaches_the_command() -> None:
    chosen = tool("none")
    table = chosen.table({"hidden": [8, 16], "extra.deep": True, "not a name": 1})
    assert {"hidden", "extra.deep"} <= table.keys()
    assert "not a name" not in table
    made = chosen.settings(
        TrialSettings({"hidden": 8, "extra.deep": True, "schedule": "unknown"}, 9, 3, "o", 0, {})
    )
    assert made == {"hidden": 8, "deep": True}


def test_options_in_a_command() -> None:
    command = ["trl", "dpo", "--beta=0.1", "--use_peft", "--lora-r", "8", "${args}", "--flag"]
    assert options_of(command) == {"beta": "0.1", "use_peft": "true", "lora_r": "8", "flag": "true"}


@pytest.mark.parametrize("name", BUILT_IN["tool"])
def test_every_tool_is_described(name: str) -> None:
    found = tool(name)
    assert found.name == name
    assert found.meaning.endswith(".")
    assert set(found.always) <= set(found.hyperparameters)


def test_the_lists_of_names_are_dated_and_as_the_installed_version_has_them() -> None:
    known = known_names("trl", "trainer", "common", "dpo")
    assert known.date.startswith("20")
    assert {"beta", "learning_rate", "use_peft"} <= known.names
    document = json.loads((Path(__file__).parents[2] / "tuner/methods/tools/known_names.json").read_text())
    assert set(document) == {"axolotl", "trl", "llamafactory"}
