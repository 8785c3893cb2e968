"""The sections of a round file: their keys, defaults, and what can be wrong with one of them alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from tuner.config.dimensions import describe, parse_value, read_dimension
from tuner.config.names import meant_value
from tuner.config.schemas import enqueue_schema, hyperparameters_schema
from tuner.config.wording import UNKNOWN_KEY, Refusal, mistake, refuse
from tuner.errors import one_of, refusal, shown
from tuner.methods.hyperparameters import Hyperparameter
from tuner.methods.registry import BUILT_IN, PATH, Kind, expected, is_known, names
from tuner.methods.table import HYPERPARAMETERS
from tuner.records import Condition, Dimension, Fixed, Space, possible

Table: TypeAlias = Mapping[str, Hyperparameter]
_TABLE: ContextVar[Table] = ContextVar("table", default=HYPERPARAMETERS)


def table_in_use() -> Table:
    """The hyperparameters that the file which is being checked may name."""
    return _TABLE.get()


@contextmanager
def using(table: Table) -> Iterator[None]:
    """Check what follows against this table: tuner's with what plug-ins bring."""
    token = _TABLE.set(table)
    try:
        yield
    finally:
        _TABLE.reset(token)


STRICT = ConfigDict(
    extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
)
"""A file means what it says: `"8"` is no number and `60.0` no whole number."""

Count = Annotated[int, Field(ge=1)]
Text = Annotated[str, Field(min_length=1)]
_LONGEST_NAME_BYTES = 255


def possible_path(path: str) -> str:
    """A path, id or URL as it is. A file system looks at no name with a NUL or longer than 255 bytes."""
    if "\0" in path:
        raise mistake("has a NUL character, which no path can have")
    is_url = "://" in path and not path.startswith("sqlite")
    if not is_url and any(len(name.encode()) > _LONGEST_NAME_BYTES for name in path.split("/")):
        raise mistake(f"has a name longer than {_LONGEST_NAME_BYTES} bytes, which no file system keeps")
    return path


def _known(kind: Kind) -> Callable[[str], str]:
    """Refuses a name that leads nowhere; what it leads to is not imported."""

    def check(name: str) -> str:
        if not is_known(kind, name):
            raise mistake(refusal(expected(kind), name, meant_value(name, names(kind))))
        return name

    return check


def _named(kind: Kind) -> WithJsonSchema:
    """Names that are built in, for editors to complete, and any other."""
    others = {"type": "string", "pattern": f"^{PATH}$"}
    return WithJsonSchema({"anyOf": [{"enum": list(BUILT_IN[kind])}, others]})


