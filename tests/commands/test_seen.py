"""What is shown of a round of commands: every view and verb, with "unknown" where nothing is known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from tests import studies, tiny
from tests.commands.driving import PYTHON, document, spec_of, trainer, with_fault, written
from tests.commands.test_rounds import searching, tuner
from tests.inference.test_gguf import CONVERTER
from tests.inference.test_hub import Hub, hub
from tuner.commands.size import estimated_bytes
from tuner.errors import CheckpointError
from tuner.inference import merge_checkpoint

__all__ = ["hub"]
TRAP = b"cos\nabort\n(tR."
"""A pickle that ends the process of whoever loads it."""


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A round of a plain script, followed by TensorBoard."""
    folder = tmp_path_factory.mktemp("seen")
    written(folder, searching(run={"gpus_per_worker": 0, "report_to": ["tensorboard"]}))
    tuner(folder, "study", "run", "round1.yaml")
    return folder


def test_status_and_trials(ran: Path) -> None:
    status = json.loads(tuner(ran, "study", "status", "--json"))["rounds"][0]
    assert status["state"] == "complete"
    trials = json.loads(tuner(ran, "trial", "list", "--json"))
    assert [trial["state"] for trial in trials] == ["complete"] * 2
    shown = json.loads(tuner(ran, "trial", "show", "round1/0", "--json"))
    assert [each["step"] for each in shown["evaluations"]] == list(range(0, 25, 4))
    shown, said = tuner(ran, "trial", "show", "round1/1"), tuner(ran, "study", "status")
    assert "round1/1" in shown
    assert f"checkpoint {ran}/runs/round1/trial-0001/best" in " ".join(shown.split())
    assert "complete" in said
    assert f"best: round1/1, checkpoint in {ran}/runs/round1/trial-0001/best" in said
    assert "adapter" not in shown + said


def test_what_only_the_command_knows_is_not_spoken_of(ran: Path) -> None:
    assert "--show 2 shows nothing" in tuner(ran, "study", "check", "round1.yaml", "--show", "2")
    said = tuner(ran, "study", "report")
    assert "Its checkpoint: " in said
    assert "adapter" not in said


def test_what_follows_a_round_without_a_result(tmp_path: Path) -> None:
    written(tmp_path, with_fault("nan", schedule="constant") | {"search": {"trials": 1}})
    tuner(tmp_path, "study", "run", "round1.yaml")
    assert "next: tuner trial list" in studies.tuner("study", "report", directory=tmp_path).stderr


def test_the_report_in_all_forms(ran: Path) -> None:
    tuner(ran, "study", "report", "--html", "page.html", "--markdown", "page.md")
    assert "learning_rate" in (ran / "page.html").read_text()
    assert "round1" in (ran / "page.md").read_text()


def test_the_dashboards_page(ran: Path) -> None:
    study = optuna.load_study(study_name="commands/round1", storage=f"sqlite:///{ran / 'tuner.db'}")
    assert len(study.trials) == 2
    assert study.user_attrs["max_train_steps"] == 24
    assert study.user_attrs["diagnosis"]
    assert {*study.trials[0].params} == {"learning_rate"}
    assert 4 in study.trials[0].intermediate_values


def test_trackers_get_the_metrics_of_the_command(ran: Path) -> None:
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="TensorBoard is not installed"
    )
    folders = {path.parent for path in ran.rglob("events.out.tfevents.*")}
    tags: set[str] = set()
    for folder in folders:
        tags |= set(accumulator.EventAccumulator(str(folder)).Reload().Tags()["scalars"])
    assert any("eval_loss" in tag for tag in tags), tags
    assert any("accuracy" in tag for tag in tags), tags


def test_a_trial_that_was_also_evaluated_where_it_saved_is_reproduced(tmp_path: Path) -> None:
    values = {"learning_rate": 0.05, "schedule": "linear", "decay_steps": 5}
    written(tmp_path, searching(hyperparameters=values, search={"trials": 1}, max_train_steps=12))
    tuner(tmp_path, "study", "run", "round1.yaml")
    shown = json.loads(tuner(tmp_path, "trial", "show", "round1/0", "--json"))
    steps = [each["step"] for each in shown["evaluations"]]
    assert 7 in steps, "the end of the stable phase, between two evaluations"
    said = tuner(tmp_path, "trial", "reproduce", "round1/0")
    assert f"digit for digit: {len(steps)} evaluations" in said


def test_reproduce_and_export(ran: Path) -> None:
    assert "digit for digit" in tuner(ran, "trial", "reproduce", "round1/1")
    tuner(ran, "trial", "export", "best", "--to", "out")
    assert (ran / "out" / "state.json").is_file()
    assert "is not a PEFT adapter" in tuner(
        ran, "trial", "export", "best", "--to", "merged", "--merge", code=2
    )
    for option in ("--push", "--gguf"):
        said = tuner(ran, "trial", "export", "best", "--to", "x", option, "a/b", code=2)
        assert f"{option}: the checkpoint of round1/" in said
        assert "not a transformers model (it has no config.json)" in said
    assert "--license: " in tuner(ran, "trial", "export", "best", "--to", "x", "--license", "mit", code=2)
    assert not (ran / "merged").exists()


