"""Report on a trial that was run again: whether the curves agree, and what else differs."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from tuner.playbook.reproduction import Agreement, Pair, Reproduction
from tuner.report import format
from tuner.report.terminal import FittedTable, column

_DIGITS = 9
"""Significant digits of a loss, as in float32."""
_STYLES = {Agreement.EQUAL: "green", Agreement.WITHIN_TOLERANCE: "green", Agreement.DIFFERS: "red"}


def reproduction_page(study: str, found: Reproduction) -> RenderableType:
    """Return the verdict, both curves, and the differences between the two runs."""
    lines: list[RenderableType] = [Text(f"{study}: {verdict(found)}", style=_STYLES[found.agreement])]
    if not found.ends_alike:
        lines.append(Text(_ends(found)))
    lines += [_curves(found.pairs), *(Text(remark) for remark in found.remarks)]
    lines.append(Text(_environment(found)))
    return Group(*lines)


def verdict(found: Reproduction) -> str:
    """Return one sentence: whether the curves agree, how closely, and from which step they differ."""
    name = found.trial.name
    compared = f"{format.count(len(found.pairs), 'evaluation')} up to step {found.to_step}"
    first, largest = found.first_beyond, found.largest
    match found.agreement:
        case Agreement.EQUAL:
            return f"{name} is reproduced digit for digit: {compared}"
        case Agreement.WITHIN_TOLERANCE:
            assert largest is not None
            return (
                f"{name} is reproduced within rounding: {compared}, at most {_difference(largest)} apart at "
                f"step {largest.step}; differences up to {_share(found.tolerance)} count as rounding"
            )
        case _ if first is None or largest is None:
            return f"{name} is not reproduced: the losses agree, but the run ended differently"
        case _ if first.recorded is None or first.again is None:
            return f"{name} is not reproduced: only one of the two runs was evaluated at step {first.step}"
        case _:
            return (
                f"{name} is not reproduced: losses differ by more than rounding ({_share(found.tolerance)}) "
                f"from step {first.step} on, at most {_difference(largest)} at step {largest.step}"
            )


def reproduction_document(study: str, found: Reproduction) -> dict[str, Any]:
    """Return the document of `trial reproduce --json`."""
    return {
        "study": study,
        "trial": found.trial.name,
        "agreement": found.agreement.value,
        "tolerance": found.tolerance,
        "from_step": found.from_step,
        "to_step": found.to_step,
        "first_difference": _pair(found.first_beyond),
        "largest_difference": _pair(found.largest),
        "state": {"recorded": found.trial.state.value, "again": found.ended_as and found.ended_as.value},
        "reason": {"recorded": found.trial.reason, "again": found.reason},
        "evaluations": [_pair(pair) for pair in found.pairs],
        "environment": [
            {"name": changed.name, "recorded": changed.recorded, "again": changed.again}
            for changed in found.changed
        ],
        "remarks": list(found.remarks),
    }


def _pair(pair: Pair | None) -> dict[str, float | int | None] | None:
    if pair is None:
        return None
    return {
        "step": pair.step,
        "recorded": pair.recorded,
        "again": pair.again,
        "relative_difference": pair.difference,
    }


def _curves(pairs: tuple[Pair, ...]) -> FittedTable:
    return FittedTable(
        [
            column("step", [str(pair.step) for pair in pairs], rank=0),
            column("recorded", [_loss(pair.recorded) for pair in pairs], rank=1),
            column("again", [_loss(pair.again) for pair in pairs], rank=2),
            column("difference", [_difference(pair) for pair in pairs], rank=3),
        ]
    )


def _loss(number: float | None) -> str:
    return format.NOTHING if number is None else f"{number:.{_DIGITS}g}"


def _difference(pair: Pair) -> str:
    if pair.recorded is None or pair.again is None:
        return "not in both"
    return "0" if pair.difference == 0 else _share(pair.difference)


def _share(share: float) -> str:
    return f"{format.number(100 * share, 2)}%"


def _ends(found: Reproduction) -> str:
    def ended(state: str, reason: str | None) -> str:
        return f"{state} ({reason})" if reason else state

    again = ended(found.ended_as.value, found.reason) if found.ended_as else "not run to its end"
    return f"Recorded as {ended(found.trial.state.value, found.trial.reason)}; again: {again}."


def _environment(found: Reproduction) -> str:
    if not found.changed:
        return "The environment is the recorded one: device, slots and versions are the same."
    unknown = [changed for changed in found.changed if changed.recorded is None]
    if unknown:
        now = ", ".join(f"{changed.name} {changed.again}" for changed in unknown)
        return f"The recorded environment is unknown: an earlier version of tuner ran the trial. Now: {now}."
    listed = ", ".join(f"{changed.name} {changed.recorded} -> {changed.again}" for changed in found.changed)
    return f"Changed since it was recorded: {listed}."
