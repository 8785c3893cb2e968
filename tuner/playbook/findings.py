"""What a finding is, and how its numbers are written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum


class Severity(StrEnum):
    """How much a finding matters."""

    INFO = "info"
    WARNING = "warning"
    PROBLEM = "problem"


@dataclass(frozen=True, slots=True)
class Finding:
    """What a rule of the playbook says of a round."""

    rule: str
    """The rule's name, the same in reports and documentation."""
    severity: Severity
    message: str
    """What was seen and what to do, in a sentence or two."""
    numbers: Mapping[str, float] = field(default_factory=dict)
    """What the finding rests on; all finite."""


def counted(quantity: int, noun: str) -> str:
    """A number with its noun: 1 trial, 1,200 trials. Rule: this project's decision."""
    return f"{quantity:,} {noun}" if quantity == 1 else f"{quantity:,} {noun}s"


def percent(share: float) -> str:
    """A share as people read it: 12%, 0.34%. Rule: this project's decision: two digits that count."""
    number = 100 * share
    return f"{number:.0f}%" if abs(number) >= 9.95 else f"{number:.2g}%"
