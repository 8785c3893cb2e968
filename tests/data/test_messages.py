"""What a row of messages says is what the model learns, or the row is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, ClassVar

import pytest
from transformers import PreTrainedTokenizerBase

from tests.data import tiny
from tuner.config import SourceSpec
from tuner.data import PreparedData, read_prompts, show_rows
from tuner.data.chat import TEMPLATES
from tuner.errors import DataError

CHAT = tiny.byte_level(chat_template=tiny.CHATML)
PLAIN = tiny.byte_level(bos=True)
USER = {"role": "user", "content": "Is it 4?"}
RIGHT = {"role": "assistant", "content": "4"}
WRONG = {"role": "assistant", "content": "It is 5."}
THINKS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.reasoning_content %}<think>"
    "{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOLS = [{"type": "function", "function": {"name": "tide", "parameters": {"type": "object"}}}]
WITH_TOOLS = "{% if tools %}{{ tools | tojson }}\n{% endif %}" + tiny.CHATML
TOOLS_IN_ROW = {"tools": TOOLS, "messages": [USER, RIGHT]}


def prepared(
    folder: Path, rows: list[dict[str, Any]], format: str = "messages", tokenizer: Any = CHAT, **more: Any
) -> PreparedData:
    data = {"loss_on": more.pop("loss_on")} if "loss_on" in more else {}
    train = tiny.source(tiny.write_jsonl(folder / "train.jsonl", rows), format, **more)
    other = tiny.source(tiny.write_jsonl(folder / "eval.jsonl", [{"text": "other"}]), "text")
    return tiny.prepared(tokenizer, train=[train], eval=[other], **data)


def shown(*args: Any, **more: Any) -> list[str]:
    """Each row, what the loss sees between brackets."""
    tokenizer: PreTrainedTokenizerBase = more.get("tokenizer", CHAT)
    rows = show_rows(prepared(*args, **more).train, tokenizer, 100)
    return ["".join(f"[{text}]" if learned else text for text, learned in row.pieces) for row in rows]


def refusal(folder: Path, row: dict[str, Any], format: str = "messages", **more: Any) -> str:
    with pytest.raises(DataError) as caught:
        prepared(folder, [row], format, **more)
    message = str(caught.value)
    assert message.startswith(f"{folder}/train.jsonl:1: ")
    return message


def in_format(format: str, *turns: dict[str, Any]) -> dict[str, Any]:
    if format == "messages":
        return {"messages": list(turns)}
    speakers = {"user": "human", "assistant": "gpt", "system": "system"}
    renamed = [
        {"from": speakers[turn["role"]], "value": turn["content"]}
        | {key: turn[key] for key in turn.keys() - {"role", "content"}}
        for turn in turns
    ]
    return {"conversations": renamed}


ASKED = "<|im_start|>user\nIs it 4?<|im_end|>\n<|im_start|>assistant\n"


class TestWhetherATurnIsLearned:
    @pytest.mark.parametrize("format", ["messages", "sharegpt"])
    @pytest.mark.parametrize("says", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"training": False}])
    def test_no(self, tmp_path: Path, format: str, says: dict[str, Any]) -> None:
        row = in_format(format, USER, WRONG | says, USER, RIGHT)
        expected = ASKED + "It is 5.<|im_end|>\n" + ASKED + "[4<|im_end|>]"
        assert shown(tmp_path, [row], format) == [expected]

    @pytest.mark.parametrize("format", ["messages", "sharegpt"])
    @pytest.mark.parametrize("says", [{"weight": 1}, {"train": True}, {"weight": None}, {}])
    def test_yes(self, tmp_path: Path, format: str, says: dict[str, Any]) -> None:
        row = in_format(format, USER, RIGHT | says)
        assert shown(tmp_path, [row], format) == [ASKED + "[4<|im_end|>]"]

    @pytest.mark.parametrize("value", [0.5, 2, -1, "0", [1]])
    @pytest.mark.parametrize("key", ["weight", "train"])
    def test_by_half(self, tmp_path: Path, key: str, value: Any) -> None:
        assert f"message 2: {key!r} is" in refusal(tmp_path, {"messages": [USER, RIGHT | {key: value}]})

    def test_a_loss_on_everything_does_not_see_it_either(self, tmp_path: Path) -> None:
        rows = [
            {"messages": [USER, WRONG | {"weight": 0}, USER, RIGHT]},
            {"messages": [USER, WRONG | {"weight": 0}]},
        ]
        first, last = shown(tmp_path, rows, loss_on="all")
        assert "]It is 5.<|im_end|>[" in first
        assert last.endswith("]It is 5.<|im_end|>")

    def test_an_unlearned_turn_that_is_rendered_anew_is_no_obstacle(self, tmp_path: Path) -> None:
        """Qwen3's template thinks in the last turn alone, so the first reads otherwise when it is last."""
        tokenizer = qwen3()
        row = {"messages": [USER, WRONG | {"weight": 0}, USER, RIGHT]}
        [said] = shown(tmp_path, [row], tokenizer=tokenizer)
        whole = tokenizer.apply_chat_template([USER, WRONG, USER, RIGHT], tokenize=False)
        assert said.replace("[", "").replace("]", "") == whole.rstrip("\n")
        assert said.endswith("<|im_start|>assistant\n[<think>\n\n</think>\n\n4<|im_end|>]")
        assert said.count("[") == 1
        [said] = shown(tmp_path, [row], tokenizer=tokenizer, loss_on="all")
        assert "It is 5." not in "".join(piece.partition("]")[0] for piece in said.split("[")[1:])

    @pytest.mark.parametrize("says", [{"weight": 0}, {"train": False}])
    @pytest.mark.parametrize("at", range(4))
    def test_of_anybody(self, tmp_path: Path, says: dict[str, Any], at: int) -> None:
        """A loss on all turns sees those of the user and the system, too, unless the row says otherwise."""
        turns = [{"role": "system", "content": "Be kind."}, USER, RIGHT, USER]
        turns[at] = turns[at] | says
        [said] = shown(tmp_path, [{"messages": turns}], loss_on="all")
        whole = CHAT.apply_chat_template(turns, tokenize=False)
        assert said.replace("[", "").replace("]", "").startswith(whole.rstrip("\n"))
        texts = [f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>" for turn in turns]
        # The first token is never learned, and a row whose end is not learned does not learn its EOS.
        opening, end = ("", "") if at == 0 else ("<|im_start|>", "<|im_end|>" if at == 3 else "")
        unlearned = "".join(piece.replace("\n", " ").strip() for piece in re.split(r"\[[^]]*\]", said))
        expected = "4<|im_end|>" if at == 2 else texts[at].replace("\n", " ")
        assert unlearned.replace(" <|im_end|>", "<|im_end|>") == opening + expected + end

    def test_a_loss_on_completions_sees_what_it_saw(self, tmp_path: Path) -> None:
        rows = [{"messages": [USER | {"weight": weight}, RIGHT]} for weight in (0, 1)]
        first, second = prepared(tmp_path, rows).train
        assert first.input_ids.tolist() == second.input_ids.tolist()
        assert first.is_target.tolist() == second.is_target.tolist()

    def test_a_message_that_cannot_be_told_apart_hides_those_beside_it(self, tmp_path: Path) -> None:
        """Here the last user's message has the system's text in it, as in Mistral's templates."""
        template = (
            "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>"
            "{% if loop.last or messages[loop.index].role != 'user' %}LAST {% endif %}{% endif %}"
            "{{ m.content }}<|im_end|>{% endfor %}"
        )
        other = {"role": "user", "content": "Well?"}
        row = {"messages": [USER | {"weight": 0}, other, RIGHT]}
        [said] = shown(tmp_path, [row], tokenizer=tiny.byte_level(chat_template=template), loss_on="all")
        assert said == "<|im_start|>Is it 4?<|im_end|><|im_start|>LAST Well?<|im_end|>[4<|im_end|>]"


def template_of_trl(name: str, *marks: str) -> PreTrainedTokenizerBase:
    """A tokenizer with a chat template that TRL brings, and its marks, of which the last is EOS."""
    trl = pytest.importorskip("trl", reason="trl is not installed, which the extra dev brings")
    file = Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja"
    if not file.exists():
        pytest.skip(f"this trl has no {file.name}")
    tokenizer = tiny.byte_level(chat_template=file.read_text(encoding="utf-8"))
    tokenizer.add_tokens(list(marks), special_tokens=True)
    tokenizer.eos_token = marks[-1]
    return tokenizer


DEEPSEEK = ("<｜User｜>", "<｜Assistant｜>", "<think>", "<｜end▁of▁sentence｜>")
PHI = ("<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>")
QWEN = ("<|im_start|>", "<|im_end|>")


def test_a_thought_that_the_last_turn_alone_may_have(tmp_path: Path) -> None:
    """Qwen3 leaves it out of the turns before, in the content too, so writing it there is no way out."""
    thinks = RIGHT | {"reasoning_content": "Two."}
    message = refusal(tmp_path, {"messages": [USER, thinks, USER, thinks]}, tokenizer=qwen3())
    assert "message 2 has 'reasoning_content'" in message
    assert "renders it in the last turn alone; let a row end with this turn" in message
    rows = [{"messages": [USER, thinks]}, {"messages": [USER, RIGHT | {"weight": 0}, USER, thinks]}]
    assert all("[<think>\nTwo.\n</think>" in said for said in shown(tmp_path, rows, tokenizer=qwen3()))


@pytest.mark.parametrize("key", ["tools", "mask", "masked", "loss_mask"])
def test_keys_that_other_tools_give_a_meaning_are_named(tmp_path: Path, key: str) -> None:
    data = prepared(tmp_path, [{"messages": [USER, RIGHT | {key: 1}]}] * 2)
    assert f"{key!r} of a message is not read (2 rows" in " ".join(data.report.remarks)


ROWS_WITHOUT_ANSWER = {
    "messages": ({"messages": [USER, RIGHT | {"content": " "}]}, CHAT),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "Is it 4?"}, {"from": "gpt", "value": ""}]},
        CHAT,
    ),
    "alpaca": ({"instruction": "Is it 4?", "output": ""}, PLAIN),
    "completion": ({"prompt": "Is it 4?", "completion": ""}, PLAIN),
}


