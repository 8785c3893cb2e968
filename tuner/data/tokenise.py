"""Segments of text to token ids and target masks: those that inference sees, with beginning and end."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum, IntEnum, auto
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from tuner.data.examples import Opening, Segment
from tuner.data.plain_text import Windows, spans
from tuner.data.special_tokens import Marks
from tuner.errors import DataError, ModelError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

_MOST_CHARACTERS = 500_000
"""Tokenised at once, at 200 bytes a character. A longer text is cut, if it can be where a line begins."""


class Fate(IntEnum):
    """What happened to a row."""

    KEPT = 0
    TRUNCATED = 1
    """Kept, its first max_length tokens."""
    CUT_OFF = 2
    """Dropped: max_length left no target."""
    EMPTY = 3
    """Dropped: nothing to learn, such as empty answers or a conversation without assistant turn."""

    @property
    def is_kept(self) -> bool:
        """Return whether the row is an example."""
        return self in (Fate.KEPT, Fate.TRUNCATED)


@dataclass(frozen=True, slots=True, eq=False)
class TokenisedRow:
    """A row's tokens, at most max_length; none when it was dropped."""

    tokens: NDArray[np.int32]
    targets: NDArray[np.bool_]
    full_length: int
    """Tokens before truncation."""
    fate: Fate


class _After(Enum):
    """What stands before a piece of text, on which it depends whether the tokenizer puts a space there."""

    NOTHING = auto()
    MARK = auto()
    TEXT = auto()


@dataclass(frozen=True, slots=True)
class _Run:
    """Text that is tokenised at once."""

    text: str
    after: _After
    parts: tuple[Segment, ...]
    """What it is joined from."""


