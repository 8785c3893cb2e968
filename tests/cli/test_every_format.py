"""Rows of every format, from their files through a round to an adapter that plain PEFT loads."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.studies import QUICKSTART, tuner, write_round
from tuner.api.export import finished_trial
from tuner.data import prepare
from tuner.study.folder import open_folder

ROWS = 12
HELD_OUT_ROWS = 4
LOG_LINES = 16_500
"""About a megabyte."""
SHOWN_BY = {
    "alpaca.json": "### Instruction:\nName river",
    "messages.jsonl": "<s>user\nWhich is river",
    "sharegpt.json": "<|im_start|>user\nWhere is river",
    "completion.csv": "River number",
    "app.log": "GET /rivers/",
}
"""What an example has in it that comes from that file."""


def write_files(directory: Path, numbers: range, *, log_lines: int) -> None:
    directory.mkdir()
    answers = [(n, f"River {n} is the Ebb, {n} miles long.") for n in numbers]
    alpaca = [{"instruction": f"Name river {n}.", "input": "", "output": answer} for n, answer in answers]
    messages = [
        [{"role": "user", "content": f"Which is river {n}?"}, {"role": "assistant", "content": answer}]
        for n, answer in answers
    ]
    sharegpt = [
        {
            "conversations": [
                {"from": "human", "value": f"Where is river {n}?"},
                {"from": "gpt", "value": answer},
            ]
        }
        for n, answer in answers
    ]
    table = io.StringIO()
    csv.writer(table).writerows(
        [("prompt", "completion"), *((f"River number {n} is", " the Ebb") for n in numbers)]
    )
    log = (
        f"2026-11-23 {n // 3600 % 24:02}:{n // 60 % 60:02}:{n % 60:02} INFO GET /rivers/{numbers.start}-{n} "
        f"answered in {n * 13 % 101} ms\n"
        for n in range(log_lines)
    )
    (directory / "alpaca.json").write_text(json.dumps(alpaca))
    (directory / "messages.jsonl").write_text(
        "".join(json.dumps({"messages": turns}) + "\n" for turns in messages)
    )
    (directory / "sharegpt.json").write_text(json.dumps(sharegpt))
    (directory / "completion.csv").write_text(table.getvalue())
    (directory / "app.log").write_text("".join(log))


def sources(directory: str, log_weight: float) -> str:
    log = f"format: text, split_on: line, group_records: fill, weight: {log_weight}"
    formats = {
        "alpaca.json": "format: alpaca",
        "messages.jsonl": "format: messages",
        "sharegpt.json": "format: sharegpt, template: chatml",
        "completion.csv": "format: completion",
        "app.log": log,
    }
    return ", ".join(f"{{path: {directory}/{name}, {more}}}" for name, more in formats.items())


def written_round(directory: Path) -> None:
    write_files(directory / "train", range(ROWS), log_lines=LOG_LINES)
    write_files(directory / "eval", range(100, 100 + HELD_OUT_ROWS), log_lines=9)
    assert (directory / "train" / "app.log").stat().st_size > 1_000_000
    path = write_round(directory, trials=1, steps=4, learning_rate="1e-2", lora_r="4", decay_steps=1)
    lines = path.read_text().splitlines()
    changed = {
        "  train:": f"  train: [{sources('train', 0.005)}]",
        "  eval:": f"  eval: [{sources('eval', 1)}]",
        "  max_length:": "  max_length: 192",
        "  batch_size:": "  batch_size: 16",
        "evaluation:": "evaluation: {every_steps: 2, batch_size: 8, max_examples: 64}",
    }
    named = [changed.get(line.split(":")[0] + ":", line) for line in lines]
    path.write_text("\n".join(named) + "\n")


def said_by(directory: Path, *arguments: str) -> str:
    done = tuner(*arguments, directory=directory)
    assert done.returncode == 0, done.stderr
    return done.stdout


@torch.no_grad()
def losses(model: Any, examples: Any) -> list[float]:
    """Negative log-likelihood of each example's targets, by transformers alone."""
    found = []
    for example in examples:
        ids = torch.from_numpy(example.input_ids).long()
        nll = torch.nn.functional.cross_entropy(model(ids[None]).logits[0, :-1], ids[1:], reduction="none")
        found.append(float(nll[torch.from_numpy(example.is_target[1:])].sum()))
    return found


@pytest.mark.slow
def test_what_is_exported_has_the_recorded_loss_on_rows_of_every_format(tmp_path: Path) -> None:
    written_round(tmp_path)
    plan = json.loads(said_by(tmp_path, "study", "check", "round1.yaml", "--json"))["plan"]
    said_by(tmp_path, "study", "run", "round1.yaml")
    said_by(tmp_path, "trial", "export", "best", "--to", "adapter")

    finished = finished_trial(open_folder(tmp_path), "best")
    best = min(finished.trial.evaluations, key=lambda evaluation: evaluation.eval_loss)
    tokenizer = AutoTokenizer.from_pretrained(QUICKSTART / "base")
    examples = list(prepare(finished.spec, tokenizer, tmp_path / ".tuner-cache").evaluation)
    assert len(examples) == plan["eval_rows"] == len(best.example_nll)
    texts = [tokenizer.decode(example.input_ids) for example in examples]
    shown = Counter(name for text in texts for name, words in SHOWN_BY.items() if words in text)
    assert shown == dict.fromkeys(SHOWN_BY, HELD_OUT_ROWS) | {"app.log": 3}

    base = AutoModelForCausalLM.from_pretrained(QUICKSTART / "base", dtype=torch.float32).eval()
    untouched = losses(base, examples)
    reloaded = losses(PeftModel.from_pretrained(base, tmp_path / "adapter").eval(), examples)
    assert reloaded == pytest.approx(best.example_nll, rel=1e-4)
    assert sum(reloaded) < 0.9 * sum(untouched)
