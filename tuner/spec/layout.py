"""Where each key and value of a YAML mapping stands in the text, to the character."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ruamel.yaml import YAML
from ruamel.yaml.nodes import CollectionNode, MappingNode, Node, ScalarNode
from ruamel.yaml.tokens import DirectiveToken, DocumentEndToken, DocumentStartToken, ScalarToken, Token


@dataclass(frozen=True, slots=True)
class Entry:
    """A key and its value. All places are indices into the text."""

    name: str
    start: int
    """First character of the key."""
    colon: int
    """After the colon."""
    value_start: int
    end: int
    """After the last character of the value, without the comment that follows it."""
    is_block: bool
    """Whether the value is a list or a mapping written by indentation."""
    comment_line: int
    """A place on the line that ends with the entry's comment: a block's first, or else its last."""
    inside: Section | None
    """The value's own entries, when it is a mapping that stands here (and not an alias of one elsewhere)."""


@dataclass(frozen=True, slots=True)
class Section:
    """The entries of a mapping in the order of the text."""

    entries: tuple[Entry, ...]
    is_flow: bool
    """Whether it stands between braces."""
    end: int

    def find(self, name: str) -> Entry | None:
        """The entry of that name."""
        return next((entry for entry in self.entries if entry.name == name), None)


@dataclass(frozen=True, slots=True)
class Layout:
    """A text, and where its mappings are."""

    text: str
    root: Section
    ends: tuple[int, ...]
    """Where each piece of content ends, in order; after the last of a line only a comment can follow."""

    @classmethod
    def of(cls, text: str) -> Layout:
        """The layout of a text that is known to be a YAML mapping."""
        tokens = YAML(typ="safe", pure=True).scan(text)
        ends = tuple(sorted(_content_ends(tokens, text)))
        node = YAML(typ="rt", pure=True).compose(text)
        return cls(text, _section(node, text, ends), ends)

    def find(self, path: list[str]) -> Entry | None:
        """The entry that a path of keys leads to."""
        section: Section | None = self.root
        entry = None
        for name in path:
            entry = section.find(name) if section else None
            section = entry.inside if entry else None
        return entry

    def line_start(self, index: int) -> int:
        """Index of the first character of the line."""
        return self.text.rfind("\n", 0, index) + 1

    def line_end(self, index: int) -> int:
        """Index after the last character of the line, without its line break."""
        end = self.text.find("\n", index)
        if end < 0:
            return len(self.text)
        return end - 1 if end > index and self.text[end - 1] == "\r" else end

    def content_end(self, index: int) -> int:
        """Index after the content of the line: what follows there is blank or a comment."""
        return self.ends[bisect_right(self.ends, self.line_end(index)) - 1]


_CONTENT_LESS = (DirectiveToken, DocumentStartToken, DocumentEndToken)
_ALIAS = re.compile(r"[ \t]*(\*[^\s,\[\]{}]+)")
_BLOCK_SCALAR = re.compile(r"[|>][0-9+-]*")


def _section(node: MappingNode, text: str, ends: tuple[int, ...]) -> Section:
    entries = tuple(_entry(key, value, text, ends) for key, value in node.value)
    return Section(entries, bool(node.flow_style), _end(node, ends))


def _entry(key: Node, value: Node, text: str, ends: tuple[int, ...]) -> Entry:
    colon = text.find(":", key.end_mark.index) + 1
    start, end, inside = value.start_mark.index, _end(value, ends), None
    if start < key.start_mark.index:
        alias = _ALIAS.match(text, colon)
        start, end = alias.span(1) if alias else (colon, colon)
    elif value.end_mark.index == start:
        start = end = colon
    elif isinstance(value, MappingNode):
        inside = _section(value, text, ends)
    is_block = isinstance(value, CollectionNode) and not value.flow_style and start > colon
    is_block_scalar = isinstance(value, ScalarNode) and value.style in ("|", ">")
    comment_line = colon if is_block or is_block_scalar else end
    return Entry(str(key.value), key.start_mark.index, colon, start, end, is_block, comment_line, inside)


def _end(node: Node, ends: tuple[int, ...]) -> int:
    """Where a node's content ends: ruamel's mark of a block is past the comments and blanks after it."""
    return ends[bisect_right(ends, node.end_mark.index) - 1]


def _content_ends(tokens: Iterable[Token], text: str) -> Iterator[int]:
    for token in tokens:
        start, end = token.start_mark.index, token.end_mark.index
        if isinstance(token, _CONTENT_LESS) or start == end:
            continue
        if isinstance(token, ScalarToken) and (header := _BLOCK_SCALAR.match(text, start)):
            yield header.end()
        yield start + len(text[start:end].rstrip())
