"""A round's data: read, split, tokenised and counted."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from tuner.data.answer_metrics import EvalPrompt, eval_prompts
from tuner.data.examples import Examples
from tuner.data.files import downloads
from tuner.data.formats import source_format
from tuner.data.prompts import refuse_prompt_beyond, token_beyond
from tuner.data.rows import Recipe, tokenised
from tuner.data.sources import is_elsewhere, open_sources
from tuner.data.special_tokens import SpecialTokens
from tuner.data.splits import (
    Overlap,
    Part,
    Parts,
    divide,
    duplicates,
    examples,
    overlap,
    pieces,
    places,
    refuse_overlap,
    sample,
    share_to_hold_out,
    weigh,
)
from tuner.data.tokenise import Fate, Tokeniser
from tuner.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tuner.config import DataSpec, RoundSpec, SourceSpec

_QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}


@dataclass(frozen=True, slots=True)
class SplitReport:
    """Statistics of the rows of one split."""

    num_examples: int = 0
    """Rows that are trained or evaluated on: those kept, after `weight` and `max_examples`."""
    tokens: int = 0
    """In these examples."""
    targets: int = 0
    """Those of the tokens that the loss sees."""
    rows_read: int = 0
    rows_kept: int = 0
    truncated: int = 0
    """Rows kept whose text beyond `max_length` tokens is lost."""
    cut_off: int = 0
    """Rows dropped because `max_length` left nothing to learn."""
    empty: int = 0
    """Rows dropped because they had nothing to learn: an empty output, no assistant turn."""
    duplicates: int = 0
    """Rows kept whose text a row before them has."""
    pieces: int = 0
    """Rows kept that continue a text longer than `max_length`."""
    overlap: int = 0
    """Rows that training has too (of test, those that training or evaluation has); see `allow_overlap`."""
    token_lengths: Mapping[str, int] = field(default_factory=dict)
    """Tokens a row before truncation: p50, p90, p99 and max of the rows that are not empty."""


@dataclass(frozen=True, slots=True)
class DataReport:
    """Statistics of all rows that were read."""

    train: SplitReport = field(default_factory=SplitReport)
    evaluation: SplitReport = field(default_factory=SplitReport)
    test: SplitReport = field(default_factory=SplitReport)
    mix: Mapping[str, float] = field(default_factory=dict)
    """Each training source's share of the rows of an epoch, by its path."""
    overlaps: tuple[str, ...] = ()
    """Which rows are in two of train, eval and test, where the round file allows it."""
    remarks: tuple[str, ...] = ()
    """What rows say that is read otherwise than written, or not at all; how many, and the first of them."""

    @property
    def splits(self) -> Mapping[str, SplitReport]:
        """Return the reports by split, with the names of the round file."""
        return {"train": self.train, "eval": self.evaluation, "test": self.test}

    def left_out(self, max_length: int) -> list[str]:
        """Return what is cut or left out, a sentence for each split and reason."""
        said = []
        for name, split in self.splits.items():
            if split.truncated:
                said.append(
                    f"{split.truncated} of {split.rows_kept} {name} rows are cut at max_length {max_length}"
                )
            if split.empty:
                said.append(
                    f"{split.empty} {name} rows are left out: no answer to learn (none, empty, or weight 0)"
                )
            if split.cut_off:
                said.append(
                    f"{split.cut_off} {name} rows are left out: nothing in them to learn within max_length"
                )
        return [*said, *self.remarks]


@dataclass(frozen=True, slots=True, eq=False)
class PreparedData:
    """A round's data, ready for training."""

    train: Examples
    evaluation: Examples
    test: Examples
    """Empty unless the round file has `data.test`."""
    report: DataReport
    fingerprint: str
    """Hash of all tokens and target masks, in order."""
    eval_prompts: tuple[EvalPrompt, ...] = ()
    """Evaluation rows to be answered; empty unless the round file has `evaluation.answers`."""


def refuse_tokens_beyond(
    data: PreparedData, num_embeddings: int, tokenizer: Callable[[], PreTrainedTokenizerBase]
) -> None:
    """Raise DataError for the first row with a token beyond the base model's embeddings.

    `tokenizer` is called to name the token.
    """
    for split in (data.train, data.evaluation, data.test):
        if (found := split.first_beyond(num_embeddings)) is not None:
            index, token = found
            raise token_beyond(split.place(index), token, num_embeddings, tokenizer())
    for eval_prompt in data.eval_prompts:
        refuse_prompt_beyond(eval_prompt.prompt, num_embeddings, tokenizer)


