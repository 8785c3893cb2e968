"""CPU time, padding and operators of training updates of K trials, to compare two versions of the code.

    OMP_NUM_THREADS=1 PYTHONPATH=. python benchmarks/passes.py quickstart,8,0.05,128,10 smollm2,4,0,512,1
    OMP_NUM_THREADS=1 PYTHONPATH=OTHER_CHECKOUT python benchmarks/passes.py ...     the other version

A cell is shape, trials, dropout, max_length and updates. Rows have the lengths of `../shared/data`'s Alpaca
answers by characters; at max_length 128 they are the quickstart's own. Weights are random, rank 16 on all
linear layers, batch size 8, passes of 4,096 tokens. Seconds are of the process, after one update.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from ruamel.yaml import YAML
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.operators import operators_of
from tests.training.driving import begin, worker_state
from tuner.adapters.base import Base, freeze
from tuner.config import RoundSpec
from tuner.data import Example, Examples, load_tokenizer, prepare
from tuner.training.environment import keep_freed_memory
from tuner.training.packed_passes import micro_step

SHAPES = {"quickstart": (128, 384, 3, 4, 2, 1024), "smollm2": (576, 1536, 30, 9, 3, 49_152)}
_NAMES = "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads vocab_size"
PASS_TOKENS = 4096
QUICKSTART = Path("studies/quickstart")
ALPACA = Path("../shared/data/alpaca_en_demo.json")


def base_of(shape: str, directory: Path) -> Base:
    """A Llama with random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        **dict(zip(_NAMES.split(), SHAPES[shape], strict=True)), max_position_embeddings=4096
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return freeze(AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32), dtype=torch.float32)


def rows_of(vocabulary: int, max_length: int, directory: Path) -> Examples:
    """The quickstart's training rows, or random tokens of Alpaca's lengths."""
    if max_length == 128:
        document = YAML(typ="safe").load((QUICKSTART / "round1.yaml").read_text())
        spec = RoundSpec.model_validate(document).absolute(QUICKSTART.resolve())
        return prepare(spec, load_tokenizer(spec.model), directory, lambda _: None).train
    if not ALPACA.exists():
        raise SystemExit(f"{ALPACA} is not there")
    draw, made = np.random.default_rng(0), []
    for row in json.loads(ALPACA.read_text())[:256]:
        prompt = int((len(row["instruction"]) + len(row.get("input", ""))) / 3.8) + 30
        length = min(prompt + int(len(row["output"]) / 3.8) + 2, max_length)
        tokens = draw.integers(2, vocabulary, length).astype(np.int32)
        made.append(Example(tokens, np.arange(length) >= min(prompt, length - 1)))
    return Examples.of(made)


def measure(cell: str, directory: Path) -> str:
    """A line of the table."""
    shape, trials, dropout, max_length, updates = cell.split(",")
    base = base_of(shape, directory / shape)
    rows = rows_of(base.vocabulary_size, int(max_length), directory / "cache")
    settings = {"target_modules": "all-linear", "batch_size": 8, "optimizer": "adamw", "lora_r": 16}
    drawn = [
        settings
        | {"lora_dropout": float(dropout), "lora_alpha": 16, "learning_rate": 1e-3, "training_seed": n}
        for n in range(int(trials))
    ]
    micro_tokens = PASS_TOKENS // len(drawn)
    with worker_state(base, drawn, slots=len(drawn), micro_tokens=micro_tokens, rows=rows) as state:
        state.pass_tokens = PASS_TOKENS
        runs = {n: begin(state, n, trial, max_train_steps=10**6) for n, trial in enumerate(drawn)}

        def update() -> None:
            wanted = {n: run.step + 1 for n, run in runs.items()}
            while behind := {n: run for n, run in runs.items() if run.step < wanted[n]}:
                micro_step(state, behind)

        counted = operators_of(update)
        passes, tokens, padded = state.meter.passes, state.meter.tokens, state.meter.padded_tokens
        operators = counted.total / passes
        begun = time.process_time()
        for _ in range(int(updates)):
            update()
        seconds = time.process_time() - begun
        tokens, padded = state.meter.tokens - tokens, state.meter.padded_tokens - padded
        a_step = len(drawn) * int(updates)
        return (
            f"| {cell} | {a_step / seconds:.2f} | {tokens / seconds:,.0f} | {1 - tokens / padded:.0%} "
            f"| {(state.meter.passes - passes) / int(updates):.1f} | {operators:,.0f} |"
        )


def main() -> None:
    """Print a table, a row a cell."""
    keep_freed_memory()
    print("| cell | trial-steps / CPU s | tokens / CPU s | padding | passes an update | operators a pass |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as made:
        for cell in sys.argv[1:]:
            print(measure(cell, Path(made)), flush=True)


if __name__ == "__main__":
    main()
