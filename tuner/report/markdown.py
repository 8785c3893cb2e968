"""Markdown in which nothing that a person or a program wrote is taken for markup."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence


def escaped(text: str) -> str:
    """Text that Markdown shows as it is, on one line. Underscores within words mean nothing to it."""
    one_line = " ".join(text.split())
    return re.sub(r"([\\`*<>\[\]|#]|(?<!\w)_|_(?!\w))", r"\\\1", one_line)


def prose(text: str) -> str:
    """Text in which `backquotes` mark code, all else taken literally."""
    parts = re.split(r"(`[^`]+`)", text)
    return "".join(part if i % 2 else escaped(part) for i, part in enumerate(parts))


def code(text: str) -> str:
    """Text as code, on one line."""
    return f"`{' '.join(text.split()).replace('`', '')}`"


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, num_words: int = 0) -> str:
    """A table whose last `num_words` columns are words, the others numbers."""
    lines = [f"| {' | '.join(escaped(cell) for cell in row)} |" for row in (header, *rows)]
    kinds = ["---:"] * (len(header) - num_words) + ["---"] * num_words
    return "\n".join([lines[0], f"|{'|'.join(kinds)}|", *lines[1:]])
