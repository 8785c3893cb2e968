"""What YAML in a round file may cost and contain: checked event by event, before anything is built."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.events import (
    AliasEvent,
    CollectionEndEvent,
    CollectionStartEvent,
    MappingStartEvent,
    NodeEvent,
    ScalarEvent,
)

MAX_CHARACTERS = 120_000
"""Fifty times a commented round file; more takes seconds to read."""
MAX_BYTES = 10_000_000
"""Of a file that is opened at all: somebody may name gigabytes of rows."""
MAX_DEPTH = 32
"""Levels of lists and mappings; a round file has five. Readers that recurse fail at some hundred."""
MAX_VALUES = 50_000
"""Values with every alias written out: a kilobyte of nested aliases can stand for millions."""

_SURROGATES = re.compile("[\ud800-\udfff]")
"""An escape such as `"\\ud800"` makes a text that nothing can write."""

_PLAIN_DATA = "expects plain text, numbers, lists or `key: value` lines, without YAML tags"


class YamlError(ValueError):
    """Text that is not YAML, or YAML that is not plain data."""

    def __init__(self, message: str, line: int | None) -> None:
        super().__init__(message)
        self.message = message
        self.line = line
        """1-based, where one can be named."""


@dataclass(slots=True)
class _Open:
    """A list or a mapping whose end has not come yet."""

    anchor: str | None
    is_mapping: bool
    num_children: int = 0
    num_values: int = 1
    """With aliases written out, itself included."""

    @property
    def expects_key(self) -> bool:
        return self.is_mapping and self.num_children % 2 == 0


def refuse_costly(text: str) -> None:
    """Raise YamlError for text that is too long, too deep or grows by aliases, and for what no file needs.

    Raises what ruamel.yaml does for text that is not YAML.
    """
    if len(text) > MAX_CHARACTERS:
        raise YamlError(
            f"has {len(text):,} characters; a round file has at most {MAX_CHARACTERS:,} (instead of a long "
            "list of values, write a range such as `{low: 1e-5, high: 1e-3, log: true}`)",
            None,
        )
    around: list[_Open] = []
    sizes: dict[str, int] = {}
    for event in YAML(typ="safe", pure=True).parse(text):
        if isinstance(event, NodeEvent):
            _refuse_node(event, around)
            _count(event, around, sizes)
        elif isinstance(event, CollectionEndEvent):
            ended = around.pop()
            if ended.anchor is not None:
                sizes[ended.anchor] = ended.num_values
            if around:
                around[-1].num_values += ended.num_values


def _refuse_node(event: NodeEvent, around: list[_Open]) -> None:
    line = event.start_mark.line + 1
    if _is_tagged(event):
        raise YamlError(_PLAIN_DATA, line)
    if isinstance(event, ScalarEvent) and (halves := _SURROGATES.search(event.value)):
        raise YamlError(
            f"contains {ascii(halves[0])[1:-1]}, half of a surrogate pair; write the character itself", line
        )
    if around and around[-1].expects_key and not isinstance(event, ScalarEvent):
        kind = "an alias" if isinstance(event, AliasEvent) else "a list or a mapping"
        raise YamlError(f"a key is {kind}; expects a name, as in `key: value`", line)
    if isinstance(event, AliasEvent) and event.anchor in {each.anchor for each in around}:
        raise YamlError("an alias that contains itself; write its value here instead", line)
    if isinstance(event, CollectionStartEvent) and len(around) >= MAX_DEPTH:
        raise YamlError(
            f"lists and mappings are nested more than {MAX_DEPTH} levels deep, and a round file has five; is "
            "a bracket not closed?",
            line,
        )


def _is_tagged(event: NodeEvent) -> bool:
    implicit: Any = getattr(event, "implicit", True)
    # A collection says whether its tag follows from its form; a scalar says so for each of two forms.
    return getattr(event, "ctag", None) is not None and implicit in (False, (False, False))


def _count(event: NodeEvent, around: list[_Open], sizes: dict[str, int]) -> None:
    if around:
        around[-1].num_children += 1
    match event:
        case CollectionStartEvent():
            around.append(_Open(event.anchor, isinstance(event, MappingStartEvent)))
            return
        case AliasEvent():
            num_values = sizes.get(event.anchor, 1)  # an unknown one is refused when it is composed
        case _:
            num_values = 1
            if event.anchor is not None:
                sizes[event.anchor] = 1
    if not around:
        return
    around[-1].num_values += num_values
    if sum(each.num_values for each in around) > MAX_VALUES:
        raise YamlError(
            f"stands for more than {MAX_VALUES:,} values once every alias is written out; write the values "
            "that you mean without aliases",
            event.start_mark.line + 1,
        )
