from __future__ import annotations

from pathlib import Path

import pytest

from tests.config.rounds import MINIMAL, mistake_in, mistakes_in, spec_of
from tuner.config import SourceSpec
from tuner.config.data_section import COLUMNS

SOURCE = "{path: train.jsonl, format: alpaca}"


def with_source(source: str, more: str = "") -> str:
    """The minimal file with this training source, on line 4."""
    return MINIMAL.replace(SOURCE, source).replace("eval_fraction: 0.1", f"eval_fraction: 0.1{more}")


@pytest.mark.parametrize(
    "source",
    [
        "{path: a.json, format: sharegpt, columns: {conversations: dialog}, template: chatml}",
        "{path: 'logs/*.log', format: text, split_on: bytes, record_bytes: 4096, overlap_tokens: 64}",
        "{path: a.log, format: text, split_on: blank, group_records: fill}",
        "{path: a.jsonl, format: text, overlap_tokens: 0}",
        "{path: a.jsonl, format: completion, columns: {prompt: question, completion: answer}}",
        "{path: a.jsonl, format: completion, columns: {prompt: completion, completion: prompt}}",
    ],
)
def test_sources_that_are_right(source: str) -> None:
    assert isinstance(spec_of(with_source(source)).data.train[0], SourceSpec)


@pytest.mark.parametrize(
    ("source", "key", "said"),
    [
        (
            "{path: a, format: text, template: chatml}",
            "template",
            "only to format: alpaca, messages or sharegpt",
        ),
        ("{path: a, format: alpaca, split_on: line}", "split_on", "applies only to format: text"),
        ("{path: a, format: alpaca, overlap_tokens: 0}", "overlap_tokens", "applies only to format: text"),
        ("{path: a, format: text, split_on: bytes}", "split_on", "`record_bytes: 4096`"),
        ("{path: a, format: text, split_on: line, record_bytes: 9}", "record_bytes", "`split_on: bytes`"),
        ("{path: a, format: text, group_records: 2}", "group_records", "`split_on: line`"),
        ("{path: a, format: text, split_on: line, split: train}", "split", "applies only to tables"),
        ("{path: a, format: text, split_on: line, columns: {text: t}}", "columns", "applies only to tables"),
        ("{path: a, format: text, split_on: lines}", "split_on", "did you mean line?"),
        ("{path: a, format: text, split_on: line, group_records: all}", "group_records", "expects fill or a"),
        ("{path: a, format: text, overlap_tokens: 300}", "overlap_tokens", "half of max_length (512)"),
        ("{path: a, format: alpaca, template: llama-3}", "template", "did you mean llama3?"),
        ("{path: a, format: alpaca, columns: {outputs: b}}", "columns.outputs", "did you mean output?"),
        ("{path: a, format: alpaca, columns: {output: 3}}", "columns.output", "expects text"),
        ("{path: a, format: alpaca, columns: {output: input}}", "columns", "would be read from 'input'"),
        ("{path: a, format: alpaca, chat_template: x}", "chat_template", "did you mean template?"),
    ],
)
def test_keys_that_do_not_go_together(source: str, key: str, said: str) -> None:
    mistake = mistake_in(with_source(source))
    assert (mistake.line, mistake.key) == (4, f"data.train[0].{key}")
    assert said in mistake.message


def test_all_mistakes_of_all_sources_at_once() -> None:
    text = """\
study: greeting
round: round1
model: {path: some/model}
data:
  train:
    - {path: a.jsonl, format: text, template: chatml}
    - {path: a.log, format: text, split_on: bytes, columns: {text: t}}
    - {path: a.jsonl, format: share-gpt, template: chatml, split_on: line}
  eval:
    - {path: b.jsonl, format: alpaca, delimiter: line}
    - {path: b.jsonl, format: alpaca, columns: {prompt: p}}
  allow_overlaps: true
max_train_steps: 60
"""
    found = [(mistake.line, mistake.key) for mistake in mistakes_in(text)]
    assert found == [
        (6, "data.train[0].template"),
        (7, "data.train[1].split_on"),
        (7, "data.train[1].columns"),
        (8, "data.train[2].format"),
        (10, "data.eval[0].delimiter"),
        (11, "data.eval[1].columns.prompt"),
        (12, "data.allow_overlaps"),
    ]
    [*_, unknown, _, overlap] = mistakes_in(text)
    assert unknown.message == "unknown; did you mean split_on?"
    assert overlap.message == "unknown; did you mean allow_overlap?"


@pytest.mark.parametrize(
    ("path", "split_on", "absolute"),
    [
        ("logs/*", "null", "/study/logs/*"),
        ("a/b[0-9].jsonl", "null", "/study/a/b[0-9].jsonl"),
        ("var/log", "line", "/study/var/log"),
        ("A.JSONL", "null", "/study/A.JSONL"),
        ("s3://bucket/*.jsonl", "null", "s3://bucket/*.jsonl"),
        ("some/set", "null", "some/set"),
    ],
)
def test_patterns_and_plain_text_are_paths(path: str, split_on: str, absolute: str) -> None:
    spec = spec_of(with_source(f"{{path: '{path}', format: text, split_on: {split_on}}}"))
    assert spec.absolute(Path("/study")).data.train[0].path == absolute


def test_every_format_says_which_columns_it_reads() -> None:
    assert set(COLUMNS) == set(SourceSpec.model_json_schema()["properties"]["format"]["enum"])
