"""Answers of a trial's adapter, or of the base model: to prompts, into a file, and scored."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from tuner.adapters import Pack, load_base, read_adapter
from tuner.adapters.base import keep_differentiable, load_model
from tuner.adapters.evaluation import Scores, scores_of
from tuner.adapters.generation import Decoding, Generated, TextGenerator
from tuner.adapters.placement import worker_devices
from tuner.data import Examples, Prompt
from tuner.errors import InputError, StorageError
from tuner.whole import written_whole

if TYPE_CHECKING:
    from tuner.config import ModelSpec, RoundSpec


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


_BEGINNING = b'{"row": '
"""The first characters of every line."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to a row."""

    row: int
    """As `Prompt.row`."""
    prompt: str
    """The prompt as the model received it."""
    answer: str | None = None
    """With the adapter; None if it was not requested."""
    base: str | None = None
    """Without it; None if it was not requested."""
    made_from: str = ""
    """Hash of all that determines the answer: prompt, trial, options."""

    def line(self) -> str:
        """Return the answer as a line of a file."""
        said = {name: value for name, value in asdict(self).items() if value is not None}
        return json.dumps(said, ensure_ascii=False) + "\n"


class AnswerFile:
    """The answer file of an interrupted run, or a new one.

    A line that was cut off by a crash counts as not written. The file is unchanged until `open`.
    """

    def __init__(self, path: Path, expected: Mapping[int, str]) -> None:
        """`expected` has `made_from` by row.

        Raises InputError if the file contains anything else, so that it is not overwritten.
        """
        self._path = path
        self._expected = expected
        self._stream: IO[bytes] | None = None
        if not path.parent.is_dir():
            raise InputError(f"{path}: directory {path.parent} does not exist")
        self._lines, self._whole_bytes, self._read_bytes = self._read()

    @property
    def rows(self) -> frozenset[int]:
        """Return the rows that have an answer."""
        return frozenset(self._lines)

    def open(self) -> None:
        """Remove a half-written line and prepare to append.

        Raises StorageError, also if another process has written since the file was read.
        """
        try:
            self._stream = self._path.open("ab")
            fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            locked, found = os.fstat(self._stream.fileno()), self._path.stat()
        except BlockingIOError as error:
            raise StorageError(f"{self._path}: another process is writing to it") from error
        except OSError as error:
            raise StorageError(f"{self._path}: cannot be written: {error.strerror}") from error
        if found.st_ino != locked.st_ino or found.st_size != self._read_bytes:
            self._stream.close()
            raise StorageError(
                f"{self._path}: another process has written to it in the meantime; run the same command "
                "again to continue"
            )
        self._stream.truncate(self._whole_bytes)

    def __enter__(self) -> AnswerFile:
        self.open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def append(self, answers: Sequence[Answer]) -> None:
        """Write answers and sync them to the disk."""
        assert self._stream is not None
        lines = {answer.row: answer.line().encode() for answer in answers}
        self._stream.write(b"".join(lines.values()))
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._lines |= lines

    def close(self) -> None:
        """Sort the answers by row once every row has one."""
        if self._stream is None:
            return
        if list(self._lines) != sorted(self._lines) and self._lines.keys() >= self._expected.keys():
            with written_whole(self._path) as ordered:
                ordered.write_bytes(b"".join(line for _, line in sorted(self._lines.items())))
        self._stream.close()

    def _read(self) -> tuple[dict[int, bytes], int, int]:
        """Return the lines by row, and the file's bytes without and with a half-written last line."""
        try:
            text = self._path.read_bytes()
        except FileNotFoundError:
            return {}, 0, 0
        except OSError as error:
            raise InputError(f"{self._path}: cannot be read: {error.strerror}") from error
        *lines, rest = text.split(b"\n")
        if not (rest.startswith(_BEGINNING) or _BEGINNING.startswith(rest)):
            raise self._foreign(len(lines) + 1, "this line is not an answer")
        found = {}
        for number, line in enumerate(lines, start=1):
            row, made_from = self._parsed(line, number)
            if self._expected.get(row) != made_from:
                raise self._foreign(number, "this line was made from another prompt, trial or options")
            found[row] = line + b"\n"
        return found, len(text) - len(rest), len(text)

    def _parsed(self, line: bytes, number: int) -> tuple[int, str]:
        try:
            value: Any = json.loads(line)
            return int(value["row"]), str(value["made_from"])
        except (ValueError, TypeError, KeyError) as error:
            raise self._foreign(number, "this line is not an answer") from error

    def _foreign(self, number: int, what: str) -> InputError:
        return InputError(
            f"{self._path}:{number}: {what}, so the file cannot be continued; "
            "delete it, or pass another --output"
        )


PASS_TOKENS = 4096
"""Tokens of a pass, including padding."""


def score(spec: RoundSpec, examples: Examples, adapter: Path) -> Scores:
    """Return the scores of a PEFT directory's adapter on examples.

    Computed like the evaluations of a trial alone in its worker: on a CPU in float32 they are equal digit for
    digit. Raises ModelError, and CheckpointError if there is no such adapter.
    """
    saved = read_adapter(adapter)
    # The parent of a cluster may have fewer GPUs than its workers.
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    device, *others = worker_devices(min(spec.run.gpus_per_worker, max(1, num_gpus)), num_gpus=num_gpus)
    base = load_base(spec.model, device=device, max_length=spec.data.max_length, others=others)
    pack = Pack(base, num_slots=1, max_rank=saved.config.r, modules=saved.weights)
    pack.occupy(0, saved)
    (scores,), _ = scores_of(pack, examples, (0,), rows=spec.evaluation.batch_size, pass_tokens=PASS_TOKENS)
    return scores
