"""How messages show what was read and what is allowed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any


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
