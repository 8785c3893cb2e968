"""A trial's configuration in the words of other tools: the same rate at every step, and no word too many."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import TrainingArguments
from transformers.optimization import get_scheduler

from tuner.config import ModelSpec
from tuner.playbook.schedule import multiplier
from tuner.records import Value
from tuner.report.exporters import TOOLS, Recipe, recipe_file

HYPERPARAMETERS: Mapping[str, Value] = {
    "learning_rate": 2e-5,
    "lora_r": 8,
    "lora_alpha": 16.0,
    "target_modules": "all-linear",
    "batch_size": 6,
    "optimizer": "adamw_8bit",
    "warmup_steps": 5,
    "schedule": "linear",
    "decay_steps": 24,
    "lora_dropout": 0.1,
    "use_rslora": False,
    "use_dora": False,
    "loraplus_ratio": 1.0,
    "lora_init": "default",
    "weight_decay": 0.0,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-8,
    "max_grad_norm": 1.0,
    "training_seed": 3,
}


def recipe(
    *, horizon: int = 60, best_step: int = 55, model: Mapping[str, Any] | None = None, **changes: Value
) -> Recipe:
    return Recipe(
        trial="round1/7",
        model=ModelSpec.model_validate({"path": "org/model"} | dict(model or {})),
        hyperparameters={**HYPERPARAMETERS, **changes},
        max_train_steps=horizon,
        best_step=best_step,
        max_length=512,
        every_steps=5,
        eval_batch_size=16,
    )


def written(tool: str, **changes: Any) -> tuple[str, dict[str, Any]]:
    """The comments in one line, and what a YAML 1.1 reader makes of the rest."""
    text = recipe_file(TOOLS[tool], recipe(**changes))
    comments = " ".join(line.removeprefix("#").strip() for line in text.splitlines() if line.startswith("#"))
    return comments, yaml.safe_load(text)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_the_rate_is_the_same_at_every_step(data: st.DataObject) -> None:
    horizon = data.draw(st.integers(1, 40))
    warmup = data.draw(st.integers(0, horizon))
    decay = data.draw(st.integers(0, horizon - warmup))
    schedule = data.draw(st.sampled_from(["constant", "linear", "cosine"]))
    best = data.draw(st.integers(1, horizon))
    name, arguments = recipe(
        horizon=horizon, best_step=best, schedule=schedule, warmup_steps=warmup, decay_steps=decay
    ).scheduler
    rate = _theirs(name, warmup=warmup, steps=best, arguments=arguments)
    for done in range(best):
        ours = multiplier(done, {"schedule": schedule, "warmup_steps": warmup, "decay_steps": decay}, horizon)
        assert rate(done) == pytest.approx(ours, abs=1e-12)


def _theirs(name: str, *, warmup: int, steps: int, arguments: Mapping[str, Any]) -> Any:
    """transformers' multiplier, as its Trainer makes it."""
    import warnings

    import torch

    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Both num_training_steps and num_stable_steps")
        made = get_scheduler(
            name,
            optimizer,
            num_warmup_steps=warmup,
            num_training_steps=steps,
            scheduler_specific_kwargs=dict(arguments),
        )
    return made.lr_lambdas[0]


@pytest.mark.parametrize("tool", TOOLS)
def test_numbers_are_numbers_to_every_reader(tool: str) -> None:
    """YAML 1.1 takes 1e-5 for text."""
    _, document = written(tool)
    assert document["learning_rate"] == 2e-5
    assert document["adam_epsilon"] == 1e-8
    assert document["max_steps"] == 55
    assert document["seed"] == 3
    assert document["gradient_accumulation_steps"] == 3
    assert 2 in (document.get("per_device_train_batch_size"), document.get("micro_batch_size"))


def test_a_batch_that_two_does_not_divide_is_cut_into_single_rows() -> None:
    for size, cut in ((3, (1, 3)), (8, (2, 4)), (1, (1, 1))):
        made = recipe(batch_size=size)
        assert (made.micro_batch, made.accumulation) == cut


def test_a_run_that_ends_in_its_warmup_has_no_more_of_a_schedule() -> None:
    made = recipe(horizon=5, best_step=5, warmup_steps=5, decay_steps=0, schedule="cosine")
    assert made.scheduler == ("constant_with_warmup", {})


