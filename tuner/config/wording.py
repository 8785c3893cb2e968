"""How a refusal of a round file is worded: the place, what was read, what is allowed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

Location = tuple[str | int, ...]
"""Keys and list positions that lead to a value, relative to the model that is validated."""

MISTAKE = "mistake"
"""Type of a pydantic error whose message is complete as it is."""
UNKNOWN_KEY = "unknown_key"
"""Type of a pydantic error for a name that is in no table; pydantic's own is `extra_forbidden`."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """One thing that is wrong."""

    location: Location
    message: str
    rests_on: tuple[str, ...] = ()
    """Dotted names of the other keys that make it wrong: while one of them is, this says nothing."""
    type: str = MISTAKE


def mistake(message: str, *, rests_on: tuple[str, ...] = (), type: str = MISTAKE) -> PydanticCustomError:
    """A pydantic error that says this message and nothing else."""
    return PydanticCustomError(type, "{message}", {"message": message, "rests_on": rests_on})


def refuse(title: str, refusals: Iterable[Refusal]) -> None:
    """Raise one ValidationError with all refusals; return when there are none."""
    details = [
        InitErrorDetails(
            type=mistake(refusal.message, rests_on=refusal.rests_on, type=refusal.type),
            loc=refusal.location,
            input=None,
        )
        for refusal in refusals
    ]
    if details:
        raise ValidationError.from_exception_data(title, details)


def shown(raw: Any) -> str:
    """What the file says, short enough for a message: text in quotes, anything else as YAML writes it."""
    match raw:
        case None:
            return "no value"
        case bool():
            return str(raw).lower()
        case str():
            return repr(raw) if len(raw) <= 60 else repr(raw[:57] + "...")
        case Mapping():
            return "{" + ", ".join(f"{key}: {_inner(value)}" for key, value in raw.items()) + "}"
        case list() | tuple():
            return "[" + ", ".join(_inner(item) for item in raw) + "]"
        case _:
            return str(raw)


def one_of(names: Sequence[Any]) -> str:
    """`a, b or c`."""
    *most, last = [str(name) for name in names]
    return f"{', '.join(most)} or {last}" if most else last


def refusal(expected: str, raw: Any, hint: str = "") -> str:
    """`expects a number above 0, got the text '1e-5'; ...`, for one value that is not what is allowed."""
    if raw is None:
        return f"expects {expected}, but it has no value"
    if isinstance(raw, str) and "number" in expected and _is_number(raw):
        hint = f"that is text, write {raw} without quotes"
    return f"expects {expected}, got {shown(raw)}" + (f"; {hint}" if hint else "")


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _inner(raw: Any) -> str:
    return raw if isinstance(raw, str) and raw else shown(raw)