class Tokeniser:
    """A fast tokenizer, used so that training and inference see the same tokens.

    A row's tokens are those of its whole text, as `apply_chat_template(tokenize=True)` has them, with one
    exception: the text is cut where a target begins, since there a prompt ends. Tokenised as one text, the
    last characters of a prompt may merge with the first of the completion into a token that no prompt ends
    with. So a prompt tokenised for inference is exactly the beginning of the training example.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        from tokenizers import Tokenizer

        backend = tokenizer.backend_tokenizer
        document = json.loads(backend.to_str())
        document["truncation"] = document["padding"] = None
        text = json.dumps(document)
        self._first: Tokenizer = Tokenizer.from_str(text)
        self._next = self._first
        if _drop_prefix_space(document):
            self._next = Tokenizer.from_str(json.dumps(document))
        for own in (self._first, self._next):
            own.encode_special_tokens = backend.encode_special_tokens
        self._end = int(tokenizer.eos_token_id)
        self._end_text = str(tokenizer.eos_token)
        self._marks = Marks(self._first, document, special_are_text=backend.encode_special_tokens)
        self._by_context = {
            _After.NOTHING: self._first,
            _After.MARK: self._first if self._puts_space_after_marks() else self._next,
            _After.TEXT: self._next,
        }
        self._beginning = self._find_beginning()
        self._bos_text = self._text_of_bos(tokenizer.bos_token)
        plain_only = backend.encode_special_tokens
        identity = json.dumps([text, plain_only, tokenizer.chat_template, self._beginning, self._end])
        self.fingerprint = hashlib.sha256(identity.encode()).hexdigest()
        """Hash of everything in the tokenizer that decides about tokens."""

    @property
    def beginning(self) -> list[int]:
        """Return what the tokenizer itself puts before a text, such as BOS."""
        return self._beginning

    def prompt(self, segments: Sequence[Segment], opening: Opening) -> list[int]:
        """Return the token ids of the segments before a completion."""
        runs = self._runs(segments, opening, loss_on="completion")
        ids = [token for of_run, _ in self._encoded(runs, loss_on="completion") for token in of_run]
        return ids if opening is Opening.WRITTEN else self._beginning + ids

    def rows(
        self,
        rows: Sequence[tuple[Segment, ...]],
        opening: Opening,
        *,
        loss_on: Literal["completion", "all"],
        max_length: int,
    ) -> list[TokenisedRow]:
        """Tokenise rows together. An example that is not truncated ends with exactly one EOS.

        Unless its opening is written, it begins with exactly one BOS, where the tokenizer puts one before a
        text.
        """
        if loss_on == "completion":
            rows = [_up_to_last_target(segments) for segments in rows]
        runs = [self._runs(segments, opening, loss_on=loss_on) for segments in rows]
        encoded = iter(self._encoded([run for of_row in runs for run in of_row], loss_on=loss_on))
        tokenised = []
        for segments, of_row in zip(rows, runs, strict=True):
            ids = array("i", () if opening is Opening.WRITTEN else self._beginning)
            targets = bytearray(len(ids))
            for _ in of_row:
                piece, learned = next(encoded)
                ids.extend(piece)
                targets += learned
            if not ids or ids[-1] != self._end:
                ids.append(self._end)
                targets.append(not segments or not segments[-1].is_masked)
            has_text = any(self._says(s.text) for s in segments if _is_learned(s, loss_on))
            tokenised.append(_cut(ids, bytes(targets), max_length, has_text=has_text))
        return tokenised

    def _runs(
        self, segments: Sequence[Segment], opening: Opening, *, loss_on: Literal["completion", "all"]
    ) -> list[_Run]:
        """Join segments that must be tokenised at once.

        A cut is where a target begins, and wherever it changes no token: beside a mark.
        """
        if opening is not Opening.WRITTEN:
            segments = self._without_bos(segments)
        after = _After.MARK if opening is Opening.TEMPLATE and self._beginning else _After.NOTHING
        runs: list[_Run] = []
        for segment in segments:
            text, last = segment.text, runs[-1] if runs else None
            if last is not None and self._marks.end(last.text):
                after = _After.MARK
                if self._marks.swallow_after(last.text):
                    text = text.lstrip()
            elif last is not None:
                after = _After.TEXT
                if not segment.is_target and not self._marks.begin(text):
                    runs[-1] = _joined(last, segment, loss_on)
                    continue
            if text:
                part = segment if text == segment.text else replace(segment, text=text)
                runs.append(_Run(text, after, (part,)))
        return runs

    def _encoded(
        self, runs: Sequence[_Run], *, loss_on: Literal["completion", "all"]
    ) -> Iterator[tuple[Sequence[int], bytes]]:
        """Return the ids of each run, and whether each id is a target."""
        whole = iter(self._ids([(run.text, run.after) for run in runs if len(run.parts) == 1]))
        for run in runs:
            if len(run.parts) == 1:
                ids = next(whole)
                yield ids, bytes([_is_learned(run.parts[0], loss_on)]) * len(ids)
            else:
                yield self._encoded_by_parts(run, loss_on=loss_on)

    def _encoded_by_parts(
        self, run: _Run, *, loss_on: Literal["completion", "all"]
    ) -> tuple[Sequence[int], bytes]:
        """Encode runs; a token belongs to the part where it begins, or to a masked part that it contains."""
        ids, begins, ends, position = array("i"), array("q"), array("q"), 0
        for text, after in self._pieces(run.text, run.after):
            encoding = self._by_context[after].encode(text, add_special_tokens=False)
            ids.extend(encoding.ids)
            begins.extend(position + begin for begin, _ in encoding.offsets)
            ends.extend(position + end for _, end in encoding.offsets)
            position += len(text)
        bounds = list(accumulate(len(part.text) for part in run.parts))
        learned = np.array([_is_learned(part, loss_on) for part in run.parts])
        masked = np.array([part.is_masked for part in run.parts])
        first = np.searchsorted(bounds, begins, side="right").clip(max=len(bounds) - 1)
        last = np.searchsorted(bounds, ends, side="left").clip(max=len(bounds) - 1)
        return ids, (learned[first] & ~masked[last]).tobytes()

    def windowed(
        self, rows: Iterable[Sequence[str]], windows: Windows, *, max_length: int
    ) -> Iterator[tuple[range, Iterable[TokenisedRow]]]:
        """Tokenise texts, all of them targets, which come in batches.

        Yields which of the texts, counted from the first, went together, and the examples they became: one
        that fits, or several. The last of them ends with EOS, each begins with what the tokenizer puts before
        a text. Raises DataError when `max_length` leaves no room for new tokens.
        """
        room = max_length - len(self._beginning)
        if room <= windows.overlap_tokens:
            raise DataError(
                f"max_length {max_length} leaves no room for new tokens after overlap_tokens "
                f"({windows.overlap_tokens}) and the beginning of a text ({len(self._beginning)} tokens)"
            )
        separator = windows.separator if windows.fills else ""
        first, position, ids, has_text = 0, 0, array("i"), False
        for texts in rows:
            pieces = self._ids([(text + separator, _After.TEXT) for text in texts])
            for text, piece in zip(texts, pieces, strict=True):
                fits = windows.fills and len(ids) + len(piece) + 1 <= room
                if first < position and not fits:
                    yield range(first, position), self._windows(ids, windows, room, has_text=has_text)
                    first, ids, has_text = position, array("i"), False
                ids.extend(piece if first < position else self._opening(text + separator, piece))
                has_text = has_text or bool(text.strip())
                position += 1
        if first < position:
            yield range(first, position), self._windows(ids, windows, room, has_text=has_text)

    def _opening(self, text: str, as_next: Sequence[int]) -> Sequence[int]:
        """Return the ids of a text at the start of an example, given its ids elsewhere."""
        [plain] = self._without_bos([Segment(text, is_target=True)])
        if self._next is self._first and plain.text == text:
            return as_next
        [ids] = self._ids([(plain.text, _After.NOTHING)])
        return ids

    def _windows(
        self, ids: array[int], windows: Windows, room: int, *, has_text: bool
    ) -> Iterator[TokenisedRow]:
        if not has_text:
            yield _cut([*self._beginning, *ids], b"", room, has_text=False)
            return
        if ids[-1] != self._end:
            ids.append(self._end)
        for begin, new, end in spans(len(ids), room=room, overlap=windows.overlap_tokens):
            tokens = [*self._beginning, *ids[begin:end]]
            targets = bytes(len(tokens) - (end - new)) + b"\1" * (end - new)
            yield _cut(tokens, targets, len(tokens), has_text=True)

    def _says(self, text: str) -> bool:
        """Whether there is more in a text than where it begins and ends."""
        return bool(text.replace(self._end_text, "").replace(self._bos_text or self._end_text, "").strip())

    def _text_of_bos(self, bos: object) -> str | None:
        """Return the text of the BOS that the tokenizer puts before a text; None if it puts none."""
        ids = self._first.encode(str(bos), add_special_tokens=False).ids if bos is not None else []
        return str(bos) if len(ids) == 1 and ids[0] in self._beginning else None

    def _without_bos(self, segments: Sequence[Segment]) -> Sequence[Segment]:
        """Return the segments of an example without the BOS at their start."""
        if self._bos_text is None:
            return segments
        at = next((index for index, segment in enumerate(segments) if segment.text), None)
        if at is None or not segments[at].text.startswith(self._bos_text):
            return segments
        text = segments[at].text
        while text.startswith(self._bos_text):
            text = text.removeprefix(self._bos_text)
        return self._without_bos([*segments[:at], replace(segments[at], text=text), *segments[at + 1 :]])

    def _puts_space_after_marks(self) -> bool:
        """Whether text after a mark gets what the tokenizer puts before a text."""
        mark = self._end_text
        plain: list[int] = self._first.encode("a", add_special_tokens=False).ids
        return bool(self._first.encode(f"{mark}a", add_special_tokens=False).ids[-len(plain) :] == plain)

    def _find_beginning(self) -> list[int]:
        """Return what the tokenizer itself puts before a whole text, such as BOS."""
        whole: list[int] = self._first.encode("a", add_special_tokens=True).ids
        plain: list[int] = self._first.encode("a", add_special_tokens=False).ids
        for at in range(len(whole) - len(plain) + 1):
            if plain and whole[at : at + len(plain)] == plain:
                return whole[:at]
        raise ModelError("the tokenizer has no tokens for the letter a; is the file damaged?")

    def _ids(self, texts: Sequence[tuple[str, _After]]) -> list[Sequence[int]]:
        """Return the ids of texts, each with what precedes it."""
        if self._next is self._first and all(len(text) <= _MOST_CHARACTERS for text, _ in texts):
            encodings = self._first.encode_batch_fast([text for text, _ in texts], add_special_tokens=False)
            return [encoding.ids for encoding in encodings]
        cut = [self._pieces(text, after) for text, after in texts]
        encoded = {}
        for own in {id(own): own for own in self._by_context.values()}.values():
            of_own = [text for pieces in cut for text, after in pieces if self._by_context[after] is own]
            encoded[id(own)] = iter(own.encode_batch_fast(of_own, add_special_tokens=False))
        found: list[Sequence[int]] = []
        for pieces in cut:
            ids = [next(encoded[id(self._by_context[after])]).ids for _, after in pieces]
            found.append(ids[0] if len(ids) == 1 else array("i", (token for of in ids for token in of)))
        return found

    def _pieces(self, text: str, after: _After) -> list[tuple[str, _After]]:
        """Return the text in pieces, cut where it is too long or the tokenizer without a space must end."""
        texts = _parts_of_text(text)
        pieces = [(texts[0], after), *((more, _After.TEXT) for more in texts[1:])]
        if self._next is self._first:
            return pieces
        return [part for piece in pieces for part in self._cut_at_mark(*piece)]

    def _cut_at_mark(self, text: str, after: _After) -> list[tuple[str, _After]]:
        at = self._marks.first_in(text) if self._by_context[after] is self._next else len(text)
        pieces = [(text[:at], after), (text[at:], _After.NOTHING)]
        return [piece for piece in pieces if piece[0]] or [(text, after)]


def _is_learned(segment: Segment, loss_on: Literal["completion", "all"]) -> bool:
    return (segment.is_target or loss_on == "all") and not segment.is_masked


def _joined(run: _Run, segment: Segment, loss_on: Literal["completion", "all"]) -> _Run:
    """Return the run extended by a segment; merge parts that the loss treats alike."""
    *before, last = run.parts
    if (_is_learned(last, loss_on), last.is_masked) == (_is_learned(segment, loss_on), segment.is_masked):
        parts = (*before, replace(last, text=last.text + segment.text))
    else:
        parts = (*run.parts, segment)
    return _Run(run.text + segment.text, run.after, parts)


def _up_to_last_target(segments: tuple[Segment, ...]) -> tuple[Segment, ...]:
    while segments and not segments[-1].is_target:
        segments = segments[:-1]
    return segments


def _parts_of_text(text: str) -> list[str]:
    parts, begin = [], 0
    while len(text) - begin > _MOST_CHARACTERS:
        half, end = begin + _MOST_CHARACTERS // 2, begin + _MOST_CHARACTERS
        at = text.rfind("\n", half, end) + 1 or text.rfind(" ", half, end)
        parts.append(text[begin : at if at > 0 else end])
        begin += len(parts[-1])
    return [*parts, text[begin:]]


def _cut(ids: Sequence[int], targets: bytes, max_length: int, *, has_text: bool) -> TokenisedRow:
    mask = np.frombuffer(targets[:max_length], dtype=bool).copy()
    mask[:1] = False
    if not has_text:
        fate = Fate.EMPTY
    elif not mask.any():
        fate = Fate.CUT_OFF
    else:
        fate = Fate.TRUNCATED if len(ids) > max_length else Fate.KEPT
    kept = max_length if fate.is_kept else 0
    return TokenisedRow(np.array(ids[:kept], dtype=np.int32), mask[:kept], len(ids), fate)


def _drop_prefix_space(document: dict[str, Any]) -> bool:
    """Take from a serialised tokenizer what it puts before a text; False when it puts nothing."""
    before = json.dumps([document["normalizer"], document["pre_tokenizer"]])
    for part in _parts(document["normalizer"], "normalizers"):
        if part["type"] == "Prepend":
            part["prepend"] = ""
    # One that follows another puts its space before each part that the other has cut.
    for part in _parts(document["pre_tokenizer"], "pretokenizers")[:1]:
        if part["type"] == "Metaspace":
            part["prepend_scheme"] = "never"
        if part["type"] == "ByteLevel":
            part["add_prefix_space"] = False
    return before != json.dumps([document["normalizer"], document["pre_tokenizer"]])


def _parts(component: dict[str, Any] | None, children: str) -> list[dict[str, Any]]:
    if component is None:
        return []
    if component["type"] == "Sequence":
        return [part for child in component[children] for part in _parts(child, children)]
    return [component]
