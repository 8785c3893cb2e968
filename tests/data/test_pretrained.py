from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import errors
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase

from tests.data import tiny
from tests.studies import hub_cache, round_file
from tuner.adapters.base import load_config
from tuner.config import ModelSpec
from tuner.data import load_tokenizer, pretrained
from tuner.data.pretrained import as_trained, hub_advice, loaded_commit
from tuner.errors import ModelError


def refusal(path: Path | str, **more: Any) -> str:
    with pytest.raises(ModelError) as caught:
        load_tokenizer(ModelSpec(path=str(path), **more))
    return str(caught.value)


def test_a_directory_gives_the_tokenizer_that_was_saved(tmp_path: Path) -> None:
    saved = tiny.byte_level(bos=True, chat_template=tiny.CHATML)
    saved.save_pretrained(tmp_path)
    loaded = load_tokenizer(ModelSpec(path=str(tmp_path)))
    assert loaded("Name three.").input_ids == saved("Name three.").input_ids
    assert loaded.eos_token == "<|im_end|>"
    assert loaded.pad_token is None
    assert loaded.chat_template == tiny.CHATML


def test_without_eos_nothing_could_end(tmp_path: Path) -> None:
    tiny.byte_level().save_pretrained(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    without = {key: value for key, value in json.loads(config.read_text()).items() if key != "eos_token"}
    config.write_text(json.dumps(without))
    assert "has no EOS token" in refusal(tmp_path)


def test_a_slow_tokenizer_is_refused(tmp_path: Path) -> None:
    ByT5Tokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    assert "has only a slow tokenizer; tuner requires a fast one" in refusal(tmp_path)


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    assert refusal(tmp_path / "no") == f"{tmp_path / 'no'}: there is no such directory"
    assert "the directory has no tokenizer.json" in refusal(tmp_path)
    (tmp_path / "model.gguf").write_bytes(b"no")
    assert "set path to the model's directory" in refusal(tmp_path / "model.gguf")
    assert "GGUF files there: model.gguf" in refusal(tmp_path, gguf_file="other.gguf")
    assert "the tokenizer cannot be loaded" in refusal(tmp_path, gguf_file="model.gguf")


def test_a_damaged_tokenizer_is_refused(tmp_path: Path) -> None:
    tiny.byte_level().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    assert "the tokenizer cannot be loaded" in refusal(tmp_path)


def test_a_name_that_the_hub_cannot_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "is not in the local Hub cache" in refusal("nobody/no-such-model-anywhere")


@pytest.mark.usefixtures("no_hub")
def test_without_a_network_the_hub_is_not_asked_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its client would try for 47 seconds."""
    pauses: list[float] = []
    monkeypatch.setattr("time.sleep", pauses.append)
    assert "is not in the local Hub cache" in refusal("nobody/no-such-model-anywhere")
    assert sum(pauses) == 0
    assert pretrained.where_to_look("nobody/no-such-model-anywhere") == {"local_files_only": True}


def test_the_hub_is_asked_where_it_may_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert pretrained.can_be_resolved("http://localhost:9999")
    assert pretrained.where_to_look(str(tmp_path)) == {}
    monkeypatch.setenv("https_proxy", "http://localhost:1")
    assert pretrained.can_be_resolved("https://behind-a-proxy.invalid")


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (errors.GatedRepoError, "is gated: request access on its page on the Hub, then log in with `hf auth"),
        (errors.RepositoryNotFoundError, "nor a repository on the Hub that you can see; check the name"),
        (errors.RevisionNotFoundError, "has no revision v9"),
    ],
)
def test_what_the_hub_refuses_says_what_to_do(kind: type[errors.HfHubHTTPError], words: str) -> None:
    """The Hub's own error is the cause of what transformers raises."""
    refused = OSError("401 Client Error")
    refused.__cause__ = kind.__new__(kind)  # without a response, which only their texts need
    advice = hub_advice(ModelSpec(path="someone/model", revision="v9"), refused)
    assert advice is not None
    assert words in advice
    assert hub_advice(ModelSpec(path="someone/model"), OSError("disk")) is None


COMMITS = ("a" * 40, "b" * 40)


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository in the local cache of a Hub that cannot be reached."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return hub_cache(tmp_path / "hub", commit=COMMITS[0])


def test_a_model_of_the_hub_is_used_offline_and_found_again_when_its_branch_has_moved(
    cached: Path, tmp_path: Path
) -> None:
    model = ModelSpec(path="quickstart/base")
    assert load_tokenizer(model).eos_token == "</s>"
    assert load_config(model, max_length=8).vocab_size == 1024
    assert loaded_commit(model) == COMMITS[0]
    (tmp_path / "adapter_config.json").write_text(json.dumps({"revision": COMMITS[0]}))
    (cached / "refs" / "main").write_text(COMMITS[1])
    for load in (load_tokenizer, lambda each: load_config(each, max_length=8)):
        with pytest.raises(ModelError, match="is not in the local Hub cache, and the Hub cannot be reached"):
            load(model)
    trained_on = as_trained(round_file(tmp_path, base=model.path).spec, tmp_path).model
    assert load_config(trained_on, max_length=8).vocab_size == 1024
    assert load_tokenizer(trained_on).eos_token == "</s>"


@pytest.mark.parametrize("config", ['{"revision": null}', "{", None])
def test_a_model_without_a_commit_is_as_the_file_says(tmp_path: Path, config: str | None) -> None:
    if config is not None:
        (tmp_path / "adapter_config.json").write_text(config)
    spec = round_file(tmp_path, base=f"{tmp_path}, revision: v1").spec
    assert as_trained(spec, tmp_path) == spec
    assert loaded_commit(spec.model) is None


def test_a_gguf_file_brings_its_tokenizer(tmp_path: Path) -> None:
    tokenizer = tiny.byte_level(chat_template=tiny.CHATML)
    write_gguf(tmp_path / "model.gguf", tokenizer)
    loaded = load_tokenizer(ModelSpec(path=str(tmp_path), gguf_file="model.gguf"))
    text = "Name three colours.<|im_end|>"
    assert loaded(text).input_ids == tokenizer(text).input_ids
    assert loaded.eos_token_id == tokenizer.eos_token_id
    assert loaded.chat_template == tiny.CHATML


def write_gguf(path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    special = set(tokenizer.added_tokens_decoder)
    kinds = [
        gguf.TokenType.CONTROL if number in special else gguf.TokenType.NORMAL
        for number in range(len(tokens))
    ]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(8)
    writer.add_block_count(1)
    writer.add_feed_forward_length(16)
    writer.add_head_count(1)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_chat_template(tokenizer.chat_template)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
