"""A round of K trials by tuner, packed, against the same trials one after another with PEFT and Trainer.

    OMP_NUM_THREADS=2 python benchmarks/packing.py                       the tiny cell, on a CPU
    OMP_NUM_THREADS=2 python benchmarks/packing.py --cells smollm2 --trials 1 2
    OMP_NUM_THREADS=2 python benchmarks/packing.py --cells real --trials 4   what equal rows hide
    python benchmarks/packing.py --cells gpu --markdown FILE             on a GPU: every cell

Both sides run in this process in turn, several times; what is printed are medians and ratios of
medians. A round takes in loading the base, evaluations and checkpoints. Importing libraries and
tokenising are not counted, for Trainer not even once. Rows, order, precision, evaluations and
the number of checkpoints kept are the same on both sides; weights are random.

Trainer takes micro-batches of the cell's size and accumulates. Packed, each trial takes the same
micro-batches, so that one tick is one micro-step of every trial; `--micro-tokens` lets tuner choose
larger ones.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import get_peft_model, prepare_model_for_kbit_training
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)

from tuner.adapters.initial import lora_config
from tuner.config import RoundSpec
from tuner.data import Example, batch_rows
from tuner.methods.schedules import warmup_length
from tuner.records import Assignment, Ended, Evaluated, Event, Measured, Throughput, Value, to_json
from tuner.training.environment import keep_freed_memory
from tuner.training.startup import load_worker_state
from tuner.training.worker import CommandReader, train
from tuner.training.worker_state import WorkerState


@dataclass(frozen=True)
class Cell:
    """A model's shape and a round's."""

    name: str
    shape: dict[str, int]
    tokens: int
    """Of a row."""
    micro_rows: int = 2
    accumulation: int = 4
    steps: int = 60
    evaluation_rows: int = 64
    evaluate_every: int = 10
    dtype: str = "float32"
    quantization: str = "none"
    is_alpaca: bool = False
    """Rows have Alpaca's lengths, and `tokens` is the longest."""
    batch_sizes: tuple[int, ...] = ()
    """Of the trials in turn; `batch_size` of each if there are none."""
    dropout: float = 0.0
    optimizer: str = "adamw"
    has_hole: bool = False
    """Packed, a slot between the others is empty."""
    attention: str = "torch"
    """Of tuner's training passes."""

    @property
    def micro_tokens(self) -> int:
        """Tokens of a trial's micro-step, padding included."""
        return self.micro_rows * self.tokens

    @property
    def real_tokens(self) -> int:
        """The same without padding, on average."""
        mean = statistics.mean(self.length(row) for row in range(len(_ALPACA))) if self.is_alpaca else 0
        return round(self.micro_rows * mean) or self.micro_tokens

    @property
    def batch_size(self) -> int:
        """Rows of an update."""
        return self.micro_rows * self.accumulation

    def batch_size_of(self, trial: int) -> int:
        """Rows of an update of one trial."""
        return self.batch_sizes[trial % len(self.batch_sizes)] if self.batch_sizes else self.batch_size

    def length(self, row: int) -> int:
        """Tokens of a row."""
        # 13 and 32 have no common factor: neighbours are unlike.
        return min(_ALPACA[13 * row % len(_ALPACA)], self.tokens) if self.is_alpaca else self.tokens


# fmt: off
_ALPACA = (
    50, 57, 61, 65, 69, 73, 77, 81, 87, 95, 102, 113, 128, 141, 153, 172, 194, 207, 224, 249, 274, 299, 331,
    358, 384, 409, 437, 468, 495, 528, 570, 662,
)
# fmt: on
"""Tokens of Alpaca's rows with their prompt, by characters: 32 quantiles of a thousand rows."""


_TINY = {
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 2048,
}
_1B = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32_000,
}
_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32_000,
}
_SMOLLM2 = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49_152,
}
TINY = Cell("tiny", _TINY, tokens=64)
SMOLLM2 = Cell(
    "SmolLM2-135M", _SMOLLM2, tokens=64, accumulation=2, steps=6, evaluation_rows=8, evaluate_every=6
)


