"""Tokens and loss masks are those of TRL's SFTTrainer for the same rows, but for what is named here."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from tests import tiny as tiny_models
from tests.data import tiny
from tuner.config.data_section import SourceSpec
from tuner.data import render_prompt
from tuner.data.chat import TEMPLATES
from tuner.data.prompts import chat_template_of
from tuner.errors import DataError

trl = pytest.importorskip("trl", reason="trl is not installed, which the extra dev brings")

QUICKSTART = Path(__file__).parents[2] / "studies" / "quickstart" / "base"
PLAIN_TOKENIZERS = {
    "byte level": tiny.byte_level,
    "with BOS": lambda: tiny.byte_level(bos=True),
    "sentencepiece": tiny.sentencepiece,
}
ALPACA = [
    {"instruction": "Name three colours.", "input": "", "output": "Red, green and blue."},
    {"instruction": "Add.", "input": "1 2", "output": "3"},
    {"instruction": "Übersetze.", "input": "日本 – 🦀\n\nzwei", "output": "Ein Krebs.\n\n  Zwei\tZeilen  "},
    {"instruction": "End.", "input": "", "output": "It has its end.</s>"},
]
COMPLETIONS = [
    {
        "prompt": "Below is an instruction that describes a task. Write a response that appropriately "
        f"completes the request.\n\n### Instruction:\n{row['instruction']}\n\n### Response:\n",
        "completion": row["output"],
    }
    if not row["input"]
    else {
        "prompt": "Below is an instruction that describes a task, paired with an input that provides further "
        "context. Write a response that appropriately completes the request.\n\n### Instruction:\n"
        f"{row['instruction']}\n\n### Input:\n{row['input']}\n\n### Response:\n",
        "completion": row["output"],
    }
    for row in ALPACA
]
"""The same with the prompts of Stanford's train.py."""

SYSTEM = {"role": "system", "content": "Be kind."}
ASKED = {"role": "user", "content": "Name a colour.\n\nOne."}
ANSWERED = {"role": "assistant", "content": "Red, of course."}
THANKED = {"role": "user", "content": "Another."}
ANSWERED_AGAIN = {"role": "assistant", "content": "Blue\n\nor green."}
CONVERSATIONS = [
    {"messages": [ASKED, ANSWERED]},
    {"messages": [SYSTEM, ASKED, ANSWERED, THANKED, ANSWERED_AGAIN]},
    {"messages": [ASKED, ANSWERED, THANKED]},
]


class Seen(NamedTuple):
    """A row as a trainer sees it."""

    ids: list[int]
    learned: list[bool]


def seen_by_tuner(
    folder: Path, tokenizer: Any, rows: list[Any], format: str, template: str | None = None, **data: Any
) -> list[Seen]:
    source = tiny.source(tiny.write_jsonl(folder / "train.jsonl", rows), format)
    if template:
        source["template"] = template
    other = tiny.source(tiny.write_jsonl(folder / "eval.jsonl", [{"text": "other"}]), "text")
    examples = tiny.prepared(tokenizer, train=[source], eval=[other], **data).train
    return [Seen(example.input_ids.tolist(), example.is_target.tolist()) for example in examples]


