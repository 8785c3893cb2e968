from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.data import tiny
from tuner.config.data_section import COLUMNS
from tuner.data import render_prompt, show_rows
from tuner.data.chat import TEMPLATES
from tuner.data.examples import Row
from tuner.data.formats import RowFormat, require_columns, row_format
from tuner.errors import DataError

PLAIN = tiny.byte_level(bos=True)
CHAT = tiny.byte_level(bos=True, chat_template=tiny.CHATML)
LLAMA_2 = tiny.sentencepiece()
TURNS = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]
MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


def segments(
    name: str, values: dict[str, Any], tokenizer: Any = CHAT, **options: Any
) -> list[tuple[str, bool]]:
    chosen = row_format(name, tokenizer, **options)
    row = Row(12, "train.jsonl:12", values)
    require_columns(row, chosen)
    return [(segment.text, segment.is_target) for segment in chosen.segments(row)]


def refusal(name: str, values: dict[str, Any], tokenizer: Any = CHAT, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        segments(name, values, tokenizer, **options)
    return str(caught.value)


def test_sharegpt_says_what_messages_say() -> None:
    expected = segments("messages", {"messages": [{"role": "system", "content": "Be kind."}, *MESSAGES * 2]})
    system = {"from": "system", "value": "Be kind."}
    assert segments("sharegpt", {"conversations": [system, *TURNS * 2]}) == expected
    assert segments("sharegpt", {"conversations": TURNS * 2, "system": "Be kind."}) == expected
    for nothing in (None, ""):
        assert segments("sharegpt", {"conversations": TURNS, "system": nothing}) == segments(
            "messages", {"messages": MESSAGES}
        )
    columns = {"conversations": "dialog", "system": "rules"}
    mapped = {"dialog": TURNS * 2, "rules": "Be kind."}
    assert segments("sharegpt", mapped, columns=columns) == expected


@pytest.mark.parametrize(
    ("human", "model"), [("user", "assistant"), ("Human", "GPT"), ("prompter", "bot"), ("human", "chatgpt")]
)
def test_sharegpts_speakers_have_many_names(human: str, model: str) -> None:
    turns = [{"from": human, "value": "hi"}, {"from": model, "value": "hello"}]
    assert segments("sharegpt", {"conversations": turns}) == segments("sharegpt", {"conversations": TURNS})


def test_a_turn_that_opens_a_sharegpt_conversation_is_said_and_not_learned() -> None:
    turns = [{"from": "gpt", "value": "welcome"}, *TURNS]
    [(opening, opening_is_learned), answer] = segments("sharegpt", {"conversations": turns})
    assert opening.startswith("<|im_start|>assistant\nwelcome<|im_end|>\n<|im_start|>user\n")
    assert not opening_is_learned
    assert answer == ("hello<|im_end|>", True)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"messages": TURNS}, "no column 'conversations'; columns found: 'messages'; format sharegpt needs"),
        ({"conversations": "hi"}, "column 'conversations' is text; it must be a list of messages"),
        ({"conversations": []}, "column 'conversations' is an empty list"),
        ({"conversations": ["hi"]}, "message 1 is text; it must be an object with from and value"),
        ({"conversations": MESSAGES}, "these rows are messages: write `format: messages`"),
        ({"conversations": [{"value": "a"}]}, "message 1: 'from' is missing; it must be text"),
        ({"conversations": [TURNS[0], {"from": "gpt", "value": None}]}, "message 2: 'value' is null"),
        (
            {"conversations": [{"from": "observation", "value": "a"}]},
            "message 1 is from 'observation', which",
        ),
        ({"conversations": TURNS, "system": 3}, "column 'system' is the number 3; it must be text"),
        (
            {"conversations": [{"from": "system", "value": "a"}, *TURNS], "system": "b"},
            "column 'system' has a system message, but so has the conversation",
        ),
    ],
)
def test_a_row_that_is_not_sharegpt_is_refused(values: dict[str, Any], said: str) -> None:
    message = refusal("sharegpt", values)
    assert message.startswith("train.jsonl:12: ")
    assert said in message


@pytest.mark.parametrize(
    ("template", "asked", "answered"),
    [
        ("chatml", "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", "hello</s>"),
        (
            "llama3",
            "<|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
            "hello</s>",
        ),
        (
            "alpaca",
            "Below is an instruction that describes a task. Write a response that appropriately completes "
            "the request.\n\n### Instruction:\nhi\n\n### Response:\n",
            "hello</s>",
        ),
    ],
)
def test_named_templates_on_a_tokenizer_without_one(template: str, asked: str, answered: str) -> None:
    expected = [(asked, False), (answered, True)]
    assert segments("messages", {"messages": MESSAGES}, PLAIN, template=template) == expected
    assert segments("sharegpt", {"conversations": TURNS}, PLAIN, template=template) == expected
    if template != "alpaca":
        row = {"instruction": "hi", "output": "hello"}
        assert segments("alpaca", row, PLAIN, template=template) == expected


