"""What a model is asked is what it was trained to complete, and the reference is the row's completion."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.data import tiny
from tuner.data import EvalPrompt, Examples, PreparedData, refuse_tokens_beyond, render_prompt
from tuner.errors import DataError

PLAIN = tiny.byte_level(bos=True)
CHAT = tiny.byte_level(chat_template=tiny.CHATML)


def asked(
    tokenizer: Any, sources: list[dict[str, Any]], *, max_examples: int = 50, **data: Any
) -> PreparedData:
    given = {"train": sources, "allow_overlap": True} | ({} if "eval_fraction" in data else {"eval": sources})
    return tiny.prepared(tokenizer, answers={"max_examples": max_examples}, **given | data)


def pairs(eval_prompts: tuple[EvalPrompt, ...]) -> list[tuple[str, str]]:
    return [(q.prompt.text, q.reference) for q in eval_prompts]


@pytest.mark.parametrize("loss_on", ["completion", "all"])
def test_a_row_is_asked_as_it_is_trained_whatever_the_loss_is_on(tmp_path: Path, loss_on: str) -> None:
    rows = tiny.alpaca_rows(12)
    tiny.write_jsonl(tmp_path / "rows.jsonl", rows)
    data = asked(PLAIN, [tiny.source(tmp_path / "rows.jsonl")], max_examples=5, loss_on=loss_on)
    assert [q.reference for q in data.eval_prompts] == [row["output"].strip() for row in rows[:5]]
    for number, (eval_prompt, row) in enumerate(zip(data.eval_prompts, rows, strict=False), start=1):
        sent = render_prompt("alpaca", PLAIN, instruction=row["instruction"], input=row.get("input", ""))
        assert eval_prompt.prompt.ids == sent.ids
        assert (eval_prompt.prompt.row, eval_prompt.prompt.place) == (
            number,
            f"{tmp_path}/rows.jsonl:{number}",
        )
        assert eval_prompt.reference_tokens == len(PLAIN.encode(row["output"], add_special_tokens=False))


@pytest.mark.parametrize("loss_on", ["completion", "all"])
def test_held_out_rows_alone_are_asked(tmp_path: Path, loss_on: str) -> None:
    rows = tiny.alpaca_rows(40)
    tiny.write_jsonl(tmp_path / "rows.jsonl", rows)
    sources = [tiny.source(tmp_path / "rows.jsonl")]
    data = asked(PLAIN, sources, eval_fraction=0.3, allow_overlap=False, loss_on=loss_on)
    held_out = [str(PLAIN.decode(e.input_ids)) for e in data.evaluation]
    assert len(data.eval_prompts) == len(held_out) > 3
    assert all(
        eval_prompt.reference in text for eval_prompt, text in zip(data.eval_prompts, held_out, strict=True)
    )


def test_of_a_conversation_the_last_turn_is_asked(tmp_path: Path) -> None:
    turns = [("user", "One?"), ("assistant", "Uno."), ("user", "Two?"), ("assistant", "Dos.")]
    rows = [{"messages": [{"role": role, "content": text} for role, text in turns]}]
    tiny.write_jsonl(tmp_path / "rows.jsonl", rows)
    for loss_on in ("completion", "all"):
        source = {"path": str(tmp_path / "rows.jsonl"), "format": "messages"}
        [(prompt, reference)] = pairs(asked(CHAT, [source], loss_on=loss_on).eval_prompts)
        assert reference == "Dos."
        assert prompt.endswith("Two?<|im_end|>\n<|im_start|>assistant\n")
        assert "Uno." in prompt


def test_rows_without_a_prompt_or_without_a_whole_completion_are_left_out(tmp_path: Path) -> None:
    rows = [
        {"prompt": "", "completion": "Nobody asked."},
        {"prompt": "Short?", "completion": "A long answer. " * 20},
        {"prompt": "Short?", "completion": "Yes."},
    ]
    tiny.write_jsonl(tmp_path / "rows.jsonl", rows)
    tiny.write_jsonl(tmp_path / "texts.jsonl", [{"text": "Nobody asks this."}])
    texts = {"path": str(tmp_path / "texts.jsonl"), "format": "text"}
    completions = {"path": str(tmp_path / "rows.jsonl"), "format": "completion"}
    data = asked(PLAIN, [texts, completions], max_length=48)
    assert [(q.prompt.row, q.reference) for q in data.eval_prompts] == [(3, "Yes.")]
    with pytest.raises(
        DataError, match=r"evaluation.answers: .*texts.jsonl \(format text\): no evaluation row"
    ):
        asked(PLAIN, [texts])


def test_a_question_with_a_token_that_the_embedding_lacks_is_refused(tmp_path: Path) -> None:
    """Whatever the examples have: what is asked is looked at by itself."""
    tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.alpaca_rows(3))
    data = asked(PLAIN, [tiny.source(tmp_path / "rows.jsonl")])
    largest = max(max(eval_prompt.prompt.ids) for eval_prompt in data.eval_prompts)
    alone = replace(data, train=Examples([]), evaluation=Examples([]), test=Examples([]))
    refuse_tokens_beyond(alone, largest + 1, lambda: PLAIN)
    token = re.escape(repr(PLAIN.convert_ids_to_tokens(largest)))
    with pytest.raises(DataError, match=rf"rows.jsonl:\d: has the token {token} \({largest}\)"):
        refuse_tokens_beyond(alone, largest, lambda: PLAIN)