def seen_by_trl(folder: Path, tokenizer: Any, rows: list[Any], **settings: Any) -> list[Seen]:
    trainer = trl.SFTTrainer(
        model=AutoModelForCausalLM.from_config(tiny_models.config("llama")),
        args=trl.SFTConfig(
            output_dir=str(folder / "trl"), use_cpu=True, bf16=False, report_to="none", **settings
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    return [
        Seen(row["input_ids"], [label != -100 for label in row["labels"]]) for row in trainer.train_dataset
    ]


def with_marks(tokenizer: PreTrainedTokenizerBase, *marks: str) -> PreTrainedTokenizerBase:
    """The tokenizer with these strings as tokens of their own, the last of them EOS."""
    tokenizer.add_tokens(list(marks), special_tokens=True)
    tokenizer.eos_token = marks[-1]
    return tokenizer


@pytest.mark.parametrize("name", sorted(PLAIN_TOKENIZERS))
def test_alpaca_is_a_completion_of_its_prompt(tmp_path: Path, name: str) -> None:
    tokenizer = PLAIN_TOKENIZERS[name]()
    alpaca = seen_by_tuner(tmp_path, tokenizer, ALPACA, "alpaca")
    assert alpaca == seen_by_trl(tmp_path, tokenizer, COMPLETIONS, completion_only_loss=True)
    assert alpaca == seen_by_tuner(tmp_path, tokenizer, COMPLETIONS, "completion")
    assert len(alpaca) == len(ALPACA)


def test_rows_are_cut_and_left_out_alike(tmp_path: Path) -> None:
    tokenizer = tiny.byte_level(bos=True)
    whole = seen_by_tuner(tmp_path, tokenizer, ALPACA, "alpaca")
    max_length = len(whole[0].ids) - 3
    cut = seen_by_tuner(tmp_path, tokenizer, ALPACA, "alpaca", max_length=max_length)
    assert cut == seen_by_trl(tmp_path, tokenizer, COMPLETIONS, max_length=max_length)
    assert 0 < len(cut) < len(whole)
    assert len(cut[0].ids) == max_length


def test_loss_on_all_is_loss_on_all(tmp_path: Path) -> None:
    tokenizer = tiny.byte_level()
    ours = seen_by_tuner(tmp_path, tokenizer, ALPACA, "alpaca", loss_on="all")
    theirs = seen_by_trl(tmp_path, tokenizer, COMPLETIONS, completion_only_loss=False)
    assert [row.ids for row in ours] == [row.ids for row in theirs]
    # The first token has nothing before it: the label that TRL gives it is never used.
    assert [row.learned[1:] for row in ours] == [row.learned[1:] for row in theirs]


def test_a_prompt_that_ends_with_a_space_is_learned_as_inference_sends_it(tmp_path: Path) -> None:
    """TRL tokenises prompt and completion as one text: the space goes to the completion's first token."""
    tokenizer = tiny.byte_level()
    row = {"prompt": "Name three ", "completion": "colours."}
    [ours] = seen_by_tuner(tmp_path, tokenizer, [row], "completion")
    [theirs] = seen_by_trl(tmp_path, tokenizer, [row])
    asked = list(render_prompt("completion", tokenizer, instruction=row["prompt"]).ids)
    assert tokenizer.decode(ours.ids) == tokenizer.decode(theirs.ids)
    assert ours.ids[: len(asked)] == asked == tokenizer(row["prompt"]).input_ids
    assert ours.learned == [False] * len(asked) + [True] * (len(ours.ids) - len(asked))
    assert tokenizer.decode(theirs.ids[theirs.learned.index(True)]).startswith(" ")


def test_turns_in_a_template_that_trl_has_marked(tmp_path: Path) -> None:
    from trl.chat_template_utils import llama3_chat_template

    tokenizer = with_marks(
        tiny.byte_level(bos=True), "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"
    )
    tokenizer.chat_template = llama3_chat_template
    ours = seen_by_tuner(tmp_path, tokenizer, CONVERSATIONS, "messages")
    theirs = seen_by_trl(tmp_path, tokenizer, CONVERSATIONS, assistant_only_loss=True)
    assert ours[:2] == theirs[:2]
    end = len(ours[2].ids)
    assert ours[2] == Seen(theirs[2].ids[:end], theirs[2].learned[:end])
    assert tokenizer.decode(theirs[2].ids[end:]).startswith("<|start_header_id|>user")
    assert not any(theirs[2].learned[end:])


def test_turns_in_the_quickstarts_template(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(QUICKSTART)
    own = tokenizer.chat_template
    ours = seen_by_tuner(tmp_path, tokenizer, CONVERSATIONS[:2], "messages")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<s>' + m.role + '\n' }}"
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '</s>' }}{% endgeneration %}"
        "{% else %}{{ m.content + '</s>' }}{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
    )
    for row in CONVERSATIONS:
        marked = tokenizer.apply_chat_template(row["messages"], tokenize=False)
        assert marked == tokenizer.apply_chat_template(row["messages"], chat_template=own, tokenize=False)
    theirs = seen_by_trl(tmp_path, tokenizer, CONVERSATIONS[:2], assistant_only_loss=True)
    newline = tokenizer("\n", add_special_tokens=False).input_ids
    assert [Seen(row.ids + newline, [*row.learned, False]) for row in ours] == theirs