@pytest.mark.parametrize("format", ROWS_WITHOUT_ANSWER)
def test_an_empty_answer_and_its_end_are_not_learned_with_the_prompt(tmp_path: Path, format: str) -> None:
    row, tokenizer = ROWS_WITHOUT_ANSWER[format]
    [example] = prepared(tmp_path, [row], format, tokenizer, loss_on="all").train
    assert example.input_ids[-1] == tokenizer.eos_token_id
    assert not example.is_target[-1]
    assert example.is_target.sum() > 5, "the prompt is learned"


@pytest.mark.parametrize("system", [None, "", " \n"])
def test_a_system_column_without_text_is_no_message(tmp_path: Path, system: str | None) -> None:
    row = {"instruction": "Is it 4?", "output": "4"}
    rows = [row, row | {"system": system}]
    plain, given = shown(tmp_path, rows, "alpaca", tokenizer=PLAIN)
    assert given == plain


def test_a_history_of_something_else(tmp_path: Path) -> None:
    row = {"instruction": "Is it 4?", "output": "4", "history": [["Is it 3?", None]]}
    message = refusal(tmp_path, row, "alpaca", tokenizer=PLAIN)
    assert "'history' is a list of something else; it must be a list of pairs of texts" in message


class TestWhatATemplateAsksWith:
    @pytest.mark.parametrize("content", ["4", "<think>\nTwo and two.\n</think>\n\n4"])
    @pytest.mark.parametrize("more", [{}, {"reasoning_content": "Two and two."}])
    def test_and_does_not_render_is_named(self, tmp_path: Path, content: str, more: dict[str, str]) -> None:
        """R1's distilled models are asked with an open thought, which no turn of theirs has."""
        tokenizer = template_of_trl("deepseek_r1_distill", *DEEPSEEK)
        turn = {"role": "assistant", "content": content, **more}
        message = refusal(tmp_path, {"messages": [USER, turn]}, tokenizer=tokenizer)
        assert (
            "message 2: the tokenizer's chat template asks for an answer with '<｜Assistant｜><think>"
            in message
        )
        assert "and renders this assistant turn as '<｜Assistant｜>" in message
        assert "name another `template` in the source (alpaca, chatml, llama3)" in message
        assert "one assistant turn" not in message
        assert "reasoning" not in message

    def test_is_rendered_with_a_reasoning(self, tmp_path: Path) -> None:
        tokenizer = template_of_trl("nemotron_3_nano", *QWEN)
        message = refusal(tmp_path, {"messages": [USER, RIGHT]}, tokenizer=tokenizer)
        assert "; give the turn a `reasoning_content`, name another" in message
        row = {"messages": [USER, RIGHT | {"reasoning_content": "Two."}]}
        [said] = shown(tmp_path, [row], tokenizer=tokenizer)
        assert said.endswith("<think>\n[Two.\n</think>\n4<|im_end|>]")

    def test_is_rendered_without_a_reasoning(self, tmp_path: Path) -> None:
        tokenizer = template_of_trl("qwen3_5_nothink", *QWEN)
        row = {"messages": [USER, RIGHT | {"reasoning_content": "Two."}]}
        assert "; take its reasoning out, name another" in refusal(tmp_path, row, tokenizer=tokenizer)
        [said] = shown(tmp_path, [{"messages": [USER, RIGHT]}], tokenizer=tokenizer)
        assert said.endswith("<think>\n\n</think>\n\n[4<|im_end|>]")

    def test_other_turns_that_change_it_are_named(self, tmp_path: Path) -> None:
        """Also where one turn is the assistant's, and somebody speaks after it."""
        for turns in ([USER, RIGHT, USER, RIGHT], [USER, RIGHT, USER]):
            message = refusal(tmp_path, {"messages": turns}, tokenizer=qwen3())
            assert "let the conversation end with the turn that is learned, with `weight: 0`" in message
        followed = {"messages": [USER, RIGHT | {"weight": 0}, USER, RIGHT]}
        assert shown(tmp_path, [followed], tokenizer=qwen3())


