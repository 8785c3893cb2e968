"""The sections of a round file: their keys, defaults and the checks within one section."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from tuner.config.dimensions import (
    advice_on,
    describe,
    enqueue_schema,
    hyperparameters_schema,
    parse_value,
    read_dimension,
)
from tuner.config.wording import UNKNOWN_KEY, Refusal, meant_method, mistake, refuse
from tuner.errors import InputError, one_of, refusal, shown
from tuner.methods.hyperparameters import Hyperparameter
from tuner.methods.registry import BUILT_IN, PATH, Kind, expected, is_known
from tuner.methods.table import HYPERPARAMETERS
from tuner.records import Condition, Dimension, Fixed, Space, possible

Table: TypeAlias = Mapping[str, Hyperparameter]
_TABLE: ContextVar[Table] = ContextVar("table", default=HYPERPARAMETERS)
_UNKNOWN: ContextVar[str | None] = ContextVar("unknown", default=None)


def table_in_use() -> Table:
    """Return the hyperparameters that the file being checked may name."""
    return _TABLE.get()


@contextmanager
def using(table: Table, *, unknown: str | None = None) -> Iterator[None]:
    """Check files against this table (tuner's own plus those of plug-ins) within the block.

    `unknown` is the message for another name; None suggests one of tuner's.
    """
    token, message = _TABLE.set(table), _UNKNOWN.set(unknown)
    try:
        yield
    finally:
        _TABLE.reset(token)
        _UNKNOWN.reset(message)


def written_at(name: str) -> tuple[str, ...]:
    """Return where a hyperparameter is written below `hyperparameters`: `extra.beta` is under `extra`."""
    return tuple(name.split(".", 1))


def _unknown(place: tuple[str | int, ...]) -> Refusal:
    message = _UNKNOWN.get()
    if message is None:
        return Refusal(place, "unknown hyperparameter", type=UNKNOWN_KEY)
    return Refusal(place, message)


STRICT = ConfigDict(
    extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
)
"""Values are not coerced: `"8"` is not a number and `60.0` is not a whole number."""

Count = Annotated[int, Field(ge=1)]
Text = Annotated[str, Field(min_length=1)]
_LONGEST_NAME_BYTES = 255


def possible_path(path: str) -> str:
    """Return a path, id or URL unchanged. Refuses a NUL and file names longer than 255 bytes."""
    if "\0" in path:
        raise mistake("contains a NUL character, which no path can contain")
    is_url = "://" in path and not path.startswith("sqlite")
    if not is_url and any(len(name.encode()) > _LONGEST_NAME_BYTES for name in path.split("/")):
        raise mistake(
            f"contains a file name longer than {_LONGEST_NAME_BYTES} bytes, which file systems do not allow"
        )
    return path


def _known(kind: Kind) -> Callable[[object], object]:
    """Return a check that refuses unknown names without importing anything."""

    def check(name: object) -> object:
        if not isinstance(name, str) or not is_known(kind, name):
            raise mistake(refusal(expected(kind), name, meant_method(kind, name)))
        return name

    return check


def _named(kind: Kind) -> WithJsonSchema:
    """Return a schema with the built-in names (for completion) and any `package.module:Name`."""
    others = {"type": "string", "pattern": f"^{PATH}$"}
    return WithJsonSchema({"anyOf": [{"enum": list(BUILT_IN[kind])}, others]})


PathText = Annotated[Text, AfterValidator(possible_path)]
NAME_PATTERN = r"^[A-Za-z0-9_][A-Za-z0-9._-]*$"
_MAX_NAME = 100
Name = Annotated[str, Field(pattern=NAME_PATTERN, max_length=_MAX_NAME)]
"""A name that is safe as a directory."""


def refuse_bad_name(name: str, *, asked: str) -> None:
    """Raise InputError, which begins with `asked`, for what a round file may not have as a name."""
    if len(name) > _MAX_NAME:
        raise InputError(f"{asked} {shown(name)}: expects at most {_MAX_NAME} characters")
    # `$` alone would let a last newline pass.
    if not re.fullmatch(NAME_PATTERN, name):
        allowed = "letters, digits, `_`, `.` and `-` (no `.` or `-` first)"
        raise InputError(f"{asked} {name!r}: expects {allowed}, such as round2")


TRIAL_PATH = re.compile(r"([A-Za-z0-9_][A-Za-z0-9._-]*)/(\d+)", re.ASCII)
"""ROUND/TRIAL, the form of `continues`."""


class ModelSpec(BaseModel):
    """The frozen base model, the same for all trials."""

    model_config = STRICT

    path: PathText
    """A model on the Hugging Face Hub, or a directory: relative to the file, or absolute."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Data type of the base model's weights and of the computation; adapters always train in float32."""
    tf32: bool = False
    """Multiply float32 with 10 bits of mantissa (TF32) on a GPU: several times as fast, and less exact. Needs
    `dtype: float32`; a CPU ignores it and says so."""
    kernels: Literal["torch", "liger"] = "torch"
    """What computes norms, RoPE, gated activations and losses while training: `liger` is faster on a GPU and
    rounds otherwise. It needs a GPU, the extra `liger` and an architecture that liger-kernel knows."""
    attention: Literal["torch", "varlen"] = "torch"
    """What computes attention in training passes whose examples share a row: `varlen` is torch's varlen_attn,
    which needs no copies into a padded grid and rounds otherwise. It needs a GPU and `dtype: bfloat16`."""
    quantization: Literal["none", "nf4", "int8"] = "none"
    """Load the base model's weights in 4 bits (`nf4`, as QLoRA does) or 8 bits (`int8`)."""
    revision: str | None = None
    """Branch, tag or commit on the Hub; null means the main branch."""
    gguf_file: str | None = None
    """GGUF file in the model's directory or repository to read the weights and the tokenizer from."""
    trust_remote_code: bool = False
    """Run the Python code in the model's repository."""
    loader: Literal["transformers", "unsloth"] = "transformers"
    """Library that loads the base model. `unsloth` patches it with faster kernels, needs a GPU and the extra
    `unsloth`, and does not support `int8` or `gguf_file`."""

    @property
    def warning_of_code(self) -> str:
        """Return the warning to print for `trust_remote_code` before the model is loaded."""
        advice = (
            "review it first" if self.revision else "review it first, and pin that version with `revision`"
        )
        return f"model.trust_remote_code: Python code from {self.path} runs with your permissions; {advice}"

    @model_validator(mode="after")
    def _unsloth_takes_less(self) -> Self:
        if self.loader == "unsloth" and (self.quantization == "int8" or self.gguf_file):
            wrong = "gguf_file" if self.gguf_file else "quantization"
            message = "not supported by loader: unsloth; remove this line, or use loader: transformers"
            refuse("model", [Refusal((wrong,), message, rests_on=("model.loader",))])
        return self

    @model_validator(mode="after")
    def _unsloth_has_kernels(self) -> Self:
        wrong = [key for key in ("kernels", "attention") if getattr(self, key) != "torch"]
        if self.loader == "unsloth" and wrong:
            message = "unsloth has kernels of its own; remove this line, or use loader: transformers"
            refuse("model", [Refusal((key,), message, rests_on=("model.loader",)) for key in wrong])
        return self

    @model_validator(mode="after")
    def _varlen_is_of_bfloat16(self) -> Self:
        if self.attention == "varlen" and self.dtype != "bfloat16":
            message = "varlen is for dtype: bfloat16; set attention: torch, or dtype: bfloat16"
            refuse("model", [Refusal(("attention",), message, rests_on=("model.dtype",))])
        return self

    @model_validator(mode="after")
    def _tf32_is_of_float32(self) -> Self:
        if self.tf32 and self.dtype != "float32":
            message = "true is for dtype: float32; remove this line, or set dtype: float32"
            refuse("model", [Refusal(("tf32",), message, rests_on=("model.dtype",))])
        return self

    @field_validator("dtype", mode="before")
    @classmethod
    def _float16_overflows(cls, dtype: object) -> object:
        if dtype in ("float16", "fp16", "half"):
            raise mistake(
                f"{dtype} is not supported: gradients overflow without a loss scale per trial; "
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
            yield _unknown(written_at(name))
            continue
        try:
            space[name] = read_dimension(table[name], raw)
        except ValueError as error:
            yield Refusal(written_at(name), f"{error}{advice_on(table[name], raw)}")
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
"""Allowed (and ignored) with schedules other than linear, as in files of earlier versions."""


def condition_of(row: Hyperparameter) -> Condition:
    """Return the condition of a row that has one."""
    assert row.only_with is not None
    return row.only_with


def counts_with(row: Hyperparameter) -> str:
    """Return, for example, `applies only to optimizer: adamw or adamw_8bit`."""
    chooser, values = condition_of(row)
    return f"applies only to {chooser}: {one_of(values)}"


def described_choice(chooser: str, space: Space, table: Table) -> str:
    """Return what the file chooses, and which hyperparameters belong to that choice."""
    dimension = space[chooser]
    own = [
        name
        for name, row in table.items()
        if row.only_with is not None and row.only_with.chosen_by == chooser
        if any(map(dimension.contains, row.only_with.values))
    ]
    has = f", whose own hyperparameters are {', '.join(own)}" if own else ", which has none of its own"
    return f"{chooser} is {describe(dimension)} here{has}"


WrittenHyperparameters = Annotated[
    dict[str, Any], AfterValidator(_check_hyperparameters), WithJsonSchema(hyperparameters_schema())
]
"""Hyperparameters by name, as written: a scalar, a list or a range each, in the file's order."""


class SearchSpec(BaseModel):
    """How many points of the search space to try, and which."""

    model_config = STRICT

    trials: Count = 16
    """Number of trials in the round. Infeasible trials are included; trials that failed because of the
    machine are replaced. No point is tried twice, so a smaller search space gets one trial per point."""
    sampler: Annotated[str, BeforeValidator(_known("sampler")), _named("sampler")] = "quasi-random"
    """How hyperparameters are proposed: `quasi-random` covers the space evenly; `tpe` and `gp` model the
    results so far; `random` draws independently; `grid` tries every combination of the lists. Any Optuna
    sampler works as `package.module:Class`, such as `optuna.samplers:CmaEsSampler`."""
    sampler_arguments: dict[str, Any] = {}
    """Keyword arguments for the class of an Optuna sampler, besides its seed."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Sampling seed; training has its own seed, `hyperparameters.training_seed`."""
    enqueue: Annotated[list[dict[str, Any]], WithJsonSchema(enqueue_schema())] = []
    """Points to try first, such as your baseline; the sampler fills in what an entry leaves out. Each point
    runs once: to repeat one, list two values of `training_seed`. With `continues: round1/3` the trial resumes
    from a checkpoint of that trial."""

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
            yield _unknown((position, *written_at(name)))
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
    """How generated answers are scored: once per complete trial, with the adapter of its best step."""

    model_config = STRICT

    metric: Annotated[Text, WithJsonSchema({"type": "string", "pattern": f"^({_METRIC})$"})] = "exact_match"
    """How an answer is compared with the row's completion. `exact_match` is 1 if they are equal up to white
    space, else 0. Or a function of your own, as `file.py:function` (relative to the round file) or
    `module:function`: it is called as `function(answer, reference)` with two strings and returns a finite
    number, higher is better."""
    max_examples: Count = 50
    """Maximum number of evaluation rows to answer: the first ones with a prompt and a completion."""
    max_new_tokens: Count = 128
    """Maximum number of tokens in an answer. Decoding is greedy."""
    objective: bool = False
    """Old spelling of `objective: {metric: answers}` at the top level of the file."""

    @field_validator("metric")
    @classmethod
    def _names_a_function(cls, metric: str) -> str:
        if not re.fullmatch(_METRIC, metric):
            raise mistake(f"expects exact_match, file.py:function or module:function, got {shown(metric)}")
        return metric


class EvaluationSpec(BaseModel):
    """How often the loss is measured, and on how many examples."""

    model_config = ConfigDict(**STRICT, json_schema_extra=lambda schema: schema.pop("required"))

    every_steps: Count
    """Steps between two evaluations. Default: a twelfth of `max_train_steps`. Step 0 and the last step are
    always evaluated."""
    batch_size: Count = 16
    """Sequences per evaluation batch. Does not change results."""
    max_examples: Count = 200
    """Maximum number of examples to evaluate on."""
    answers: AnswersSpec | None = None
    """Score generated answers of every complete trial. Off when left out."""


_METRIC_SCHEMA = WithJsonSchema(
    {"anyOf": [{"enum": list(BUILT_IN["metric"])}, {"type": "string", "minLength": 1}]}
)


class ObjectiveSpec(BaseModel):
    """The metric that ranks trials and that the sampler optimizes."""

    model_config = STRICT

    metric: Annotated[Text, _METRIC_SCHEMA] = "eval_loss"
    """`eval_loss`: the evaluation loss. `token_accuracy`: the share of target tokens that are the model's top
    prediction. `answers`: the mean score of `evaluation.answers`; it ranks trials, while best steps and
    horizons still use the loss. Or a metric of your own as `package.module:NAME`. If the metric is measured
    at each evaluation, the best step, the gain of a doubling, the noise and `run.pruner` use it too. With
    `command`: any name that the command reports."""
    direction: Literal["minimize", "maximize"] | None = None
    """Which values are better. Defaults to the metric's own direction; if given, it must match. Required for
    a metric that only a command reports."""


class CheckpointsSpec(BaseModel):
    """Where adapters are saved, and how many are kept."""

    model_config = STRICT

    directory: PathText = "runs"
    """Directory for checkpoints, relative to the file; each trial has a folder in it, `ROUND/trial-0007`."""
    keep_best: Count = 1
    """Number of adapters to keep per trial: those of its best steps."""
    keep_best_trials: Annotated[
        Literal["all"] | int,
        WithJsonSchema({"anyOf": [{"const": "all"}, {"type": "integer", "minimum": 1}]}),
    ] = "all"
    """How many of the round's best trials keep their adapters: `all` or a number. Adapters of other trials
    are deleted when the trial ends, except checkpoints of the best three from which a longer round can
    resume. Curves are kept for all trials."""

    @field_validator("keep_best_trials", mode="before")
    @classmethod
    def _all_or_count(cls, number: object) -> object:
        is_count = isinstance(number, int) and not isinstance(number, bool) and number >= 1
        if number != "all" and not is_count:
            raise mistake(refusal("all or a whole number of at least 1", number))
        return number

    @property
    def most_kept_trials(self) -> int | None:
        """Return `keep_best_trials` as a number; None means all."""
        return self.keep_best_trials if isinstance(self.keep_best_trials, int) else None


_UNITS = {"s": 1, "m": 60, "h": 3600}


def seconds_of(text: str) -> float:
    """Return the seconds of `90s`, `30m` or `2h`. Raises ValueError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text.strip())
    if found is None:
        raise ValueError(text)
    return float(found[1]) * _UNITS[found[2]]


def _lasting(text: object) -> object:
    try:
        enough = isinstance(text, str) and seconds_of(text) > 0
    except ValueError:
        enough = False
    if not enough:
        raise mistake(refusal("a time such as 90s, 30m or 2h", text))
    return text


_ADDRESS = r"local|(?!\w+://)\S+:\d+"


def _address(text: object) -> object:
    if not (isinstance(text, str) and re.fullmatch(_ADDRESS, text)):
        raise mistake(refusal("HOST:PORT, such as 10.0.0.1:6379, or local", text))
    return text


class RunSpec(BaseModel):
    """Where and how the round runs. These keys do not change the results of a complete trial, so you can edit
    them at any time."""

    model_config = STRICT

    engine: Annotated[str, BeforeValidator(_known("engine")), _named("engine")] = "local"
    """Where trials run. `local`: this machine, one process per GPU. `ray`: the GPUs of a Ray cluster.
    `simulated`: a dry run with synthetic losses, in the folder `dry-run` beside the file. Or an engine of
    your own as `package.module:Class`."""
    ray_address: (
        Annotated[
            str,
            BeforeValidator(_address),
            WithJsonSchema({"type": "string", "pattern": f"^({_ADDRESS})$"}),
        ]
        | None
    ) = None
    """Cluster that `engine: ray` joins, as `HOST:6379`; `local` starts one on this machine. Default: the
    variable RAY_ADDRESS. `tuner` itself must run on a machine of the cluster."""
    resources_patience: Annotated[float, Field(gt=0)] = 30.0
    """Minutes to wait for a free GPU with `engine: ray` before the round stops."""
    send_model_up_to: Annotated[float, Field(ge=0)] = 20.0
    """Largest model or data file, in GB, that is sent to a node that does not see it, with `engine: ray`.
    Twice as much is kept on each node between rounds."""
    slots: Annotated[
        Literal["auto"] | int,
        WithJsonSchema({"anyOf": [{"const": "auto"}, {"type": "integer", "minimum": 1}]}),
    ] = "auto"
    """Number of trials that train together in one pass over the base model. `auto`: on a GPU, as many as are
    efficient and fit into memory, measured with a few probe passes; on a CPU, one, which is bit-exact. If
    `use_dora` can be true, it is always one."""
    gpus_per_worker: Annotated[int, Field(ge=0)] = 1
    """GPUs of a worker process; 0 for none. tuner's own trainer spreads the base model over them, a `command`
    may use them together."""
    production_steps: Count | None = None
    """The longest run you can afford, in steps; no suggested horizon is longer."""
    worthwhile_gain: Annotated[float, Field(ge=0, lt=1)] = 0.005
    """Smallest relative improvement of the loss that makes doubling the steps worthwhile. A horizon whose
    last doubling brought less is long enough."""
    decay_branches: Annotated[
        Literal["auto"] | bool,
        WithJsonSchema({"anyOf": [{"const": "auto"}, {"type": "boolean"}]}),
    ] = "auto"
    """Comparison runs, which measure how much the last doubling of the steps improved the loss. `auto`: after
    the last trial, the best one is run to half of `max_train_steps` on the same schedule, if the rate decays
    and no earlier round shows the gain. `true`: all leading trials, to 0.5 and 0.71 of the horizon. `false`:
    none. With `schedule: linear` they start from checkpoints of the trials and are short; otherwise they
    start from scratch."""
    pruner: Literal["none", "median", "halving"] = "none"
    """Stops trials before the horizon. `median`: if the trial's best loss is above the median that at least
    five complete trials had at this step. `halving`: if it is not in the best third at a ninth or a third of
    the horizon. Schedule and horizon do not change. A pruned trial is included in `search.trials` and is
    never promoted."""
    report_to: list[Annotated[str, BeforeValidator(_known("tracker")), _named("tracker")]] = []
    """Experiment trackers that get each trial as a run, with its curve, while it runs. Each is an extra;
    `tuner doctor` shows the command that installs it."""

    notify: list[Annotated[str, Field(min_length=1)]] = []
    """A program and its arguments, run without a shell when a trial is the new best and when the round ends,
    stops or fails; it gets a JSON document on its standard input and has 30 seconds. Its failure does not
    affect the round. Empty: nothing is run."""
    loading_timeout: Annotated[str, BeforeValidator(_lasting)] = "30m"
    """How long a worker may be silent while it downloads, loads, quantises or compiles, such as `90s`, `30m`
    or `2h`. A pass may take ten times as long as the slowest one so far, and at least two minutes. A worker
    that is silent for longer is killed and replaced; its trials resume."""

    storage_patience: Annotated[str, BeforeValidator(_lasting)] = "10m"
    """How long a round waits, such as `90s`, `30m` or `2h`, while its database cannot be reached or a disk is
    full, before it stops. Training continues while the database is away, and pauses while the disk is full;
    commands, and trials on other machines, continue then too. The same command resumes a round that has
    stopped."""

    @property
    def storage_seconds(self) -> float:
        """`storage_patience` in seconds."""
        return seconds_of(self.storage_patience)

    @property
    def loading_seconds(self) -> float:
        """`loading_timeout` in seconds."""
        return seconds_of(self.loading_timeout)

    @field_validator("notify", mode="before")
    @classmethod
    def _program_and_arguments(cls, command: object) -> object:
        if not isinstance(command, list) or not all(isinstance(word, str) and word for word in command):
            raise mistake(refusal("a program and its arguments, such as [python, tell.py]", command))
        return command

    @field_validator("decay_branches", mode="before")
    @classmethod
    def _auto_or_yes_or_no(cls, rule: object) -> object:
        if rule != "auto" and not isinstance(rule, bool):
            raise mistake(refusal("auto, true or false", rule))
        return rule

    @field_validator("slots", mode="before")
    @classmethod
    def _auto_or_count(cls, slots: object) -> object:
        is_count = isinstance(slots, int) and not isinstance(slots, bool) and slots >= 1
        if slots != "auto" and not is_count:
            raise mistake(refusal("auto or a whole number of at least 1", slots))
        return slots
