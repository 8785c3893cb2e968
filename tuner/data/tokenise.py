"""Segments of text to token ids and target masks, with the beginning and the end that training needs."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from tuner.data.segments import Segment
from tuner.data.windows import Windows, spans
from tuner.errors import DataError, ModelError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

_MOST_CHARACTERS = 500_000
"""Tokenised at once, at 200 bytes a character. A longer text is cut, if it can be where a line begins."""


class Fate(IntEnum):
    """What became of a row."""

    KEPT = 0
    TRUNCATED = 1
    """Kept, its first max_length tokens."""
    CUT_OFF = 2
    """Dropped: max_length left no target."""
    EMPTY = 3
    """Dropped: nothing to learn, such as empty answers or a conversation without assistant turn."""

    @property
    def is_kept(self) -> bool:
        """Whether the row is an example."""
        return self in (Fate.KEPT, Fate.TRUNCATED)


@dataclass(frozen=True, slots=True, eq=False)
class TokenisedRow:
    """A row's tokens, at most max_length; none when it was dropped."""

    tokens: NDArray[np.int32]
    targets: NDArray[np.bool_]
    full_length: int
    """Tokens before truncation."""
    fate: Fate


class Tokeniser:
    """A fast tokenizer, used so that training and inference see the same tokens.

    Each segment is tokenised by itself. So the prompt's tokens do not depend on what follows, and a
    prompt tokenised for inference is exactly the beginning of the training example; tokenised as one
    text, the last characters of a prompt may merge with the first of the completion into a token
    that no prompt ends with. A segment in the middle of a text does not get the space that some
    tokenizers put before a text.
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
        self._beginning = self._find_beginning()
        self._bos_text = self._text_of_bos(tokenizer.bos_token)
        plain_only = backend.encode_special_tokens
        identity = json.dumps([text, plain_only, tokenizer.chat_template, self._beginning, self._end])
        self.fingerprint = hashlib.sha256(identity.encode()).hexdigest()
        """Hash of everything in the tokenizer that decides about tokens."""

    @property
    def beginning_tokens(self) -> int:
        """How many tokens the tokenizer itself puts before a text, such as BOS."""
        return len(self._beginning)

    def prompt(self, text: str, *more: str, starts_plain: bool) -> list[int]:
        """Token ids of the segments that a completion follows."""
        texts = self._without_bos([text, *more]) if starts_plain else [text, *more]
        ids: list[int] = self._first.encode(texts[0], add_special_tokens=False).ids
        for piece in self._ids(self._next, texts[1:]):
            ids.extend(piece)
        return self._beginning + ids if starts_plain else ids

    def rows(
        self,
        rows: Sequence[tuple[Segment, ...]],
        *,
        starts_plain: bool,
        loss_on: Literal["completion", "all"],
        max_length: int,
    ) -> list[TokenisedRow]:
        """Tokenise rows together. An example that is not truncated ends with exactly one EOS.

        With `starts_plain` it begins with exactly one BOS, where the tokenizer puts one before a text.
        """
        if loss_on == "completion":
            rows = [_up_to_last_target(segments) for segments in rows]
        texts = [[segment.text for segment in segments] for segments in rows]
        if starts_plain:
            texts = [self._without_bos(of_row) for of_row in texts]
        firsts = iter(self._ids(self._first, [of_row[0] for of_row in texts if of_row]))
        nexts = iter(self._ids(self._next, [text for of_row in texts for text in of_row[1:]]))
        tokenised = []
        for segments in rows:
            ids = array("i", self._beginning if starts_plain else ())
            targets = bytearray(len(ids))
            for index, segment in enumerate(segments):
                piece = next(nexts if index else firsts)
                ids.extend(piece)
                targets += bytes([_is_learned(segment, loss_on)]) * len(piece)
            if not ids or ids[-1] != self._end:
                ids.append(self._end)
                targets.append(not segments or not segments[-1].is_masked)
            has_text = any(self._says(s.text) for s in segments if _is_learned(s, loss_on))
            tokenised.append(_cut(ids, bytes(targets), max_length, has_text=has_text))
        return tokenised

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
                f"max_length {max_length} leaves no room for anything new after overlap_tokens "
                f"({windows.overlap_tokens}) and the beginning of a text ({len(self._beginning)} tokens)"
            )
        separator = windows.separator if windows.fills else ""
        first, position, ids, has_text = 0, 0, array("i"), False
        for texts in rows:
            pieces = self._ids(self._next, [text + separator for text in texts])
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
        """Ids of a text that begins an example, given those that it has further on."""
        [plain] = self._without_bos([text])
        if self._next is self._first and plain == text:
            return as_next
        [ids] = self._ids(self._first, [plain])
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
        """How a text writes the BOS that the tokenizer puts before it; None where it puts none."""
        ids = self._first.encode(str(bos), add_special_tokens=False).ids if bos is not None else []
        return str(bos) if len(ids) == 1 and ids[0] in self._beginning else None

    def _without_bos(self, texts: list[str]) -> list[str]:
        """The texts of an example without the BOS that the first of them begins with."""
        if self._bos_text is None:
            return texts
        at = next((index for index, text in enumerate(texts) if text), None)
        if at is None or not texts[at].startswith(self._bos_text):
            return texts
        text = texts[at]
        while text.startswith(self._bos_text):
            text = text.removeprefix(self._bos_text)
        return self._without_bos([*texts[:at], text, *texts[at + 1 :]])

    def _find_beginning(self) -> list[int]:
        """What the tokenizer itself puts before a whole text, such as BOS."""
        whole: list[int] = self._first.encode("a", add_special_tokens=True).ids
        plain: list[int] = self._first.encode("a", add_special_tokens=False).ids
        for at in range(len(whole) - len(plain) + 1):
            if plain and whole[at : at + len(plain)] == plain:
                return whole[:at]
        raise ModelError("the tokenizer has no tokens for the letter a; is it damaged?")

    def _ids(self, tokenizer: Tokenizer, texts: list[str]) -> list[Sequence[int]]:
        cut = [_parts_of_text(text) for text in texts]
        heads = tokenizer.encode_batch_fast([parts[0] for parts in cut], add_special_tokens=False)
        return [self._with_more(head.ids, parts[1:]) for head, parts in zip(heads, cut, strict=True)]

    def _with_more(self, ids: list[int], texts: Sequence[str]) -> Sequence[int]:
        if not texts:
            return ids
        whole = array("i", ids)
        for text in texts:
            whole.extend(self._next.encode(text, add_special_tokens=False).ids)
        return whole


def _is_learned(segment: Segment, loss_on: Literal["completion", "all"]) -> bool:
    return (segment.is_target or loss_on == "all") and not segment.is_masked


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
    for part in _parts(document["pre_tokenizer"], "pretokenizers"):
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
