"""Texts that do not fit an example and records that leave room in one: where examples begin and end."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Windows:
    """How texts become examples."""

    overlap_tokens: int = 0
    """Last tokens of an example that the next one of the same text begins with."""
    fills: bool = False
    """Whether records are put together as long as they fit; a row that does not is cut."""
    separator: str = ""
    """What stands between two records."""


def spans(num_tokens: int, *, room: int, overlap: int) -> Iterator[tuple[int, int, int]]:
    """(begin, first new token, end) of each example that a text of so many tokens is cut into.

    All but the last have `room` tokens; each begins `overlap` tokens before the one before it ends.
    """
    assert 0 <= overlap < room
    begin = new = 0
    while new < num_tokens:
        end = min(begin + room, num_tokens)
        yield begin, new, end
        begin, new = end - overlap, end