def test_newlines_around_a_turn_are_not_learned_where_trls_marks_have_them(tmp_path: Path) -> None:
    """TRL's marks for Qwen 2.5 hold the newline that ends the generation prompt and the one after the EOS."""
    from trl.chat_template_utils import qwen2_5_chat_template

    tokenizer = with_marks(tiny.byte_level(), "<|im_start|>", "<|im_end|>")
    tokenizer.chat_template = qwen2_5_chat_template
    ours = seen_by_tuner(tmp_path, tokenizer, CONVERSATIONS[:2], "messages")
    theirs = seen_by_trl(tmp_path, tokenizer, CONVERSATIONS[:2], assistant_only_loss=True)
    [newline] = tokenizer("\n", add_special_tokens=False).input_ids
    for mine, other, num_turns in zip(ours, theirs, (1, 2), strict=True):
        assert [*mine.ids, newline] == other.ids
        more = [at for at, learned in enumerate(other.learned) if learned and not [*mine.learned, False][at]]
        assert [other.ids[at] for at in more] == [newline] * 2 * num_turns
        assert sum(other.learned) == sum(mine.learned) + 2 * num_turns


def test_eos_comes_after_an_end_mark_that_is_not_eos(tmp_path: Path) -> None:
    """TRL's marks for Gemma end with the turn, without the EOS that every example of ours has."""
    from trl.chat_template_utils import gemma_chat_template

    tokenizer = with_marks(tiny.byte_level(bos=True), "<start_of_turn>", "<end_of_turn>", "<eos>")
    tokenizer.chat_template = gemma_chat_template
    conversations = [CONVERSATIONS[0], {"messages": [ASKED, ANSWERED, THANKED, ANSWERED_AGAIN]}]
    ours = seen_by_tuner(tmp_path, tokenizer, conversations, "messages")
    theirs = seen_by_trl(tmp_path, tokenizer, conversations, assistant_only_loss=True)
    assert ours == [Seen([*row.ids, tokenizer.eos_token_id], [*row.learned, True]) for row in theirs]


def test_turns_of_a_template_that_ends_every_conversation(tmp_path: Path) -> None:
    """Phi 3 puts an EOS after the last message alone, so that a turn in the middle has none."""
    from trl.chat_template_utils import phi3_chat_template

    tokenizer = with_marks(tiny.byte_level(), "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>")
    tokenizer.chat_template = phi3_chat_template
    ours = seen_by_tuner(tmp_path, tokenizer, CONVERSATIONS[:2], "messages")
    theirs = seen_by_trl(tmp_path, tokenizer, CONVERSATIONS[:2], assistant_only_loss=True)
    assert ours == theirs


def test_turns_that_a_template_renders_anew_are_refused(tmp_path: Path) -> None:
    """TRL takes a training template of its own here, which says what inference does not send."""
    from trl.chat_template_utils import qwen3_chat_template

    tokenizer = with_marks(tiny.byte_level(), "<|im_start|>", "<|im_end|>")
    tokenizer.chat_template = qwen3_chat_template
    assert seen_by_trl(tmp_path, tokenizer, CONVERSATIONS[1:2], assistant_only_loss=True)
    with pytest.raises(DataError, match=r"message 3: .* renders this assistant turn differently"):
        seen_by_tuner(tmp_path, tokenizer, CONVERSATIONS[1:2], "messages")


