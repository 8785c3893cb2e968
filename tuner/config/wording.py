"""How a refusal of a round file reaches pydantic: the place, and a message that is complete as it is."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

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
