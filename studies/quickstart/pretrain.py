"""Makes base/ and data/ of this folder: a small language model, and instructions to tune it on.

    python studies/quickstart/pretrain.py         # eight minutes on one core

A byte-level BPE tokenizer and a Llama of 0.7 million parameters learn the texts of valley.py. One thread
and fixed seeds: the same versions on the same kind of processor make the same files.
"""

from __future__ import annotations

import json
import math
import random
import time
from pathlib import Path

import torch
from instructions import Row, instructions
from texts import documents
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

FOLDER = Path(__file__).resolve().parent
VOCABULARY = 1024
NUM_DOCUMENTS = 120_000
BATCH_SIZE, SEQUENCE_TOKENS, NUM_STEPS = 32, 128, 1_700
PEAK_RATE, WARMUP_STEPS = 4e-3, 50
TRAIN_ROWS, EVAL_ROWS = 36, 8
"""For each kind of instruction."""

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<s>' + message['role'] + '\n' + message['content'] + '</s>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)


# --- tokenizer, model, files ----------------------------------------------------------------------


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer whose numbers are spelled digit by digit."""
    words = Regex(r" ?\p{L}+|\p{N}|\n+| ?[^\s\p{L}\p{N}]+|\s+")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """An untrained Llama of 0.7 million parameters."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def pretrain(model: LlamaForCausalLM, tokens: torch.Tensor) -> None:
    """Next-token training on random windows of the texts, warm-up and cosine."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.95), weight_decay=0.1)
    order = torch.Generator().manual_seed(0)
    began = time.monotonic()
    for step in range(NUM_STEPS):
        cosine = 0.5 * (1 + math.cos(math.pi * step / NUM_STEPS))
        optimizer.param_groups[0]["lr"] = PEAK_RATE * min((step + 1) / WARMUP_STEPS, cosine)
        starts = torch.randint(len(tokens) - SEQUENCE_TOKENS, (BATCH_SIZE,), generator=order)
        batch = torch.stack([tokens[start : start + SEQUENCE_TOKENS] for start in starts])
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0 or step == NUM_STEPS - 1:
            print(f"step {step}: loss {loss.item():.3f}, {time.monotonic() - began:.0f} s", flush=True)


def write_rows(path: Path, rows: list[Row]) -> None:
    """Rows in Alpaca form, one JSON object a line."""
    path.parent.mkdir(exist_ok=True)
    keys = ("instruction", "input", "output")
    lines = [json.dumps(dict(zip(keys, row, strict=True)), ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")


def main() -> None:
    """Makes data/ and base/."""
    torch.set_num_threads(1)
    train, evaluation = instructions(random.Random(3), train_rows=TRAIN_ROWS, eval_rows=EVAL_ROWS)
    write_rows(FOLDER / "data" / "train.jsonl", train)
    write_rows(FOLDER / "data" / "eval.jsonl", evaluation)

    texts = list(documents(random.Random(2), NUM_DOCUMENTS))
    tokenizer = train_tokenizer([*texts[:20_000], *(" ".join(row) for row in train)])
    ids = tokenizer([text + "</s>" for text in texts])["input_ids"]
    tokens = torch.tensor([token for text in ids for token in text])
    model = new_model(tokenizer)
    print(f"{model.num_parameters():,} parameters, {len(tokens):,} tokens of text")
    pretrain(model, tokens)
    model.to(torch.bfloat16).save_pretrained(FOLDER / "base")
    tokenizer.save_pretrained(FOLDER / "base")


if __name__ == "__main__":
    main()