class TestWhatIsAsked:
    """Inference asks what the template renders, whether or not training could tell the turns apart."""

    def asked(self, folder: Path, tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, Any]]) -> bool:
        path = tiny.write_jsonl(folder / "asked.jsonl", [{"messages": turns}])
        source = SourceSpec.model_validate(tiny.source(path, "messages"))
        [prompt] = read_prompts(path, source, tokenizer)
        whole = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        return list(prompt.ids) == list(whole)

    @pytest.mark.parametrize("name", ["qwen3", "qwen3_5_think", "qwen3_5_nothink"])
    def test_after_turns_that_read_otherwise_alone(self, tmp_path: Path, name: str) -> None:
        assert self.asked(tmp_path, template_of_trl(name, *QWEN), [USER, RIGHT, USER, WRONG, USER])

    @pytest.mark.parametrize("turns", [[USER], [USER, RIGHT, USER]])
    def test_of_a_model_that_thinks_first(self, tmp_path: Path, turns: list[dict[str, Any]]) -> None:
        assert self.asked(tmp_path, template_of_trl("nemotron_3_nano", *QWEN), turns)

    def test_of_a_template_that_asks_for_what_no_turn_has(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="asks for an answer with"):
            self.asked(tmp_path, template_of_trl("deepseek_r1_distill", *DEEPSEEK), [USER])


