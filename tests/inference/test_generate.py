"""An answer is what transformers and PEFT alone would say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tests import tiny
from tuner.errors import InputError, ModelError
from tuner.inference import generate

PROMPT = "Name three colours."
MAX_NEW_TOKENS = 12


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tiny.Models:
    return tiny.Models(tmp_path_factory.mktemp("models"))


def adapter_of(models: tiny.Models, shape: tiny.Shape, directory: Path) -> Path:
    """An adapter with a B that is not zero: a large part of what the model says."""
    targets = ["c_attn", "c_fc"] if shape == "gpt2" else ["q_proj", "down_proj"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        wrapped = get_peft_model(
            models.plain(shape), LoraConfig(r=4, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM")
        )
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.5)
    wrapped.save_pretrained(str(directory))
    return directory


def by_transformers(
    models: tiny.Models, shape: tiny.Shape, tokenizer: PreTrainedTokenizerBase, adapter: Path | None
) -> str:
    model = models.plain(shape)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter)).eval()
    ids = tokenizer(PROMPT, return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=MAX_NEW_TOKENS, do_sample=False, pad_token_id=0)
    return str(tokenizer.decode(out[0, ids.input_ids.shape[1] :], skip_special_tokens=True)).strip()


@pytest.mark.parametrize("shape", ["llama", "gpt2"])
def test_greedy_answers_equal_those_of_transformers_and_peft(
    models: tiny.Models, shape: tiny.Shape, tmp_path: Path
) -> None:
    spec = tiny.model_spec(models.path(shape))
    tokenizer = AutoTokenizer.from_pretrained(models.path(shape))
    adapter = adapter_of(models, shape, tmp_path / "adapter")
    answers = {}
    for directory in (None, adapter):
        answers[directory] = generate(
            spec, tokenizer, tokenizer(PROMPT).input_ids, adapter=directory, max_new_tokens=MAX_NEW_TOKENS
        )
        assert answers[directory] == by_transformers(models, shape, tokenizer, directory)
    assert answers[adapter]
    assert answers[adapter] != answers[None]


def test_an_answer_ends_at_the_end_of_text(models: tiny.Models) -> None:
    """The first token that the model says is taken for the tokenizer's end of text."""
    spec = tiny.model_spec(models.path("llama"))
    tokenizer = AutoTokenizer.from_pretrained(models.path("llama"))
    ids = tokenizer(PROMPT).input_ids
    with torch.no_grad():
        first = int(models.plain("llama")(torch.tensor([ids])).logits[0, -1].argmax())
    whole = generate(spec, tokenizer, ids, adapter=None, max_new_tokens=MAX_NEW_TOKENS)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(first)
    ended = generate(spec, tokenizer, ids, adapter=None, max_new_tokens=MAX_NEW_TOKENS)
    assert ended == str(tokenizer.decode([first])).strip()
    assert len(ended) < len(whole)


def test_no_more_tokens_than_asked_for(models: tiny.Models) -> None:
    spec = tiny.model_spec(models.path("llama"))
    tokenizer = AutoTokenizer.from_pretrained(models.path("llama"))
    ids = tokenizer(PROMPT).input_ids
    longer, shorter = (
        generate(spec, tokenizer, ids, adapter=None, max_new_tokens=number) for number in (MAX_NEW_TOKENS, 3)
    )
    assert longer.startswith(shorter.rstrip("\N{REPLACEMENT CHARACTER}"))
    assert len(shorter) < len(longer)


def test_a_model_that_is_not_there(tmp_path: Path, models: tiny.Models) -> None:
    tokenizer = AutoTokenizer.from_pretrained(models.path("llama"))
    with pytest.raises(ModelError, match="no-model"):
        generate(tiny.model_spec(tmp_path / "no-model"), tokenizer, [1, 2], adapter=None, max_new_tokens=1)


def test_an_answer_ends_at_the_last_position(models: tiny.Models) -> None:
    """And a prompt that leaves none is refused: this model has 64."""
    spec, tokenizer = tiny.model_spec(models.path("gpt2")), AutoTokenizer.from_pretrained(models.path("gpt2"))
    assert generate(spec, tokenizer, [5] * 60, adapter=None, max_new_tokens=500)
    with pytest.raises(InputError, match=r"--prompt: it has 64 tokens .* has 64 positions"):
        generate(spec, tokenizer, [5] * 64, adapter=None, max_new_tokens=500)
