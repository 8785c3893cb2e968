"""The data section: where rows come from, how a row becomes an example, and which keys exclude each other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema, field_validator, model_validator

from tuner.config.sections import STRICT, PathText, Text
from tuner.config.wording import Refusal, meant_value, mistake, refuse
from tuner.errors import one_of, refusal

Format = Literal["alpaca", "messages", "sharegpt", "completion", "text"]
Template = Literal["alpaca", "chatml", "llama3", "tokenizer"]
SplitOn = Literal["line", "blank", "bytes"]

COLUMNS: Mapping[str, tuple[str, ...]] = {
    "alpaca": ("instruction", "input", "output", "system", "history"),
    "messages": ("messages", "tools"),
    "sharegpt": ("conversations", "system", "tools"),
    "completion": ("prompt", "completion"),
    "text": ("text",),
}
"""The columns that each format reads, by the keys of `columns`."""

_YIELDING = {"alpaca": ("system", "history"), "messages": ("tools",), "sharegpt": ("tools",)}
"""Optional columns that are skipped if another column is mapped to their name."""
_CONVERSATIONS = ("alpaca", "messages", "sharegpt")
"""Formats that are rendered by a chat template."""
_MAX_RECORD_BYTES = 64 * 1024 * 1024
"""A record is held in memory as a whole."""
_COLUMNS_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        name: {"type": "string", "minLength": 1} for columns in COLUMNS.values() for name in columns
    },
    "additionalProperties": False,
    "default": {},
}


class SourceSpec(BaseModel):
    """One dataset."""

    model_config = STRICT

    path: PathText
    """A JSON, JSONL, CSV or Parquet file relative to the round file, a pattern such as `data/*.jsonl`, a URL,
    or a dataset on the Hub. All except Parquet may be compressed with gzip."""
    format: Format
    """How a row becomes a prompt and a completion. `alpaca`: instruction, input and output; optionally system
    and history. `messages`: a list of role and content; optionally tools. `sharegpt`: conversations, a list
    of from and value. `completion`: prompt and completion. `text`: only text."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """How many times each of its rows appears in an epoch of training. Its share of an epoch is weight x
    rows, divided by the sum over all sources. With a fraction, a fixed subset of the rows appears once
    more."""
    split: str | None = None
    """Split of a dataset on the Hub or in a folder; null means `train`, or the only split that `save_to_disk`
    wrote."""
    config: str | None = None
    """Configuration (subset) of a dataset on the Hub."""
    columns: Annotated[dict[str, Text], WithJsonSchema(_COLUMNS_SCHEMA)] = {}
    """Names of the format's columns in this dataset, where they differ: `{prompt: question, completion:
    answer}`."""
    template: Template | None = None
    """Chat template for `alpaca`, `messages` and `sharegpt`: `alpaca`, `chatml`, `llama3`, or `tokenizer` for
    the model's own. Null means `alpaca` for that format, otherwise `tokenizer`."""
    split_on: SplitOn | None = None
    """For `text`: read the file as plain text, such as a log, instead of a table. A record is a `line`, a
    block between `blank` lines, or `record_bytes` `bytes`."""
    record_bytes: Annotated[int, Field(ge=1, le=_MAX_RECORD_BYTES)] | None = None
    """With `split_on: bytes`: size of a record in bytes; a record never ends within a character."""
    group_records: Annotated[
        Literal["fill"] | int,
        WithJsonSchema({"anyOf": [{"const": "fill"}, {"type": "integer", "minimum": 1}]}),
    ] = 1
    """With `split_on`: number of consecutive records in an example; `fill` takes as many as fit into
    `max_length`."""
    overlap_tokens: Annotated[int, Field(ge=0)] | None = None
    """For `text`: split a text longer than `max_length` into several examples, where each repeats this number
    of tokens from the end of the previous one as context (they are not trained on again). Null means 0 with
    `split_on`; without `split_on` the end of a long text is cut off."""

    @field_validator("group_records", mode="before")
    @classmethod
    def _fill_or_count(cls, number: object) -> object:
        is_count = isinstance(number, int) and not isinstance(number, bool) and number >= 1
        if number != "fill" and not is_count:
            raise mistake(refusal("fill or a whole number of at least 1", number))
        return number


class DataSpec(BaseModel):
    """What to train on, and what to measure the loss on."""

    model_config = ConfigDict(
        **STRICT, json_schema_extra={"anyOf": [{"required": ["eval"]}, {"required": ["eval_fraction"]}]}
    )

    train: Annotated[list[SourceSpec], Field(min_length=1)]
    """The training rows; several sources are mixed by weight."""
    eval: list[SourceSpec] = []
    """Held-out rows whose loss chooses the best step. Give either this or `eval_fraction`."""
    eval_fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of the training rows to hold out for evaluation, chosen by a hash of their content."""
    test: list[SourceSpec] = []
    """Test rows, which no choice depends on. They are checked for overlap with the others, and scored once
    for the final trial, by `trial show T --test` or at the end of `study auto`."""
    max_length: Annotated[int, Field(ge=2)] = 512
    """Maximum number of tokens in an example; longer rows are truncated at the end, and reported."""
    loss_on: Literal["completion", "all"] = "completion"
    """Tokens that the loss is computed on: only the completion, or all, including the prompt."""
    allow_overlap: bool = False
    """Report rows that are in two of train, eval and test instead of refusing them. Rows are equal if they
    differ only in format, case, white space or Unicode normalization."""

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Self:
        refuse("data", [*_evaluation_refusals(self), *_all_source_refusals(self)])
        return self


def _evaluation_refusals(data: DataSpec) -> Iterator[Refusal]:
    """Refuse anything but exactly one evaluation set."""
    if data.eval and data.eval_fraction is not None:
        message = "cannot be combined with eval; keep one of them"
        yield Refusal(("eval_fraction",), message, rests_on=("data.eval",))
    if not data.eval and data.eval_fraction is None:
        message = (
            "missing: add rows to evaluate on, as `eval: [{path: ..., format: ...}]`; "
            "or hold out a share of the training rows with `eval_fraction: 0.05`"
        )
        yield Refusal(("eval",), message, rests_on=("data.eval_fraction",))


def _all_source_refusals(data: DataSpec) -> Iterator[Refusal]:
    for part in ("train", "eval", "test"):
        for position, source in enumerate(getattr(data, part)):
            at = f"data.{part}[{position}]"
            for key, message, rests_on in _source_refusals(source):
                yield Refusal(
                    (part, position, *key), message, rests_on=(at, *(f"{at}.{k}" for k in rests_on))
                )
            if source.overlap_tokens is not None and source.overlap_tokens > data.max_length // 2:
                yield Refusal(
                    (part, position, "overlap_tokens"),
                    f"{source.overlap_tokens} is more than half of max_length ({data.max_length}): an "
                    "example would mostly repeat the previous one",
                    rests_on=("data.max_length",),
                )


_Wrong = tuple[tuple[str, ...], str, tuple[str, ...]]
"""Key in the source, message, and the source's other keys that the message depends on."""


def _source_refusals(source: SourceSpec) -> Iterator[_Wrong]:
    """Yield conflicts between keys of a source."""
    yield from _column_refusals(source)
    if source.template is not None and source.format not in _CONVERSATIONS:
        formats = one_of(_CONVERSATIONS)
        message = f"applies only to format: {formats}; format {source.format} uses no template"
        yield ("template",), message, ("format",)
    for key in ("split_on", "overlap_tokens"):
        value = getattr(source, key)
        if value is not None and source.format != "text":
            yield (
                (key,),
                f"applies only to format: text; this source has format: {source.format}",
                ("format",),
            )
    yield from _record_refusals(source)


def _column_refusals(source: SourceSpec) -> Iterator[_Wrong]:
    allowed = COLUMNS[source.format]
    for name in source.columns:
        if name not in allowed:
            hint = meant_value(name, allowed)
            message = f"not a column of format {source.format}; its columns: {', '.join(allowed)}"
            yield ("columns", name), f"{message}; {hint}" if hint else message, ("format",)
    yielding = [name for name in _YIELDING.get(source.format, ()) if name not in source.columns]
    names = [source.columns.get(name, name) for name in allowed if name not in yielding]
    if twice := next((name for name in names if names.count(name) > 1), None):
        yield ("columns",), f"two columns of format {source.format} would be read from {twice!r}", ("format",)


def _record_refusals(source: SourceSpec) -> Iterator[_Wrong]:
    if source.split_on == "bytes" and source.record_bytes is None:
        message = "bytes requires a size; add `record_bytes: 4096`"
        yield ("split_on",), message, ("record_bytes",)
    if source.split_on != "bytes" and source.record_bytes is not None:
        yield ("record_bytes",), "applies only to `split_on: bytes`", ("split_on",)
    if source.split_on is None:
        if source.group_records != 1:
            message = "applies only to records of plain text; set where a record ends, as `split_on: line`"
            yield ("group_records",), message, ("split_on",)
        return
    for key in ("split", "config", "columns"):
        if getattr(source, key):
            yield (key,), "applies only to tables; split_on reads plain text", ("split_on",)