SAID = {
    "trl": {
        **{"lora_r": 8, "lora_dropout": 0.1, "use_rslora": True, "use_dora": True, "max_length": 512},
        **{"model_revision": "v1", "trust_remote_code": True, "optim": "adamw_8bit", "bf16": True},
        **{"eval_steps": 5, "per_device_eval_batch_size": 16, "lora_alpha": 16, "packing": False},
    },
    "llamafactory": {
        **{"lora_rank": 8, "lora_dropout": 0.1, "use_rslora": True, "use_dora": True, "cutoff_len": 512},
        **{"model_revision": "v1", "trust_remote_code": True, "optim": "adamw_8bit", "bf16": True},
        **{"eval_steps": 5, "per_device_eval_batch_size": 16, "lora_alpha": 16},
    },
    "axolotl": {
        **{"lora_r": 8, "lora_dropout": 0.1, "peft_use_rslora": True, "peft_use_dora": True},
        **{"revision_of_model": "v1", "trust_remote_code": True, "optimizer": "adamw_8bit", "bf16": True},
        **{"eval_steps": 5, "eval_batch_size": 16, "lora_alpha": 16, "sequence_len": 512},
        **{"sample_packing": False},
    },
}


@pytest.mark.parametrize("tool", TOOLS)
def test_what_was_trained_is_said_in_each_tools_words(tool: str) -> None:
    model = {"revision": "v1", "trust_remote_code": True}
    _, document = written(tool, model=model, use_rslora=True, use_dora=True)
    assert {key: document.get(key) for key in SAID[tool]} == SAID[tool]
    _, other = written(tool, model={"dtype": "float32"}, optimizer="adamw")
    assert other["bf16"] is False
    assert "adamw_torch" in (other.get("optim"), other.get("optimizer"))
    assert not {"model_revision", "revision_of_model", "trust_remote_code"} & other.keys()


@pytest.mark.parametrize("tool", ["trl", "llamafactory"])
def test_what_the_trainer_is_told_are_arguments_of_its(tool: str) -> None:
    """Without the words of the tool, which its own schema was asked about: docs/log.md."""
    own = {
        "trl": {
            *("model_name_or_path", "dtype", "use_peft", "lora_r", "lora_alpha", "lora_dropout"),
            *("lora_target_modules", "use_rslora", "use_dora", "dataset_name", "dataset_train_split"),
            *("dataset_test_split", "max_length", "packing"),
        },
        "llamafactory": {
            *("model_name_or_path", "stage", "finetuning_type", "lora_rank", "lora_alpha", "lora_dropout"),
            *("lora_target", "use_rslora", "use_dora", "dataset", "eval_dataset", "template"),
            *("tokenized_path", "cutoff_len"),
        },
    }[tool]
    _, document = written(tool)
    assert document.keys() - own <= set(TrainingArguments.__dataclass_fields__)
    assert own <= document.keys()


@pytest.mark.parametrize(
    ("tool", "nf4", "int8"),
    [
        (
            "trl",
            {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "use_bnb_nested_quant": True},
            {"load_in_8bit": True},
        ),
        (
            "llamafactory",
            {
                "quantization_bit": 4,
                "quantization_method": "bnb",
                "quantization_type": "nf4",
                "double_quantization": True,
            },
            {"quantization_bit": 8, "quantization_method": "bnb"},
        ),
        (
            "axolotl",
            {"load_in_4bit": True, "load_in_8bit": False, "adapter": "qlora"},
            {"load_in_8bit": True, "load_in_4bit": False, "adapter": "lora"},
        ),
    ],
)
def test_quantised_bases(tool: str, nf4: Mapping[str, Any], int8: Mapping[str, Any]) -> None:
    for quantization, expected in (("nf4", nf4), ("int8", int8)):
        said, document = written(tool, model={"quantization": quantization})
        assert {key: document.get(key) for key in expected} == expected
        assert ("llm_int8_threshold" in said) == (quantization == "int8")


@pytest.mark.parametrize(
    ("tool", "all_linear", "named"),
    [
        ("trl", {"lora_target_modules": ["all-linear"]}, {"lora_target_modules": ["q_proj", "v_proj"]}),
        ("llamafactory", {"lora_target": "all"}, {"lora_target": "q_proj,v_proj"}),
        (
            "axolotl",
            {"lora_target_linear": True, "lora_target_modules": None},
            {"lora_target_linear": None, "lora_target_modules": ["q_proj", "v_proj"]},
        ),
    ],
)
def test_layers(tool: str, all_linear: Mapping[str, Any], named: Mapping[str, Any]) -> None:
    for targets, expected in (("all-linear", all_linear), (("q_proj", "v_proj"), named)):
        _, document = written(tool, target_modules=targets)
        assert {key: document.get(key) for key in expected} == expected


