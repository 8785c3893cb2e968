"""The tools that can train a trial's command: their names, their schedules, and what a trial has to set.

A tool is described in one file. `command.tool` names it.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from tuner.methods.hyperparameters import Hyperparameter
from tuner.methods.kinds import Anything
from tuner.methods.registry import described
from tuner.methods.table import HYPERPARAMETERS
from tuner.records import Choices, Dimension, Fixed, Hyperparameters, Range, Space, Value

EXTRA = "extra."
"""Prefix of hyperparameters with the tool's own names."""
UNKNOWN_SCHEDULE = "unknown"
"""The schedule of a command that tuner does not write: nothing is known of its learning rate."""

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")

Settings: TypeAlias = Mapping[str, Any]
"""A tool's settings by its own names: of its configuration file, or as options."""


@dataclass(frozen=True, slots=True)
class TrialSettings:
    """What one trial's command is to do."""

    hyperparameters: Hyperparameters
    max_train_steps: int
    evaluate_every: int
    output: str
    """The folder that the command writes to."""
    gpus: int
    """Number of GPUs, 0 for none."""
    config: Settings
    """The content of the round's `command.config`, and the options in its command."""
    resume_from: str | None = None
    """The copy of a checkpoint that the command may read and that is its own."""


class Mistaken(NamedTuple):
    """A setting that cannot be used."""

    name: str
    """A hyperparameter of the round file, or a key of the tool's configuration."""
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """A tool that a round file may name."""

    name: str
    meaning: str
    """A sentence for the reference pages."""
    hyperparameters: tuple[str, ...] = ()
    """tuner's names that it understands."""
    always: tuple[str, ...] = ()
    """Those that every trial sets, whether or not the round file names them."""
    takes_any_name: bool = False
    """Whether names that are neither tuner's nor below `extra` are passed as they are."""
    settings: Callable[[TrialSettings], Settings]
    """Returns what a trial sets, by the tool's names."""
    mistakes: Callable[[Sequence[str], Settings, Space], Iterator[Mistaken]]
    """Yields what cannot work: (command, content of the configuration, hyperparameters of the round file)."""
    replaced: tuple[str, ...] = ()
    """Keys of the configuration that every trial sets itself."""
    has_hook: bool = False
    """Whether it trains with Hugging Face's Trainer, which reports by itself and resumes by an option."""
    device_batch: tuple[str, int] = ("per_device_train_batch_size", 8)
    """Its name for the sequences of one device's pass, and its own default."""

    def table(self, written: Mapping[str, Any]) -> Mapping[str, Hyperparameter]:
        """Return the hyperparameters that a round file with this tool may name."""
        rows = {name: self._row(name, written) for name in self.hyperparameters}
        for name in written:
            is_free = self.takes_any_name or name.startswith(EXTRA)
            if name not in rows and is_free and _NAME.fullmatch(bare(name)):
                rows[name] = Hyperparameter(name, None, Anything(), f"Passed to the command as {bare(name)}.")
        return rows

    @property
    def unknown_name(self) -> str:
        """Return the message for a hyperparameter that the tool does not have."""
        if self.takes_any_name:
            return "is no name of an argument: letters, digits, _ and -"
        return (
            f"unknown with tool: {self.name}, which has {', '.join(self.hyperparameters)}; write a name of "
            "the tool's own below extra, such as `extra: {beta: [0.1, 0.3]}`"
        )

    def _row(self, name: str, written: Mapping[str, Any]) -> Hyperparameter:
        row = HYPERPARAMETERS[name]
        if name == "schedule" and name not in self.always and name not in written:
            return replace(row, default=UNKNOWN_SCHEDULE)
        is_set = name in self.always or (name == "decay_steps" and "schedule" in written)
        return replace(row, only_if_written=not is_set)


def tool(name: str) -> Tool:
    """Return the tool with this name. Raises InputError for an unknown name."""
    return described("tool", name, Tool)


def bare(name: str) -> str:
    """Return a hyperparameter's name as the command gets it: without `extra.`."""
    return name.removeprefix(EXTRA)


def options_of(command: Sequence[str]) -> dict[str, str]:
    """Return the options in a command: `--name=value`, `--name value` or, as a flag, `--name`."""
    found: dict[str, str] = {}
    for part, following in zip(command, [*command[1:], "--"], strict=True):
        name, equals, value = part.partition("=")
        if not name.startswith("--") or name == "--":
            continue
        is_flag = not equals and following.startswith(("-", "$"))
        found[name[2:].replace("-", "_")] = value if equals else "true" if is_flag else following
    return found


class KnownNames(NamedTuple):
    """The names of a tool's version, as they were listed on a day."""

    version: str
    date: str
    names: frozenset[str]


@cache
def known_names(tool_name: str, *groups: str) -> KnownNames:
    """Return the names that a tool knows, from the list that comes with tuner; nothing is imported."""
    document = json.loads((Path(__file__).parent / "known_names.json").read_text())[tool_name]
    names = [name for group in groups for name in document["names"].get(group, ())]
    return KnownNames(document["version"], document["date"], frozenset(names))


def unknown_names(
    tool_name: str, called: str, groups: Sequence[str], config: Settings, space: Space
) -> Iterator[Mistaken]:
    """Yield the keys of a configuration, and the names below `extra`, that a tool does not know.

    `called` is the tool's name in the message.
    """
    known = known_names(tool_name, *groups)
    extra = [name for name in space if name.startswith(EXTRA)]
    for shown, name in [*((f"hyperparameters.{n}", bare(n)) for n in extra), *((n, n) for n in config)]:
        if name not in known.names:
            near = difflib.get_close_matches(name, known.names, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            yield Mistaken(shown, f"is not a name of {called} {known.version} (listed {known.date}){hint}")


def can_be(dimension: Dimension, value: Value) -> bool:
    """Return whether a trial can have this value."""
    match dimension:
        case Fixed(value=only):
            return only == value
        case Choices(values=values):
            return value in values
        case Range(low=low, high=high):
            return isinstance(value, (int, float)) and low <= value <= high
    return False
