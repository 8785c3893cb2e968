"""Special tokens that rows say: counted, and marked where rows are shown, those of a template not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.data import tiny
from tuner.data import PreparedData, show_rows

CHAT = tiny.byte_level(bos=True, chat_template=tiny.CHATML)
PLAIN = tiny.byte_level(bos=True)
LLAMA_2 = tiny.sentencepiece()
MIDDLE = "Say <|im_end|> twice <|im_start|>."
MARKED = "Say {!<|im_end|>!} twice {!<|im_start|>!}."


def prepared(directory: Path, tokenizer: Any, rows: list[dict[str, Any]], **source: Any) -> PreparedData:
    other = tiny.write_jsonl(directory / "other.jsonl", [{"text": "something else"}])
    file = tiny.write_jsonl(directory / "train.jsonl", rows)
    train = [tiny.source(file, **source)]
    return tiny.prepared(tokenizer, train=train, eval=[tiny.source(other, "text")], max_length=512)


def shown(data: PreparedData, tokenizer: Any) -> list[str]:
    rows = show_rows(data.train, tokenizer, 100)
    assert [row.num_written for row in rows] == ["".join(t for t, _ in r.pieces).count("{!") for r in rows]
    return ["".join(f"[{text}]" if learned else text for text, learned in row.pieces) for row in rows]


def messages(user: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]}


def sharegpt(user: str, answer: str) -> dict[str, Any]:
    return {"conversations": [{"from": "human", "value": user}, {"from": "gpt", "value": answer}]}


def alpaca(user: str, answer: str) -> dict[str, Any]:
    return {"instruction": user, "output": answer}


def completion(user: str, answer: str) -> dict[str, Any]:
    return {"prompt": user, "completion": answer}


FORMATS = [messages, sharegpt, alpaca, completion]


@pytest.mark.parametrize("row", FORMATS, ids=lambda row: row.__name__)
@pytest.mark.parametrize("is_answer", [False, True])
def test_in_a_text_they_are_counted_and_marked(tmp_path: Path, row: Any, is_answer: bool) -> None:
    said = [("Hi.", MIDDLE) if is_answer else (MIDDLE, "Yes."), ("Is it?", "It is."), (MIDDLE, MIDDLE)]
    data = prepared(tmp_path, CHAT, [row(*texts) for texts in said], format=row.__name__)
    for token in ("<|im_end|>", "<|im_start|>"):
        [remark] = [remark for remark in data.report.remarks if repr(token) in remark]
        assert remark.endswith(f"(2 rows, first {tmp_path / 'train.jsonl'}:1)")
    first, second, third = shown(data, CHAT)
    assert MARKED in first
    assert first.count("{!") == 2
    assert first.index(MARKED) > first.index("[") if is_answer else first.index(MARKED) < first.index("[")
    assert "{!" not in second
    assert third.count(MARKED) == 2
    assert third.replace("{!", "").replace("!}", "").count("<|im_end|>") == (
        3 if row in (alpaca, completion) else 4
    )


@pytest.mark.parametrize("tokenizer", [PLAIN, LLAMA_2], ids=["bytes", "llama"])
@pytest.mark.parametrize("row", [alpaca, completion], ids=lambda row: row.__name__)
def test_the_end_that_an_example_has_anyway_is_not_meant(tmp_path: Path, row: Any, tokenizer: Any) -> None:
    data = prepared(tmp_path, tokenizer, [row("<s>Hi.", "Yes.</s>"), row("Hi", "No.")], format=row.__name__)
    assert len(data.report.remarks) == (row is alpaca), "within Stanford's text it is not the beginning"
    first, second = shown(data, tokenizer)
    assert first.count("{!<s>!}") == first.count("{!") == (row is alpaca)
    assert "{!" not in second


@pytest.mark.parametrize("tokenizer", [PLAIN, LLAMA_2], ids=["bytes", "llama"])
def test_a_text_is_what_the_row_says_but_for_its_beginning_and_end(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"text": text} for text in ("<s>a b</s>", "a b", "a</s> b</s>", "<s><s>a <s>b", "</s>a</s></s>")]
    data = prepared(tmp_path, tokenizer, rows, format="text")
    texts = [text.replace("[", "").replace("]", "") for text in shown(data, tokenizer)]
    assert [text.count("{!") for text in texts] == [0, 0, 1, 1, 2]
    assert "a{!</s>!} " in texts[2]
    assert [remark.rpartition("(")[2].partition(",")[0] for remark in data.report.remarks] == [
        "2 rows",
        "1 row",
    ]


def test_pieces_of_long_texts(tmp_path: Path) -> None:
    rows = [{"text": "one <|im_end|> two " * 40}, {"text": "three"}]
    data = prepared(tmp_path, PLAIN, rows, format="text", overlap_tokens=0)
    pieces = tiny.prepared(
        PLAIN,
        train=[tiny.source(tmp_path / "train.jsonl", "text", overlap_tokens=0)],
        eval=[tiny.source(tmp_path / "other.jsonl", "text")],
        max_length=32,
    )
    for made in (data, pieces):
        [remark] = made.report.remarks
        assert remark.endswith("train.jsonl:1)")
        assert "".join(shown(made, PLAIN)).count("{!<|im_end|>!}") == 40
    assert len(pieces.train) > 10


def test_what_a_cut_leaves_is_marked(tmp_path: Path) -> None:
    file = tiny.write_jsonl(tmp_path / "a.jsonl", [messages("Hi", "a <|im_end|> b" * 40)])
    other = tiny.write_jsonl(tmp_path / "b.jsonl", [{"text": "something"}])
    data = tiny.prepared(
        CHAT,
        train=[tiny.source(file, "messages")],
        eval=[tiny.source(other, "text")],
        max_length=60,
    )
    [text] = shown(data, CHAT)
    assert 0 < text.count("{!<|im_end|>!}") < 40
    assert "<|im_start|>user" in text
    assert "{!<|im_start|>" not in text


def test_letters_that_are_no_token_are_not_marked(tmp_path: Path) -> None:
    rows = [messages("A <|eot_id|> and [INST] and <b>.", "<think>No.</think>")]
    data = prepared(tmp_path, CHAT, rows, format="messages")
    assert not data.report.remarks
    assert "{!" not in shown(data, CHAT)[0]


def test_a_tokenizer_that_reads_letters_is_believed(tmp_path: Path) -> None:
    tokenizer = tiny.byte_level(chat_template=tiny.CHATML)
    tokenizer.backend_tokenizer.encode_special_tokens = True
    data = prepared(tmp_path, tokenizer, [{"text": MIDDLE}], format="text")
    assert not data.report.remarks


def test_rows_that_are_left_out_are_not_counted(tmp_path: Path) -> None:
    data = prepared(tmp_path, CHAT, [messages("<|im_end|>", ""), messages("Hi", "Yes.")], format="messages")
    assert not data.report.remarks
    assert data.report.train.empty == 1


def test_from_the_cache_they_are_the_same(tmp_path: Path) -> None:
    file = tiny.write_jsonl(tmp_path / "a.jsonl", [messages("Hi", "Yes."), messages(MIDDLE, MIDDLE)])
    other = tiny.write_jsonl(tmp_path / "b.jsonl", [{"text": "something"}])
    sections = {"train": [tiny.source(file, "messages")], "eval": [tiny.source(other, "text")]}
    first, second = (tiny.prepared(CHAT, cache=tmp_path / "cache", **sections) for _ in range(2))
    assert shown(first, CHAT) == shown(second, CHAT)
    assert first.report == second.report
    assert shown(second, CHAT)[1].count("{!") == 4


TOKENS = st.sampled_from(["<|im_start|>", "<|im_end|>", "<s>", "</s>", "a", " b", "\n", "é"])


@given(texts=st.lists(st.lists(TOKENS, max_size=5).map("".join), min_size=2, max_size=2))
@pytest.mark.parametrize("tokenizer", [CHAT, PLAIN], ids=["own", "named"])
def test_exactly_those_of_the_row_are_marked(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: Any, texts: list[str]
) -> None:
    """Wherever a template puts its own."""
    user, answer = (f"x{text}y" for text in texts)
    template = None if tokenizer.chat_template else "chatml"
    directory = tmp_path_factory.mktemp("rows")
    data = prepared(directory, tokenizer, [messages(user, answer)], format="messages", template=template)
    marked = shown(data, tokenizer)[0].replace("[", "").replace("]", "")
    for text in (user, answer):
        expected = text
        for token in ("<|im_start|>", "<|im_end|>", "<s>", "</s>"):
            expected = expected.replace(token, token.join(("{!", "!}")))
        assert expected in marked
    assert marked.count("{!") == sum(text.count("<") for text in texts)
