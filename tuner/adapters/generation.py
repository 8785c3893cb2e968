"""Generate answers with adapters: sampling, where an answer ends, and which prompts go into one batch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer
from transformers.modeling_layers import GradientCheckpointingLayer

from tuner.adapters.base import Base, load_config, model_source
from tuner.adapters.device_io import one_out_of_memory
from tuner.data import Prompt, refuse_prompt_beyond
from tuner.errors import TunerError

if TYPE_CHECKING:
    from tuner.config import ModelSpec


@dataclass(frozen=True, slots=True)
class Decoding:
    """The decoding options of an answer."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    """0 takes the likeliest token; 1 samples with the model's own probabilities."""
    top_k: int = 0
    """Sample among this many of the likeliest tokens; 0 is all."""
    top_p: float = 1.0
    """Sample among the likeliest tokens that together have this probability."""
    seed: int = 0

    def processors(self, rows: Sequence[int]) -> LogitsProcessorList:
        """Return the processors of these rows' logits, applied before the largest is taken."""
        if self.temperature == 0:
            return LogitsProcessorList()
        chosen: list[LogitsProcessor] = [TemperatureLogitsWarper(float(self.temperature))]
        if self.top_k:
            chosen.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1:
            chosen.append(TopPLogitsWarper(self.top_p))
        return LogitsProcessorList([*chosen, _Chance(self.seed, rows)])


class _Chance(LogitsProcessor):  # type: ignore[misc]  # transformers is not typed
    """Adds Gumbel noise, which makes the largest sum a sample from the softmax of the logits (Gumbel 1954).

    Each row samples from a generator of its own, so its neighbours in the batch change nothing.
    """

    def __init__(self, seed: int, rows: Sequence[int]) -> None:
        self._generators = [torch.Generator().manual_seed(_mixed(seed, row)) for row in rows]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        draws = [torch.empty(scores.shape[-1]).exponential_(generator=each) for each in self._generators]
        return scores.float() - torch.stack(draws).log().to(scores.device)


def _mixed(seed: int, row: int) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed} {row}".encode(), digest_size=8).digest())


def batches(
    prompt_tokens: Sequence[int], new_tokens: Sequence[int], *, budget_tokens: int, most_rows: int | None
) -> list[list[int]]:
    """Group prompts into batches of positions, the longest first, so that one that does not fit fails early.

    Prompts of similar length go together, since the shorter ones are padded, and only those with the same
    number of new tokens. A batch has at most `budget_tokens`, including padding and answers, but always at
    least one prompt; `most_rows`, if given, limits the rows instead.
    """
    order = sorted(range(len(prompt_tokens)), key=lambda at: (-prompt_tokens[at], at))
    found: list[list[int]] = []
    for at in order:
        batch = found[-1] if found else []
        rows = most_rows
        if batch and rows is None:
            rows = budget_tokens // (prompt_tokens[batch[0]] + new_tokens[batch[0]])
        if batch and rows is not None and len(batch) < rows and new_tokens[at] == new_tokens[batch[0]]:
            batch.append(at)
        else:
            found.append([at])
    return found


def end_tokens(tokenizer: PreTrainedTokenizerBase, configured: GenerationConfig | None) -> list[int]:
    """Return the tokenizer's own EOS, with which training rows end, then the model's other end tokens."""
    return list(dict.fromkeys([int(tokenizer.eos_token_id), *_listed(configured)]))


def ends_unlike_its_base(model: ModelSpec, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return all end tokens if transformers' `generate` would not stop the base model at the trained EOS;
    else none.

    Raises ModelError if the model has no configuration.
    """
    configured = _generation_config(model)
    if int(tokenizer.eos_token_id) in _listed(configured):
        return []
    return end_tokens(tokenizer, configured)


def warning_of_ends(ends: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a warning about `ends_unlike_its_base` for users who generate without tuner."""
    trained, *others = (f"{tokenizer.convert_ids_to_tokens(end)!r} ({end})" for end in ends)
    stops = f"stops at {' and '.join(others)}" if others else "does not stop"
    return (
        f"answers are trained to end with the tokenizer's EOS, {trained}, and the base's generation_config "
        f"{stops}: with the adapter, other tools would generate to the limit; set "
        f"`base.generation_config.eos_token_id = {list(ends)}` there, as the card of an exported adapter "
        "says. Merged exports and tuner itself stop"
    )


def _generation_config(model: ModelSpec) -> GenerationConfig:
    """Return the model's generation config: its file, or else one made from its configuration."""
    try:
        return GenerationConfig.from_pretrained(model.path, **model_source(model))
    except (OSError, ValueError):
        return GenerationConfig.from_model_config(load_config(model, max_length=1))


def _listed(configured: GenerationConfig | None) -> list[int]:
    ends = getattr(configured, "eos_token_id", None)
    listed = ends if isinstance(ends, list) else [] if ends is None else [ends]
    return [int(end) for end in listed]


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
        # A loader whose cached step would pass by the adapters says so here.
        self._caches = base.model.generation_config.use_cache is not False
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
            with _keeping_a_cache(model), one_out_of_memory():
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
                use_cache=self._caches,
            ),
            logits_processor=decoding.processors([prompt.row for prompt in prompts]),
            streamer=None if say is None else _Streamer(self._tokenizer, say),
        )
        return [self._read(row) for row in out[:, ids.shape[1] :].tolist()]

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