PathText = Annotated[Text, AfterValidator(possible_path)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$", max_length=100)]
"""A name that is safe as a directory."""

TRIAL_PATH = re.compile(r"([A-Za-z0-9_][A-Za-z0-9._-]*)/(\d+)", re.ASCII)
"""ROUND/TRIAL, as `continues` says it."""


class ModelSpec(BaseModel):
    """The frozen base model, the same for all trials."""

    model_config = STRICT

    path: PathText
    """A model on the Hugging Face Hub, or a directory: relative to the file, or absolute."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of the base's weights and of the computation; adapters are always trained in float32."""
    quantization: Literal["none", "nf4", "int8"] = "none"
    """Keep the base's weights in 4 bits (`nf4`, as QLoRA) or 8 bits (`int8`)."""
    revision: str | None = None
    """Branch, tag or commit on the Hub; null is its main branch."""
    gguf_file: str | None = None
    """Name of a GGUF file in the model's directory or repository, to read weights and tokenizer from."""
    trust_remote_code: bool = False
    """Run Python code that the model's repository brings along."""
    loader: Literal["transformers", "unsloth"] = "transformers"
    """Who loads the base: `unsloth` puts its own kernels into it, needs a GPU and the extra `unsloth`, and
    takes neither `int8` nor `gguf_file`."""

    @property
    def warning_of_code(self) -> str:
        """What to know of `trust_remote_code` before the model is loaded."""
        advice = (
            "read it first" if self.revision else "read it first, and keep to what you read by `revision`"
        )
        return f"model.trust_remote_code: Python code of {self.path} runs here, with your rights; {advice}"

    @model_validator(mode="after")
    def _unsloth_takes_less(self) -> Self:
        if self.loader == "unsloth" and (self.quantization == "int8" or self.gguf_file):
            wrong = "gguf_file" if self.gguf_file else "quantization"
            message = "unsloth loads none and nf4 alone; leave this out, or take loader: transformers"
            refuse("model", [Refusal((wrong,), message, rests_on=("model.loader",))])
        return self

    @field_validator("dtype", mode="before")
    @classmethod
    def _float16_overflows(cls, dtype: object) -> object:
        if dtype in ("float16", "fp16", "half"):
            raise mistake(
                f"{dtype} is not offered: gradients overflow in it without a loss scale for each trial; "
                "use bfloat16 (or float32)"
            )
        return dtype


def _check_hyperparameters(written: dict[str, Any]) -> dict[str, Any]:
    refuse("hyperparameters", _hyperparameter_refusals(written, table_in_use()))
    return written


def _hyperparameter_refusals(written: dict[str, Any], table: Table) -> Iterator[Refusal]:
    space: dict[str, Dimension] = {}
    for name, raw in written.items():
        if name not in table:
            yield Refusal((name,), "unknown hyperparameter", type=UNKNOWN_KEY)
            continue
        try:
            space[name] = read_dimension(table[name], raw)
        except ValueError as error:
            yield Refusal((name,), str(error))
    for name, row in table.items():
        if row.default is not None and name not in written:
            space[name] = Fixed(row.default)
    idle = space.keys() - possible(space).keys() - IGNORED_WHERE_INACTIVE
    for name in written:
        if name in idle:
            chooser = condition_of(table[name]).chosen_by
            message = f"{counts_with(table[name])}; {described_choice(chooser, space, table)}"
            yield Refusal((name,), message, rests_on=(f"hyperparameters.{chooser}",))


IGNORED_WHERE_INACTIVE = frozenset({"decay_steps"})
"""A file may have it beside another schedule than linear, as the files of earlier versions do."""


def condition_of(row: Hyperparameter) -> Condition:
    """The condition of a row that has one."""
    assert row.only_with is not None
    return row.only_with


def counts_with(row: Hyperparameter) -> str:
    """Such as `counts only with the optimizer adamw or adamw_8bit`."""
    chooser, values = condition_of(row)
    return f"counts only with the {chooser} {one_of(values)}"


def described_choice(chooser: str, space: Space, table: Table) -> str:
    """What a chooser is, and which hyperparameters go with that."""
    dimension = space[chooser]
    own = [
        name
        for name, row in table.items()
        if row.only_with is not None and row.only_with.chosen_by == chooser
        if any(map(dimension.contains, row.only_with.values))
    ]
    has = f", which has {', '.join(own)}" if own else ", which has none of its own"
    return f"{chooser} is {describe(dimension)} here{has}"


WrittenHyperparameters = Annotated[
    dict[str, Any], AfterValidator(_check_hyperparameters), WithJsonSchema(hyperparameters_schema())
]
"""Hyperparameters as the file writes them: by name a scalar, a list or a range, in the file's order."""


class SearchSpec(BaseModel):
    """How many points of the search space are tried, and which."""

    model_config = STRICT

    trials: Count = 16
    """Trials of the round. Infeasible ones count; those that a machine failed are replaced. No point is tried
    twice, so a search space with fewer points has a trial for each."""
    sampler: Annotated[str, AfterValidator(_known("sampler")), _named("sampler")] = "quasi-random"
    """Who proposes: `quasi-random` covers the space evenly; `tpe` and `gp` model the results so far; `grid`
    goes through all combinations of lists. Or a sampler of Optuna's as `package.module:Class`, such as
    `optuna.samplers:CmaEsSampler`."""
    sampler_arguments: dict[str, Any] = {}
    """What the class of such a sampler is made with, besides its seed."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the sampler; training has its own, `hyperparameters.training_seed`."""
    enqueue: Annotated[list[dict[str, Any]], WithJsonSchema(enqueue_schema())] = []
    """Hyperparameters to try first, such as your baseline; the sampler fills in those left out. Each point
    once: to run one again, list two values of `training_seed`.
    `continues: round1/3` goes on from that trial's run."""

    @field_validator("enqueue", mode="after")
    @classmethod
    def _check_enqueue(cls, entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
        refuse(
            "enqueue", (refusal for at, entry in enumerate(entries) for refusal in _entry_refusals(at, entry))
        )
        return [{name: _enqueued(name, raw) for name, raw in entry.items()} for entry in entries]


def _entry_refusals(position: int, entry: dict[str, Any]) -> Iterator[Refusal]:
    for name, raw in entry.items():
        if name == "continues":
            if not (isinstance(raw, str) and TRIAL_PATH.fullmatch(raw)):
                yield Refusal((position, name), f"expects ROUND/TRIAL such as round1/3, got {shown(raw)}")
        elif name not in table_in_use():
            yield Refusal((position, name), "unknown hyperparameter", type=UNKNOWN_KEY)
        else:
            try:
                _enqueued(name, raw)
            except ValueError as error:
                yield Refusal((position, name), str(error))


def _enqueued(name: str, raw: Any) -> Any:
    if name == "continues":
        return raw
    value = parse_value(table_in_use()[name].kind, raw)
    return list(value) if isinstance(value, tuple) else value


_METRIC = r"exact_match|[^:]+:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*"


class AnswersSpec(BaseModel):
    """How generated answers are scored, once for each complete trial, with the adapter of its best step."""

    model_config = STRICT

    metric: Annotated[Text, WithJsonSchema({"type": "string", "pattern": f"^({_METRIC})$"})] = "exact_match"
    """What compares an answer with the row's completion: `exact_match`, which is 1 where they are equal but
    for white space, else 0; or a function as `file.py:function`, of a file beside the round file, or
    `module:function`. It is called as `function(answer, reference)` with two texts and returns a finite
    number, the higher the better."""
    max_examples: Count = 50
    """Answer so many evaluation rows at most: the first that have a prompt and a completion."""
    max_new_tokens: Count = 128
    """Tokens that an answer may have; the likeliest is taken each time."""
    objective: bool = False
    """The former spelling of `objective: {metric: answers}` at the top level of the file."""

    @field_validator("metric")
    @classmethod
    def _names_a_function(cls, metric: str) -> str:
        if not re.fullmatch(_METRIC, metric):
            raise mistake(f"expects exact_match, file.py:function or module:function, got {shown(metric)}")
        return metric


class EvaluationSpec(BaseModel):
    """When and on how much the loss is measured."""

    model_config = ConfigDict(**STRICT, json_schema_extra=lambda schema: schema.pop("required"))

    every_steps: Count
    """Steps between two evaluations; a twelfth of `max_train_steps` when left out. Step 0 and the last step
    are always evaluated."""
    batch_size: Count = 16
    """Sequences evaluated at once; changes no result."""
    max_examples: Count = 200
    """Evaluate on that many examples at most."""
    answers: AnswersSpec | None = None
    """Let every complete trial answer evaluation rows, and score that; not done where it is left out."""


class ObjectiveSpec(BaseModel):
    """What trials are ranked by, and what the sampler is told."""

    model_config = STRICT

    metric: Annotated[str, AfterValidator(_known("metric")), _named("metric")] = "eval_loss"
    """`eval_loss` is the evaluation loss; `token_accuracy` the share of target tokens that the model predicts
    first; `answers` the mean score of `evaluation.answers`, which ranks trials, while steps and horizons stay
    with the loss. Or a metric of yours as `package.module:NAME`. Of a metric that each evaluation has, the
    best step, the gain of a doubling, the noise and `run.pruner` follow it."""
    direction: Literal["minimize", "maximize"] | None = None
    """Which values are better. The metric says so itself; written out, it has to agree."""


class CheckpointsSpec(BaseModel):
    """Where adapters are kept."""

    model_config = STRICT

    directory: PathText = "runs"
    """Relative to the file; each trial has its folder `ROUND/trial-0007` in it."""
    keep_best: Count = 1
    """Adapters kept for each trial: those of its best steps."""
    keep_best_trials: Annotated[
        Literal["all"] | int,
        WithJsonSchema({"anyOf": [{"const": "all"}, {"type": "integer", "minimum": 1}]}),
    ] = "all"
    """Trials of the round that keep their adapters: `all`, or so many of the best. The others lose theirs
    once they have ended; of the best three, what a longer round goes on from stays. Curves stay of all."""

    @field_validator("keep_best_trials", mode="before")
    @classmethod
    def _all_or_count(cls, number: object) -> object:
        is_count = isinstance(number, int) and not isinstance(number, bool) and number >= 1
        if number != "all" and not is_count:
            raise mistake(f"expects all or a whole number of at least 1, got {shown(number)}")
        return number

    @property
    def most_kept_trials(self) -> int | None:
        """`keep_best_trials` as a number; None is all."""
        return self.keep_best_trials if isinstance(self.keep_best_trials, int) else None


class RunSpec(BaseModel):
    """Where and how the round runs; nothing here changes what a trial run to its end gives, so it may change
    at any time."""

    model_config = STRICT

    engine: Annotated[str, AfterValidator(_known("engine")), _named("engine")] = "local"
    """Where trials run: `local` is this machine, one process for each GPU; `simulated` is a rehearsal with
    made-up losses, in the folder `rehearsal` beside the file. Or an engine of yours, as
    `package.module:Class`."""
    slots: Annotated[
        Literal["auto"] | int,
        WithJsonSchema({"anyOf": [{"const": "auto"}, {"type": "integer", "minimum": 1}]}),
    ] = "auto"
    """Trials that train together in one pass over the base. `auto`: on a GPU as many as fill a pass and fit
    into memory, from a few probe passes; on a CPU one, which is exact to the digit. Where `use_dora`
    may be true it is one, whatever is written."""
    production_steps: Count | None = None
    """The longest run you can pay for; no suggested horizon is longer."""
    worthwhile_gain: Annotated[float, Field(ge=0, lt=1)] = 0.005
    """The share of the loss that doubling the steps has to bring; a horizon whose last doubling brought no
    more is long enough."""
    decay_branches: Annotated[
        Literal["auto"] | bool,
        WithJsonSchema({"anyOf": [{"const": "auto"}, {"type": "boolean"}]}),
    ] = "auto"
    """Comparison runs, which measure what the last doubling of the steps was worth. `auto`: after the last
    trial the best one is run to half of `max_train_steps` on the same schedule, where the rate decays and no
    earlier round tells. `true`: all leading trials, to a half and to 0.71. `false`: none. With
    `schedule: linear` they start from checkpoints of the trials and are short, else from scratch."""
    pruner: Literal["none", "median", "halving"] = "none"
    """Ends trials before the horizon: `median` one whose best loss is above the median of what at least five
    complete trials had by then, `halving` one that is not among the best third at a ninth or a third of the
    horizon. It changes neither schedule nor horizon. A pruned trial counts, and is never promoted."""
    report_to: list[Annotated[str, AfterValidator(_known("tracker")), _named("tracker")]] = []
    """Other tools that show each trial as a run with its curve, while it runs. Each is an extra;
    `tuner doctor` names the command that installs it."""

    @field_validator("decay_branches", mode="before")
    @classmethod
    def _auto_or_yes_or_no(cls, rule: object) -> object:
        if rule != "auto" and not isinstance(rule, bool):
            raise mistake(f"expects auto, true or false, got {shown(rule)}")
        return rule

    @field_validator("slots", mode="before")
    @classmethod
    def _auto_or_count(cls, slots: object) -> object:
        is_count = isinstance(slots, int) and not isinstance(slots, bool) and slots >= 1
        if slots != "auto" and not is_count:
            raise mistake(f"expects auto or a whole number of at least 1, got {shown(slots)}")
        return slots
