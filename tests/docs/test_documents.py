"""What the documents say can be typed and followed: commands, options, links, make's targets, the tree."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer

from tuner.cli import app

ROOT = Path(__file__).parents[2]
NOT_NOW = ("log.md", "CHANGELOG.md", "adr", "cli.md")
"""What was true on its day, whose commands may be gone; and the page that is made from the commands."""

_FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
_SPAN = re.compile(r"`([^`]+)`")
_LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ +(.+?)\s*$", re.MULTILINE)
_SHELL = ("console", "sh")
_ENVIRONMENT = re.compile(r"^(?:[A-Z_]+=\S* +)+")

USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[1]
"""Of the Click that Typer uses, which may be a copy of its own."""


@dataclass(frozen=True)
class Command:
    """A command in a document."""

    where: str
    text: str
    is_typed: bool
    """From a block to be typed, so complete; otherwise named in a sentence, perhaps without its arguments."""

    @property
    def words(self) -> list[str]:
        """Its words, without variables, the program, a comment, and what a shell does after it."""
        words = shlex.split(_ENVIRONMENT.sub("", self.text), comments=True)
        end = next((at for at, word in enumerate(words) if word in ("|", ">", "||", "&&", ";")), len(words))
        return words[1:end]


def documents() -> list[Path]:
    found = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *ROOT.glob("studies/*/*.md")]
    assert len(found) > 10
    return sorted(found)


def prose_and_blocks(path: Path) -> tuple[str, list[tuple[str, str]]]:
    text = path.read_text(encoding="utf-8")
    return _FENCE.sub("", text), [(match[1], match[2]) for match in _FENCE.finditer(text)]


def typed_lines(path: Path) -> Iterator[str]:
    """What a reader types: lines after `$ ` of console blocks, all lines of sh blocks."""
    for language, body in prose_and_blocks(path)[1]:
        for line in map(str.strip, body.splitlines()):
            if language == "console":
                assert line.startswith("$ "), f"{path.name}: output has a block of its own: {line}"
            if language in _SHELL and line:
                yield line.removeprefix("$ ")


def commands() -> list[Command]:
    """Every `tuner ...` of the documents that describe what there is now."""
    found: list[Command] = []
    for path in documents():
        if any(part in NOT_NOW for part in path.relative_to(ROOT).parts):
            continue
        where = str(path.relative_to(ROOT))
        named = (" ".join(span.split()) for span in _SPAN.findall(prose_and_blocks(path)[0]))
        found += [Command(where, line, is_typed=True) for line in typed_lines(path) if _is_ours(line)]
        found += [Command(where, text, is_typed=False) for text in named if re.match("tuner (-|[a-z])", text)]
    return found


def _is_ours(line: str) -> bool:
    return re.match(r"tuner\b", _ENVIRONMENT.sub("", line)) is not None


@cache
def root() -> Any:
    """Every group and verb; to make them takes a tenth of a second."""
    return typer.main.get_command(app)


def resolve(words: list[str]) -> tuple[Any, list[str]]:
    """Walk groups and their options down to a verb. Raises ValueError for a name that there is not."""
    command, rest = root(), list(words)
    while rest and hasattr(command, "commands"):
        word = rest.pop(0)
        if word.startswith("-"):
            if word != "--help" and not option_of(word, command).is_flag:
                rest.pop(0)
        elif word in command.commands:
            command = command.commands[word]
        else:
            raise ValueError(f"no verb {word!r}; there are {', '.join(command.commands)}")
    return command, rest


def option_of(word: str, command: Any) -> Any:
    name = word.partition("=")[0]
    for parameter in command.params:
        if name in (*parameter.opts, *parameter.secondary_opts):
            return parameter
    raise ValueError(f"{command.name} has no option {name}")


def check(command: Command) -> None:
    verb, rest = resolve(command.words)
    for word in rest:
        if word.startswith("-"):
            option_of(word, verb)
    if command.is_typed and not hasattr(verb, "commands"):
        verb.make_context(verb.name, list(rest))  # raises for what is missing or too much


@pytest.mark.parametrize("command", commands(), ids=lambda command: f"{command.where}: {command.text}")
def test_commands_can_be_typed(command: Command) -> None:
    check(command)


def test_there_are_commands() -> None:
    found = commands()
    assert sum(command.is_typed for command in found) >= 30
    assert {"README.md", "docs/tutorial.md"} <= {command.where for command in found if command.is_typed}
    verbs = {resolve(command.words)[0].name for command in found}
    assert {"new", "check", "run", "promote", "status", "report", "list", "show", "generate"} <= verbs


@pytest.mark.parametrize(
    "text",
    [
        "tuner study sweeep round1.yaml",
        "tuner study run",
        "tuner study run a.yaml b.yaml",
        "tuner study promote --too x",
        "tuner study promote --to round2 --top none",
        "tuner --loud study status",
    ],
)
def test_wrong_commands_are_found(text: str) -> None:
    with pytest.raises((ValueError, USAGE_ERROR)):
        check(Command("here", text, is_typed=True))


@pytest.mark.parametrize("path", documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    for target in _links(path):
        file, _, anchor = target.partition("#")
        linked = (path.parent / file).resolve() if file else path
        assert linked.exists(), f"{path.name}: {target}"
        assert linked.is_relative_to(ROOT), f"{path.name}: {target}"
        if anchor and linked.suffix == ".md":
            headings = _HEADING.findall(linked.read_text(encoding="utf-8"))
            assert anchor in map(_anchor, headings), f"{path.name}: {target}"


def test_there_are_links() -> None:
    assert sum(len(_links(path)) for path in documents()) >= 30


def test_every_page_can_be_reached() -> None:
    reached, waiting = set(), [ROOT / "README.md"]
    while waiting:
        path = waiting.pop()
        if path not in reached:
            reached.add(path)
            waiting += [(path.parent / t.partition("#")[0]).resolve() for t in _links(path) if ".md" in t]
    decisions = set((ROOT / "docs" / "adr").glob("*.md"))
    assert decisions
    assert set((ROOT / "docs").rglob("*.md")) - decisions <= reached


def test_targets_of_make_exist() -> None:
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    typed = [
        shlex.split(line, comments=True)
        for path in documents()
        for line in typed_lines(path)
        if "make" in line
    ]
    named = {word for words in typed if words[:1] == ["make"] for word in words[1:] if "=" not in word}
    assert {"quickstart", "check", "test"} <= named
    assert named <= targets


def test_tree_of_the_readme() -> None:
    blocks = prose_and_blocks(ROOT / "README.md")[1]
    tree = next(body for _, body in blocks if body.startswith("tuner/\n"))
    named = set(re.findall(r"^  ([\w.]+)/?(?= )", tree, re.MULTILINE))
    there = {p.name for p in (ROOT / "tuner").iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert named == there - {"__init__.py"}


def test_decisions_are_short() -> None:
    decisions = sorted((ROOT / "docs" / "adr").glob("*.md"))
    assert [int(path.name[:4]) for path in decisions] == list(range(1, len(decisions) + 1))
    assert all(len(path.read_text().splitlines()) <= 30 for path in decisions)


def _links(path: Path) -> list[str]:
    found = _LINK.findall(prose_and_blocks(path)[0])
    return [target for target in found if not re.match(r"[a-z]+:", target)]


def _anchor(heading: str) -> str:
    kept = re.sub(r"[^\w\- ]", "", heading.lower())
    return kept.replace(" ", "-")