def test_a_text_begins_anew_after_an_eos_in_the_middle(tmp_path: Path) -> None:
    """Llama 2's tokenizer puts a space there."""
    tokenizer = tiny.sentencepiece()
    turns = [ASKED, ANSWERED, THANKED, ANSWERED_AGAIN]
    [ours] = seen_by_tuner(tmp_path, tokenizer, [{"messages": turns}], "messages", "alpaca")
    source = SourceSpec.model_validate(tiny.source(tmp_path / "train.jsonl", "messages", template="alpaca"))
    tokenizer.chat_template = chat_template_of([source], tokenizer)
    [theirs] = seen_by_trl(tmp_path, tokenizer, [{"prompt": turns[:3], "completion": turns[3:]}])
    eos, space = tokenizer.convert_tokens_to_ids(["</s>", "▁"])
    assert ours.ids == theirs.ids[: len(ours.ids)]
    assert (eos, space) in pairwise(ours.ids)


@pytest.mark.parametrize("name", sorted(PLAIN_TOKENIZERS))
@pytest.mark.parametrize("template", sorted(TEMPLATES))
def test_a_named_template_exported_for_others(tmp_path: Path, template: str, name: str) -> None:
    """In the template that an export writes TRL sees the same, and learns white space after EOS too."""
    tokenizer = PLAIN_TOKENIZERS[name]()
    [ours] = seen_by_tuner(
        tmp_path, tokenizer, [{"messages": [SYSTEM, ASKED, ANSWERED]}], "messages", template
    )
    source = SourceSpec.model_validate(tiny.source(tmp_path / "train.jsonl", "messages", template=template))
    tokenizer.chat_template = chat_template_of([source], tokenizer)
    [theirs] = seen_by_trl(tmp_path, tokenizer, [{"prompt": [SYSTEM, ASKED], "completion": [ANSWERED]}])
    end = len(ours.ids)
    assert ours == Seen(theirs.ids[:end], theirs.learned[:end])
    assert not tokenizer.decode(theirs.ids[end:]).strip()
    assert ours.ids[-1] == tokenizer.eos_token_id


def test_tools_and_reasoning_are_what_trl_renders(tmp_path: Path) -> None:
    """TRL's template for Qwen 3 differs from the model's in its marks, and learns the generation prompt."""
    from trl.chat_template_utils import qwen3_chat_template

    tokenizer = with_marks(tiny.byte_level(), "<|im_start|>", "<|im_end|>")
    tokenizer.chat_template = qwen3_chat_template
    tool = {"type": "function", "function": {"name": "tide", "parameters": {"type": "object"}}}
    thought = {**ANSWERED, "reasoning_content": "Red is one."}
    rows = [{"messages": [SYSTEM, ASKED, thought], "tools": [tool]}]
    [ours] = seen_by_tuner(tmp_path, tokenizer, rows, "messages")
    [theirs] = seen_by_trl(tmp_path, tokenizer, rows, assistant_only_loss=True)
    assert theirs.ids[: len(ours.ids)] == ours.ids
    assert tokenizer.decode(theirs.ids[len(ours.ids) :]) == "\n"
    learned = tokenizer.decode([id for id, seen in zip(ours.ids, ours.learned, strict=True) if seen])
    assert learned == "<think>\nRed is one.\n</think>\n\nRed, of course.<|im_end|>"
    assert all(theirs.learned[at] for at, seen in enumerate(ours.learned) if seen)


@pytest.mark.parametrize("name", ["with BOS", "sentencepiece"])
def test_a_bos_in_the_row_changes_nothing_but_trls_second_one(tmp_path: Path, name: str) -> None:
    tokenizer = PLAIN_TOKENIZERS[name]()
    texts = [{"text": "Red, green and blue."}]
    with_bos = [{"text": "<s>Red, green and blue."}]
    ours = seen_by_tuner(tmp_path, tokenizer, with_bos, "text")
    [theirs] = seen_by_trl(tmp_path, tokenizer, texts)
    assert ours == [Seen(theirs.ids, [False, *theirs.learned[1:]])]
    assert seen_by_tuner(tmp_path, tokenizer, texts, "text") == ours
