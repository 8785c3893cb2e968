"""YAML text: parsed with the line of every value, and where each key stands."""

from __future__ import annotations

import datetime
import io
import re
import sys
import warnings
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import MarkedYAMLError, ReusedAnchorWarning, YAMLError
from ruamel.yaml.nodes import CollectionNode, MappingNode, Node, ScalarNode
from ruamel.yaml.reader import ReaderError
from ruamel.yaml.scalarbool import ScalarBoolean
from ruamel.yaml.scalarstring import DoubleQuotedScalarString
from ruamel.yaml.tokens import DirectiveToken, DocumentEndToken, DocumentStartToken, ScalarToken, Token

from tuner.config.wording import Location
from tuner.config.yaml_limits import YamlError, refuse_costly

__all__ = ["Layout", "Parsed", "Section", "YamlError", "one_line", "parse", "plain"]


@dataclass(frozen=True, slots=True)
class Parsed:
    """A YAML document as plain dicts, lists and scalars."""

    document: Any
    lines: Mapping[Location, int]
    """1-based line of every key and list item."""

    def line(self, location: Location) -> int | None:
        """The line of a place, or of the nearest place above it that the text has."""
        for end in range(len(location), 0, -1):
            if location[:end] in self.lines:
                return self.lines[location[:end]]
        return None


def parse(text: str) -> Parsed:
    """Read one YAML document. Raises YamlError with the line."""
    parsed = _parsed(text)
    return replace(parsed, document=deepcopy(parsed.document))


@lru_cache(maxsize=16)  # a command asks for the same round file up to ten times, 20 ms each
def _parsed(text: str) -> Parsed:
    try:
        refuse_costly(text)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ReusedAnchorWarning)
            node = YAML(typ="rt", pure=True).load(text)
    except YamlError:
        raise
    except (YAMLError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        # ruamel's constructors raise these for scalars that only look like a number, a date or a merge.
        raise _explained(error, text) from None
    lines: dict[Location, int] = {}
    return Parsed(_converted(node, (), lines, ()), lines)


def one_line(value: Any) -> str:
    """A value as YAML on one line, safe inside `{...}` and `[...]` as well."""
    yaml = YAML(typ="rt", pure=True)
    yaml.default_flow_style = True
    yaml.width = sys.maxsize
    yaml.brace_single_entry_mapping_in_flow_sequence = True
    yaml.representer.ignore_aliases = lambda *_: True
    stream = io.StringIO()
    yaml.dump([_escaped(plain(value))], stream)
    return stream.getvalue().strip()[1:-1]


def plain(value: Any) -> Any:
    """The value as YAML and JSON see it: tuples as lists, enums and numpy's floats as what they extend."""
    match value:
        case Mapping():
            return {str(key): plain(item) for key, item in value.items()}
        case list() | tuple():
            return [plain(item) for item in value]
        case bool():
            return value
        case int():
            return int(value)
        case float():
            return float(value)
        case str():
            return str(value)
        case _:
            return value


def _converted(node: Any, at: Location, lines: dict[Location, int], above: tuple[int, ...]) -> Any:
    """The node without ruamel's types; fills `lines`. `above` are the ids of the nodes around it."""
    line = lines.get(at)
    match node:
        case CommentedMap() | CommentedSeq() if id(node) in above:
            raise YamlError("an alias that contains itself", line)
        case CommentedMap():
            lines.update(_lines(node, at))
            inside = (*above, id(node))
            return {
                str(key): _converted(value, (*at, str(key)), lines, inside) for key, value in node.items()
            }
        case CommentedSeq():
            lines.update(_lines(node, at))
            return [_converted(item, (*at, key), lines, (*above, id(node))) for key, item in enumerate(node)]
        case None | str():
            return None if node is None else str(node)
        case bool() | ScalarBoolean():
            return bool(node)
        case int():
            return _finite(node, line)
        case float():
            return float(node)
        case datetime.date():
            return node.isoformat()
        case _:
            raise YamlError(
                "expects plain text, numbers, lists or `key: value` lines, without YAML tags", line
            )


def _finite(number: int, line: int | None) -> int:
    try:
        float(number)
    except OverflowError:
        raise YamlError("a whole number of more than 308 digits", line) from None
    return int(number)


def _lines(node: CommentedMap | CommentedSeq, at: Location) -> dict[Location, int]:
    """1-based lines of a container's own keys or items; merged keys have none."""
    places = node.lc.data or {}
    return {
        (*at, key if isinstance(node, CommentedSeq) else str(key)): place[0] + 1
        for key, place in places.items()
    }


def _escaped(value: Any) -> Any:
    """The value with text marked for double quotes where ruamel would write it so that it reads otherwise.

    That is unusual characters, which only double quotes can escape, and a key that begins with a colon.
    """
    match value:
        case dict():
            return {_escaped(key): _escaped(item) for key, item in value.items()}
        case list():
            return [_escaped(item) for item in value]
        case str() if not value.isprintable() or value.startswith(":"):
            return DoubleQuotedScalarString(value)
        case _:
            return value


def _explained(error: Exception, text: str) -> YamlError:
    if isinstance(error, ReaderError):
        line = text.count("\n", 0, error.position) + 1
        return YamlError(f"contains the character {text[error.position]!r}, which YAML does not allow", line)
    if not isinstance(error, MarkedYAMLError):
        return YamlError(f"is not YAML: {' '.join(str(error).split()) or type(error).__name__}", None)
    mark = error.problem_mark or error.context_mark
    row = None if mark is None else mark.line + 1
    problem = str(error.problem or error.context)
    if twice := re.match(r'found duplicate key "(.*?)" with value', problem, re.DOTALL):
        return YamlError(f"the key {twice[1]} appears a second time; keep one of them", row)
    if r"'\t'" in problem:
        return YamlError("a tab cannot indent or separate in YAML; use spaces", row)
    if "<document start>" in problem:
        return YamlError("is not one YAML document: a round file is `key: value` lines", row)
    if re.search(r"<block end>, but found '(<block|\?|-)", problem):
        said = "begins in another column than the keys above; keys of one section begin in the same column"
        return YamlError(f"is not YAML: the line {said}", row)
    if "could not find expected ':'" in problem and error.context_mark is not None:
        return YamlError("is not YAML: expects `key: value`, with a colon", error.context_mark.line + 1)
    during = f" {error.context}" if error.context and error.problem else ""
    return YamlError(f"is not YAML: {problem}{during}", row)


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
