"""Metrics of generated answers, and the evaluation rows to answer."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, SupportsFloat

import numpy as np

from tuner.data.prompts import Prompt
from tuner.data.splits import Part
from tuner.data.tokenise import Fate
from tuner.errors import DataError, MetricError, last_words

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


EXACT_MATCH = "exact_match"
METRIC_KEY = "evaluation.answers.metric"
ADVICE = "write exact_match, file.py:function (relative to the round file), or module:function"
_LARGEST = 1e100
"""Of a score: a mean of such numbers, and its standard error, are finite."""


class AnswerMetric:
    """A function that scores answers, by its name in the round file; higher is better."""

    def __init__(self, name: str, compare: Callable[[str, str], Any], *, code: str | None = None) -> None:
        self.name = name
        self.code = code
        """Hash of the file that the function is in; None where there is none of the user's."""
        self._compare = compare

    def __call__(self, answer: str, reference: str, *, place: str) -> float:
        """Return the score of one answer. `place` is the place of the row, for messages.

        Raises MetricError when the user's function raises, or returns no finite number: it is the function's
        fault, not the answer's, since any text may come as an answer.
        """
        try:
            with redirect_stdout(sys.stderr):
                found = self._compare(answer, reference)
            number = float(found) if isinstance(found, SupportsFloat) else None
        except (Exception, SystemExit) as error:
            raise self._at_fault(
                place, f"it raised {last_words(error, __file__)}", answer, reference
            ) from error
        if number is None:
            said = f"it returned {_short(found)}, not a number"
            raise self._at_fault(place, said, answer, reference)
        if not abs(number) <= _LARGEST:
            limit = "not a finite number" if not math.isfinite(number) else f"which is beyond {_LARGEST:.0e}"
            raise self._at_fault(place, f"it returned {number}, {limit}", answer, reference)
        return number

    def _at_fault(self, place: str, what: str, answer: str, reference: str) -> MetricError:
        return MetricError(
            f"{METRIC_KEY}: {self.name}, called with answer {_short(answer)} and reference "
            f"{_short(reference)} ({place}): {what}; it takes any two texts and returns a finite number, "
            "the higher the better"
        )


def load_metric(name: str) -> AnswerMetric:
    """Load the metric named in a round file with absolute paths; messages omit the file's folder.

    A file's neighbours can be imported by it. Raises MetricError when there is no such function.
    """
    if name == EXACT_MATCH:
        return AnswerMetric(name, exact_match)
    place, _, attribute = name.rpartition(":")
    shown = shown_metric(name)
    if place.endswith(".py"):
        refuse_no_file(Path(place), shown=shown)
    try:
        with redirect_stdout(sys.stderr):
            module = _file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except (Exception, SystemExit) as error:
        said = f"{place} cannot be imported: {last_words(error, __file__)}"
        raise MetricError(f"{METRIC_KEY}: {shown}: {said}; {ADVICE}") from error
    found: Any = module
    for part in attribute.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        raise no_function(name, [key for key, value in vars(module).items() if callable(value)])
    return AnswerMetric(shown, found, code=_file_hash(module))


def refuse_no_file(path: Path, *, shown: str) -> None:
    """Raise MetricError if a metric's file is not there, or is a directory."""
    if not path.is_file():
        said = f"{path} is a directory" if path.is_dir() else f"there is no file {path}"
        raise MetricError(f"{METRIC_KEY}: {shown}: {said}; {ADVICE}")


def no_function(name: str, known: Sequence[str]) -> MetricError:
    """Return the error of a metric that its file or module, with the functions `known`, does not have."""
    place, _, attribute = name.rpartition(":")
    public = [each for each in known if not each.startswith("_")]
    there = f"it has {', '.join(public[:8])}" if public else "it has none"
    said = f"{place} has no function {attribute}; {there}"
    return MetricError(f"{METRIC_KEY}: {shown_metric(name)}: {said}; {ADVICE}")


def shown_metric(name: str) -> str:
    """Return a metric's name in the round file without the folder of its file."""
    place, _, attribute = name.rpartition(":")
    return f"{Path(place).name}:{attribute}" if place else attribute


def exact_match(answer: str, reference: str) -> float:
    """Return 1 if the texts are equal up to white space, else 0."""
    return float(answer.split() == reference.split())


def _file(path: Path) -> ModuleType:
    """Import a module from a file. Its folder comes last on the path, so that it hides no installed
    package."""
    if (folder := str(path.parent)) not in sys.path:
        sys.path.append(folder)
    name = f"tuner_metric_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _file_hash(module: ModuleType) -> str | None:
    try:
        return hashlib.sha256(Path(module.__file__ or "").read_bytes()).hexdigest()[:16]
    except (AttributeError, OSError):
        return None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


@dataclass(frozen=True, slots=True)
class EvalPrompt:
    """A row up to its last completion, and that completion."""

    prompt: Prompt
    """Token for token what training rows complete."""
    reference: str
    """The completion as the tokenizer decodes it, without special tokens and white space around it."""
    reference_tokens: int
    """Its tokens, without the end of text."""


def eval_prompts(
    parts: Sequence[Part], tokenizer: PreTrainedTokenizerBase, *, beginning: int, max_examples: int
) -> tuple[EvalPrompt, ...]:
    """Return the first evaluation rows that have a prompt and a complete completion.

    Left out are rows of format `text` and rows that `max_length` cuts, since the end of their completion is
    not known. `beginning` is the number of tokens that the tokenizer puts before a text. Raises DataError
    where no row is left.
    """
    found = tuple(islice((q for part in parts for q in _of_part(part, tokenizer, beginning)), max_examples))
    if not found:
        sources = ", ".join(dict.fromkeys(f"{part.path} (format {part.format})" for part in parts))
        raise DataError(
            f"evaluation.answers: {sources}: no evaluation row has a prompt and a completion that max_length "
            "leaves whole, so there is nothing to answer; use eval rows of format alpaca, messages, sharegpt "
            "or completion, or remove evaluation.answers"
        )
    return found


def try_metric(metric: AnswerMetric, eval_prompt: EvalPrompt) -> None:
    """Compare a row's completion, and an empty answer, with the row. Raises MetricError."""
    for answer in (eval_prompt.reference, ""):
        metric(answer, eval_prompt.reference, place=eval_prompt.prompt.place)


def _of_part(part: Part, tokenizer: PreTrainedTokenizerBase, beginning: int) -> Iterator[EvalPrompt]:
    if part.format == "text":
        return
    table = part.turns or part.table
    for index, row in enumerate(part.rows.tolist()):
        if table.fates[row] != Fate.KEPT:
            continue
        start, end = table.tokens.offsets[row], table.tokens.offsets[row + 1]
        ids, is_target = table.tokens.tokens[start:end], table.tokens.targets[start:end]
        split = int(np.flatnonzero(~is_target)[-1]) + 1
        # The first token is never a target: alone it is no prompt.
        if split <= max(1, beginning):
            continue
        said = [token for token in ids[split:].tolist() if token != tokenizer.eos_token_id]
        prompt = tuple(ids[:split].tolist())
        yield EvalPrompt(
            Prompt(int(table.numbers[row]), part.place(index), str(tokenizer.decode(prompt)), prompt),
            str(tokenizer.decode(said, skip_special_tokens=True)).strip(),
            len(said),
        )
