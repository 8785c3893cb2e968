"""Small files of rows that go wrong elsewhere: what `study check` says of each."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from tests.cli.test_data_formats import with_data
from tests.studies import QUICKSTART, Done, tuner

ROWS = Path(__file__).parents[3] / "shared" / "data" / "rows"
TEMPLATE = (
    "{% for m in messages %}{% if m.role in ('user', 'assistant', 'system') %}{{ '<s>' + m.role + '\n' }}"
    "{% if m.reasoning_content %}{{ '<think>' + m.reasoning_content + '</think>' }}{% endif %}"
    "{{ m.content + '</s>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)


def base_with(directory: Path, *, template: str | None = None, tokens: tuple[str, ...] = ()) -> Path:
    """The quickstart's base with another template, or with tokens that its embedding lacks."""
    base = directory / "base"
    shutil.copytree(QUICKSTART / "base", base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(list(tokens), special_tokens=True)
    tokenizer.chat_template = template or tokenizer.chat_template
    tokenizer.save_pretrained(base)
    return base


def checked(directory: Path, name: str, *options: str, base: Path | None = None) -> Done:
    """`study check` of a round that trains on a shared file."""
    if not (ROWS / name).exists():
        pytest.skip(f"{ROWS / name} is not here")
    return checked_file(directory, ROWS / name, *options, base=base)


def checked_file(directory: Path, file: Path, *options: str, base: Path | None = None) -> Done:
    held_out = directory / "held-out.jsonl"
    held_out.write_text('{"text": "Something else."}\n')
    path = with_data(directory, f"{{path: {file}, format: messages}}", f"{{path: {held_out}, format: text}}")
    text = path.read_text().replace("max_length: 64", "max_length: 512\n  allow_overlap: true")
    path.write_text(text.replace(str(QUICKSTART / "base"), str(base)) if base else text)
    return tuner("study", "check", "round1.yaml", *options, directory=directory)


def rows_of(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (ROWS / name).read_text().splitlines()]


def test_reasoning(tmp_path: Path) -> None:
    refused = checked(tmp_path, "reasoning_content.jsonl")
    assert refused.returncode == 2
    assert "reasoning_content.jsonl:1: message 2 has 'reasoning_content'" in refused.stderr
    done = checked(
        tmp_path, "reasoning_content.jsonl", "--show", "1", base=base_with(tmp_path, template=TEMPLATE)
    )
    assert done.returncode == 0, done.stderr
    assert "[[<think>Add 0 to 0.</think>0.</s>]]" in done.stdout


def test_weights(tmp_path: Path) -> None:
    done = checked(tmp_path, "message_weight.jsonl", "--show", "1")
    assert done.returncode == 0, done.stderr
    assert "It is 0, I guess." in done.stdout
    learned = [piece.partition("]]")[0] for piece in done.stdout.split("[[")[1:]]
    assert learned == ["No, 0.</s>"]


def test_tools(tmp_path: Path) -> None:
    refused = checked(tmp_path, "tools_column.jsonl")
    assert refused.returncode == 2
    assert "tools_column.jsonl:1: the tokenizer's chat template does not render tools" in refused.stderr
    with_tools = "{% if tools %}{{ tools | tojson }}{% endif %}" + TEMPLATE
    base = base_with(tmp_path, template=with_tools)
    done = checked(tmp_path, "tools_column.jsonl", "--show", "1", base=base)
    assert done.returncode == 0, done.stderr
    assert "Tide table of a harbour" in done.stdout


def test_a_role_that_the_template_leaves_out(tmp_path: Path) -> None:
    refused = checked(tmp_path, "tool_role.jsonl", base=base_with(tmp_path, template=TEMPLATE))
    assert refused.returncode == 2
    assert "tool_role.jsonl:1: message 3: the tokenizer's chat template leaves out" in refused.stderr


def test_empty_answers(tmp_path: Path) -> None:
    done = checked(tmp_path, "empty_answer.jsonl", "--json")
    assert done.returncode == 0, done.stderr
    answers = [row["messages"][-1]["content"].strip() for row in rows_of("empty_answer.jsonl")]
    assert 0 < answers.count("") < len(answers)
    assert (
        f"{answers.count('')} train rows are left out: no answer to learn (none, empty, or weight 0)"
        in done.stdout
    )


def test_role_names(tmp_path: Path) -> None:
    done = checked(tmp_path, "role_names.jsonl", "--json")
    assert done.returncode == 0, done.stderr
    count = len(rows_of("role_names.jsonl"))
    for name, role in (("User", "user"), ("Assistant", "assistant")):
        assert f"the role '{name}' is read as {role} ({count} rows, first" in done.stdout


def test_tokens_that_the_embedding_lacks(tmp_path: Path) -> None:
    base = base_with(tmp_path, tokens=("harbour_town", "<|tool|>"))
    size = json.loads((base / "config.json").read_text())["vocab_size"]
    refused = checked(tmp_path, "added_tokens.jsonl", base=base)
    assert refused.returncode == 2, refused.stdout
    assert "added_tokens.jsonl:1: has the token " in refused.stderr
    assert f"embeddings for {size} tokens" in refused.stderr
    as_json = json.loads(checked(tmp_path, "added_tokens.jsonl", "--json", base=base).stdout)
    assert "added_tokens.jsonl:1: has the token " in json.dumps(as_json)


def test_the_row_with_a_token_that_the_embedding_lacks(tmp_path: Path) -> None:
    """Also where a run looks, before anything is recorded."""
    base = base_with(tmp_path, tokens=("harbour_town",))
    rows = [f"in {town} {n}" for n, town in enumerate(["town", "town", "harbour_town"])]
    turns = [[{"role": "user", "content": row}, {"role": "assistant", "content": "Yes."}] for row in rows]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in turns))
    refused = checked_file(tmp_path, file, base=base)
    assert refused.returncode == 2
    assert "rows.jsonl:3: has the token 'harbour_town'" in " ".join(refused.stderr.split())
    run = tuner("study", "run", "round1.yaml", directory=tmp_path)
    assert run.returncode == 2
    assert "rows.jsonl:3: has the token 'harbour_town'" in " ".join(run.stderr.split())


def test_special_tokens_of_a_row_are_marked(tmp_path: Path) -> None:
    """Those of the template are not, and the answer's end neither."""
    texts = [("Is it?", "It is."), ("What is </s> for?", "It ends."), ("And <s>?", "</s> no.")]
    turns = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in texts]
    file = tmp_path / "special.jsonl"
    file.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in turns))
    base = base_with(tmp_path, template=TEMPLATE)
    done = checked_file(tmp_path, file, "--show", "3", base=base)
    assert done.returncode == 0, done.stderr
    assert "What is {!</s>!} for?</s>" in done.stdout
    assert "[[{!</s>!} no.</s>]]" in done.stdout
    assert done.stdout.count("{!<") == 3
    assert "(2 special tokens written in the row itself: {!...!})" in done.stdout
    as_json = json.loads(checked_file(tmp_path, file, "--json", base=base).stdout)
    [remark] = [remark for remark in as_json["remarks"] if "'</s>'" in remark]
    assert "(2 rows, first " in remark
    assert "special.jsonl:2)" in remark
