"""A file of prompts is tokenised as training rows are, up to their last completion."""

from __future__ import annotations

import gzip
import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data import tiny
from tuner.config.data_section import SourceSpec
from tuner.data import read_prompts, render_prompt
from tuner.errors import DataError

TOKENIZERS = {
    "byte level": tiny.byte_level(bos=True, chat_template=tiny.CHATML),
    "sentencepiece": tiny.sentencepiece(),
}
USER, REPLY = {"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello!"}
HUMAN, GPT = {"from": "human", "value": "Hi."}, {"from": "gpt", "value": "Hello!"}
ROWS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "alpaca": (
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"instruction": "Add.", "input": "1 2"},
    ),
    "alpaca without input": (
        {"instruction": "Hi.", "output": "Hello"},
        {"instruction": "Hi.", "output": None},
    ),
    "completion": ({"prompt": "One, two,", "completion": " three"}, {"prompt": "One, two,"}),
    "messages": ({"messages": [USER, REPLY]}, {"messages": [USER]}),
    "messages of two turns": ({"messages": [USER, REPLY] * 2}, {"messages": [USER, REPLY, USER]}),
    "sharegpt": (
        {"conversations": [HUMAN, GPT, HUMAN, GPT], "system": "Be brief."},
        {"conversations": [HUMAN, GPT, HUMAN], "system": "Be brief."},
    ),
}
"""A training row, and the same without its last answer."""


def source(path: Path, format: str, **more: Any) -> SourceSpec:
    return SourceSpec.model_validate(tiny.source(path, format, **more))


def before_last_target(ids: Any, is_target: Any) -> list[int]:
    begins = np.flatnonzero(is_target & ~np.roll(is_target, 1))
    return list(ids[: begins[-1]].tolist())


def can_be_rendered(name: str, tokenizer: str, template: str | None) -> bool:
    if template:
        return name != "completion"
    return tokenizer == "byte level" or name.startswith(("alpaca", "completion"))


CASES = [case for case in product(ROWS, TOKENIZERS, [None, "chatml"]) if can_be_rendered(*case)]


@pytest.mark.parametrize(("name", "tokenizer", "template"), CASES)
def test_prompts_are_the_beginnings_of_training_rows(
    tmp_path: Path, name: str, tokenizer: str, template: str | None
) -> None:
    format = name.split()[0]
    more = {"template": template} if template else {}
    chosen = TOKENIZERS[tokenizer]
    trained = tiny.write_jsonl(tmp_path / "train.jsonl", ROWS[name][:1])
    other = tiny.write_jsonl(tmp_path / "eval.jsonl", [{"text": "other"}])
    [example] = tiny.prepared(
        chosen, train=[tiny.source(trained, format, **more)], eval=[tiny.source(other, "text")]
    ).train
    asked = tiny.write_jsonl(tmp_path / "asked.jsonl", ROWS[name])
    with_answer, without = read_prompts(asked, source(trained, format, **more), chosen)
    assert list(with_answer.ids) == before_last_target(example.input_ids, example.is_target)
    assert without.ids == with_answer.ids
    assert (with_answer.row, without.place) == (1, f"{asked}:2")


SYSTEM = "Be brief."
WITH_SYSTEM: dict[str, dict[str, Any]] = {
    "alpaca": {"instruction": "Hi.", "output": "Hello!", "system": SYSTEM},
    "messages": {"messages": [{"role": "system", "content": SYSTEM}, USER, REPLY]},
    "sharegpt": {"conversations": [{"from": "system", "value": SYSTEM}, HUMAN, GPT]},
}


@pytest.mark.parametrize("format", sorted(WITH_SYSTEM))
@pytest.mark.parametrize("tokenizer", sorted(TOKENIZERS))
@pytest.mark.parametrize("template", [None, "chatml", "llama3", "alpaca"])
def test_a_system_message_is_that_of_training(
    tmp_path: Path, format: str, tokenizer: str, template: str | None
) -> None:
    """However it is given: typed, as a column, as a message, before rows of another shape that have none."""
    if not can_be_rendered(format, tokenizer, template):
        pytest.skip("the tokenizer has no template of its own")
    chosen = TOKENIZERS[tokenizer]
    more = {"template": template} if template else {}
    trained = tiny.write_jsonl(tmp_path / "train.jsonl", [WITH_SYSTEM[format]])
    other = tiny.write_jsonl(tmp_path / "eval.jsonl", [{"text": "other"}])
    [example] = tiny.prepared(
        chosen, train=[tiny.source(trained, format, **more)], eval=[tiny.source(other, "text")]
    ).train
    expected = before_last_target(example.input_ids, example.is_target)
    asks = source(trained, format, **more)
    typed = render_prompt(format, chosen, instruction="Hi.", system=SYSTEM, template=template)
    assert list(typed.ids) == expected
    whole = tmp_path / "conversation.json"
    whole.write_text(json.dumps(WITH_SYSTEM["messages"]["messages"][:2]))
    rows = [WITH_SYSTEM["messages"], WITH_SYSTEM["sharegpt"], {"prompt": "Hi.", "system": SYSTEM}]
    asked = tiny.write_jsonl(tmp_path / "asked.jsonl", rows)
    found = read_prompts(asked, asks, chosen) + read_prompts(whole, asks, chosen)
    bare = [{"messages": [USER]}, {"conversations": [HUMAN]}, {"prompt": "Hi."}]
    for path in (tiny.write_jsonl(tmp_path / "bare.jsonl", bare), trained):
        found += read_prompts(path, asks, chosen, system=SYSTEM)
    assert len(found) >= 8
    assert {prompt.ids for prompt in found} == {tuple(expected)}