def test_the_disk_is_that_of_the_largest_checkpoint_so_far(ran: Path) -> None:
    plan = json.loads(tuner(ran, "study", "check", "round1.yaml", "--json"))
    kept = [place for place in ran.glob("runs/round1/trial-*/*/step-*") if place.is_dir()]
    sizes = [sum(path.stat().st_size for path in place.rglob("*") if path.is_file()) for place in kept]
    each = 4  # of a trial: the best one, and at most three to resume from
    assert plan["plan"]["checkpoint_bytes"] == 2 * each * max(sizes)


def test_without_an_evaluation_at_step_0_the_first_one_stands_for_the_base_model(tmp_path: Path) -> None:
    """Of a metric that is maximised, all differences are relative to what was gained over the base model."""
    objective = {"metric": "accuracy", "direction": "maximize"}
    content = searching(objective=objective, run={"gpus_per_worker": 0, "decay_branches": False})
    written(tmp_path, content)
    script = tmp_path / "train.py"
    script.write_text(script.read_text().replace("if start == 0:\n", "if start < 0:\n"))
    tuner(tmp_path, "study", "run", "round1.yaml")
    said = " ".join(tuner(tmp_path, "study", "report").split())
    assert "The base model was not evaluated; the first evaluation, at step 4, stands for it." in said
    assert "raised accuracy by" in said  # the gain of a doubling is known


SAVES_AN_ADAPTER = """
import json, os, shutil
from pathlib import Path
for step in (0, 4):
    with open(os.environ["TUNER_METRICS"], "a") as file:
        file.write(json.dumps({"step": step, "eval_loss": 2.0 - step / 10}) + "\\n")
place = Path(os.environ["TUNER_OUTPUT_DIR"]) / "adapter"
shutil.copytree("made", place)
with open(os.environ["TUNER_METRICS"], "a") as file:
    file.write(json.dumps({"step": 4, "checkpoint": str(place)}) + "\\n")
"""


def saving(folder: Path) -> None:
    """A round whose script copies its checkpoint from the folder `made`."""
    content = document("save.py", max_train_steps=4, hyperparameters={"learning_rate": 0.1})
    content["command"] = {"run": content["command"]["run"]}
    written(folder, content | {"run": {"gpus_per_worker": 0, "decay_branches": False}})
    (folder / "save.py").write_text(SAVES_AN_ADAPTER)


@pytest.fixture
def token(monkeypatch: pytest.MonkeyPatch, hub: Hub) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)


def test_a_peft_adapter_is_merged_into_the_base_model_that_it_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, token: None, hub: Hub
) -> None:
    saving(tmp_path)
    tiny.save_model(tmp_path / "base", tiny.config("llama"))
    monkeypatch.chdir(tmp_path)  # the adapter names its base model as the command sees it
    torch.manual_seed(0)
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained("base", dtype=torch.float32),
        LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"),
    )
    adapted.save_pretrained("made")
    tuner(tmp_path, "study", "run", "round1.yaml")
    monkeypatch.chdir("/")
    said = tuner(tmp_path, "trial", "export", "best", "--to", "merged", "--merge", "--dtype", "float32")
    assert not said or "merged into base" in said
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    expected = PeftModel.from_pretrained(base, str(tmp_path / "made"))
    ids = torch.arange(20)[None]
    torch.testing.assert_close(merged(ids).logits, expected(ids).logits)
    assert (tmp_path / "merged" / "tokenizer_config.json").is_file()
    assert "adapter merged into `base` in float32" in (tmp_path / "merged" / "README.md").read_text()
    push = ("--to", "again", "--push", "someone/model")
    said = tuner(tmp_path, "trial", "export", "best", *push, code=2)
    assert "the base model is a local directory (base)" in said
    (tmp_path / "convert.py").write_text(CONVERTER)
    gguf = ("--gguf", "model.gguf", "--gguf-converter", "convert.py", "--license", "mit")
    said = tuner(tmp_path, "trial", "export", "best", *push, *gguf)
    assert (tmp_path / "model.gguf").read_text() == "again bf16"
    (pushed,) = hub.commits
    assert {"model.safetensors", "config.json", "README.md"} <= set(pushed)
    assert b"license: mit" in pushed["README.md"]
    assert b"base_model" not in pushed["README.md"]


