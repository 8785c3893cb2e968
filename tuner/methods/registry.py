"""Names that a round file can use: built in, `package.module:Name`, or registered by an installed package.

Checking a name imports nothing; a method is imported on first use.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from contextvars import ContextVar
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, Literal, TypeAlias, TypeVar

from tuner.errors import InputError, last_words

Kind: TypeAlias = Literal[
    "optimizer", "schedule", "variant", "metric", "sampler", "engine", "tracker", "tool"
]
Described = TypeVar("Described")

BUILT_IN: Mapping[Kind, tuple[str, ...]] = {
    "optimizer": ("adamw", "adamw_8bit", "lion", "lion_8bit", "muon"),
    "schedule": ("constant", "linear", "cosine", "inverse_sqrt"),
    "variant": ("lora", "dora"),
    "metric": ("eval_loss", "token_accuracy", "answers"),
    "sampler": ("quasi-random", "tpe", "gp", "random", "grid"),
    "engine": ("local", "ray", "simulated"),
    "tracker": ("tensorboard", "wandb", "mlflow", "trackio"),
    "tool": ("none", "transformers", "trl", "axolotl", "llamafactory"),
}
PATH = r"[A-Za-z_][A-Za-z0-9_.]*:[A-Za-z_][A-Za-z0-9_]*"
"""Pattern of `package.module:Name`."""
NOT_INSTALLED = "if a package registers this name, install the package"


def names(kind: Kind) -> tuple[str, ...]:
    """Return the built-in names and those registered by installed packages.

    A package registers a name with an entry point of the group `tuner.KINDs`, such as `tuner.samplers`.
    """
    registered = sorted(entry_points(group=f"tuner.{kind}s").names)
    return (*BUILT_IN[kind], *(name for name in registered if name not in BUILT_IN[kind]))


def is_built_in(kind: Kind, name: str) -> bool:
    """Return whether the name is built in."""
    return name in BUILT_IN[kind]


def is_known(kind: Kind, name: str) -> bool:
    """Return whether the name can be resolved, as far as is known without importing it."""
    return (
        is_built_in(kind, name)
        or re.fullmatch(PATH, name) is not None
        or _TRUSTING.get()
        or name in names(kind)
    )


@contextmanager
def trusting_names() -> Iterator[None]:
    """Take every name in the block for a known one: the package that registers it may not be installed here.

    For a round that has been recorded, and for a file that is only read.
    """
    token = _TRUSTING.set(True)
    try:
        yield
    finally:
        _TRUSTING.reset(token)


_TRUSTING: ContextVar[bool] = ContextVar("trusting", default=False)


def is_at_hand(kind: Kind, name: str) -> bool:
    """Return whether `described` needs no import of a plug-in: it is built in, imported or recorded."""
    return is_built_in(kind, name) or (kind, name) in _IMPORTED or (kind, name) in _RECORDED


def expected(kind: Kind) -> str:
    """Return the allowed names, for messages."""
    return f"one of {', '.join(names(kind))}, or package.module:Name"


def path_of(kind: Kind, name: str) -> str | None:
    """Return the `package.module:Name` of a name that is not built in; None for an unknown one."""
    found = next(iter(entry_points(group=f"tuner.{kind}s", name=name)), None)
    if found is not None:
        return found.value
    return name if re.fullmatch(PATH, name) else None


def load(kind: Kind, name: str) -> Any:
    """Import a name that is not built in. Raises InputError if it cannot be imported."""
    path = path_of(kind, name)
    if path is None:
        raise InputError(f"{kind} {name}: expects {expected(kind)}; {NOT_INSTALLED}")
    place = f"{kind} {name}" if path == name else f"{kind} {name}, which is {path}"
    module, _, attribute = path.partition(":")
    try:
        with redirect_stdout(sys.stderr):  # standard output is the command's alone
            return getattr(import_module(module), attribute)
    except (Exception, SystemExit) as error:  # a module may raise anything
        raise InputError(f"{place}: {_why_not_imported(module, error)}") from error


def _why_not_imported(module: str, error: BaseException) -> str:
    """Return what went wrong and what to do."""
    match error:
        case ModuleNotFoundError(name=missing) if missing and f"{module}.".startswith(f"{missing}."):
            return (
                f"cannot be imported: there is no module {missing}. Install its package, or add its "
                "directory to PYTHONPATH"
            )
        case AttributeError() if module in sys.modules:
            return f"{error}. Correct the name"
        case _:
            return f"{module} cannot be imported: {last_words(error, __file__)}"


def described(kind: Kind, name: str, of: type[Described]) -> Described:
    """Return the description with this name, built in or not.

    The built-in optimizer `x` is `X` in `tuner.methods.optimizers.x`; schedules and variants likewise.
    A recorded description is used until the plug-in is imported. Raises InputError if the name cannot be
    imported, or is not a description.
    """
    found = _RECORDED[kind, name] if (kind, name) in _RECORDED else _found(kind, name)
    if not isinstance(found, of):
        raise InputError(
            f"{kind} {name}: expects a tuner.methods.{kind}s.{of.__name__}, got a {type(found).__name__}"
        )
    return found


def imported(kind: Kind, name: str, of: type[Described]) -> Described:
    """Import a description, which `described` returns from now on. Raises as `described` does."""
    _found(kind, name)
    _RECORDED.pop((kind, name), None)
    return described(kind, name, of)


def stand_in(kind: Kind, name: str, description: object) -> None:
    """Use a recorded description of a plug-in, unless the plug-in is already imported."""
    if (kind, name) not in _IMPORTED:
        _RECORDED[kind, name] = description


_RECORDED: dict[tuple[Kind, str], Any] = {}
_IMPORTED: set[tuple[Kind, str]] = set()


@cache
def _found(kind: Kind, name: str) -> Any:
    if is_built_in(kind, name):
        return getattr(import_module(f"tuner.methods.{kind}s.{name}"), name.upper())
    found = load(kind, name)
    _IMPORTED.add((kind, name))
    return found
