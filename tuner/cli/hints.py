"""What a wrong word on the command line was probably meant to be."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperGroup

_MEANT = {
    "study": {
        "init": "study new",
        "create": "study new",
        "start": "study run",
        "resume": "study run",
        "list": "study status, or trial list",
        "ls": "study status, or trial list",
        "show": "study status, or trial show",
        "next": "study promote",
        "plot": "study report",
        "tune": "study auto",
    },
    "trial": {
        "ls": "trial list",
        "chat": "trial generate",
        "ask": "trial generate",
        "merge": "trial export --merge",
        "push": "trial export --push",
        "rerun": "trial reproduce",
        "report": "study report",
        "status": "study status",
    },
    "tuner": {
        "init": "study new",
        "help": "--help",
        "version": "--version",
        "list": "trial list",
        "ls": "trial list",
        "create": "study new",
        "tune": "study auto",
        "studies": "study status",
        "trials": "trial list",
    },
}
"""By group: words of other tools, and the commands that do here what they do there."""


class Group(TyperGroup):
    """A group of commands that answers an unknown word with a command to type, and shows flags as flags."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Return the command that the first word names. Raises Typer's usage error, with a hint."""
        found = self.get_command(ctx, args[0]) if args else None
        if args and found is None and not args[0].startswith("-"):
            ctx.fail(f"No such command {args[0]!r}.{self._hint(ctx, args)}")
        return super().resolve_command(ctx, args)

    def _hint(self, ctx: Any, args: list[str]) -> str:
        word, *rest = args
        group = "tuner" if ctx.parent is None else str(ctx.info_name)
        before = [] if group == "tuner" else [group]
        if meant := _MEANT[group].get(word):
            return f" Did you mean: tuner {meant}"
        for elsewhere in _groups_with(_root(ctx), word):
            return f" Did you mean: {' '.join(['tuner', elsewhere, word, *rest])}"
        if close := get_close_matches(word, self.commands, n=1):
            return f" Did you mean: {' '.join(['tuner', *before, close[0], *rest])}"
        return f" Known: {', '.join(self.commands)}."

    def get_command(self, ctx: Any, name: str) -> Any:
        """Return a command by name, or None."""
        command = super().get_command(ctx, name)
        if command is not None:
            _show_as_flags([*command.params, command.get_help_option(ctx)])
        return command

    def get_params(self, ctx: Any) -> Any:
        """Return the group's own options."""
        params = super().get_params(ctx)
        _show_as_flags(params)
        return params


def explain(error: Any) -> None:
    """Complete Typer's message: what was read for an option, and which key of a round file was meant."""
    if (option := getattr(error, "option_name", None)) is not None:
        error.message += _meant_instead(option, error.ctx)
        return
    if found := re.fullmatch(r"Got unexpected extra argument\(s\) \((\S+)\)", error.message):
        error.message += (
            f"; did you mean --round {found[1]}?" if "--round" in _options(error.ctx.command) else ""
        )
        return
    error.message = error.message.removeprefix("Value error, ")
    for wrong in getattr(error.__cause__, "errors", list)()[:1]:
        if wrong["type"] in _EXPECTED:
            expected = _EXPECTED[wrong["type"]].format(**wrong.get("ctx", {}))
            error.message = f"expects {expected}, got {wrong['input']}"


_EXPECTED = {
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_parsing": "a number",
    "greater_than_equal": "at least {ge:g}",
    "less_than_equal": "at most {le:g}",
}
"""Messages for pydantic's types of error, which Typer passes on without what was read."""


def _meant_instead(option: str, ctx: Any) -> str:
    """Return where an option of other commands stands, or what one such as `--max-steps` means."""
    from tuner.config.wording import key_like

    if option in _options(_root(ctx)):
        return f"; it comes before the command: tuner {option} ... {ctx.command_path.removeprefix('tuner ')}"
    if owners := [verb for verb, command in _verbs(_root(ctx)) if option in _options(command)]:
        return f"; it is an option of {_enumerated(owners)}"
    key = key_like(option.lstrip("-"))
    if key is None:
        return ""
    own = f"--{key.rpartition('.')[2].replace('_', '-')}"
    if any(own in parameter.opts for parameter in ctx.command.params):
        return f"; did you mean {own}?"
    return f"; it is a key of the round file: {key}"


def _options(command: Any) -> set[str]:
    return {name for parameter in command.params for name in getattr(parameter, "opts", ())}


def _verbs(root: Any) -> Iterable[tuple[str, Any]]:
    """Yield `study run` and the like, with their commands."""
    for name, group in root.commands.items():
        for verb, command in getattr(group, "commands", {"": group}).items():
            yield f"{name} {verb}".strip(), command


def _enumerated(words: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def _groups_with(root: Any, word: str) -> Iterable[str]:
    groups = getattr(root, "commands", {})
    return (name for name, group in groups.items() if word in getattr(group, "commands", {}))


def _root(ctx: Any) -> Any:
    return ctx.find_root().command


def _show_as_flags(parameters: Iterable[Any]) -> None:
    """Help shows a flag without a value: Typer would write `--yes <bool>`."""
    for parameter in parameters:
        if getattr(parameter, "is_flag", False) and parameter.metavar is None:
            parameter.metavar = ""


def round_path(path: Path) -> Path:
    """Return the round file that is meant: `round1` means round1.yaml where there is no other `round1`."""
    if not path.exists():
        for suffix in (".yaml", ".yml"):
            named = path.with_name(path.name + suffix)
            if named.is_file():
                return named
    return path


def one_name(argument: str | None, option: str | None, *, name: str) -> str:
    """Return what was given as an argument or as an option. Raises Typer's usage error for none or two."""
    if argument is not None and option is not None and argument != option:
        raise typer.BadParameter(f"got {argument} and {option}; pass one of them", param_hint=name)
    if (given := option if option is not None else argument) is None:
        raise typer.BadParameter("is missing: name the next round, such as --to round2", param_hint=name)
    return given