def prepare(
    spec: RoundSpec,
    tokenizer: PreTrainedTokenizerBase,
    cache: Path | None,
    say: Callable[[str], None] = lambda _: None,
    *,
    known: str | None = None,
) -> PreparedData:
    """Prepare the data of a round with absolute paths; `cache` is a folder for tokenised data, or None.

    `say` hears how far it is, about once a second. `known` is the fingerprint of the round's data: rows of
    the Hub and of URLs are then those that were opened first, as long as they have it. Raises DataError, and
    StorageError when the cache cannot be written.
    """
    sources = (*spec.data.train, *spec.data.eval, *spec.data.test)
    if known is not None and any(map(is_elsewhere, sources)):
        with suppress(DataError):
            before = _prepared(spec, tokenizer, cache, say, as_before=True)
            if before.fingerprint == known:
                return before
    return _prepared(spec, tokenizer, cache, say, as_before=False)


def _prepared(
    spec: RoundSpec,
    tokenizer: PreTrainedTokenizerBase,
    cache: Path | None,
    say: Callable[[str], None],
    *,
    as_before: bool,
) -> PreparedData:
    data = spec.data
    if weighted := [source.path for source in (*data.eval, *data.test) if source.weight != 1]:
        raise DataError(f"{weighted[0]}: weight applies only to training rows; every other row is used once")
    tokeniser = Tokeniser(tokenizer)
    special = SpecialTokens(tokenizer, tokeniser)
    recipe = Recipe(tokeniser, data.loss_on, data.max_length, cache, say, special)
    answers = spec.evaluation.answers
    asked = None if answers is None else "eval" if data.eval_fraction is None else "train"
    read = {
        name: _parts(sources, tokenizer, recipe, asks=name == asked, as_before=as_before)
        for name, sources in (("train", data.train), ("eval", data.eval), ("test", data.test))
    }
    parts = dict(read)
    if data.eval_fraction is not None:
        parts["train"], parts["eval"] = divide(read["train"], data.eval_fraction)
    overlaps = _overlaps(parts, allowed=data.allow_overlap)
    used = {
        "train": [weigh(part.kept(), part.weight) for part in parts["train"]],
        "eval": sample([part.kept() for part in parts["eval"]], spec.evaluation.max_examples),
        "test": [part.kept() for part in parts["test"]],
    }
    _refuse_emptiness(data, used, read)
    splits = {name: examples(used_parts) for name, used_parts in used.items()}
    beginning = len(tokeniser.beginning)
    return PreparedData(
        splits["train"],
        splits["eval"],
        splits["test"],
        replace(
            _reported(parts, splits, overlaps),
            mix=_mix(used["train"]),
            remarks=_remarks([part for each in read.values() for part in each]),
        ),
        _fingerprint(splits.values()),
        eval_prompts(used["eval"], tokenizer, beginning=beginning, max_examples=answers.max_examples)
        if answers is not None
        else (),
    )


def _reported(
    parts: Mapping[str, Parts], splits: Mapping[str, Examples], overlaps: Sequence[Overlap]
) -> DataReport:
    of_eval, *of_test = overlaps
    return DataReport(
        train=_report(parts["train"], splits["train"]),
        evaluation=_report(parts["eval"], splits["eval"], overlap=of_eval.num_rows),
        test=_report(parts["test"], splits["test"], overlap=max(found.num_rows for found in of_test)),
        overlaps=tuple(found.explanation for found in overlaps if found.num_rows),
    )


def _overlaps(parts: Mapping[str, Parts], *, allowed: bool) -> tuple[Overlap, ...]:
    """Return the overlaps of train, eval and test with each other. Raises DataError unless allowed."""
    pairs = (("eval", "train"), ("test", "train"), ("test", "eval"))
    found = tuple(overlap(name, parts[name], other, parts[other]) for name, other in pairs)
    if not allowed:
        for (name, _), each in zip(pairs, found, strict=True):
            refuse_overlap(each, has_test=name == "test")
    return found


def share_for_evaluation(
    spec: RoundSpec,
    tokenizer: PreTrainedTokenizerBase,
    cache: Path | None,
    say: Callable[[str], None] = lambda _: None,
    *,
    least: float,
    wanted_rows: int,
) -> float:
    """Return an `eval_fraction` of at least `least` that holds out this many training rows.

    Of few rows it is three tenths. Raises DataError as `prepare`, and where the rows cannot be parted.
    """
    data = spec.data
    recipe = Recipe(Tokeniser(tokenizer), data.loss_on, data.max_length, cache, say)
    parts = _parts(data.train, tokenizer, recipe, asks=False)
    fates = np.concatenate([part.table.fates[part.rows] for part in parts])
    kept = (fates == Fate.KEPT) | (fates == Fate.TRUNCATED)
    _refuse_emptiness(data, {"train": [part.kept() for part in parts]}, {"train": parts})
    share = share_to_hold_out(places(parts)[kept], least=least, wanted_rows=wanted_rows)
    if share is None:
        sources = ", ".join(part.source.name for part in parts)
        raise DataError(
            f"{sources}: none of its rows can be held out, since there is only one, or all are equal; add "
            "separate evaluation rows"
        )
    return share