class TestAnEndOfTheWholeConversation:
    @pytest.mark.parametrize("name", ["phi3", "phi3_5"])
    def test_is_no_part_of_a_turn_before_it(self, tmp_path: Path, name: str) -> None:
        tokenizer = template_of_trl(name, *PHI)
        turns = [USER, RIGHT, USER, WRONG, USER]
        first = "<|user|>\nIs it 4?<|end|>\n<|assistant|>\n[4<|end|>\n]"
        second = first.replace("[4", "[It is 5.")[:-1]
        [one, two, three] = shown(tmp_path, [{"messages": turns[:n]} for n in (2, 4, 5)], tokenizer=tokenizer)
        assert one == first[:-1] + "<|endoftext|>]"
        assert two == first + second + "<|endoftext|>]"
        assert three == two, "what follows the last answer is not in an example"

    @pytest.mark.parametrize("begins", ["<|endo", "<", "<|end|>", ""])
    def test_however_the_next_message_begins(self, tmp_path: Path, begins: str) -> None:
        """It is cut where a token begins, not within one."""
        template = (
            "{% for m in messages %}{{ m.content }}{{ '<|end|>' if m.role == 'assistant' else '|' }}"
            "{% endfor %}{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"
        )
        tokenizer = template_of_trl("phi3", *PHI)
        tokenizer.chat_template = template
        turns = [USER, RIGHT, USER | {"content": f"{begins}Well?"}, RIGHT]
        [said] = shown(tmp_path, [{"messages": turns}], tokenizer=tokenizer)
        said = said.replace("{!", "").replace("!}", "")
        assert said == f"Is it 4?|[4<|end|>]{begins}Well?|[4<|end|><|endoftext|>]"

    def test_a_turn_that_is_written_anew_is_none(self, tmp_path: Path) -> None:
        """Qwen3's last turn has a thought that the first has not, and the same text after it."""
        row = {"messages": [USER, RIGHT, USER, RIGHT]}
        assert "differently" in refusal(tmp_path, row, tokenizer=qwen3())