def test_an_adapter_is_pushed_without_what_only_resuming_needs(tmp_path: Path, token: None, hub: Hub) -> None:
    saving(tmp_path)
    (tmp_path / "made").mkdir()
    for name in ("adapter_model.safetensors", "optimizer.pt", "training_args.bin", "rng_state_0.pth"):
        (tmp_path / "made" / name).write_bytes(b"weights")
    (tmp_path / "made" / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    tuner(tmp_path, "study", "run", "round1.yaml")
    tuner(tmp_path, "trial", "export", "best", "--to", "out", "--push", "someone/model")
    (pushed,) = hub.commits
    assert set(pushed) == {"adapter_model.safetensors", "adapter_config.json", "README.md"}
    card = pushed["README.md"].decode()
    assert "base_model: org/base" in card
    assert "| learning_rate | 0.1 |" in card
    tuner(tmp_path, "trial", "export", "best", "--to", "whole")
    assert (tmp_path / "whole" / "optimizer.pt").is_file()


@pytest.mark.parametrize("pickle", ["adapter", "base model"])
def test_a_pickle_is_never_merged(tmp_path: Path, pickle: str) -> None:
    """Neither PEFT nor transformers reads one, which each does where there is nothing else."""
    for folder, name, part in (("made", "adapter_model", "adapter"), ("base", "model", "base model")):
        (tmp_path / folder).mkdir()
        kept = "pytorch_model.bin" if folder == "base" else "adapter_model.bin"
        file = kept if part == pickle else f"{name}.safetensors"
        (tmp_path / folder / file).write_bytes(TRAP)
    config = {"base_model_name_or_path": "base", "peft_type": "LORA", "task_type": "CAUSAL_LM"}
    (tmp_path / "made" / "adapter_config.json").write_text(json.dumps(config))
    tiny.config("llama").save_pretrained(tmp_path / "base")
    with pytest.raises(CheckpointError, match="safetensors"):
        merge_checkpoint(tmp_path / "made", tmp_path / "out", beside=tmp_path, dtype="float32")


@pytest.mark.parametrize("config", [{}, {"use_peft": True, "lora_r": 8, "lora_target_modules": "all-linear"}])
def test_the_disk_of_a_first_round_is_estimated_from_the_base_model(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    tiny.save_model(tmp_path / "base", tiny.config("llama"))
    (tmp_path / "tool.json").write_text(json.dumps({"model_name_or_path": "base", **config}))
    content = trainer(search={"trials": 1})
    run = [PYTHON, "trainer.py", "${config}"]
    content["command"] = {"run": run, "tool": "transformers", "config": "tool.json"}
    written(tmp_path, content)
    plan = json.loads(tuner(tmp_path, "study", "check", "round1.yaml", "--json"))
    weights = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(tmp_path / "base").parameters())
    one = plan["plan"]["checkpoint_bytes"] / 4  # the best one, and at most three to resume from
    tokenizer = sum(path.stat().st_size for path in (tmp_path / "base").glob("*token*"))
    if config:
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        adapted = get_peft_model(base, LoraConfig(r=8, target_modules="all-linear"))
        weights = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert one == 12 * weights + tokenizer
    said = tuner(tmp_path, "study", "check", "round1.yaml")
    assert said
    (tmp_path / "tool.json").write_text(json.dumps({"model_name_or_path": "org/of-the-hub", **config}))
    unknown = json.loads(tuner(tmp_path, "study", "check", "round1.yaml", "--json"))
    assert unknown["plan"]["checkpoint_bytes"] is None


@pytest.mark.parametrize(
    "content",
    [
        b"version https://git-lfs.github.com/spec/v1\n",
        b"",
        b"\x04" + bytes(7) + b"text",
        b"\x08" + bytes(7) + b'{"a": 3}',
        b"\x08" + bytes(7) + b"[[1, 2]]",
    ],
)
def test_weights_that_are_not_there_leave_the_disk_unknown(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "model.safetensors").write_bytes(content)
    (tmp_path / "tool.json").write_text(json.dumps({"model_name_or_path": "base"}))
    changed = trainer()
    run = [PYTHON, "trainer.py", "${config}"]
    changed["command"] = {"run": run, "tool": "transformers", "config": "tool.json"}
    assert estimated_bytes(spec_of(tmp_path, changed), tmp_path) is None


def test_a_rank_that_is_no_number_is_the_tools_to_refuse(tmp_path: Path) -> None:
    tiny.save_model(tmp_path / "base", tiny.config("llama"))
    changed = trainer()
    run = [PYTHON, "trainer.py", "${config}"]
    changed["command"] = {"run": run, "tool": "transformers", "config": "tool.json"}
    sizes = set()
    for rank in (16, "sixteen"):
        config = {"model_name_or_path": "base", "use_peft": True, "lora_r": rank}
        (tmp_path / "tool.json").write_text(json.dumps(config))
        sizes.add(estimated_bytes(spec_of(tmp_path, changed), tmp_path))
    assert len(sizes) == 1
