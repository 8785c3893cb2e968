from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from tests.data import tiny
from tuner.data import load_tokenizer, reachable
from tuner.errors import ModelError
from tuner.spec import ModelSpec


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


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    assert refusal(tmp_path / "no") == f"{tmp_path / 'no'}: there is no such directory"
    assert "the directory has no tokenizer.json" in refusal(tmp_path)
    (tmp_path / "model.gguf").write_bytes(b"no")
    assert "give the model's directory as path" in refusal(tmp_path / "model.gguf")
    assert "GGUF files there: model.gguf" in refusal(tmp_path, gguf_file="other.gguf")
    assert "the tokenizer cannot be loaded" in refusal(tmp_path, gguf_file="model.gguf")


def test_a_damaged_tokenizer_is_refused(tmp_path: Path) -> None:
    tiny.byte_level().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    assert "the tokenizer cannot be loaded" in refusal(tmp_path)


def test_a_name_that_the_hub_cannot_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "is not in the local Hub cache" in refusal("nobody/no-such-model-anywhere")


def test_without_a_network_the_hub_is_not_asked_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its client would try for 47 seconds."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "https://hub.invalid")
    monkeypatch.setattr(reachable, "_PAUSES_SECONDS", (0.0, 0.0))
    for proxy in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(proxy, raising=False)
        monkeypatch.delenv(proxy.upper(), raising=False)
    begun = time.monotonic()
    assert "is not in the local Hub cache" in refusal("nobody/no-such-model-anywhere")
    assert time.monotonic() - begun < 20
    assert reachable.where_to_look("nobody/no-such-model-anywhere") == {"local_files_only": True}


def test_the_hub_is_asked_where_it_may_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert reachable.can_be_resolved("http://localhost:9999")
    assert reachable.where_to_look(str(tmp_path)) == {}
    monkeypatch.setenv("https_proxy", "http://localhost:1")
    assert reachable.can_be_resolved("https://behind-a-proxy.invalid")


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
