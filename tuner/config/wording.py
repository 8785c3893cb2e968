"""Mistakes in a round file as pydantic errors: the location and the complete message."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pydantic import ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

Location = tuple[str | int, ...]
"""Keys and list positions of a value, relative to the model being validated."""

MISTAKE = "mistake"
"""Type of a pydantic error whose message is already complete."""
UNKNOWN_KEY = "unknown_key"
"""Type of a pydantic error for an unknown name; pydantic's own is `extra_forbidden`."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """One mistake in a round file."""

    location: Location
    message: str
    rests_on: tuple[str, ...] = ()
    """Dotted names of other keys this depends on: while one of them is wrong, this is not reported."""
    type: str = MISTAKE


def mistake(message: str, *, rests_on: tuple[str, ...] = (), type: str = MISTAKE) -> PydanticCustomError:
    """Return a pydantic error with exactly this message."""
    return PydanticCustomError(type, "{message}", {"message": message, "rests_on": rests_on})


def refuse(title: str, refusals: Iterable[Refusal]) -> None:
    """Raise one ValidationError with all refusals, if there are any."""
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