def _parts(
    sources: Sequence[SourceSpec],
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    *,
    asks: bool,
    as_before: bool = False,
) -> list[Part]:
    """Return a part for each file; `asks` says whether completions are separated from prompts.

    `as_before` is that of `open_sources`.
    """
    parts = []
    by_turns = replace(recipe, loss_on="completion")
    with downloads(recipe.cache) as copies:
        for spec in sources:
            row_format = source_format(spec, tokenizer)
            for source in open_sources(spec, recipe.cache, copies, as_before=as_before):
                table = tokenised(source, row_format, recipe)
                has_turns = asks and recipe.loss_on == "all" and spec.format != "text"
                parts.append(
                    Part(
                        source,
                        table,
                        np.arange(len(table.fates)),
                        spec.path,
                        spec.weight,
                        spec.format,
                        tokenised(source, row_format, by_turns) if has_turns else None,
                    )
                )
    return parts


def _mix(parts: Parts) -> dict[str, float]:
    total = sum(len(part.rows) for part in parts)
    shares: dict[str, float] = {}
    for part in parts:
        shares[part.path] = shares.get(part.path, 0.0) + len(part.rows) / total
    return shares


def _remarks(parts: Parts) -> tuple[str, ...]:
    """Return each remark once, for all files together."""
    found: dict[str, tuple[int, str]] = {}
    for part in parts:
        for said, remark in part.table.remarks.items():
            num_rows, first = found.get(said, (0, part.source.place(remark.first)))
            found[said] = (num_rows + remark.num_rows, first)
    return tuple(
        f"{said} ({num_rows} row{'s' if num_rows > 1 else ''}, first {place})"
        for said, (num_rows, place) in found.items()
    )


def _refuse_emptiness(data: DataSpec, used: Mapping[str, Parts], read: Mapping[str, Parts]) -> None:
    for name, parts in used.items():
        wanted = name != "test" or data.test
        if not wanted or any(len(part.rows) for part in parts):
            continue
        sources = ", ".join(part.source.name for part in read[name] or read["train"])
        if name == "eval" and data.eval_fraction is not None:
            raise DataError(
                f"{sources}: eval_fraction {data.eval_fraction} holds out none of its rows; "
                "raise it, or list evaluation rows under eval"
            )
        raise DataError(
            f"{sources}: no {name} row is left with anything to learn: rows are dropped if they have no "
            "answer, only empty ones, or `weight: 0` on all of them, or if the prompt fills "
            f"max_length ({data.max_length} tokens)"
        )


def _report(parts: Parts, split: Examples, *, overlap: int = 0) -> SplitReport:
    fates = np.concatenate([np.zeros(0, np.uint8), *(part.table.fates[part.rows] for part in parts)])
    lengths = np.concatenate([np.zeros(0, np.int64), *map(_full_lengths, parts)])
    kept = [part.kept() for part in parts]
    count = {fate: int((fates == fate).sum()) for fate in Fate}
    return SplitReport(
        num_examples=len(split),
        tokens=int(split.num_tokens.sum()),
        targets=int(split.num_targets.sum()),
        rows_read=len(fates),
        rows_kept=sum(number for fate, number in count.items() if fate.is_kept),
        truncated=count[Fate.TRUNCATED],
        cut_off=count[Fate.CUT_OFF],
        empty=count[Fate.EMPTY],
        duplicates=duplicates(kept),
        pieces=pieces(kept),
        overlap=overlap,
        token_lengths={
            name: int(np.quantile(lengths, share, method="higher", overwrite_input=True))
            for name, share in _QUANTILES.items()
            if len(lengths)
        },
    )


def _full_lengths(part: Part) -> NDArray[np.int64]:
    """Return the full lengths of rows that are not empty."""
    rows = part.rows[part.table.fates[part.rows] != Fate.EMPTY]
    lengths: NDArray[np.int64] = part.table.full_lengths[rows]
    return lengths


def _fingerprint(splits: Iterable[Examples]) -> str:
    return hashlib.sha256(" ".join(split.content_hash() for split in splits).encode()).hexdigest()
