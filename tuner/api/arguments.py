"""How an error reads to a script: the arguments that it passed, where the command line has options."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from functools import wraps
from typing import ParamSpec, TypeVar

from tuner.errors import TunerError

P = ParamSpec("P")
T = TypeVar("T")

_OPTIONS = {
    "settings": "set",
    "hyperparameters": "set",
    "eval_data": "eval",
    "from_round": "from",
    "seconds": "for",
}
"""The command line's names of arguments that it names otherwise."""


def naming_arguments(method: Callable[P, T]) -> Callable[P, T]:
    """Let a method of the library raise its errors with the names of its arguments.

    Below it, messages name options, as `--to DIR: is a file` does.
    """
    forms = {
        name: str(parameter.annotation) for name, parameter in inspect.signature(method).parameters.items()
    }

    @wraps(method)
    def named(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return method(*args, **kwargs)
        except TunerError as error:
            error.args = (with_arguments(str(error), forms), *error.args[1:])
            raise

    return named


def with_arguments(message: str, forms: Mapping[str, str]) -> str:
    """Return a message with the arguments for the options that mean them, but for those in a command.

    `forms` are the annotations of the arguments by name.
    """
    parts = message.split("`")
    for name, form in forms.items():
        option = f"--{_OPTIONS.get(name, name.replace('_', '-'))}"
        parts[::2] = [_named(part, option, name, form) for part in parts[::2]]
    return "`".join(parts)


def _named(text: str, option: str, name: str, form: str) -> str:
    if form == "bool":
        return re.sub(rf"{option}(?![\w-])", f"{name}=True", text)
    if form.startswith("Sequence"):
        text = re.sub(rf"{option} (\S+?)(?=:?(\s|$))", rf"{name}=['\1']", text)
    if form.startswith("Mapping"):
        text = re.sub(rf"{option} (?:{name}\.)?(\w+)=(\w+)", rf"{name}={{'\1': \2}}", text)
    text = re.sub(rf"{option} (\S+): ", rf"{name}=\1: ", text)
    return re.sub(rf"{option}(?![\w-])", f"`{name}`", text)
