"""The data section: where rows come from, how a row becomes an example, and what keys of a source exclude."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema, field_validator, model_validator

from tuner.config.names import meant_value
from tuner.config.sections import STRICT, PathText, Text
from tuner.config.wording import Refusal, mistake, refuse
from tuner.errors import one_of, shown

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
"""The columns that each format reads, by the names that `columns` maps."""

_YIELDING = {"alpaca": ("system", "history"), "messages": ("tools",), "sharegpt": ("tools",)}
"""Columns that are not looked for where another one is mapped to their name."""
_CONVERSATIONS = ("alpaca", "messages", "sharegpt")
"""Formats that a template renders."""
_MAX_RECORD_BYTES = 64 * 1024 * 1024
"""A record is held in memory whole."""
_COLUMNS_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        name: {"type": "string", "minLength": 1} for columns in COLUMNS.values() for name in columns
    },
    "additionalProperties": False,
    "default": {},
}


class SourceSpec(BaseModel):
    """One data set."""

    model_config = STRICT

    path: PathText
    """A JSON, JSONL, CSV or Parquet file relative to the round file, a pattern such as `data/*.jsonl`, a URL,
    or a data set on the Hub. All but Parquet may be packed with gzip."""
    format: Format
    """How a row becomes a prompt and its completion: `alpaca` has instruction, input and output, and perhaps
    system and history; `messages` has a list of role and content, and perhaps tools; `sharegpt` has
    conversations, a list of from and value; `completion` has prompt and completion; `text` has text alone."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """How many times each of its rows comes in an epoch of training: its share of an epoch is weight x rows,
    over the sum of that of all sources. Of a fraction a fixed part of the rows comes once more."""
    split: str | None = None
    """Which split of a data set on the Hub, or of a folder; null is `train`, or the only split that
    `save_to_disk` wrote."""
    config: str | None = None
    """Which configuration of a data set on the Hub."""
    columns: Annotated[dict[str, Text], WithJsonSchema(_COLUMNS_SCHEMA)] = {}
    """What the format's columns are called here, where they have other names: `{prompt: question, completion:
    answer}`."""
    template: Template | None = None
    """The text around the turns of `alpaca`, `messages` and `sharegpt`: `alpaca`, `chatml`, `llama3`, or
    `tokenizer` for the model's own chat template. Null is `alpaca` for that format, else `tokenizer`."""
    split_on: SplitOn | None = None
    """For `text`: the file is no table but plain text, such as a log. Records end at each `line`, at `blank`
    lines, or after every `record_bytes` bytes."""
    record_bytes: Annotated[int, Field(ge=1, le=_MAX_RECORD_BYTES)] | None = None
    """With `split_on: bytes`: bytes of a record; it ends before a character that would be cut."""
    group_records: Annotated[
        Literal["fill"] | int,
        WithJsonSchema({"anyOf": [{"const": "fill"}, {"type": "integer", "minimum": 1}]}),
    ] = 1
    """With `split_on`: how many records after one another make one example; `fill` is as many as fit into
    `max_length`."""
    overlap_tokens: Annotated[int, Field(ge=0)] | None = None
    """For `text`: a text longer than `max_length` becomes several examples, each beginning with that many
    last tokens of the one before, which are not trained on again. Null is 0 with `split_on`; without, the end
    of a long text is cut off."""

    @field_validator("group_records", mode="before")
    @classmethod
    def _fill_or_count(cls, number: object) -> object:
        is_count = isinstance(number, int) and not isinstance(number, bool) and number >= 1
        if number != "fill" and not is_count:
            raise mistake(f"expects fill or a whole number of at least 1, got {shown(number)}")
        return number


class DataSpec(BaseModel):
    """What is learned, and what the loss is measured on."""

    model_config = ConfigDict(
        **STRICT, json_schema_extra={"anyOf": [{"required": ["eval"]}, {"required": ["eval_fraction"]}]}
    )

    train: Annotated[list[SourceSpec], Field(min_length=1)]
    """The training rows; several sources are mixed by weight."""
    eval: list[SourceSpec] = []
    """Held-out rows whose loss chooses the best step; or else give `eval_fraction`."""
    eval_fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of the training rows to hold out instead of `eval`, chosen by a hash of their content."""
    test: list[SourceSpec] = []
    """Rows nobody chooses by: checked against the others, and scored once, for the final trial, by
    `trial show T --test` or where `study auto` ends."""
    max_length: Annotated[int, Field(ge=2)] = 512
    """Tokens of an example; longer rows are cut at the end, and counted."""
    loss_on: Literal["completion", "all"] = "completion"
    """Which tokens are predicted: those of the completion, or those of the prompt too."""
    allow_overlap: bool = False
    """Accept rows that are in two of train, eval and test, counting them, instead of refusing them. Rows are
    the same when they differ only in format, case, white space or Unicode form."""

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Self:
        refuse("data", [*_evaluation_refusals(self), *_all_source_refusals(self)])
        return self


def _evaluation_refusals(data: DataSpec) -> Iterator[Refusal]:
    """There is exactly one evaluation set."""
    if data.eval and data.eval_fraction is not None:
        message = "cannot be given together with eval; keep one of them"
        yield Refusal(("eval_fraction",), message, rests_on=("data.eval",))
    if not data.eval and data.eval_fraction is None:
        message = (
            "missing: rows to evaluate on, as `eval: [{path: ..., format: ...}]`; "
            "or hold out a share of the training rows by `eval_fraction: 0.05`"
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
                    "example would mostly repeat the one before",
                    rests_on=("data.max_length",),
                )


_Wrong = tuple[tuple[str, ...], str, tuple[str, ...]]
"""Key in the source, message, and the source's other keys that the message rests on."""


def _source_refusals(source: SourceSpec) -> Iterator[_Wrong]:
    """What keys of a source, each right by itself, get wrong together."""
    yield from _column_refusals(source)
    if source.template is not None and source.format not in _CONVERSATIONS:
        formats = one_of(_CONVERSATIONS)
        message = f"{source.template} is for {formats}; format {source.format} takes its text as it is"
        yield ("template",), message, ("format",)
    for key in ("split_on", "overlap_tokens"):
        value = getattr(source, key)
        if value is not None and source.format != "text":
            yield (key,), f"is for format text, and this format is {source.format}", ("format",)
    yield from _record_refusals(source)


def _column_refusals(source: SourceSpec) -> Iterator[_Wrong]:
    allowed = COLUMNS[source.format]
    for name in source.columns:
        if name not in allowed:
            hint = meant_value(name, allowed)
            message = f"format {source.format} has no such column; its columns: {', '.join(allowed)}"
            yield ("columns", name), f"{message}; {hint}" if hint else message, ("format",)
    yielding = [name for name in _YIELDING.get(source.format, ()) if name not in source.columns]
    names = [source.columns.get(name, name) for name in allowed if name not in yielding]
    if twice := next((name for name in names if names.count(name) > 1), None):
        yield ("columns",), f"two columns of format {source.format} would be read from {twice!r}", ("format",)


def _record_refusals(source: SourceSpec) -> Iterator[_Wrong]:
    if source.split_on == "bytes" and source.record_bytes is None:
        message = "bytes needs their number beside it, as `record_bytes: 4096`"
        yield ("split_on",), message, ("record_bytes",)
    if source.split_on != "bytes" and source.record_bytes is not None:
        yield ("record_bytes",), "is for `split_on: bytes`", ("split_on",)
    if source.split_on is None:
        if source.group_records != 1:
            message = "is for records of plain text; say where one ends, as `split_on: line`"
            yield ("group_records",), message, ("split_on",)
        return
    for key in ("split", "config", "columns"):
        if getattr(source, key):
            yield (key,), "is for tables, and split_on reads plain text", ("split_on",)
