"""Special tokens: where they cut a text, and those that a row says itself, which are read as real ones."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tuner.data.examples import Opening, Row, Segment
from tuner.data.formats import RowFormat
from tuner.errors import DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

    from tuner.data.tokenise import Tokeniser


class Marks:
    """The added tokens of a tokenizer, such as EOS and those of a chat template.

    What stands before a mark and what stands after it are tokenised apart. So a text that is cut there has
    the tokens of the whole, but for the space that some tokenizers put before a text.
    """

    def __init__(self, tokenizer: Tokenizer, document: Mapping[str, Any], *, special_are_text: bool) -> None:
        """`document` is the tokenizer, serialised; `special_are_text`, whether it reads those as text."""
        added = [
            token
            for token in document["added_tokens"]
            if not (token["special"] and special_are_text) and _is_cut_out(tokenizer, token)
        ]
        self._contents = tuple(token["content"] for token in added)
        self._initials = {content[0] for content in self._contents}
        self._swallowing = tuple(token["content"] for token in added if token["rstrip"])
        longest_first = sorted(added, key=lambda token: -len(token["content"]))
        patterns = [(r"\s*" if t["lstrip"] else "") + re.escape(t["content"]) for t in longest_first]
        self._pattern = re.compile("|".join(patterns)) if patterns else None

    def begin(self, text: str) -> bool:
        """Whether the text begins with one."""
        return self._pattern is not None and self._pattern.match(text) is not None

    def end(self, text: str) -> bool:
        """Whether the text ends with one, or with the white space that belongs to it."""
        return text.endswith(self._contents) or self.swallow_after(text)

    def swallow_after(self, text: str) -> bool:
        """Whether the text ends with one that white space belongs to: what follows loses its first."""
        return bool(self._swallowing) and text.rstrip().endswith(self._swallowing)

    def first_in(self, text: str) -> int:
        """Return where the first begins, including its white space; the text's length if there is none."""
        may_have_one = any(initial in text for initial in self._initials)
        found = self._pattern.search(text) if self._pattern and may_have_one else None
        return found.start() if found else len(text)


def _is_cut_out(tokenizer: Tokenizer, token: Mapping[str, Any]) -> bool:
    """Return whether it is cut out within a word, too, and before normalisation."""
    if token["single_word"] or not token["content"]:
        return False
    content: str = token["content"]
    return not token["normalized"] or token["id"] in tokenizer.encode(f"a{content}a").ids


_STAND_IN = re.compile("\ue0d0([0-9]+)\ue0d1")
"""What is put in the place of a token that a row says: characters that no text has."""


@dataclass(frozen=True, slots=True)
class _Found:
    """A special token in a rendered text."""

    id: int
    is_written: bool
    """Whether the row says it."""


class SpecialTokens:
    """Those of a tokenizer: where a row's own text has one, and which of its tokens that is.

    Not the BOS that a text begins with and the EOS that it ends with, of which an example has one each
    whether they are written or not.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tokeniser: Tokeniser) -> None:
        splits = tokenizer.backend_tokenizer.encode_special_tokens
        added = {} if splits else tokenizer.added_tokens_decoder
        self._ids = {token.content: id for id, token in added.items() if token.special and token.content}
        self._texts = {id: text for text, id in self._ids.items()}
        longest_first = sorted(self._ids, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._either = re.compile(f"{_STAND_IN.pattern}|{self._pattern.pattern}")
        self._beginning = tokeniser.beginning
        self._bos, self._eos = tokenizer.bos_token_id, tokenizer.eos_token_id

    def written(self, row: Row, row_format: RowFormat, segments: tuple[Segment, ...]) -> list[_Found]:
        """Return the special tokens in a row's text, in order.

        The row is rendered again with others in their place, and what then stands where they stood is what
        the row says. A template that looks for a token renders another text; then nothing is said of the row.
        """
        columns = {*row_format.needed, *row_format.optional}
        values = {name: self._stood_in(row.values[name]) for name in columns & row.values.keys()}
        if all(value is row.values[name] for name, value in values.items()):
            return []
        try:
            again = row_format.segments(replace(row, values={**row.values, **values}))
        except DataError:
            return []
        text, before = (_joined(texts) for texts in (again, segments))
        if _STAND_IN.search(before) or before != _STAND_IN.sub(lambda m: self._texts[int(m[1])], text):
            return []
        return list(self._found(text, row_format.opening))

    def written_in_plain(self, text: str) -> list[_Found]:
        """Return the special tokens of a row without a template, in order."""
        return [] if _STAND_IN.search(text) else list(self._found(self._stood_in(text), Opening.TEXT))

    def remarks(self, found: Sequence[_Found]) -> Iterator[str]:
        """Yield remarks on a row, in the same words for each such row."""
        for id in sorted({token.id for token in found if token.is_written}):
            yield (
                f"the special token {self._texts[id]!r} is in what rows say, and the model reads the token, "
                "not these letters; `--show` marks it, take it out where it is not meant"
            )

    def positions(
        self, ids: NDArray[np.int32], found: Sequence[_Found], opening: Opening
    ) -> NDArray[np.int64]:
        """Return the positions of an example's tokens that are special tokens of the row's text."""
        if not any(token.is_written for token in found):
            return np.zeros(0, np.int64)
        special = self._of(ids, opening)
        pairs = list(zip_longest(special, found[: len(special)]))
        # The EOS that an example ends with is not in the text.
        if any(other is not None and ids[at] != other.id for at, other in pairs):
            return np.zeros(0, np.int64)
        return np.array([at for at, other in pairs if other is not None and other.is_written], np.int64)

    def positions_in_plain(self, ids: NDArray[np.int32]) -> NDArray[np.int64]:
        """Return these positions in a piece of rows without a template."""
        special = self._of(ids, Opening.TEXT)
        if special and special[-1] == len(ids) - 1 and ids[-1] == self._eos:
            special = special[:-1]
        return np.array(special, np.int64)

    def _of(self, ids: NDArray[np.int32], opening: Opening) -> list[int]:
        """Return positions of special tokens, without those that the tokenizer puts before a text."""
        begins = 0 if opening is Opening.WRITTEN else len(self._beginning)
        found: list[int] = (np.flatnonzero(np.isin(ids[begins:], list(self._texts))) + begins).tolist()
        return found

    def _found(self, text: str, opening: Opening) -> Iterator[_Found]:
        """Return the special tokens of a text with placeholders."""
        opened = -1 if opening is Opening.WRITTEN else 0
        for match in self._either.finditer(text):
            id = int(match[1]) if match[1] is not None else self._ids[match[0]]
            opens = id == self._bos and match.start() == opened
            if opens:
                opened = match.end()
                if id in self._beginning:
                    continue  # the tokenizer's own takes its place
            ends = id == self._eos and match.end() == len(text)
            yield _Found(id, is_written=match[1] is not None and not opens and not ends)

    def _stood_in(self, value: Any) -> Any:
        """Return a value with placeholders for special tokens; itself if it has none."""
        match value:
            case str():
                if self._pattern.search(value) is None:
                    return value
                return self._pattern.sub(lambda match: f"\ue0d0{self._ids[match[0]]}\ue0d1", value)
            case list():
                items = [self._stood_in(item) for item in value]
                return items if any(a is not b for a, b in zip(items, value, strict=True)) else value
            case Mapping():
                held = {key: self._stood_in(item) for key, item in value.items()}
                return held if any(held[key] is not value[key] for key in held) else value
        return value


def _joined(segments: Sequence[Segment]) -> str:
    return "".join(segment.text for segment in segments)