def qwen3() -> PreTrainedTokenizerBase:
    utils = pytest.importorskip("trl.chat_template_utils", reason="trl is not installed, which dev brings")
    return tiny.byte_level(chat_template=utils.qwen3_chat_template)


class TestReasoning:
    def test_is_rendered_where_the_template_knows_it(self, tmp_path: Path) -> None:
        row = {"messages": [USER, RIGHT | {"reasoning_content": "Two and two."}]}
        tokenizer = qwen3()
        [said] = shown(tmp_path, [row], tokenizer=tokenizer)
        assert said == ASKED + "[<think>\nTwo and two.\n</think>\n\n4<|im_end|>]"
        whole = tokenizer.apply_chat_template(row["messages"], tokenize=False)
        assert said.replace("[", "").replace("]", "") == whole.rstrip("\n")

    @pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
    def test_is_refused_where_it_would_be_lost(self, tmp_path: Path, key: str) -> None:
        message = refusal(tmp_path, {"messages": [USER, RIGHT | {key: "4"}]})
        assert f"message 2 has {key!r}, and the tokenizer's chat template leaves it out" in message

    @pytest.mark.parametrize("key", ["thinking", "reasoning"])
    def test_under_another_key_is_given_to_the_template_by_transformers(
        self, tmp_path: Path, key: str
    ) -> None:
        tokenizer = tiny.byte_level(chat_template=THINKS)
        messages = [USER, RIGHT | {key: "Two."}]
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
        if "Two." not in whole:
            assert f"message 2 has {key!r}" in refusal(tmp_path, {"messages": messages}, tokenizer=tokenizer)
            return
        [said] = shown(tmp_path, [{"messages": messages}], tokenizer=tokenizer)
        assert said == ASKED + "[<think>Two.</think>4<|im_end|>]"

    def test_in_an_earlier_turn_that_the_template_forgets(self, tmp_path: Path) -> None:
        row = {"messages": [USER, RIGHT | {"reasoning_content": "Two."}, USER, RIGHT]}
        assert "message 2 has 'reasoning_content'" in refusal(tmp_path, row, tokenizer=qwen3())

    def test_is_content(self, tmp_path: Path) -> None:
        row = {"messages": [USER, {"role": "assistant", "content": "", "reasoning_content": "Two."}]}
        tokenizer = tiny.byte_level(chat_template=THINKS)
        assert shown(tmp_path, [row], tokenizer=tokenizer) == [ASKED + "[<think>Two.</think><|im_end|>]"]


