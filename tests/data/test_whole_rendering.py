"""What is trained is what `apply_chat_template(tokenize=True)` of the exported tokenizer has."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tests.data import tiny
from tuner.config import SourceSpec
from tuner.data import prepare, read_prompts
from tuner.data.chat import TEMPLATES, with_fixed_date
from tuner.data.examples import Example, Opening, Segment
from tuner.data.prompts import chat_template_of, renders_prompts_of
from tuner.data.tokenise import Tokeniser

Message = dict[str, Any]

MARKS = ("<|user|>", "<|assistant|>", "<|end|>", "<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]")


def _with_marks(tokenizer: PreTrainedTokenizerBase, *, rstrip: bool = False) -> PreTrainedTokenizerBase:
    marks = [AddedToken(mark, rstrip=rstrip, normalized=False, special=True) for mark in MARKS]
    tokenizer.add_tokens(marks)
    return tokenizer


def _metaspace(scheme: str, *, split: bool) -> PreTrainedTokenizerBase:
    made = tiny.sentencepiece()
    document = json.loads(made.backend_tokenizer.to_str())
    document["normalizer"] = None
    document["pre_tokenizer"] = {
        **{"type": "Metaspace", "replacement": "▁"},
        **{"prepend_scheme": scheme, "split": split},
    }
    return _like(made, document)


def _like(made: PreTrainedTokenizerBase, document: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(document)),
        bos_token="<s>",
        eos_token="</s>",
        unk_token=made.unk_token,
    )


def _llama_of_transformers_5() -> PreTrainedTokenizerBase:
    model = json.loads(tiny.sentencepiece().backend_tokenizer.to_str())["model"]
    return LlamaTokenizer(vocab=model["vocab"], merges=[tuple(merge) for merge in model["merges"]])


def _byte_level_with_space() -> PreTrainedTokenizerBase:
    made = tiny.byte_level(bos=True)
    document = json.loads(made.backend_tokenizer.to_str())
    document["pre_tokenizer"]["add_prefix_space"] = True
    return _like(made, document)


KINDS: Mapping[str, Callable[[], PreTrainedTokenizerBase]] = {
    "byte level": tiny.byte_level,
    "byte level with BOS": lambda: tiny.byte_level(bos=True),
    "byte level with a space": _byte_level_with_space,
    "prepend": tiny.sentencepiece,
    "always": lambda: _metaspace("always", split=False),
    "always, split": lambda: _metaspace("always", split=True),
    "first": lambda: _metaspace("first", split=False),
    "first, split": lambda: _metaspace("first", split=True),
    "never": lambda: _metaspace("never", split=False),
    "transformers 5": _llama_of_transformers_5,
    "prepend, marks": lambda: _with_marks(tiny.sentencepiece()),
    "always, marks": lambda: _with_marks(_metaspace("always", split=False)),
    "first, marks": lambda: _with_marks(_metaspace("first", split=False)),
    "byte level, marks": lambda: _with_marks(tiny.byte_level()),
    "prepend, marks take white space": lambda: _with_marks(tiny.sentencepiece(), rstrip=True),
    "first, marks take white space": lambda: _with_marks(_metaspace("first", split=False), rstrip=True),
}
OWN = {
    "zephyr": (
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    ),
    "llama 2": (
        "{% for m in messages %}{% if m.role == 'user' %}{{ '<s>[INST] ' + m.content + ' [/INST]' }}"
        "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
    ),
    "mistral": (
        "{{ '<s>' }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + '[/INST]' }}"
        "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
    ),
    "gemma": (
        "{{ '<s>' }}{% for m in messages %}{{ '<start_of_turn>' + m.role + '\n' + m.content }}"
        "{{ '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>assistant\n' }}{% endif %}"
    ),
    "phi 3": (
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    ),
    "no marks": (
        "{% for m in messages %}{{ m.role|upper + ': ' + m.content + '\n\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
    ),
}
"""As models have them; without marks, no text says where an answer ends."""
SYSTEM = {"role": "system", "content": "Be kind."}
TURNS: Sequence[Message] = (
    {"role": "user", "content": "Name a colour.\n\nOne of 日本 – 🦀"},
    {"role": "assistant", "content": "Red and a Rose.\n\n  a\tRe:d  a"},
    {"role": "user", "content": " Another"},
    {"role": "assistant", "content": "a Blue\n\nor green"},
    {"role": "user", "content": "a</s> end\n"},
    {"role": "assistant", "content": "Red"},
)


def trained(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    template: str | None,
    messages: Sequence[Message],
    **data: Any,
) -> Example:
    file = tiny.write_jsonl(folder / "train.jsonl", [{"messages": messages}])
    other = tiny.write_jsonl(folder / "eval.jsonl", [{"text": "other"}])
    source = tiny.source(file, "messages", template=template)
    [example] = tiny.prepared(
        tokenizer, train=[source], eval=[tiny.source(other, "text")], max_length=2000, **data
    ).train
    return example


def exported(folder: Path, tokenizer: PreTrainedTokenizerBase, template: str | None) -> Any:
    """The tokenizer of an export, read as anyone does."""
    source = SourceSpec.model_validate(tiny.source(folder / "x", "messages", template=template))
    own = tokenizer.chat_template
    tokenizer.chat_template = chat_template_of([source], tokenizer) or own
    tokenizer.save_pretrained(folder / "export")
    tokenizer.chat_template = own
    return AutoTokenizer.from_pretrained(folder / "export")


def rendered(tokenizer: Any, messages: Sequence[Message], *, ask: bool = False) -> list[int]:
    ids: list[int] = tokenizer.apply_chat_template(
        list(messages), add_generation_prompt=ask, tokenize=True, return_dict=False
    )
    return ids


def is_whole(tokenizer: Any, ids: list[int], whole: list[int]) -> bool:
    """But for white space after the last EOS, which is not trained, and an EOS that the template has not."""
    added = ids[:-1] if ids[-1] == tokenizer.eos_token_id and ids != whole[: len(ids)] else ids
    return added == whole[: len(added)] and not tokenizer.decode(whole[len(added) :]).strip()


CASES = [(kind, name) for kind in KINDS for name in (*TEMPLATES, *OWN)]


def case(kind: str, name: str) -> tuple[PreTrainedTokenizerBase, str | None]:
    tokenizer = KINDS[kind]()
    if name in OWN:
        tokenizer.chat_template = OWN[name]
    return tokenizer, None if name in OWN else name


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_tokens_are_those_of_the_exported_template(tmp_path: Path, kind: str, name: str) -> None:
    tokenizer, template = case(kind, name)
    theirs = exported(tmp_path, tokenizer, template)
    for num_messages in (2, 4, 6):
        messages = TURNS[:num_messages]
        example = trained(tmp_path, tokenizer, template, messages)
        ids = example.input_ids.tolist()
        whole = rendered(theirs, messages)
        assert is_whole(theirs, ids, whole)
        for at in range(1, num_messages, 2):
            asked = rendered(theirs, messages[:at], ask=True)
            assert ids[: len(asked)] == asked
            assert example.is_target[len(asked)]
            assert not example.is_target[len(asked) - 1]
            said = theirs.decode(ids[len(asked) :][: _run(example.is_target[len(asked) :])])
            assert said.strip().startswith(messages[at]["content"].split("\n")[0])
        everything = trained(tmp_path, tokenizer, template, messages, loss_on="all").input_ids.tolist()
        assert everything[: len(ids) - 1] == ids[:-1]
        asking = tiny.write_jsonl(tmp_path / "ask.jsonl", [{"messages": messages[:at]}])
        source = SourceSpec.model_validate(tiny.source(tmp_path / "x", "messages", template=template))
        [prompt] = read_prompts(asking, source, tokenizer)
        assert list(prompt.ids) == asked


@pytest.mark.parametrize(("kind", "name"), CASES[:: len(TEMPLATES) + len(OWN) + 2])
@pytest.mark.parametrize("loss_on", ["completion", "all"])
def test_evaluation_answers_are_asked_for_as_the_exported_template_asks(
    tmp_path: Path, kind: str, name: str, loss_on: str
) -> None:
    tokenizer, template = case(kind, name)
    [train, held_out] = (
        tiny.source(tiny.write_jsonl(tmp_path / f"{n}.jsonl", [{"messages": turns}]), "messages")
        for n, turns in enumerate((TURNS[:2], TURNS[:4]))
    )
    data = {"train": [{**train, "template": template}], "eval": [{**held_out, "template": template}]}
    spec = tiny.round_spec(answers={"metric": "exact_match"}, loss_on=loss_on, max_length=2000, **data)
    [eval_prompt] = prepare(spec, tokenizer, None).eval_prompts
    theirs = exported(tmp_path, tokenizer, template)
    assert list(eval_prompt.prompt.ids) == rendered(theirs, TURNS[:3], ask=True)


def _run(learned: Any) -> int:
    """How many tokens are learned before one that is not."""
    return next((at for at, is_target in enumerate(learned) if not is_target), len(learned))


WORDS = st.text(st.sampled_from("aR \n:é🦀"), min_size=1, max_size=8)


@settings(
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(kind=st.sampled_from(sorted(KINDS)), name=st.sampled_from([*TEMPLATES, *OWN]), words=st.lists(WORDS))
def test_a_prompt_is_the_beginning_of_its_row_whatever_the_answer_begins_with(
    tmp_path: Path, kind: str, name: str, words: list[str]
) -> None:
    tokenizer, template = case(kind, name)
    asked, answered = "a" + "".join(words[:2]), "".join(words[2:]) + "e"
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    prompt = rendered(exported(tmp_path, tokenizer, template), messages[:1], ask=True)
    example = trained(tmp_path, tokenizer, template, messages)
    assert example.input_ids[: len(prompt)].tolist() == prompt
    assert not example.is_target[: len(prompt)].any()
    assert example.is_target[len(prompt) :].all()


def _merging_newlines() -> PreTrainedTokenizerBase:
    """As GPT-2 has them: two are one token, but the last before a word stands alone."""
    made = tiny.byte_level()
    document = json.loads(made.backend_tokenizer.to_str())
    document["model"]["vocab"]["ĊĊ"] = max(document["model"]["vocab"].values()) + 1
    document["model"]["merges"].append(["Ċ", "Ċ"])
    return _like(made, document)


@pytest.mark.parametrize(("template", "answer"), [("llama3", "Red"), ("chatml", "\nRed")])
def test_a_row_is_cut_where_an_answer_begins(tmp_path: Path, template: str, answer: str) -> None:
    """Tokenised as one, the prompt would end otherwise than inference sends it; later turns stay whole."""
    tokenizer = _merging_newlines()
    theirs = exported(tmp_path, tokenizer, template)
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": answer}]
    asked, whole = rendered(theirs, messages[:1], ask=True), rendered(theirs, messages)
    example = trained(tmp_path, tokenizer, template, messages)
    ids = example.input_ids.tolist()
    assert ids[: len(asked)] == asked
    assert example.is_target.tolist() == [False] * len(asked) + [True] * (len(ids) - len(asked))
    if template == "llama3":
        assert whole[: len(asked)] != asked
    [unlearned, learned] = ({**messages[1], "weight": weight} for weight in (0, 1))
    history: list[Message] = [messages[0], unlearned, messages[0], learned]
    later = trained(tmp_path, tokenizer, template, history)
    [first, *_] = [at for at, is_target in enumerate(later.is_target) if is_target]
    plain = [messages[0], messages[1], messages[0]]
    assert later.input_ids[:first].tolist() == rendered(theirs, plain, ask=True)


@pytest.mark.parametrize(
    ("loss_on", "is_masked", "learned"),
    [
        ("completion", False, ["Red", "\n\n", "c", "</s>"]),
        ("completion", True, ["Red", "c", "</s>"]),
        ("all", False, ["Red", "\n\n", "\n", "b", "c", "</s>"]),
        ("all", True, ["Red", "c", "</s>"]),
    ],
)
def test_a_token_across_the_end_of_an_answer_belongs_to_where_it_begins(
    loss_on: Literal["completion", "all"], is_masked: bool, learned: list[str]
) -> None:
    """Unless some of it is text that no loss may see."""
    tokenizer = _merging_newlines()
    segments = (
        *(Segment("a", is_target=False), Segment("Red\n", is_target=True)),
        *(Segment("\n\nb", is_target=False, is_masked=is_masked), Segment("c", is_target=True)),
    )
    [row] = Tokeniser(tokenizer).rows([segments], Opening.TEXT, loss_on=loss_on, max_length=99)
    whole = tokenizer.encode("aRed\n\n\nbc", add_special_tokens=False)
    assert row.tokens.tolist() == [*whole, tokenizer.eos_token_id]
    pieces = [tokenizer.decode([token]) for token in row.tokens[row.targets].tolist()]
    assert "".join(pieces) == "".join(learned)
    assert ("\n\n" in pieces) == ("\n\n" in learned)


DATED = (
    "{%- if not date_string is defined %}{% if strftime_now is defined %}"
    "{% set date_string = strftime_now('%d %b %Y') %}"
    "{% else %}{% set date_string = '26 Jul 2024' %}{% endif %}{% endif %}"
    "{{ 'Today: ' + date_string + '\n' }}" + tiny.CHATML
)
"""As Llama 3.2's."""


