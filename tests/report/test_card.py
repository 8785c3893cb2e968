"""The model card: front matter that the Hub reads, the facts of the trial, and no path of this machine."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import yaml

from tests.config.rounds import FULL, spec_of
from tuner.records import Evaluation, RoundRecord, Trial, TrialState
from tuner.report.card import Card, model_card

HYPERPARAMETERS = {"learning_rate": 3.2e-4, "lora_r": 8, "use_dora": True, "use_rslora": False}


def card(text: str = FULL, *, steps: int = 60, best: int = 50, **changes: Any) -> Card:
    evaluations = tuple(
        Evaluation(step, 2.0 + abs(step - best) / 100, train_loss=1.5 if step else None)
        for step in range(0, steps + 1, 2)
    )
    trial = Trial("round1", 7, HYPERPARAMETERS, TrialState.COMPLETE, evaluations=evaluations)
    facts: dict[str, Any] = {
        "name": "someone/model",
        "spec": spec_of(text),
        "record": RoundRecord("round1", steps, {}, 0.0, train_rows=5000, eval_rows=200),
        "trial": trial,
        "base_is_on_hub": True,
        "prompt": "### Instruction:\n{instruction}",
        "has_chat_template": True,
        "command": "tuner trial export round1/7 --to model",
        "versions": {"tuner": "0.1.0", "peft": "0.21.2"},
        **changes,
    }
    return Card(**facts)


def front_matter(text: str) -> dict[str, Any]:
    opening, front, _ = text.split("---\n", 2)
    assert opening == ""
    found: dict[str, Any] = yaml.safe_load(front)
    return found


def test_front_matter_of_an_adapter() -> None:
    made = model_card(card(licence="apache-2.0", hub_sources=("tatsu-lab/alpaca",)))
    assert front_matter(made) == {
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "license": "apache-2.0",
        "datasets": ["tatsu-lab/alpaca"],
        "tags": ["tuner", "lora", "dora"],
    }


def test_what_is_not_known_is_left_out() -> None:
    front = front_matter(model_card(card(base_is_on_hub=False)))
    assert front.keys() == {"library_name", "pipeline_tag", "tags"}


def test_facts_of_the_trial() -> None:
    made = model_card(card(stated_licences={"tatsu-lab/alpaca": "cc-by-nc-4.0"}))
    for fact in (
        "# someone/model",
        "trial 7 of round1 in the study alpaca-smollm2",
        "The goal of the study: Learning rate and rank for Alpaca on SmolLM2",
        "Evaluation loss 2.0000 at step 50 of 60",
        "200 held-out rows",
        "The base model has 2.5000.",
        "`data/train.jsonl` (format alpaca)",
        "5,000 for training, 200 for evaluation",
        "512 tokens at most; the loss is on the completion",
        "tatsu-lab/alpaca: cc-by-nc-4.0",
        "| learning_rate | 0.00032 |",
        "| use_dora | true |",
        "```\n### Instruction:\n{instruction}\n```",
        "tuner trial export round1/7 --to model",
        "With tuner 0.1.0, peft 0.21.2.",
    ):
        assert fact in made
    assert "test rows" not in made
    assert "On test rows not used for any choice: 2.1250." in model_card(card(test_loss=2.125))


@pytest.mark.parametrize("best", [0, 22, 60])
def test_the_curve_is_short_and_keeps_its_ends_and_the_best(best: int) -> None:
    lines = model_card(card(best=best)).split("## Result")[1].split("## Training")[0].splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ") and "step" not in line]
    steps = [int(row[0]) for row in rows]
    assert steps == sorted(set(steps))
    assert {0, best, 60} <= set(steps)
    assert 12 <= len(steps) <= 13
    assert [int(row[0]) for row in rows if row[-1].strip(" |") == "best"] == [best]


def test_one_evaluation_that_is_no_number() -> None:
    lost = (Evaluation(0, 2.0), Evaluation(2, math.nan, train_loss=math.nan))
    trial = Trial("round1", 7, HYPERPARAMETERS, TrialState.COMPLETE, evaluations=lost)
    assert "| 2 | nan | nan |" in model_card(card(trial=trial))


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_how_to_load_it(quantization: str) -> None:
    text = FULL.replace("quantization: none", f"quantization: {quantization}, revision: v1.0")
    adapter, merged = model_card(card(text)), model_card(card(text, merged_dtype="float16"))
    for made in (adapter, merged):
        compile(made.split("```python\n")[1].split("```")[0], "card", "exec")
        assert ("qlora" in front_matter(made)["tags"]) == (quantization == "nf4")
    assert 'revision="v1.0", dtype="bfloat16"' in adapter
    assert ("BitsAndBytesConfig" in adapter) == (quantization != "none")
    assert "BitsAndBytesConfig" not in merged
    assert front_matter(merged)["library_name"] == "transformers"
    assert ("de-quantised again" in merged) == (quantization != "none")
    assert "rounded to float16" in merged


def test_facts_that_few_rounds_have() -> None:
    text = FULL.replace("quantization: none", "quantization: none, gguf_file: m.gguf")
    text = re.sub(r"  eval:.*", "  eval_fraction: 0.05", text)
    text = re.sub(r"  loss_on:.*", "  loss_on: all", text)
    text = text.replace("path: data/train.jsonl", "path: org/rows, config: small, split: good, weight: 0.5")
    made = model_card(card(text, merged_dtype="bfloat16", prompt_with_input="### Input:\n{input}"))
    for fact in (
        "(file `m.gguf`)",
        "The adapter was added to the base's bfloat16 weights in float32, and the sum rounded to bf",
        "5% of the training rows, held out by their content",
        "`org/rows` (format alpaca, configuration small, split good, weight 0.5)",
        "the loss is on all tokens",
        "Rows with an input use this prompt:\n\n```\n### Input:\n{input}\n```",
    ):
        assert fact in made
    assert 'gguf_file="m.gguf"' in model_card(card(text))


def test_no_secret_and_no_path_of_this_machine_is_told() -> None:
    text = FULL.replace("path: data/train.jsonl", "path: https://me:pw@host/rows.jsonl?token=abc")
    text = text.replace("path: data/eval.jsonl", "path: /home/me/secret/eval.jsonl")
    text = text.replace("HuggingFaceTB/SmolLM2-135M-Instruct", "/home/me/secret/base")
    made = model_card(card(text, base_is_on_hub=False))
    assert "`https://host/rows.jsonl`" in made
    assert "`eval.jsonl`" in made
    assert 'from_pretrained("base"' in made
    assert not [secret for secret in ("pw", "abc", "/home", "secret") if secret in made]