class TestTools:
    @pytest.mark.parametrize("tools", [TOOLS, '[{"type": "function", "function": {"name": "tide"}}]'])
    @pytest.mark.parametrize("format", ["messages", "sharegpt"])
    def test_are_given_to_the_template(self, tmp_path: Path, format: str, tools: Any) -> None:
        row = in_format(format, USER, RIGHT) | {"tools": tools}
        tokenizer = tiny.byte_level(chat_template=WITH_TOOLS)
        [said] = shown(tmp_path, [row], format, tokenizer=tokenizer)
        assert said.startswith('[{"type": "function", "function": {"name": "tide"')
        assert said.endswith(ASKED + "[4<|im_end|>]")

    def test_are_in_a_prompt_too(self, tmp_path: Path) -> None:
        tokenizer = tiny.byte_level(chat_template=WITH_TOOLS)
        [trained] = prepared(tmp_path, [TOOLS_IN_ROW], tokenizer=tokenizer).train
        path = tmp_path / "train.jsonl"
        source = SourceSpec.model_validate(tiny.source(path, "messages"))
        [asked] = read_prompts(path, source, tokenizer)
        assert list(asked.ids) == trained.input_ids[~trained.is_target].tolist()

    @pytest.mark.parametrize("template", [None, *sorted(TEMPLATES)])
    def test_are_refused_where_the_template_has_no_place(self, tmp_path: Path, template: str | None) -> None:
        assert "does not render tools" in refusal(tmp_path, TOOLS_IN_ROW, template=template)

    @pytest.mark.parametrize("tools", ["tide", "{", {"name": "tide"}, ["tide"], 3])
    def test_are_a_list_of_functions(self, tmp_path: Path, tools: Any) -> None:
        assert "column 'tools' is" in refusal(tmp_path, {"tools": tools, "messages": [USER, RIGHT]})

    @pytest.mark.parametrize("none", [None, [], ""])
    def test_none(self, tmp_path: Path, none: Any) -> None:
        rows = [{"tools": none, "messages": [USER, RIGHT]}]
        assert shown(tmp_path, rows) == [ASKED + "[4<|im_end|>]"]


class TestAlpacasEarlierTurns:
    ROW: ClassVar = {"instruction": "Add.", "output": "4", "system": "Be kind.", "history": [["Hi", "Hello"]]}

    def test_in_its_own_text(self, tmp_path: Path) -> None:
        [said] = shown(tmp_path, [self.ROW], "alpaca", tokenizer=PLAIN)
        assert said == (
            "<s>Be kind.\n\n### Instruction:\nHi\n\n### Response:\n[Hello</s>]\n\n"
            "### Instruction:\nAdd.\n\n### Response:\n[4</s>]"
        )

    def test_in_a_chat_template(self, tmp_path: Path) -> None:
        [said] = shown(tmp_path, [self.ROW], "alpaca", template="tokenizer")
        messages = [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello"},
            {"role": "user", "content": "Add."},
            {"role": "assistant", "content": "4"},
        ]
        assert [said] == shown(tmp_path, [{"messages": messages}])

    def test_a_system_alone_and_an_input(self, tmp_path: Path) -> None:
        row = {"instruction": "Add.", "input": "2 2", "output": "4", "system": "Be kind."}
        [said] = shown(tmp_path, [row], "alpaca", tokenizer=PLAIN)
        expected = "<s>Be kind.\n\n### Instruction:\nAdd.\n\n### Input:\n2 2\n\n### Response:\n[4</s>]"
        assert said == expected

    @pytest.mark.parametrize("more", [{"system": "", "history": []}, {"system": None, "history": "[]"}])
    def test_none_of_them(self, tmp_path: Path, more: dict[str, Any]) -> None:
        row = {"instruction": "Add.", "output": "4"}
        plain = shown(tmp_path, [row], "alpaca", tokenizer=PLAIN)
        assert shown(tmp_path, [row | more], "alpaca", tokenizer=PLAIN) == plain

    @pytest.mark.parametrize("history", [["Hi"], [["Hi"]], [["Hi", 3]], {"Hi": "Hello"}, "Hi"])
    def test_history_is_pairs(self, tmp_path: Path, history: Any) -> None:
        assert "column 'history' is" in refusal(tmp_path, self.ROW | {"history": history}, "alpaca")

    def test_a_column_that_is_mapped_to_their_name_has_it(self, tmp_path: Path) -> None:
        row = {"system": "Add.", "output": "4"}
        columns = {"instruction": "system"}
        assert shown(tmp_path, [row], "alpaca", columns=columns) == shown(
            tmp_path, [{"instruction": "Add.", "output": "4"}], "alpaca"
        )


