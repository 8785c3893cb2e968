"""Generate answers to prompts: padding, the end of an answer, and recovery from running out of memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer
from transformers.modeling_layers import GradientCheckpointingLayer

from tuner.adapters.base import Base
from tuner.adapters.decoding import Decoding, end_tokens
from tuner.data import Prompt, refuse_prompt_beyond
from tuner.errors import TunerError

_BUDGET_TOKENS = {"cpu": 8_192, "cuda": 32_768}
"""Tokens of a batch: keys and values of a 7B model in 16 bits need 4 and 16 GB for them."""


@dataclass(frozen=True, slots=True)
class Generated:
    """A model's answer to a prompt."""

    text: str
    num_tokens: int


class TextGenerator:
    """Generates answers with a base model and whichever adapter is on it."""

    def __init__(self, base: Base, tokenizer: PreTrainedTokenizerBase, *, limited_by: str) -> None:
        """`limited_by` names the user's option for the length of answers, for messages."""
        self.budget_tokens = _BUDGET_TOKENS[base.device.type]
        """Tokens of a batch, including its answers."""
        self.positions: int | None = getattr(base.model.config, "max_position_embeddings", None)
        """Of prompt and answer together; None if the model has no limit."""
        self._tokenizer = tokenizer
        self._device = base.device
        self._num_embeddings = base.num_embeddings
        self._limited_by = limited_by
        self._ends = end_tokens(tokenizer, base.model.generation_config)
        # Only the given options count, not the sampling and penalties in the model's files.
        base.model.generation_config = GenerationConfig()

    def new_tokens(self, prompt: Prompt, wanted: int) -> int:
        """Return the tokens that the answer may have: fewer than wanted near the last position; 0 or below
        for none.

        Raises DataError for a prompt with a token that the base model has no embedding for.
        """
        refuse_prompt_beyond(prompt, self._num_embeddings, lambda: self._tokenizer)
        return wanted if self.positions is None else min(wanted, self.positions - len(prompt.ids))

    @torch.no_grad()
    def answers(
        self,
        model: Any,
        prompts: Sequence[Prompt],
        decoding: Decoding,
        *,
        say: Callable[[str], None] | None = None,
    ) -> list[Generated]:
        """Return the answers of `model`, the base model as it is wrapped now, up to the end of text or
        `new_tokens`.

        The smallest `new_tokens` of these prompts holds for all. `say` receives the answer to a single prompt
        as it grows. A batch that does not fit into the GPU's memory is halved; raises TunerError if a prompt
        does not fit alone.
        """
        try:
            with _keeping_a_cache(model):
                return self._generated(model, prompts, decoding, say)
        except torch.OutOfMemoryError as error:
            if len(prompts) == 1:
                raise TunerError(
                    f"{prompts[0].place}: a prompt of {len(prompts[0].ids)} tokens and its answer do not fit "
                    f"into the GPU's memory; lower {self._limited_by}"
                ) from error
        # The failed pass and its tensors are freed here, but not while the error is being handled.
        torch.cuda.empty_cache()
        half = (len(prompts) + 1) // 2
        first = self.answers(model, prompts[:half], decoding, say=say)
        return first + self.answers(model, prompts[half:], decoding, say=say)

    def _generated(
        self, model: Any, prompts: Sequence[Prompt], decoding: Decoding, say: Callable[[str], None] | None
    ) -> list[Generated]:
        ids, mask = self._padded([prompt.ids for prompt in prompts])
        pad = self._tokenizer.pad_token_id
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=GenerationConfig(
                max_new_tokens=min(self.new_tokens(prompt, decoding.max_new_tokens) for prompt in prompts),
                do_sample=False,  # the logits processor adds the randomness
                eos_token_id=self._ends,
                pad_token_id=self._ends[0] if pad is None else pad,
            ),
            logits_processor=decoding.processors([prompt.row for prompt in prompts]),
            streamer=None if say is None else _Streamer(self._tokenizer, say),
        )
        return [self._read(row.tolist()) for row in out[:, ids.shape[1] :]]

    def _padded(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Return ids and mask, [rows, longest], padded on the left so that the answers start together."""
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


@contextmanager
def _keeping_a_cache(model: Any) -> Iterator[None]:
    """Turn off gradient checkpointing, which would drop the keys and values of a prompt."""
    checkpointed = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer) and m.training]
    for layer in checkpointed:
        layer.training = False
    try:
        yield
    finally:
        for layer in checkpointed:
            layer.training = True


class _Streamer(BaseStreamer):  # type: ignore[misc]  # transformers is not typed
    """Passes on each token's text once it is whole characters; transformers' streamer waits for a space."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, say: Callable[[str], None]) -> None:
        self._tokenizer, self._say = tokenizer, say
        self._tokens: list[int] = []
        self._said = ""
        self._is_prompt = True

    def put(self, value: Tensor) -> None:
        """Called by transformers with the prompt, then with each token."""
        if self._is_prompt:
            self._is_prompt = False
            return
        self._tokens += value.tolist()
        if not (text := self._text()).endswith("\N{REPLACEMENT CHARACTER}"):
            self._add(text)

    def end(self) -> None:
        """Called by transformers at the end."""
        self._add(self._text())

    def _text(self) -> str:
        return str(self._tokenizer.decode(self._tokens, skip_special_tokens=True)).lstrip()

    def _add(self, text: str) -> None:
        if len(text) > len(self._said) and text.startswith(self._said):
            self._say(text[len(self._said) :])
            self._said = text
