"""Tokenizers, files and round files that are small enough to make in a test."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tuner.config import RoundSpec
from tuner.data import PreparedData, prepare

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_SENTENCES = (
    "Below is an instruction that describes a task. Write a response that appropriately completes it.",
    "### Instruction:\nName three colours.\n\n### Response:\nRed, green and blue are three colours.",
)


def byte_level(*, bos: bool = False, chat_template: str | None = None) -> PreTrainedTokenizerBase:
    """Byte-level BPE as GPT-2, Qwen and Llama 3 have: any text goes through it unchanged."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_SENTENCES, trainer)
    if bos:
        backend.post_processor = _puts_bos_first(backend)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="<|im_end|>" if chat_template else "</s>",
        chat_template=chat_template,
    )


def sentencepiece() -> PreTrainedTokenizerBase:
    """BPE as Llama 2 has: a space is put before a text, unknown characters are bytes, BOS comes first."""
    letters = "▁abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.,:#?"
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters, "▁R", "▁a"]
    backend = Tokenizer(
        models.BPE(
            vocab={piece: number for number, piece in enumerate(pieces)},
            merges=[("▁", "R"), ("▁", "a")],
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.post_processor = _puts_bos_first(backend)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def alpaca_rows(count: int) -> list[dict[str, str]]:
    return [{"instruction": f"Name number {n}.", "output": f"It is {n}, of course."} for n in range(count)]


def source(path: Path, format: str = "alpaca", **more: Any) -> dict[str, Any]:
    return {"path": str(path), "format": format, **more}


def round_spec(
    *, max_examples: int = 200, answers: Mapping[str, Any] | None = None, **data: Any
) -> RoundSpec:
    return RoundSpec.model_validate(
        {
            "study": "s",
            "round": "r",
            "model": {"path": "m"},
            "data": data,
            "max_train_steps": 10,
            "hyperparameters": {"learning_rate": 1e-4},
            "evaluation": {"every_steps": 5, "max_examples": max_examples, "answers": answers},
        }
    )


def prepared(
    tokenizer: PreTrainedTokenizerBase, *, cache: Path | None = None, max_examples: int = 200, **data: Any
) -> PreparedData:
    """`prepare` for a round file with this data section."""
    return prepare(round_spec(max_examples=max_examples, **data), tokenizer, cache)


def _puts_bos_first(backend: Tokenizer) -> TemplateProcessing:
    return TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