def test_chatml_by_name_is_chatml_where_its_mark_is_eos() -> None:
    conversation = {"messages": [{"role": "system", "content": "Be kind."}, *MESSAGES * 2]}
    assert segments("messages", conversation, template="chatml") == segments("messages", conversation)
    assert segments("messages", conversation, template="tokenizer") == segments("messages", conversation)


def test_alpaca_by_name_is_alpaca() -> None:
    row = {"instruction": "Add.", "input": "1 2", "output": "3"}
    assert segments("alpaca", row, template="alpaca") == segments("alpaca", row)
    chat = segments("alpaca", row, template="tokenizer")
    assert chat[0][0] == "<|im_start|>user\nAdd.\n\n1 2<|im_end|>\n<|im_start|>assistant\n"
    said = {"role": "system", "content": "Be kind."}
    [(asked, _), _] = segments("messages", {"messages": [said, *MESSAGES]}, PLAIN, template="alpaca")
    assert asked == "Be kind.\n\n### Instruction:\nhi\n\n### Response:\n"


def test_what_a_named_template_has_no_place_for_is_refused() -> None:
    late = [*MESSAGES, {"role": "system", "content": "Be kind."}]
    message = refusal("messages", {"messages": late}, PLAIN, template="alpaca")
    assert message.startswith(
        "train.jsonl:12: the template alpaca cannot render this conversation: system has"
    )


def test_a_tokenizer_without_a_template_asks_for_a_named_one() -> None:
    assert "`template: chatml` (or alpaca or llama3)" in refusal("messages", {"messages": MESSAGES}, PLAIN)


@given(
    st.lists(
        st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<|>"), min_size=1), max_size=4
    )
)
@pytest.mark.parametrize("template", sorted(TEMPLATES))
def test_a_named_template_learns_every_answer_and_nothing_else(template: str, texts: list[str]) -> None:
    words = ["a" + text + "z" for text in texts]
    turns = [
        turn
        for word in words
        for turn in ({"from": "human", "value": f"Q{word}"}, {"from": "gpt", "value": word})
    ]
    pieces = segments("sharegpt", {"conversations": turns or TURNS}, PLAIN, template=template)
    assert [text for text, learned in pieces if learned] == [f"{word}</s>" for word in words or ["hello"]]


@pytest.mark.parametrize("tokenizer", [PLAIN, LLAMA_2], ids=["byte level", "sentencepiece"])
@pytest.mark.parametrize("template", sorted(TEMPLATES))
@pytest.mark.parametrize("name", ["alpaca", "messages", "sharegpt"])
def test_the_prompt_for_inference_begins_the_example(
    tmp_path: Path, name: str, template: str, tokenizer: Any
) -> None:
    rows: dict[str, dict[str, Any]] = {
        "alpaca": {"instruction": "hi", "output": "hello"},
        "messages": {"messages": MESSAGES},
        "sharegpt": {"conversations": TURNS},
    }
    files = [tiny.write_jsonl(tmp_path / "a.jsonl", [rows[name]])]
    files.append(tiny.write_jsonl(tmp_path / "b.jsonl", [{"text": "other"}]))
    data = tiny.prepared(
        tokenizer,
        train=[tiny.source(files[0], name, template=template)],
        eval=[tiny.source(files[1], "text")],
    )
    [example] = data.train
    prompt = list(render_prompt(name, tokenizer, instruction="hi", template=template).ids)
    assert example.input_ids[~example.is_target].tolist() == prompt
    assert prompt[0] == tokenizer.bos_token_id
    assert example.input_ids.tolist().count(tokenizer.bos_token_id) == 1
    assert example.input_ids[-1] == tokenizer.eos_token_id
    assert example.input_ids.tolist().count(tokenizer.eos_token_id) == 1
    [shown] = show_rows(data.train, tokenizer, 1)
    assert [is_target for _, is_target in shown.pieces] == [False, True]
    assert shown.pieces[1][0].strip() == "hello</s>"


@pytest.mark.parametrize("name", sorted(COLUMNS))
def test_columns_may_have_other_names(name: str) -> None:
    given_columns = {column: f"my {column}" for column in COLUMNS[name]}
    chosen: RowFormat = row_format(name, CHAT, columns=given_columns)
    assert {*chosen.needed, *chosen.optional} == set(given_columns.values())
    plain = row_format(name, CHAT)
    assert {*plain.needed, *plain.optional} == set(COLUMNS[name])
    values: dict[str, Any] = dict.fromkeys(COLUMNS[name], "word")
    if name in ("messages", "sharegpt"):
        values[COLUMNS[name][0]] = MESSAGES if name == "messages" else TURNS
        values["tools"] = []
    if name == "alpaca":
        values["history"] = [["earlier", "word"]]
    mapped = {given_columns[column]: value for column, value in values.items()}
    assert segments(name, mapped, columns=given_columns) == segments(name, values)
    del mapped[chosen.needed[0]]
    message = refusal(name, mapped, columns=given_columns)
    assert f"no column 'my {COLUMNS[name][0]}'" in message


def test_a_value_of_a_mapped_column_is_named_as_in_the_file() -> None:
    columns = {"prompt": "question", "completion": "answer"}
    message = refusal("completion", {"question": "a", "answer": 3}, columns=columns)
    assert "column 'answer' is the number 3" in message