def test_regular_expressions_and_numbers_of_layers() -> None:
    """To TRL a list of one is a regular expression, so that a single name becomes one, too."""
    regex = r".*\.(q|v)_proj"
    assert written("trl", target_modules=regex)[1]["lora_target_modules"] == [regex]
    [name] = written("trl", target_modules=("q_proj",))[1]["lora_target_modules"]
    assert re.fullmatch(name, "model.layers.0.self_attn.q_proj")
    assert not re.fullmatch(name, "model.layers.0.self_attn.uq_proj")
    axolotl = written("axolotl", target_modules=regex)[1]
    assert (axolotl["lora_target_modules"], axolotl.get("lora_target_linear")) == (regex, None)
    said, document = written("llamafactory", target_modules=regex)
    assert document["lora_target"] == "all"
    assert "does not take a regular expression" in said
    layers = {tool: written(tool, layers_to_transform=(0, 2)) for tool in TOOLS}
    assert layers["axolotl"][1]["peft_layers_to_transform"] == [0, 2]
    assert "layers_to_transform" not in layers["axolotl"][0].replace("peft_layers_to_transform", "")
    for tool in ("trl", "llamafactory"):
        assert "layers_to_transform [0, 2]: the tool adapts these layers and all others" in layers[tool][0]


def test_what_a_tool_cannot_say_is_written_down() -> None:
    changes: dict[str, Any] = {"loraplus_ratio": 4.0, "lora_init": "gaussian", "lora_alpha": 11.3}
    trl, _ = written("trl", **changes)
    llamafactory, document = written("llamafactory", **changes)
    axolotl, other = written("axolotl", **changes)
    assert "loraplus_ratio 4" in trl
    assert "loraplus_ratio" not in llamafactory + axolotl
    assert document["loraplus_lr_ratio"] == other["loraplus_lr_ratio"] == 4.0
    assert "lora_init gaussian" in trl
    assert "lora_init gaussian" in llamafactory
    assert "lora_init" not in axolotl
    assert other["peft_init_lora_weights"] == "gaussian"
    said, document = written("axolotl", lora_init="eva")
    assert "lora_init eva: the tool uses PEFT's default" in said
    assert "peft_init_lora_weights" not in document
    for said in (trl, llamafactory, axolotl):
        assert "lora_alpha is 11.3, rounded to 11." in said
        assert "warmup_stable_decay" in said
    assert "warmup_stable_decay" not in written("trl", schedule="cosine")[0]
    for tool in ("llamafactory", "axolotl"):
        assert "cannot read a GGUF base model" in written(tool, model={"gguf_file": "model.gguf"})[0]
    assert written("trl", model={"gguf_file": "model.gguf"})[1]["model_init_kwargs"] == {
        "gguf_file": "model.gguf"
    }


@pytest.mark.parametrize("tool", TOOLS)
def test_another_optimizer_is_named_or_said_to_be_missing(tool: str) -> None:
    """transformers takes Lion's betas by Adam's names, and has no Muon."""
    comments, settings = written(tool, optimizer="lion", lion_beta1=0.8, lion_beta2=0.95)
    named = "optimizer" if tool == "axolotl" else "optim"
    assert (settings[named], settings["adam_beta1"], settings["adam_beta2"]) == ("lion_32bit", 0.8, 0.95)
    assert "The optimizer" not in comments
    for lacking in ("muon", "somewhere.else:OPTIMIZER"):
        comments, settings = written(tool, optimizer=lacking)
        assert named not in settings
        assert f"The optimizer {lacking}: transformers' Trainer does not have it" in comments


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize(
    ("changes", "is_named"),
    [({}, False), ({"variant": "lora"}, False), ({"variant": "my_lora:SCALED"}, True)],
)
def test_a_variant_that_the_tool_lacks_is_named(tool: str, changes: dict[str, Any], is_named: bool) -> None:
    comments, _ = written(tool, **changes)
    assert ("The variant my_lora:SCALED: the tool does not have it" in comments) == is_named
