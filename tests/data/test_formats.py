from __future__ import annotations

from typing import Any

import pytest

from tests.data import tiny
from tuner.data import render_prompt
from tuner.data.examples import Row
from tuner.data.formats import require_columns, row_format
from tuner.errors import DataError

PLAIN = tiny.byte_level(bos=True)
CHAT = tiny.byte_level(bos=True, chat_template=tiny.CHATML)
TODAY = "\n{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{% endif %}\n"


def segments(name: str, values: dict[str, Any], tokenizer: Any = CHAT) -> list[tuple[str, bool]]:
    chosen = row_format(name, tokenizer)
    row = Row(12, "train.jsonl:12", values)
    require_columns(row, chosen)
    return [(segment.text, segment.is_target) for segment in chosen.segments(row)]


def conversation(*turns: str) -> dict[str, Any]:
    roles = {"s": "system", "u": "user", "a": "assistant"}
    return {"messages": [{"role": roles[turn[0]], "content": turn[1:]} for turn in turns]}


def refusal(name: str, values: dict[str, Any], tokenizer: Any = CHAT) -> str:
    with pytest.raises(DataError) as caught:
        segments(name, values, tokenizer)
    return str(caught.value)


def test_alpaca_with_input() -> None:
    [prompt, output] = segments("alpaca", {"instruction": "Add {x}.", "input": "1 2", "output": "3"})
    assert prompt == (
        "Below is an instruction that describes a task, paired with an input that provides further "
        "context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd {x}.\n\n### Input:\n1 2\n\n### Response:\n",
        False,
    )
    assert output == ("3", True)


@pytest.mark.parametrize("more", [{}, {"input": ""}, {"input": None}])
def test_alpaca_without_input(more: dict[str, Any]) -> None:
    [prompt, output] = segments("alpaca", {"instruction": "Say hi.", "output": "hi", **more})
    assert prompt == (
        "Below is an instruction that describes a task. Write a response that appropriately completes "
        "the request.\n\n### Instruction:\nSay hi.\n\n### Response:\n",
        False,
    )
    assert output == ("hi", True)


def test_completion_and_text() -> None:
    assert segments("completion", {"prompt": "a", "completion": "b"}) == [("a", False), ("b", True)]
    assert segments("text", {"text": "a"}) == [("a", True)]


def test_every_assistant_turn_is_a_target_up_to_its_end() -> None:
    assert segments("messages", conversation("sBe kind.", "uhi", "ahello", "uhow?", "afine")) == [
        (
            "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
            False,
        ),
        ("hello<|im_end|>", True),
        ("\n<|im_start|>user\nhow?<|im_end|>\n<|im_start|>assistant\n", False),
        ("fine<|im_end|>", True),
    ]


def test_a_conversation_may_end_with_the_user() -> None:
    assert segments("messages", conversation("uhi", "ahello", "ubye"))[2:] == [
        ("\n<|im_start|>user\nbye<|im_end|>\n", False)
    ]


def test_a_conversation_that_begins_with_the_assistant_is_refused() -> None:
    assert "begins with the assistant" in refusal("messages", conversation("ahi", "ubye"))


def test_a_turn_that_does_not_end_with_eos_is_a_target_whole() -> None:
    tokenizer = tiny.byte_level(chat_template=tiny.CHATML.replace("<|im_end|>", "<end>"))
    assert segments("messages", conversation("uhi", "ahello"), tokenizer)[1] == ("hello<end>\n", True)


def test_a_template_that_writes_the_date_writes_the_same_one_every_day() -> None:
    tokenizer = tiny.byte_level(chat_template=TODAY + tiny.CHATML)
    assert segments("messages", conversation("uhi", "ahello"), tokenizer)[0][0].startswith(
        "\n26 Jul 2024<|im_start|>"
    )


def test_a_template_that_changes_earlier_turns_is_refused() -> None:
    forgets = (
        "{% for m in messages %}{% if loop.last or m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    )
    tokenizer = tiny.byte_level(chat_template=forgets)
    assert segments("messages", conversation("uhi", "ahello"), tokenizer)[1] == ("hello", True)
    message = refusal("messages", conversation("uhi", "ahello", "ubye", "abye"), tokenizer)
    assert message.startswith("train.jsonl:12: message 2: the tokenizer's chat template renders")


def test_what_a_template_refuses_is_reported_with_the_row() -> None:
    picky = "{{ raise_exception('roles must alternate') if messages|length > 1 }}{{ messages[0].content }}"
    message = refusal("messages", conversation("ua", "ab"), tiny.byte_level(chat_template=picky))
    assert message.startswith("train.jsonl:12: the tokenizer's chat template cannot render")
    assert "roles must alternate" in message


def test_messages_need_a_chat_template() -> None:
    assert "has none" in refusal("messages", conversation("ua", "ab"), PLAIN)


@pytest.mark.parametrize(
    ("name", "values", "said"),
    [
        (
            "alpaca",
            {"instruction": "a", "response": "b"},
            "no column 'output'; columns found: 'instruction', ",
        ),
        ("alpaca", {}, "no column 'instruction'; columns found: none"),
        ("alpaca", {}, "needs 'instruction' and 'output' (optional: 'input', 'system', 'history'); map"),
        ("alpaca", {"instruction": "a", "output": None}, "column 'output' is null; it must be text"),
        ("alpaca", {"instruction": "a", "output": 3}, "column 'output' is the number 3; it must be text"),
        ("alpaca", {"instruction": "a", "input": ["x"], "output": "b"}, "column 'input' is a list"),
        ("completion", {"prompt": True, "completion": "b"}, "column 'prompt' is true or false"),
        ("text", {"text": {}}, "column 'text' is an object"),
        ("messages", {"messages": "hi"}, "column 'messages' is text; it must be a list of messages"),
        ("messages", {"messages": []}, "column 'messages' is an empty list"),
        ("messages", {"messages": ["hi"]}, "message 1 is text; it must be an object"),
        ("messages", {"messages": [{"role": "user"}]}, "message 1: 'content' is missing"),
        ("messages", {"messages": [{"role": 1, "content": "a"}]}, "message 1: 'role' is the number 1"),
        (
            "messages",
            {"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]},
            "message 1 has 'tool_calls'",
        ),
    ],
)
def test_a_row_that_is_not_of_the_format_is_refused(name: str, values: dict[str, Any], said: str) -> None:
    message = refusal(name, values)
    assert message.startswith("train.jsonl:12: ")
    assert said in message


def test_an_unknown_format_is_refused() -> None:
    assert "allowed: alpaca" in refusal("vicuna", {})


def test_prompts_for_inference_are_those_of_training() -> None:
    alpaca = segments("alpaca", {"instruction": "Add.", "input": "1 2", "output": "3"})[0][0]
    chat = segments("messages", conversation("uAdd.\n\n1 2", "a3"))[0][0]
    assert PLAIN.decode(render_prompt("alpaca", PLAIN, instruction="Add.", input="1 2").ids) == "<s>" + alpaca
    assert CHAT.decode(render_prompt("messages", CHAT, instruction="Add.", input="1 2").ids) == chat
    assert PLAIN.decode(render_prompt("completion", PLAIN, instruction="Add.").ids) == "<s>Add."
    assert PLAIN.decode(render_prompt("text", PLAIN, instruction="Add.", input="1").ids) == "<s>Add.\n1"
