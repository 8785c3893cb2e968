"""YAML 1.2 as text: parsing it with line numbers, and writing a value on one line."""

from __future__ import annotations

import datetime
import io
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.reader import ReaderError
from ruamel.yaml.scalarbool import ScalarBoolean
from ruamel.yaml.scalarstring import DoubleQuotedScalarString

from tuner.spec.refusals import Location


class YamlError(ValueError):
    """Text that is no YAML, or YAML that is no plain data."""

    def __init__(self, message: str, line: int | None) -> None:
        super().__init__(message)
        self.message = message
        self.line = line
        """1-based, where one can be named."""


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
    try:
        node = YAML(typ="rt", pure=True).load(text)
    except (YAMLError, ValueError) as error:
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
            return int(node)
        case float():
            return float(node)
        case datetime.date():
            return node.isoformat()
        case _:
            raise YamlError(
                "expects plain text, numbers, lists or `key: value` lines, without YAML tags", line
            )


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


def _explained(error: YAMLError | ValueError, text: str) -> YamlError:
    if isinstance(error, ReaderError):
        line = text.count("\n", 0, error.position) + 1
        return YamlError(f"holds the character {text[error.position]!r}, which YAML does not allow", line)
    if not isinstance(error, MarkedYAMLError):
        return YamlError(f"is not YAML: {error}", None)
    mark = error.problem_mark or error.context_mark
    row = None if mark is None else mark.line + 1
    problem = str(error.problem or error.context)
    if twice := re.match(r'found duplicate key "(.*?)" with value', problem, re.DOTALL):
        return YamlError(f"the key {twice[1]} stands here a second time; keep one of them", row)
    if r"'\t'" in problem:
        return YamlError("a tab cannot indent or separate in YAML; use spaces", row)
    during = f" {error.context}" if error.context and error.problem else ""
    return YamlError(f"is not YAML: {problem}{during}", row)
