"""Answers to prompts, one or many at once, by the base with a trial's adapter or without."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from tuner.adapters import load_base
from tuner.adapters.base import keep_differentiable
from tuner.data import Prompt
from tuner.errors import InputError, TunerError
from tuner.inference.decoding import Decoding

if TYPE_CHECKING:
    from tuner.spec import ModelSpec

_BUDGET_TOKENS = {"cpu": 8_192, "cuda": 32_768}
"""Of a batch: what keys and values of a 7B model in 16 bits need 4 and 16 GB for."""


@dataclass(frozen=True, slots=True)
class Generated:
    """What a model said to a prompt."""

    text: str
    num_tokens: int


class Answerer:
    """A base, and perhaps an adapter on it, loaded once."""

    def __init__(
        self, model: ModelSpec, tokenizer: PreTrainedTokenizerBase, *, adapter: Path | None = None
    ) -> None:
        """`adapter` is a PEFT directory. Raises ModelError."""
        device = "cuda:0" if torch.cuda.is_available() else "cpu"
        base = load_base(model, device=device, max_length=1)
        self.budget_tokens = _BUDGET_TOKENS[base.device.type]
        """Tokens of a batch, its answers included."""
        self._name = model.path
        self._tokenizer = tokenizer
        self._device = base.device
        self._positions: int | None = getattr(base.model.config, "max_position_embeddings", None)
        self._ends = _end_tokens(tokenizer, base.model.generation_config)
        # Whatever the model's files say of sampling and penalties: an answer is what was asked for.
        base.model.generation_config = GenerationConfig()
        self._model: Any = base.model
        if adapter is not None:
            self._model = PeftModel.from_pretrained(base.model, str(adapter)).eval()
            # In evaluation mode bitsandbytes repacks 4-bit weights; PEFT's DoRA reads wrong norms from them.
            keep_differentiable(base.model)

    def new_tokens(self, prompt: Prompt, wanted: int) -> int:
        """Tokens that the answer may have. Raises InputError when the prompt leaves no position for one."""
        left = wanted if self._positions is None else self._positions - len(prompt.ids)
        if left < 1:
            raise InputError(
                f"{prompt.place}: it has {len(prompt.ids)} tokens with its template, and {self._name} has "
                f"{self._positions} positions for prompt and answer; shorten it"
            )
        return min(wanted, left)

    def answers(
        self,
        prompts: Sequence[Prompt],
        decoding: Decoding,
        *,
        of_base: bool = False,
        say: Callable[[str], None] | None = None,
    ) -> list[Generated]:
        """Answers up to the end of text or `new_tokens`, which is the same for all of these prompts.

        `of_base` leaves out the adapter. `say` hears the answer to a single prompt as it grows. What does not
        fit into the GPU's memory is cut in two. Raises InputError and TunerError.
        """
        without = self._model.disable_adapter() if of_base and self._has_adapter else nullcontext()
        with torch.no_grad(), without:
            return self._fitting(prompts, decoding, say)

    @property
    def _has_adapter(self) -> bool:
        return isinstance(self._model, PeftModel)

    def _fitting(
        self, prompts: Sequence[Prompt], decoding: Decoding, say: Callable[[str], None] | None
    ) -> list[Generated]:
        try:
            return self._generated(prompts, decoding, say)
        except torch.OutOfMemoryError as error:
            if len(prompts) == 1:
                raise TunerError(
                    f"{prompts[0].place}: a prompt of {len(prompts[0].ids)} tokens and its answer do not fit "
                    "into the GPU's memory; ask for fewer new tokens with --max-new-tokens"
                ) from error
        # Here the failed pass and its tensors are gone, which they are not while the error is handled.
        torch.cuda.empty_cache()
        half = (len(prompts) + 1) // 2
        first = self._fitting(prompts[:half], decoding, say)
        return first + self._fitting(prompts[half:], decoding, say)

    def _generated(
        self, prompts: Sequence[Prompt], decoding: Decoding, say: Callable[[str], None] | None
    ) -> list[Generated]:
        ids, mask = self._padded([prompt.ids for prompt in prompts])
        pad = self._tokenizer.pad_token_id
        out = self._model.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=GenerationConfig(
                max_new_tokens=min(self.new_tokens(prompt, decoding.max_new_tokens) for prompt in prompts),
                do_sample=False,  # what is left to chance is in the logits
                eos_token_id=self._ends,
                pad_token_id=self._ends[0] if pad is None else pad,
            ),
            logits_processor=decoding.processors([prompt.row for prompt in prompts]),
            streamer=None if say is None else _Streamer(self._tokenizer, say),
        )
        return [self._read(row.tolist()) for row in out[:, ids.shape[1] :]]

    def _padded(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Ids and mask, [rows, longest], padded on the left: the answers begin side by side."""
        longest = max(map(len, prompts))
        ids = torch.full((len(prompts), longest), self._ends[0])
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        return ids.to(self._device), mask.to(self._device)

    def _read(self, said: list[int]) -> Generated:
        end = next((at for at, token in enumerate(said) if token in self._ends), len(said))
        text = str(self._tokenizer.decode(said[:end], skip_special_tokens=True)).strip()
        return Generated(text, end)


class _Streamer(BaseStreamer):  # type: ignore[misc]  # transformers is not typed
    """Says each token's text as soon as it is whole characters; that of transformers waits for a space."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, say: Callable[[str], None]) -> None:
        self._tokenizer, self._say = tokenizer, say
        self._tokens: list[int] = []
        self._said = ""
        self._is_prompt = True

    def put(self, value: Tensor) -> None:
        """What transformers calls with the prompt, then with each token."""
        if self._is_prompt:
            self._is_prompt = False
            return
        self._tokens += value.tolist()
        if not (text := self._text()).endswith("\N{REPLACEMENT CHARACTER}"):
            self._add(text)

    def end(self) -> None:
        """What transformers calls at the end."""
        self._add(self._text())

    def _text(self) -> str:
        return str(self._tokenizer.decode(self._tokens, skip_special_tokens=True)).lstrip()

    def _add(self, text: str) -> None:
        if len(text) > len(self._said) and text.startswith(self._said):
            self._say(text[len(self._said) :])
            self._said = text


def _end_tokens(tokenizer: PreTrainedTokenizerBase, configured: GenerationConfig | None) -> list[int]:
    """The tokenizer's own EOS, with which training rows end, then others that the model was made with."""
    others = getattr(configured, "eos_token_id", None)
    listed = others if isinstance(others, list) else [] if others is None else [others]
    return list(dict.fromkeys([int(tokenizer.eos_token_id), *map(int, listed)]))
