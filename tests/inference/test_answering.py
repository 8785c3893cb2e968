"""An answer is what transformers and PEFT alone would say, alone or beside others."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from tests import tiny
from tuner.data import Prompt
from tuner.errors import DataError, InputError, ModelError, TunerError
from tuner.inference import Answerer, Decoding

PROMPT = "Name three colours."
MAX_NEW_TOKENS = 12
GREEDY = Decoding(MAX_NEW_TOKENS)
DRAWN = Decoding(MAX_NEW_TOKENS, temperature=1.0, top_k=50, top_p=0.95)


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


def prompt(ids: Sequence[int], row: int = 1) -> Prompt:
    return Prompt(row, f"rows.jsonl:{row}", "", tuple(ids))


def by_transformers(
    models: tiny.Models, shape: tiny.Shape, tokenizer: PreTrainedTokenizerBase, adapter: Path | None
) -> str:
    model = models.plain(shape)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter)).eval()
    ids = tokenizer(PROMPT, return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=MAX_NEW_TOKENS, do_sample=False, pad_token_id=0)
    return str(tokenizer.decode(out[0, ids.input_ids.shape[1] :], skip_special_tokens=True)).strip()


def answerer(models: tiny.Models, shape: tiny.Shape, adapter: Path | None = None) -> Answerer:
    path = models.path(shape)
    return Answerer(tiny.model_spec(path), AutoTokenizer.from_pretrained(path), adapter=adapter)


def said(answering: Answerer, prompts: Sequence[Prompt], decoding: Decoding, **more: bool) -> list[str]:
    return [generated.text for generated in answering.answers(prompts, decoding, **more)]


@pytest.mark.parametrize("shape", ["llama", "gpt2"])
def test_greedy_answers_equal_those_of_transformers_and_peft(
    models: tiny.Models, shape: tiny.Shape, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(models.path(shape))
    adapter = adapter_of(models, shape, tmp_path / "adapter")
    asked = [prompt(tokenizer(PROMPT).input_ids)]
    expected = {each: by_transformers(models, shape, tokenizer, each) for each in (None, adapter)}
    both = answerer(models, shape, adapter)
    assert said(both, asked, GREEDY) == [expected[adapter]]
    assert said(both, asked, GREEDY, of_base=True) == [expected[None]]
    assert said(answerer(models, shape), asked, GREEDY) == [expected[None]]
    assert expected[adapter]
    assert expected[adapter] != expected[None]


@pytest.mark.parametrize("shape", tiny.SHAPES)
@pytest.mark.parametrize("decoding", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_an_answer_does_not_depend_on_what_is_beside_it(
    models: tiny.Models, shape: tiny.Shape, decoding: Decoding, tmp_path: Path
) -> None:
    """Rows of 1 to 34 tokens, so padded by up to 33; gemma2 attends to the last 16 positions."""
    rng = np.random.default_rng(0)
    asked = [prompt(rng.integers(2, 300, size=1 + 3 * row).tolist(), row) for row in range(12)]
    answering = answerer(models, shape, adapter_of(models, shape, tmp_path / "adapter"))
    alone = [said(answering, [each], decoding)[0] for each in asked]
    assert said(answering, asked, decoding) == alone
    assert said(answering, asked[::-2], decoding) == alone[::-2]
    assert len(set(alone)) > len(alone) // 2


def test_an_answer_is_said_as_it_grows(models: tiny.Models) -> None:
    answering = answerer(models, "llama")
    tokenizer = AutoTokenizer.from_pretrained(models.path("llama"))
    asked = [prompt(tokenizer(PROMPT).input_ids)]
    heard: list[str] = []
    [generated] = answering.answers(asked, GREEDY, say=heard.append)
    assert [generated.text] == said(answering, asked, GREEDY)
    assert "".join(heard).strip() == generated.text
    assert len(heard) > 4


def test_an_answer_ends_at_the_end_of_text(models: tiny.Models, tmp_path: Path) -> None:
    """The third token that the model says is taken for it, by the tokenizer or by the model's own files."""
    spec = tiny.model_spec(models.path("llama"))
    tokenizer = AutoTokenizer.from_pretrained(models.path("llama"))
    asked = [prompt(ids) for ids in (tokenizer(PROMPT).input_ids, tokenizer("Count.").input_ids)]
    whole = said(Answerer(spec, tokenizer), asked, GREEDY)
    with torch.no_grad():
        third = models.plain("llama").generate(
            torch.tensor([asked[0].ids]), max_new_tokens=3, do_sample=False, pad_token_id=0
        )[0, -3:]
    made = tiny.save_model(tmp_path / "model", tiny.config("llama"))
    GenerationConfig(eos_token_id=[1, int(third[-1])]).save_pretrained(made)
    by_the_models_files = Answerer(tiny.model_spec(made), tokenizer).answers(asked, GREEDY)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(int(third[-1]))
    for ended in (Answerer(spec, tokenizer).answers(asked, GREEDY), by_the_models_files):
        assert ended[0].num_tokens == int((third == third[-1]).nonzero()[0, 0])
        assert whole[0].startswith(ended[0].text)
        assert len(ended[0].text) < len(whole[0])