def test_a_row_keeps_its_own_system_message(tmp_path: Path) -> None:
    chosen = TOKENIZERS["byte level"]
    for format, row in WITH_SYSTEM.items():
        path = tiny.write_jsonl(tmp_path / f"{format}.jsonl", [row])
        own, same = (read_prompts(path, source(path, format), chosen, system=s) for s in ("", "Be long."))
        assert own == same
        assert SYSTEM in own[0].text


def test_formats_without_a_system_message(tmp_path: Path) -> None:
    for format in ("completion", "text"):
        with pytest.raises(DataError, match=f"rows of format {format} have no system message"):
            render_prompt(format, TOKENIZERS["byte level"], instruction="Hi.", system=SYSTEM)
        path = tiny.write_jsonl(tmp_path / "messages.jsonl", [{"messages": [USER]}])
        with pytest.raises(DataError, match="no column"):
            read_prompts(path, source(path, format), TOKENIZERS["byte level"])


def test_rows_that_say_prompt_are_as_typed(tmp_path: Path) -> None:
    chosen = TOKENIZERS["byte level"]
    rows = [{"prompt": "Add.", "context": "1 2"}, {"prompt": "Add.", "context": None}, {"prompt": "Add."}]
    asked = tiny.write_jsonl(tmp_path / "asked.jsonl", rows)
    for format in ("alpaca", "messages", "sharegpt", "text"):
        both, null, alone = read_prompts(asked, source(asked, format), chosen)
        assert both.ids == render_prompt(format, chosen, instruction="Add.", input="1 2").ids
        assert alone.ids == null.ids == render_prompt(format, chosen, instruction="Add.").ids
        assert both.ids != alone.ids


def test_columns_and_kinds_of_file_are_those_of_training(tmp_path: Path) -> None:
    chosen = TOKENIZERS["byte level"]
    mapped = source(tmp_path / "train.jsonl", "alpaca", columns={"instruction": "question"})
    expected = render_prompt("alpaca", chosen, instruction="Why?").ids
    table = tmp_path / "rows.csv"
    table.write_text("question,answer\nWhy?,So.\n")
    packed = tmp_path / "rows.json.gz"
    packed.write_bytes(gzip.compress(json.dumps([{"question": "Why?"}]).encode()))
    for path, place in ((table, f"{table}:2"), (packed, f"{packed}: row 1")):
        [prompt] = read_prompts(path, mapped, chosen)
        assert (prompt.ids, prompt.place) == (expected, place)


@pytest.mark.parametrize(
    ("format", "row", "words"),
    [
        ("messages", {"messages": [REPLY]}, "begins with the assistant"),
        ("sharegpt", {"conversations": [GPT]}, "has no message to answer"),
        ("sharegpt", {"conversations": [{"from": "nobody", "value": ""}]}, "is from 'nobody'"),
        ("completion", {"completion": "x"}, "no column 'prompt'; columns found: 'completion'"),
        ("text", {"prompt": 1}, "column 'prompt' is the number 1"),
        ("alpaca", {"prompt": None}, "column 'prompt' is null"),
    ],
)
def test_rows_without_a_question(tmp_path: Path, format: str, row: dict[str, Any], words: str) -> None:
    asked = tiny.write_jsonl(tmp_path / "asked.jsonl", [row])
    with pytest.raises(DataError, match=words) as refused:
        read_prompts(asked, source(asked, format), TOKENIZERS["byte level"])
    assert str(refused.value).startswith(f"{asked}:1: ")


def test_a_prompt_without_tokens(tmp_path: Path) -> None:
    asked = tiny.write_jsonl(tmp_path / "asked.jsonl", [{"text": ""}])
    with pytest.raises(DataError, match=r"asked\.jsonl:1: is empty"):
        read_prompts(asked, source(asked, "text"), tiny.byte_level())
    (tmp_path / "none.jsonl").write_text("")
    with pytest.raises(DataError, match="has no rows"):
        read_prompts(tmp_path / "none.jsonl", source(asked, "text"), tiny.byte_level())
