"""The first round file for a model and a dataset, with computed lengths."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuner.config.dimensions import DECAY_SHARE
from tuner.config.parsing import read_round
from tuner.config.round_file import EVALUATIONS_BY_DEFAULT
from tuner.config.sections import RunSpec
from tuner.config.yaml_text import one_line
from tuner.errors import InputError, one_of

EVAL_FRACTION = 0.05
"""Share of the rows to hold out where they are many."""
MAX_LENGTH = 512
"""Tokens of a row, where the model has so many positions."""
_BATCH_SIZE = 8
_MIN_PRODUCTION_STEPS = 60
_PRODUCTION_EPOCHS = 3
_FACTOR = 3
"""From a round to the next: three rounds go from a ninth of the production length to all of it."""
_MIN_STEPS = 20
"""Of a first round. Where a ninth of the production length is less, two rounds start at a third of it."""
_MAX_WARMUP_STEPS = 5


@dataclass(frozen=True, slots=True)
class Lengths:
    """The lengths of a first round, computed from the number of training rows."""

    train_rows: int
    max_train_steps: int
    production_steps: int

    @classmethod
    def of(cls, train_rows: int, max_train_steps: int | None = None) -> Lengths:
        """Three epochs for production, in round numbers, and a ninth of that for the round.

        Rounded up, so that two promotions to three times the steps get there. A round's own length stays.
        """
        production = max(_MIN_PRODUCTION_STEPS, _two_digits(_PRODUCTION_EPOCHS * train_rows / _BATCH_SIZE))
        ninth = math.ceil(production / _FACTOR**2)
        horizon = ninth if ninth >= _MIN_STEPS else math.ceil(production / _FACTOR)
        return cls(train_rows, max_train_steps or horizon, production)

    @property
    def warmup_steps(self) -> int:
        """Return the warmup steps: at most a tenth of the round."""
        return min(_MAX_WARMUP_STEPS, self.max_train_steps // 10)

    def epochs(self, steps: int) -> str:
        """Return, for example, `0.92 epochs`."""
        return f"{float(f'{steps * _BATCH_SIZE / self.train_rows:.2g}'):g} epochs"


@dataclass(frozen=True, slots=True)
class Recipe:
    """The settings of a first round, besides model and data."""

    goal: str
    quantization: str
    hyperparameters: str
    """Lines of the file, of which some have places to fill in."""
    search: str
    max_train_steps: int | None = None
    """None: by the number of rows."""
    every_steps: int | None = None
    max_examples: int = 200


_HYPERPARAMETERS = """\
  learning_rate: {low: 1e-5, high: 3e-3, log: true}  # at its peak
  lora_r: [8, 16, 32]  # rank of the adapters
  lora_alpha: 16  # adapters are scaled by lora_alpha / lora_r
"""
_SEARCH = """\
  trials: 24  # many short runs; longer rounds have fewer; infeasible ones count
  sampler: quasi-random  # covers the space evenly; or tpe, gp, random, grid
  seed: 0  # of the sampler
  enqueue: []  # hyperparameters to try first, such as your baseline
"""
_DEFAULT = Recipe("Learning rate and rank", "none", _HYPERPARAMETERS, _SEARCH)

RECIPES: Mapping[str, Recipe] = {
    "alpaca-qlora": Recipe(
        goal="The rate of QLoRA on Alpaca, beginning with the usual 2e-4",
        quantization="nf4",
        hyperparameters="""\
  learning_rate: {low: 2e-5, high: 2e-3, log: true}  # at its peak; ten times to each side of the usual 2e-4
  lora_r: 16  # rank of the adapters
  lora_alpha: 16  # adapters are scaled by lora_alpha / lora_r
""",
        search="""\
  trials: 8  # so few search one hyperparameter well; infeasible ones count
  sampler: quasi-random  # covers the space evenly; or tpe, gp, random, grid
  seed: 0  # of the sampler
  enqueue: [{learning_rate: 2e-4}]  # tried first: the rate that is used where nobody tunes
""",
        max_train_steps=60,
        every_steps=10,
        max_examples=64,
    )
}
"""Recipes by the name that `tuner study new --template` has for them.