@pytest.mark.parametrize("kind", ["byte level with BOS", "prepend", "first"])
def test_a_template_with_a_clock_is_exported_with_the_date_of_training(tmp_path: Path, kind: str) -> None:
    tokenizer = KINDS[kind]()
    tokenizer.chat_template = DATED
    theirs = exported(tmp_path, tokenizer, None)
    ids = trained(tmp_path, tokenizer, None, TURNS[:4]).input_ids.tolist()
    assert is_whole(theirs, ids, rendered(theirs, TURNS[:4]))
    assert not is_whole(tokenizer, ids, rendered(tokenizer, TURNS[:4]))
    [told] = theirs.apply_chat_template([TURNS[:1]], tokenize=False, date_string="1 Jan 2030")
    assert told.startswith("Today: 1 Jan 2030\n")
    assert exported(tmp_path, theirs, None).chat_template == theirs.chat_template


def test_a_template_for_tools_is_used_and_exported(tmp_path: Path) -> None:
    tokenizer = tiny.byte_level(bos=True)
    tools = "{{ strftime_now('%F') }}{% for t in tools %}{{ t.function.name + '\n' }}{% endfor %}"
    tokenizer.chat_template = {"default": DATED, "tool_use": tools + tiny.CHATML}
    theirs = exported(tmp_path, tokenizer, None)
    tool = {"type": "function", "function": {"name": "tide"}}
    row = {"messages": list(TURNS[:2]), "tools": [tool]}
    source = tiny.source(
        tiny.write_jsonl(tmp_path / "tools.jsonl", [row, {"messages": TURNS[:2]}]), "messages"
    )
    other = tiny.source(tiny.write_jsonl(tmp_path / "other.jsonl", [{"text": "other"}]), "text")
    [with_tools, without] = tiny.prepared(tokenizer, train=[source], eval=[other]).train
    whole = theirs.apply_chat_template(list(TURNS[:2]), tools=[tool], return_dict=False)
    assert is_whole(theirs, with_tools.input_ids.tolist(), whole)
    assert theirs.decode(whole).startswith("2024-07-26tide\n")
    assert is_whole(theirs, without.input_ids.tolist(), rendered(theirs, TURNS[:2]))


@pytest.mark.parametrize("more", [[], [tiny.source(Path("y"), "alpaca")], [tiny.source(Path("y"), "text")]])
def test_rows_beside_those_of_the_own_template_leave_its_date_fixed(more: list[Any]) -> None:
    tokenizer = tiny.byte_level(chat_template=DATED)
    sources = [SourceSpec.model_validate(each) for each in (tiny.source(Path("x"), "messages"), *more)]
    assert chat_template_of(sources, tokenizer) == with_fixed_date(DATED) != DATED
    assert renders_prompts_of(sources)
    assert renders_prompts_of(sources[::-1]) == (not more)


@pytest.mark.parametrize("format", ["completion", "text"])
def test_rows_without_template_leave_that_of_the_tokenizer(format: str) -> None:
    source = SourceSpec.model_validate(tiny.source(Path("x"), format))
    assert chat_template_of([source], tiny.byte_level(chat_template=DATED)) is None
    assert not renders_prompts_of([source])