def gpu_cells() -> list[Cell]:
    """{1B, 7B, 7B in NF4} x {256, 1024, 4096} tokens a micro-step, without accumulation."""
    short: dict[str, Any] = {"accumulation": 1, "steps": 20, "evaluation_rows": 16, "evaluate_every": 10}
    return [
        Cell(name, shape, tokens=tokens // 2, dtype="bfloat16", quantization=quantization, **short)
        for name, shape, quantization in (("1B", _1B, "none"), ("7B", _7B, "none"), ("7B-nf4", _7B, "nf4"))
        for tokens in (256, 1024, 4096)
    ]


def real_cells(cell: Cell) -> list[Cell]:
    """What equal rows and dropout 0 hide: one thing at a time, then all of them."""
    rows = replace(cell, name=f"{cell.name} alpaca", tokens=512, is_alpaca=True, accumulation=4)
    things: dict[str, dict[str, Any]] = {
        "batch sizes": {"batch_sizes": (4, 8, 16, 32)},
        "dropout": {"dropout": 0.05},
        "8-bit": {"optimizer": "adamw_8bit"},
        "hole": {"has_hole": True},
    }
    single = [replace(rows, name=f"{rows.name}, {name}", **changes) for name, changes in things.items()]
    every = {name: value for changes in things.values() for name, value in changes.items()}
    return [rows, *single, replace(rows, name=f"{rows.name}, all", **every)]


def varlen_cell(cell: Cell) -> Cell:
    """The first of the `real_cells`, with attention that needs a GPU."""
    rows = real_cells(cell)[0]
    return replace(rows, name=f"{rows.name}, varlen", attention="varlen")


@dataclass(frozen=True)
class Measurement:
    """One round of K trials, one way."""

    round_seconds: float
    training_seconds: float
    peak_bytes: int
    final_losses: tuple[float, ...]


# --- what both sides work on ----------------------------------------------------------------------


def write_files(cell: Cell, directory: Path) -> Path:
    """A model with random weights, its tokenizer, and rows of the cell's lengths."""
    torch.manual_seed(0)
    config = LlamaConfig(**cell.shape, max_position_embeddings=4096, bos_token_id=0, eos_token_id=1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, cell.dtype))
    model.save_pretrained(directory / "base")
    words = {f"w{number}": number for number in range(cell.shape["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w2"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w1").save_pretrained(directory / "base")
    draw = np.random.default_rng(0)
    for name, count in (("train", 512), ("eval", cell.evaluation_rows)):
        with (directory / f"{name}.jsonl").open("w") as file:
            for number in range(count):
                # Each word follows from the one before by the row's own rule: there is something to learn.
                start, stride = draw.integers(2, len(words)), draw.integers(1, 1000)
                row = [
                    2 + int(start + stride * place) % (len(words) - 2)
                    for place in range(cell.length(number) - 1)
                ]
                file.write(json.dumps({"text": " ".join(f"w{word}" for word in row)}) + "\n")
    del model
    free_memory()
    return directory


def hyperparameters(number: int, cell: Cell) -> dict[str, Value]:
    """Trial `number`: all linear layers, rank 16, a rate of its own."""
    return {
        "learning_rate": 1e-4 * 1.5**number,
        "lora_r": 16,
        "lora_alpha": 16,
        "target_modules": "all-linear",
        "batch_size": cell.batch_size_of(number),
        "optimizer": cell.optimizer,
        "lora_dropout": cell.dropout,
        "warmup_steps": 5,
        "schedule": "constant",
        "training_seed": number,
    }


def round_spec(cell: Cell, directory: Path) -> RoundSpec:
    """The round as a file would say it."""
    common: dict[str, Any] = dict(hyperparameters(0, cell))
    del common["training_seed"]
    if cell.batch_sizes:
        common["batch_size"] = sorted(set(cell.batch_sizes))
    return RoundSpec.model_validate(
        {
            "study": "packing",
            "round": "round1",
            "model": {
                "path": str(directory / "base"),
                "dtype": cell.dtype,
                "quantization": cell.quantization,
                "attention": cell.attention,
            },
            "data": {
                "train": [{"path": str(directory / "train.jsonl"), "format": "text"}],
                "eval": [{"path": str(directory / "eval.jsonl"), "format": "text"}],
                "max_length": cell.tokens,
                "loss_on": "all",
            },
            "max_train_steps": cell.steps,
            "hyperparameters": common,
            "search": {"trials": 16},
            "evaluation": {"every_steps": cell.evaluate_every, "batch_size": 16},
            "storage": "sqlite:///unused.db",
        }
    )


# --- tuner ----------------------------------------------------------------------------------------


def by_tuner(cell: Cell, directory: Path, *, trials: int, slots: int, micro_tokens: int) -> Measurement:
    """A round in this process: the worker's own set-up and loop, without the pipe."""
    begin_memory()
    runs = directory / "runs"
    begun = time.perf_counter()
    with_hole = cell.has_hole and slots > 1
    state, _ = load_worker_state(
        round_spec(cell, directory), cache=directory / "cache", slots=slots + with_hole
    )
    state.micro_tokens = micro_tokens
    assignments = [_assignment(number, cell, runs) for number in range(trials)]
    if with_hole:  # a trial that leaves its slot after an update, and none follows it there
        assignments.insert(slots // 2, replace(_assignment(trials, cell, runs), max_train_steps=1))
    events = drive(state, assignments)
    seconds = time.perf_counter() - begun
    done = [event for event in events if isinstance(event, Ended)]
    if [event.outcome for event in done] != ["complete"] * len(assignments):
        raise SystemExit(f"{cell.name}: {done}")
    work = [event.throughput for event in events if isinstance(event, Measured)][-1]
    measured = Measurement(seconds, work.training_seconds, peak_bytes(work), _final_losses(events, trials))
    shutil.rmtree(runs)
    del state
    free_memory()
    return measured


def drive(state: WorkerState, assignments: Sequence[Assignment]) -> list[Event]:
    """Run assignments through the training loop; the next one starts as soon as a slot is free."""
    waiting, events = list(assignments), []
    open_ends = len(waiting)
    reading, writing = os.pipe()
    with os.fdopen(reading) as lines, os.fdopen(writing, "w", buffering=1) as orders:

        def start() -> None:
            orders.write(json.dumps({"order": "start", "assignment": to_json(waiting.pop(0))}) + "\n")

        def say(event: Event) -> None:
            nonlocal open_ends
            events.append(event)
            if isinstance(event, Ended):
                open_ends -= 1
                if waiting:
                    start()
                elif not open_ends:
                    orders.write('{"order": "close"}\n')

        for _ in range(min(state.pack.num_slots, len(waiting))):
            start()
        commands = CommandReader(lines, on_parent_gone=lambda: None)
        commands.listen()
        train(state, commands, say)
    return events


def _assignment(number: int, cell: Cell, runs: Path) -> Assignment:
    return Assignment(
        round="round1",
        trial=number,
        attempt=1,
        hyperparameters=hyperparameters(number, cell),
        max_train_steps=cell.steps,
        evaluate_every=cell.evaluate_every,
        directory=str(runs / f"trial-{number:04d}"),
    )


def _final_losses(events: Sequence[Event], trials: int) -> tuple[float, ...]:
    last = {event.trial: event.evaluation.eval_loss for event in events if isinstance(event, Evaluated)}
    return tuple(last[number] for number in range(trials))


# --- PEFT and Trainer -----------------------------------------------------------------------------


def by_trainer(cell: Cell, directory: Path, *, trials: int, rows: Rows) -> Measurement:
    """The same trials one after another, as the examples of Optuna and transformers do it."""
    begin_memory()
    begun = time.perf_counter()
    training, losses = 0.0, []
    for number in range(trials):
        seconds, loss = _trainer_trial(cell, directory, number, rows)
        training += seconds
        losses.append(loss)
        free_memory()
    seconds = time.perf_counter() - begun
    return Measurement(seconds, training, peak_bytes(None), tuple(losses))


@dataclass(frozen=True)
class Rows:
    """The tokenised rows that tuner made, for Trainer."""

    train: Sequence[Example]
    evaluation: Sequence[Example]


def _trainer_trial(cell: Cell, directory: Path, number: int, rows: Rows) -> tuple[float, float]:
    """Training seconds, evaluations and checkpoints left out, and the last evaluation loss."""
    trial = hyperparameters(number, cell)
    quantization = None
    if cell.quantization == "nf4":
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, cell.dtype),
        )
    on_gpu = torch.cuda.is_available()
    model = AutoModelForCausalLM.from_pretrained(
        directory / "base",
        dtype=getattr(torch, cell.dtype),
        quantization_config=quantization,
        device_map={"": "cuda:0" if on_gpu else "cpu"},
    )
    if quantization is not None:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    torch.manual_seed(number)
    wrapped = get_peft_model(model, lora_config(trial, base_path=str(directory / "base")))
    arguments = TrainingArguments(
        output_dir=str(directory / "trainer"),
        max_steps=cell.steps,
        per_device_train_batch_size=cell.micro_rows,
        gradient_accumulation_steps=cell.batch_size_of(number) // cell.micro_rows,
        per_device_eval_batch_size=16,
        learning_rate=float(trial["learning_rate"]),  # type: ignore[arg-type]
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=warmup_length(trial),
        optim="adamw_bnb_8bit" if cell.optimizer == "adamw_8bit" else "adamw_torch",
        bf16=cell.dtype == "bfloat16",
        eval_strategy="steps",
        eval_steps=cell.evaluate_every,
        save_strategy="steps",
        save_steps=cell.evaluate_every,
        save_total_limit=1,
        load_best_model_at_end=True,
        eval_on_start=number == 0,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        prediction_loss_only=True,
        logging_strategy="no",
        report_to=[],
        use_cpu=not on_gpu,
        disable_tqdm=True,
    )
    order = [
        rows.train[row]
        for step in range(1, cell.steps + 1)
        for row in batch_rows(len(rows.train), batch_size=cell.batch_size_of(number), seed=number, step=step)
    ]
    trainer = TimedTrainer(
        model=wrapped,
        args=arguments,
        train_dataset=order,  # type: ignore[arg-type]
        eval_dataset=rows.evaluation,  # type: ignore[arg-type]
        data_collator=collate,
    )
    trainer.remove_callback(PrinterCallback)
    begun = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - begun - trainer.other_seconds
    loss = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry][-1]
    shutil.rmtree(directory / "trainer")
    return seconds, float(loss)


class TimedTrainer(Trainer):  # type: ignore[misc]
    """A Trainer that knows how long its evaluations and checkpoints took."""

    other_seconds = 0.0

    def evaluate(self, *args: Any, **options: Any) -> dict[str, float]:
        """As Trainer does."""
        return self._timed(super().evaluate, *args, **options)  # type: ignore[no-any-return]

    def _save_checkpoint(self, *args: Any, **options: Any) -> None:
        self._timed(super()._save_checkpoint, *args, **options)

    def _load_best_model(self) -> None:
        self._timed(super()._load_best_model)

    def _timed(self, work: Callable[..., Any], *args: Any, **options: Any) -> Any:
        synchronize()
        begun = time.perf_counter()
        done = work(*args, **options)
        synchronize()
        self.other_seconds += time.perf_counter() - begun
        return done


def collate(batch: Sequence[Example]) -> dict[str, torch.Tensor]:
    """Rows padded on the right, without a mask where they are of one length."""
    lengths = [len(example.input_ids) for example in batch]
    ids = torch.zeros(len(batch), max(lengths), dtype=torch.int64)
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    for row, (example, length) in enumerate(zip(batch, lengths, strict=True)):
        ids[row, :length] = torch.from_numpy(np.asarray(example.input_ids, dtype=np.int64))
        labels[row, :length] = torch.where(
            torch.from_numpy(np.array(example.is_target)), ids[row, :length], -100
        )
        mask[row, :length] = 1
    made = {"input_ids": ids, "labels": labels}
    return made if min(lengths) == max(lengths) else made | {"attention_mask": mask}


# --- the machine's own limit ----------------------------------------------------------------------


@dataclass(frozen=True)
class Limit:
    """Seconds of a pass over T tokens, of K trials together: fixed + per_token * T, K * T tokens at once."""

    fixed_seconds: float
    seconds_per_token: float

    @property
    def knee_tokens(self) -> float:
        """Of a pass whose fixed costs are a tenth of it: more packing gains little."""
        return 9 * self.fixed_seconds / self.seconds_per_token

    def speed_up(self, tokens: int, trials: int) -> float:
        """Of `trials` micro-steps of `tokens` tokens in one pass over as many passes."""
        alone = self.fixed_seconds + self.seconds_per_token * tokens
        return trials * alone / (self.fixed_seconds + self.seconds_per_token * tokens * trials)


def measure_limit(cell: Cell, directory: Path, *, repetitions: int) -> Limit:
    """Fit a straight line through the times of one trial's passes of 1 to 16 micro-batches of rows."""
    plain = replace(cell, batch_sizes=(), optimizer="adamw", has_hole=False)
    state, _ = load_worker_state(round_spec(plain, directory), cache=directory / "cache", slots=1)
    # Longer passes of 7B do not fit into 140 GB: they would be cut, and be off the line.
    sizes = [rows for rows in (1, 2, 4, 8, 16, 32) if rows * cell.tokens <= 16_384]
    found: dict[int, list[tuple[float, float]]] = {rows: [] for rows in sizes}
    for rows in sizes * repetitions:
        sized = replace(plain, micro_rows=rows, accumulation=1, steps=6, evaluate_every=6)
        state.micro_tokens = sized.micro_tokens
        before = state.meter.tokens, state.meter.seconds["training"]
        drive(state, [_assignment(0, sized, directory / "limit")])
        after = state.meter.tokens, state.meter.seconds["training"]
        found[rows].append(tuple((b - a) / sized.steps for a, b in zip(before, after, strict=True)))  # type: ignore[arg-type]
    shutil.rmtree(directory / "limit")
    tokens, seconds = (
        np.array([statistics.median(each[place] for each in found[rows]) for rows in sizes])
        for place in (0, 1)
    )
    slope, fixed = np.polyfit(tokens, seconds, 1, w=1 / seconds)
    del state
    free_memory()
    return Limit(max(0.0, float(fixed)), float(slope))


# --- the command ----------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    arguments = parse_arguments(argv)
    keep_freed_memory()  # both sides gain
    lines = [heading(), *table_head()]
    print("\n".join(lines), flush=True)
    for cell in cells_of(arguments):
        for line in rows_of(cell, arguments):
            lines.append(line)
            print(line, flush=True)
    if arguments.markdown:
        arguments.markdown.write_text("\n".join(lines) + "\n")


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """What to measure. Ends the process where that cannot be done here."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cells", choices=["tiny", "smollm2", "real", "gpu", "gpu-real"], default="tiny")
    parser.add_argument("--only", metavar="NAME,TOKENS", help="one of the cells, such as 1B,256")
    parser.add_argument(
        "--trials", type=int, nargs="+", metavar="K", help="of a round: 1 2 4 8, and 16 on a GPU"
    )
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--steps", type=int, help="instead of the cell's own")
    parser.add_argument("--micro-tokens", type=int, help="tokens of a trial's pass, by tuner alone")
    parser.add_argument("--trainer-trials", type=int, help="run so few with Trainer, and multiply")
    parser.add_argument("--markdown", type=Path, help="also write what is printed here")
    arguments = parser.parse_args(argv)
    on_gpu = arguments.cells.startswith("gpu")
    if on_gpu and not torch.cuda.is_available():
        raise SystemExit(
            f"--cells {arguments.cells}: no CUDA GPU: torch.cuda.is_available() is False; "
            "on a CPU: --cells tiny"
        )
    arguments.trials = arguments.trials or [1, 2, 4, 8, *([16] if on_gpu else [])]
    return arguments


def cells_of(arguments: argparse.Namespace) -> list[Cell]:
    """The cells to measure. Ends the process if there is none of that name."""
    short = replace(TINY, steps=6, evaluation_rows=8, evaluate_every=6)
    cells = {
        "tiny": lambda: [TINY],
        "smollm2": lambda: [SMOLLM2],
        "real": lambda: real_cells(short),
        "gpu": gpu_cells,
        "gpu-real": lambda: [*real_cells(gpu_cells()[0]), varlen_cell(gpu_cells()[0])],
    }[arguments.cells]()
    named = {f"{cell.name},{cell.micro_tokens}": cell for cell in cells}
    if arguments.only is None:
        return cells
    if arguments.only not in named:
        raise SystemExit(f"--only {arguments.only}: expects one of {'; '.join(named)}")
    return [named[arguments.only]]


def rows_of(cell: Cell, arguments: argparse.Namespace) -> Iterator[str]:
    """The lines of one cell's table."""
    cell = replace(cell, steps=arguments.steps) if arguments.steps else cell
    micro_tokens = arguments.micro_tokens or cell.micro_tokens
    with tempfile.TemporaryDirectory() as made:
        directory = write_files(cell, Path(made))
        rows = prepared_rows(cell, directory)
        limit = measure_limit(cell, directory, repetitions=arguments.repetitions)
        by_tuner(
            replace(cell, steps=6, evaluate_every=6), directory, trials=1, slots=1, micro_tokens=micro_tokens
        )
        for trials in arguments.trials:
            with_trainer = min(trials, arguments.trainer_trials or trials)
            packed, alone, reference = [], [], []
            for _ in range(arguments.repetitions):
                packed.append(
                    by_tuner(cell, directory, trials=trials, slots=trials, micro_tokens=micro_tokens)
                )
                alone.append(by_tuner(cell, directory, trials=trials, slots=1, micro_tokens=micro_tokens))
                reference.append(by_trainer(cell, directory, trials=with_trainer, rows=rows))
            yield table_row(cell, trials, packed, alone, reference, trials / with_trainer, limit)


def prepared_rows(cell: Cell, directory: Path) -> Rows:
    """Tokenise once, into the cache that every later round finds."""
    state, _ = load_worker_state(round_spec(cell, directory), cache=directory / "cache", slots=1)
    return Rows(
        [state.train[row] for row in range(len(state.train))],
        [state.evaluation[row] for row in range(len(state.evaluation))],
    )


def heading() -> str:
    """Where and with what."""
    if torch.cuda.is_available():
        hardware = torch.cuda.get_device_name()
    else:
        hardware = f"{platform.machine()} CPU, {torch.get_num_threads()} thread(s)"
    versions = ", ".join(
        f"{name} {sys.modules[name].__version__}" for name in ("torch", "transformers", "peft")
    )
    command = " ".join(["python", *sys.argv])
    return (
        f"# Packing, {time.strftime('%Y-%m-%d')}\n\n{hardware}; {versions}\n\n    {command}\n\n"
        "K trials packed by tuner, against the same trials one after another with PEFT and Trainer, and by\n"
        "tuner one at a time (K = 1). Ratios of medians, above 1 where packed is faster: `round` is all of\n"
        "it, loading, evaluations and checkpoints included; `steps` is training alone; `limit` is what\n"
        "packing can gain in that on this machine, and `of it` the share that is reached; `knee` is the\n"
        "number of tokens, K times those of a micro-step, from which more packing gains little.\n"
    )


_COLUMNS = (
    "cell",
    "tokens a micro-step",
    "K",
    "trial-steps/s",
    "round / Trainer",
    "steps / Trainer",
    "round / K = 1",
    "steps / K = 1",
    "limit",
    "of it",
    "knee",
    "peak GiB",
    "largest loss difference",
)


def table_head() -> list[str]:
    """Of the Markdown table."""
    return ["| " + " | ".join(_COLUMNS) + " |", "|" + " --- |" * len(_COLUMNS)]


def table_row(
    cell: Cell,
    trials: int,
    packed: Sequence[Measurement],
    alone: Sequence[Measurement],
    reference: Sequence[Measurement],
    multiplied: float,
    limit: Limit,
) -> str:
    """Medians, and ratios of medians: above 1, packed tuner is faster."""

    def ratio(others: Sequence[Measurement], field: str, factor: float = 1.0) -> str:
        ours = statistics.median(getattr(m, field) for m in packed)
        theirs = factor * statistics.median(getattr(m, field) for m in others)
        return f"{theirs / ours:.2f}"

    seconds = statistics.median(m.training_seconds for m in packed)
    difference = max(
        abs(a - b) / b
        for ours in packed
        for others in (alone[0].final_losses, *([] if cell.dropout else [reference[0].final_losses]))
        for a, b in zip(ours.final_losses, others, strict=False)
    )
    most = limit.speed_up(cell.real_tokens, trials)
    values = [
        cell.name,
        str(cell.real_tokens),
        str(trials),
        f"{trials * cell.steps / seconds:.1f}",
        ratio(reference, "round_seconds", multiplied),
        ratio(reference, "training_seconds", multiplied),
        ratio(alone, "round_seconds"),
        ratio(alone, "training_seconds"),
        f"{most:.2f}",
        f"{statistics.median(m.training_seconds for m in alone) / seconds / most:.0%}",
        f"{limit.knee_tokens:,.0f}",
        f"{max(m.peak_bytes for m in packed) / 2**30:.2f}",
        f"{difference:.1e}",
    ]
    return "| " + " | ".join(values) + " |"


def begin_memory() -> None:
    """Forget the peak of what came before, where that can be done."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_bytes(work: Throughput | None) -> int:
    """Since `begin_memory` on a GPU; of the whole process so far on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return work.peak_memory_bytes if work else 0


def free_memory() -> None:
    """Let go of what nobody holds."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def synchronize() -> None:
    """Wait for the GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