SKIPS = (
    "{% for m in messages %}{% if m.role in ('user', 'assistant') %}<|im_start|>{{ m.role }}\n"
    "{{ m.content | trim }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class TestMessagesThatATemplateLeavesOut:
    @pytest.mark.parametrize("role", ["tool", "developer", "system"])
    def test_are_refused(self, tmp_path: Path, role: str) -> None:
        """Though "4" stands in the question."""
        row = {"messages": [USER, RIGHT, {"role": role, "content": "4"}, RIGHT]}
        message = refusal(tmp_path, row, tokenizer=tiny.byte_level(chat_template=SKIPS))
        assert f"message 3: the tokenizer's chat template leaves out this message of role {role!r}" in message

    def test_trimmed_text_is_not_left_out(self, tmp_path: Path) -> None:
        row = {"messages": [{"role": "user", "content": "\n Hi \n"}, RIGHT]}
        [said] = shown(tmp_path, [row], tokenizer=tiny.byte_level(chat_template=SKIPS))
        assert said.startswith("<|im_start|>user\nHi<|im_end|>")

    def test_a_row_of_another_kind_was_rendered_whole_before(self, tmp_path: Path) -> None:
        tokenizer = tiny.byte_level(chat_template=SKIPS)
        rows = [{"messages": [USER, RIGHT]}, {"messages": [{"role": "tool", "content": "4"}, USER, RIGHT]}]
        with pytest.raises(DataError, match=r"train\.jsonl:2: message 1: .* leaves out this message"):
            prepared(tmp_path, rows, tokenizer=tokenizer)

    @pytest.mark.parametrize("name", ["qwen3", "phi3", "llama3", "qwen2_5"])
    @pytest.mark.parametrize("role", ["tool", "developer", "system"])
    def test_in_templates_of_models(self, tmp_path: Path, name: str, role: str) -> None:
        """Refused if and only if a word that stands nowhere else is not rendered."""
        utils = pytest.importorskip("trl.chat_template_utils", reason="trl is not installed")
        tokenizer = tiny.byte_level(chat_template=getattr(utils, f"{name}_chat_template"))
        messages = [{"role": role, "content": "xyzzy"}, USER, RIGHT]
        is_rendered = "xyzzy" in tokenizer.apply_chat_template(messages, tokenize=False)
        if is_rendered:
            assert len(prepared(tmp_path, [{"messages": messages}], tokenizer=tokenizer).train) == 1
        else:
            assert "leaves out" in refusal(tmp_path, {"messages": messages}, tokenizer=tokenizer)


class TestEmptyAnswers:
    @pytest.mark.parametrize("nothing", ["", " ", "\n\t", "<|im_end|>", " <|im_end|>"])
    @pytest.mark.parametrize(
        ("format", "template"),
        [
            (f, t)
            for f in ("messages", "sharegpt", "alpaca")
            for t in ("tokenizer", "chatml", "llama3", "alpaca")
        ],
    )
    def test_alone_are_left_out(self, tmp_path: Path, format: str, template: str, nothing: str) -> None:
        rows = [
            {"instruction": "Is it 4?", "output": said}
            if format == "alpaca"
            else in_format(format, USER, {"role": "assistant", "content": said})
            for said in (nothing, "4")
        ]
        data = prepared(tmp_path, rows, format, template=template)
        assert (data.report.train.empty, len(data.train)) == (1, 1)
        assert data.report.left_out(512) == [
            "1 train rows are left out: no answer to learn (none, empty, or weight 0)"
        ]

    @pytest.mark.parametrize("format", ["messages", "sharegpt"])
    def test_among_others_are_not_learned(self, tmp_path: Path, format: str) -> None:
        row = in_format(format, USER, {"role": "assistant", "content": " "}, USER, RIGHT)
        assert shown(tmp_path, [row] * 2, format)[0] == ASKED + " <|im_end|>\n" + ASKED + "[4<|im_end|>]"
        [said] = prepared(tmp_path, [row] * 2, format).report.left_out(512)
        place = tmp_path / "train.jsonl"
        assert said == f"an empty assistant turn among others is not learned (2 rows, first {place}:1)"

    def test_of_a_template_without_eos(self, tmp_path: Path) -> None:
        tokenizer = tiny.byte_level(chat_template=tiny.CHATML.replace("<|im_end|>", "<end>"))
        rows = [{"messages": [USER, {"role": "assistant", "content": said}]} for said in ("", "4")]
        assert prepared(tmp_path, rows, tokenizer=tokenizer).report.train.empty == 1


class TestRoles:
    @pytest.mark.parametrize(
        ("human", "model"), [("human", "gpt"), ("User", "Assistant"), ("HUMAN", "model"), ("user", "bot")]
    )
    def test_of_other_tools_are_read_and_said_once(self, tmp_path: Path, human: str, model: str) -> None:
        row = {"messages": [USER | {"role": human}, RIGHT | {"role": model}]}
        assert shown(tmp_path, [row] * 3) == [ASKED + "[4<|im_end|>]"] * 3
        said = prepared(tmp_path, [row] * 3).report.left_out(512)
        renamed = [(name, role) for name, role in ((human, "user"), (model, "assistant")) if name != role]
        assert sorted(said) == sorted(
            f"the role {name!r} is read as {role} (3 rows, first {tmp_path}/train.jsonl:1)"
            for name, role in renamed
        )

    def test_that_nobody_knows_are_named(self, tmp_path: Path) -> None:
        message = refusal(tmp_path, {"messages": [USER, RIGHT | {"role": "narrator"}]})
        assert "message 2 has the role 'narrator', which is not known; roles are system, " in message
        assert "gpt" in message
        assert "`columns: {messages: ...}`" in message
        assert "`format: sharegpt`" in message

    def test_rows_of_sharegpt_are_told_so(self, tmp_path: Path) -> None:
        row = {"messages": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}
        assert "write `format: sharegpt`" in refusal(tmp_path, row)


class TestWhatIsNotRead:
    def test_keys_and_columns_are_named_once_with_their_count(self, tmp_path: Path) -> None:
        named = {"messages": [USER | {"name": "Ann"}, RIGHT], "images": ["a.png"], "id": 7, "history": []}
        rows: list[dict[str, Any]] = [named, named]
        rows += [{"messages": [USER, RIGHT]}, {"messages": [USER, RIGHT], "system": "Be kind."}]
        place = f"{tmp_path}/train.jsonl"
        assert sorted(prepared(tmp_path, rows).report.left_out(512)) == [
            f"'name' of a message is not read (2 rows, first {place}:1)",
            f"format messages does not read the column 'images' (2 rows, first {place}:1)",
            f"format messages does not read the column 'system' (1 row, first {place}:4)",
        ]

    def test_in_parquet_too(self, tmp_path: Path) -> None:
        import pyarrow
        from pyarrow import parquet

        rows = [{"prompt": f"a{n}", "completion": "b", "system": "Be kind.", "more": "x"} for n in range(40)]
        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
        train = [tiny.source(tmp_path / "a.parquet", "completion")]
        said = tiny.prepared(PLAIN, train=train, eval_fraction=0.5, cache=tmp_path / "cache")
        again = tiny.prepared(PLAIN, train=train, eval_fraction=0.5, cache=tmp_path / "cache")
        assert again.report == said.report
        assert said.report.remarks == (
            f"format completion does not read the column 'system' (40 rows, first "
            f"{tmp_path}/a.parquet: row 1)",
        )

    def test_a_user_is_not_learned_from(self, tmp_path: Path) -> None:
        row = {"messages": [USER | {"train": True}, RIGHT]}
        [said] = prepared(tmp_path, [row]).report.left_out(512)
        assert said.startswith("'train' on a turn of user is not read: the assistant's are learned (1 row")
