"""Tokens that a tokenizer cuts out of a text before it reads the rest: there a text may be cut."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer


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
        """Where the first begins, with the white space that belongs to it; the text's length without any."""
        may_have_one = any(initial in text for initial in self._initials)
        found = self._pattern.search(text) if self._pattern and may_have_one else None
        return found.start() if found else len(text)


def _is_cut_out(tokenizer: Tokenizer, token: Mapping[str, Any]) -> bool:
    """Within a word, too; one that is looked for after normalisation may be spelled there."""
    if token["single_word"] or not token["content"]:
        return False
    content: str = token["content"]
    return not token["normalized"] or token["id"] in tokenizer.encode(f"a{content}a").ids
