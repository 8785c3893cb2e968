"""What goes along with an export: the template of training, and the licences that are stated."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.data.tiny import CHATML, byte_level
from tuner.config import SourceSpec
from tuner.data import render_prompt
from tuner.data.preview import stated_licence
from tuner.data.prompts import chat_template_of


def source(format: str, template: str | None = None) -> SourceSpec:
    return SourceSpec.model_validate({"path": "x.jsonl", "format": format, "template": template})


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize(
    ("format", "template"),
    [("alpaca", None), ("alpaca", "chatml"), ("messages", "llama3"), ("sharegpt", "alpaca")],
)
def test_a_chat_renders_the_prompt_of_training(format: str, template: str | None, bos: bool) -> None:
    tokenizer = byte_level(bos=bos, chat_template=CHATML)
    expected = render_prompt(format, tokenizer, instruction="Name a river.", template=template).ids
    chat = chat_template_of([source(format, template)] * 2, tokenizer)
    assert chat is not None
    tokenizer.chat_template = chat
    asked = [{"role": "user", "content": "Name a river."}]
    assert (
        tuple(tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)) == expected
    )
    assert (expected[0] == tokenizer.bos_token_id) == bos


@pytest.mark.parametrize(
    "sources",
    [
        [source("messages")],
        [source("alpaca", "tokenizer")],
        [source("completion")],
        [source("text")],
        [source("alpaca"), source("messages")],
    ],
    ids=lambda sources: "+".join(each.format for each in sources),
)
def test_no_template_that_all_rows_share(sources: list[SourceSpec]) -> None:
    assert chat_template_of(sources, byte_level(chat_template=CHATML)) is None


COMMIT = "a" * 40


def test_licences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a directory's card, or of a card in the local cache of the Hub."""
    assert stated_licence(str(tmp_path), kind="model") is None
    for text, licence in (
        ("---\nlicense: mit\n---\n# A model\n", "mit"),
        ("---\ntags: [x]\n---\n", None),
        ("# no front matter\n", None),
        ("---\nlicense: [\n---\n", None),
    ):
        (tmp_path / "README.md").write_text(text)
        assert stated_licence(str(tmp_path), kind="model") == licence
    for kind in ("model", "dataset"):
        repository = tmp_path / f"{kind}s--someone--thing"
        (repository / "snapshots" / COMMIT).mkdir(parents=True)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(COMMIT)
        card = repository / "snapshots" / COMMIT / "README.md"
        card.write_text(f"---\nlicense: of-a-{kind}\n---\n")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert stated_licence("someone/thing", kind="model") == "of-a-model"
    assert stated_licence("someone/thing", kind="dataset") == "of-a-dataset"
    for unknown in ("nobody/has-this-one", "https://host/rows.jsonl", "not an id"):
        assert stated_licence(unknown, kind="dataset") is None
