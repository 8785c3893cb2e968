"""Answers of a trial's adapter, or of the base model, to prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from tuner.adapters import load_base
from tuner.adapters.base import keep_differentiable, load_model
from tuner.adapters.decoding import Decoding
from tuner.adapters.generation import Generated, TextGenerator
from tuner.data import Prompt
from tuner.errors import InputError

if TYPE_CHECKING:
    from tuner.config import ModelSpec


class Answerer:
    """A base model, optionally with an adapter, loaded once."""

    def __init__(
        self, model: ModelSpec, tokenizer: PreTrainedTokenizerBase, *, adapter: Path | None = None
    ) -> None:
        """`adapter` is a PEFT directory. Raises ModelError."""
        device = "cuda:0" if torch.cuda.is_available() else "cpu"
        base = load_base(model, device=device, max_length=1)
        self._name = model.path
        self._generator = TextGenerator(base, tokenizer, limited_by="--max-new-tokens")
        self.budget_tokens = self._generator.budget_tokens
        """Tokens of a batch, including its answers."""
        self._model: Any = base.model
        if adapter is not None:
            self._model = PeftModel.from_pretrained(base.model, str(adapter)).eval()
            # In evaluation mode bitsandbytes repacks 4-bit weights, from which PEFT's DoRA reads wrong norms.
            keep_differentiable(base.model)

    def new_tokens(self, prompt: Prompt, wanted: int) -> int:
        """Return the tokens that the answer may have. Raises InputError if the prompt leaves no position for
        one.
        """
        possible = self._generator.new_tokens(prompt, wanted)
        if possible < 1:
            raise InputError(
                f"{prompt.place}: it has {len(prompt.ids)} tokens with its template, and {self._name} has "
                f"{self._generator.positions} positions for prompt and answer; shorten it"
            )
        return possible

    def answers(
        self,
        prompts: Sequence[Prompt],
        decoding: Decoding,
        *,
        of_base: bool = False,
        say: Callable[[str], None] | None = None,
    ) -> list[Generated]:
        """Return answers up to the end of text or `new_tokens`, which is the same for all of these prompts.

        `of_base` leaves out the adapter. `say` receives the answer to a single prompt as it grows. A batch
        that does not fit into the GPU's memory is halved. Raises InputError and TunerError.
        """
        for prompt in prompts:
            self.new_tokens(prompt, decoding.max_new_tokens)
        without = self._model.disable_adapter() if of_base and self._has_adapter else nullcontext()
        with without:
            return self._generator.answers(self._model, prompts, decoding, say=say)

    @property
    def _has_adapter(self) -> bool:
        return isinstance(self._model, PeftModel)


def load_adapted(model: ModelSpec, adapter: Path, *, device: str | None = None) -> PeftModel:
    """Load a base model with a PEFT directory, in evaluation mode.

    `device` is a GPU by default, if there is one. Raises ModelError.
    """
    device = device or ("cuda:0" if torch.cuda.is_available() else "cpu")
    base = load_model(model, device=device, max_length=1)
    adapted = PeftModel.from_pretrained(base, str(adapter)).eval()
    # In evaluation mode bitsandbytes repacks 4-bit weights, from which PEFT's DoRA reads wrong norms.
    keep_differentiable(base)
    return adapted