alpaca-qlora is that of QLoRA (arXiv:2305.14314: NF4 with double quantisation, adapters on all linear layers)
as Unsloth's notebooks run it on Alpaca: batches of 8, 5 steps of warmup, 60 steps, AdamW in 8 bits, rank 16.
The batch of 8 is cut into micro-batches by the machine that runs it.
"""


def new_round(
    *,
    study: str,
    model: str,
    data: str,
    train_rows: int,
    format: str = "alpaca",
    eval: str | None = None,
    eval_fraction: float | None = None,
    round_name: str = "round1",
    goal: str | None = None,
    dtype: str = "bfloat16",
    quantization: str | None = None,
    max_length: int = MAX_LENGTH,
    gguf_file: str | None = None,
    columns: Mapping[str, str] | None = None,
    split: str | None = None,
    template: str | None = None,
    target_modules: Sequence[str] = (),
    recipe: str | None = None,
) -> str:
    """The commented text of a first round file, by one of `RECIPES` or as this version does it by default.

    `columns`, `split` and `template` are those of the sources; `target_modules` is empty for all linear
    layers. `train_rows` are the rows of `data`, those that `eval_fraction` (0.05 when there is no `eval`
    either) will hold out included. Raises InputError for no rows or an unknown recipe, and RoundFileError
    for what a round file cannot say.
    """
    if recipe is not None and recipe not in RECIPES:
        raise InputError(f"unknown template {recipe}; expects {one_of(list(RECIPES))}")
    chosen = _DEFAULT if recipe is None else RECIPES[recipe]
    if train_rows < 1:
        raise InputError(f"{data} has no rows to train on")
    if eval is None and eval_fraction is None:
        eval_fraction = EVAL_FRACTION
    lengths = Lengths.of(max(1, round(train_rows * (1 - (eval_fraction or 0)))), chosen.max_train_steps)
    every_steps = chosen.every_steps or max(1, round(lengths.max_train_steps / EVALUATIONS_BY_DEFAULT))
    named: dict[str, Any] = {"columns": dict(columns)} if columns else {}
    named |= {"template": template} if template else {}
    held_out = _held_out(None if eval is None else {"path": eval, "format": format, **named}, eval_fraction)
    text = _TEMPLATE.format(
        study=one_line(study),
        round=one_line(round_name),
        goal=one_line(chosen.goal if goal is None else goal),
        model=one_line(
            {
                "path": model,
                **({"gguf_file": gguf_file} if gguf_file else {}),
                "dtype": dtype,
                "quantization": quantization or chosen.quantization,
            }
        ),
        hyperparameters=chosen.hyperparameters,
        search=chosen.search,
        train=one_line([{"path": data, "format": format, **({"split": split} if split else {}), **named}]),
        target_modules=one_line(list(target_modules) or "all-linear"),
        held_out="\n  ".join(held_out),
        max_length=max_length,
        horizon=lengths.max_train_steps,
        horizon_epochs=lengths.epochs(lengths.max_train_steps),
        rows=lengths.train_rows,
        batch_size=_BATCH_SIZE,
        warmup_steps=lengths.warmup_steps,
        decay_steps=round(DECAY_SHARE * lengths.max_train_steps),
        decay_share=f"{DECAY_SHARE:.0%}",
        evaluation=one_line(
            {"every_steps": every_steps, "batch_size": 16, "max_examples": chosen.max_examples}
        ),
        run=one_line(RunSpec(production_steps=lengths.production_steps).model_dump(exclude={"notify"})),
        production_epochs=lengths.epochs(lengths.production_steps),
    )
    read_round(text, Path(f"{round_name}.yaml"))
    return text


def _held_out(source: Mapping[str, Any] | None, fraction: float | None) -> Iterator[str]:
    """Yield the lines of the evaluation rows."""
    if source is not None:
        yield f"eval: {one_line([source])}  # held-out rows; their loss chooses the best step"
    if fraction is not None:
        share = f"eval_fraction: {one_line(fraction)}"
        yield f"{share}  # share of train held out to choose the best step; or give files under eval"


_TEMPLATE = """\
# One round: every trial trains for max_train_steps, and its best step is chosen afterwards.
# A scalar fixes a hyperparameter; a list or a range searches it. Paths are relative to this file.
study: {study}
round: {round}
goal: {goal}  # shown in reports
model: {model}  # none, nf4 or int8
data:
  train: {train}  # a file or a Hub id; alpaca, messages, sharegpt, completion or text
  {held_out}
  test: []  # optional: rows nobody chooses by; scored once, for the final trial
  max_length: {max_length}  # tokens; longer rows are cut
  loss_on: completion  # or all, to learn the prompts too
max_train_steps: {horizon}  # of every trial, never searched; {horizon_epochs} of {rows} rows
hyperparameters:
{hyperparameters}  target_modules: {target_modules}  # or layer names, such as [q_proj, v_proj]
  batch_size: {batch_size}  # sequences per optimizer step; memory decides how it is cut into micro-batches
  optimizer: adamw_8bit  # or adamw
  warmup_steps: {warmup_steps}  # from 0 to the peak
  schedule: linear  # constant, then linear decay over decay_steps; or constant, cosine
  decay_steps: {decay_steps}  # {decay_share} of max_train_steps
search:
{search}evaluation: {evaluation}  # steps 0 and {horizon} always
checkpoints: {{directory: runs, keep_best: 1}}  # adapters kept for each trial
run: {run}  # production_steps is the longest run you can pay for, {production_epochs} here
storage: sqlite:///tuner.db  # beside this file; or postgresql+psycopg://...
"""


def _two_digits(number: float) -> int:
    """Return the number rounded to two significant digits."""
    return int(float(f"{number:.2g}"))


_COMMANDS = {
    "axolotl": '[axolotl, train, "${config}"]',
    "llamafactory": '[llamafactory-cli, train, "${config}"]',
    "trl": '[trl, dpo, --config, "${config}"]',
    "transformers": '[python, train.py, "${config}"]',
}
_OWN_COMMAND = '[python, train.py, --config, "${config}", "${args}"]'
_COMMAND_ROUND = """\
study: {study}
round: round1
goal: A first round
command:
  run: {run}  # what trains one trial; a list, no shell
  tool: {tool}  # one of trl, transformers, axolotl, llamafactory, none
  config: {config}  # copied for each trial, with the trial's values
max_train_steps: 60  # optimizer steps of every trial; never searched
hyperparameters:
  learning_rate: {{low: 1e-6, high: 1e-3, log: true}}
{more}search: {{trials: 8}}
evaluation: {{every_steps: 5}}
objective: {{metric: eval_loss}}  # or another metric that the command reports, with its direction
run: {{gpus_per_worker: 1}}  # GPUs of one trial; 0 without
"""
_WRITTEN_SCHEDULE = """\
  schedule: linear  # the peak rate, then a decay: longer rounds resume before it
  decay_steps: 24
  # extra: {beta: [0.05, 0.1, 0.3]}  # names of the tool's own
"""


def new_command_round(*, study: str, tool: str, config: str) -> str:
    """Return the commented text of a first round file for a training command."""
    return _COMMAND_ROUND.format(
        study=one_line(study),
        run=_COMMANDS.get(tool, _OWN_COMMAND),
        tool=one_line(tool),
        config=one_line(config),
        more="" if tool == "none" else _WRITTEN_SCHEDULE,
    )