def test_what_the_models_files_say_of_sampling_is_not_asked_for(models: tiny.Models, tmp_path: Path) -> None:
    made = tiny.save_model(tmp_path / "model", tiny.config("llama"))
    GenerationConfig(
        do_sample=True, temperature=5.0, repetition_penalty=9.0, eos_token_id=[1, 2], max_length=4
    ).save_pretrained(made)
    answering = Answerer(tiny.model_spec(made), AutoTokenizer.from_pretrained(made))
    asked = [prompt([5, 6, 7])]
    assert said(answering, asked, GREEDY) == said(answerer(models, "llama"), asked, GREEDY)


def test_no_more_tokens_than_asked_for(models: tiny.Models) -> None:
    asked = [prompt([5, 6, 7])]
    [generated] = answerer(models, "llama").answers(asked, Decoding(3))
    assert generated.num_tokens == 3


def test_a_model_that_is_not_there(tmp_path: Path, models: tiny.Models) -> None:
    tokenizer = AutoTokenizer.from_pretrained(models.path("llama"))
    with pytest.raises(ModelError, match="no-model"):
        Answerer(tiny.model_spec(tmp_path / "no-model"), tokenizer)


def test_an_answer_ends_at_the_last_position(models: tiny.Models) -> None:
    """And a prompt that leaves none is refused: this model has 64."""
    answering = answerer(models, "gpt2")
    [generated] = answering.answers([prompt([5] * 60)], Decoding(500))
    assert generated.num_tokens == 4
    assert answering.new_tokens(prompt([5] * 60), 500) == 4
    assert answering.new_tokens(prompt([5] * 60), 2) == 2
    with pytest.raises(InputError, match=r"rows.jsonl:7: it has 64 tokens .* has 64 positions"):
        answering.new_tokens(prompt([5] * 64, 7), 500)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError(), RuntimeError("CUBLAS_STATUS_ALLOC_FAILED")])
def test_what_does_not_fit_is_cut_in_two(
    models: tiny.Models, monkeypatch: pytest.MonkeyPatch, error: RuntimeError
) -> None:
    """Memory for two rows at once is played by the model; then for none."""
    answering = answerer(models, "llama")
    asked = [prompt([row, 6, 7], row) for row in range(5, 10)]
    expected = said(answering, asked, GREEDY)
    whole = type(models.plain("llama")).generate

    def generate(self: Any, *args: Any, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        if len(input_ids) > room:
            raise error
        return whole(self, *args, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(type(models.plain("llama")), "generate", generate)
    room = 2
    assert said(answering, asked, GREEDY) == expected
    room = 0
    with pytest.raises(TunerError, match=r"rows.jsonl:5: a prompt of 3 tokens .* --max-new-tokens"):
        answering.answers(asked, GREEDY)


@pytest.mark.parametrize("shape", tiny.SHAPES)
def test_a_token_without_an_embedding_is_refused(models: tiny.Models, shape: tiny.Shape) -> None:
    tokenizer = AutoTokenizer.from_pretrained(models.path(shape))
    answerer = Answerer(tiny.model_spec(models.path(shape)), tokenizer)
    last = tiny.VOCABULARY - 1
    assert answerer.answers([prompt([5, last])], GREEDY)
    said = (
        rf"rows.jsonl:3: has the token .* \({last + 1}\), and the model has embeddings for {last + 1} tokens"
    )
    with pytest.raises(DataError, match=said):
        answerer.answers([prompt([5, last]), prompt([last + 1, 5], 3)], GREEDY)
