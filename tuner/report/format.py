"""How numbers and names look in everything people read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from tuner.playbook import results
from tuner.records import Hyperparameters, Trial, Value

NOTHING = "-"
"""Shown where there is no number."""


def loss(number: float | None) -> str:
    """A loss with four decimals, fewer where it is large; nan and inf are named."""
    if number is None:
        return NOTHING
    if not math.isfinite(number):
        return str(number)
    return f"{number:.4f}" if abs(number) < 1000 else f"{number:.3g}"


def value(setting: Value | None) -> str:
    """A hyperparameter's value, short enough for a column: 0.00032, 1e-5, true, q_proj,v_proj."""
    match setting:
        case None:
            return NOTHING
        case bool():
            return str(setting).lower()
        case float():
            return number(setting)
        case tuple():
            return ",".join(setting)
        case _:
            return str(setting)


def number(quantity: float, digits: int = 3) -> str:
    """A number with so many significant digits and no padded exponent: 1e-5, not 1e-05."""
    text = f"{quantity:.{digits}g}"
    mantissa, e, exponent = text.partition("e")
    return f"{mantissa}e{int(exponent)}" if e else text


def percent(share: float) -> str:
    """A share as the findings write it: 12%, 0.34%."""
    return results.percent(share) if math.isfinite(share) else NOTHING


def duration(seconds: float) -> str:
    """Seconds in the units that matter: 3 h 05 min, 42 min, 4 min 10 s, 12 s."""
    whole = max(0, round(seconds))
    minutes, rest = divmod(whole, 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    if minutes >= 10 or (minutes and not rest):
        return f"{minutes} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def size(num_bytes: float) -> str:
    """Bytes in decimal units: 98 MB, 1.4 GB."""
    scaled, units = float(num_bytes), ["B", "kB", "MB", "GB", "TB"]
    while scaled >= 1000 and len(units) > 1:
        scaled, units = scaled / 1000, units[1:]
    return f"{scaled:.0f} {units[0]}" if scaled >= 10 or units[0] == "B" else f"{scaled:.1f} {units[0]}"


def count(quantity: int, noun: str) -> str:
    """A number with its noun: 1 trial, 1,200 trials."""
    return results.counted(quantity, noun)


def varying(trials: Sequence[Trial]) -> tuple[str, ...]:
    """Hyperparameters that are not the same in all trials, the seed included, in the trials' order."""
    names = {name: None for trial in trials for name in trial.hyperparameters}
    return tuple(name for name in names if len({trial.hyperparameters.get(name) for trial in trials}) > 1)


def settings(hyperparameters: Hyperparameters, names: Sequence[str]) -> str:
    """Some hyperparameters on one line: `learning_rate 0.0003, lora_r 16`."""
    known = [name for name in names if name in hyperparameters]
    return ", ".join(f"{name} {value(hyperparameters[name])}" for name in known)


def counts(by_state: Mapping[str, int]) -> str:
    """How many trials are in each state, those without any left out: `6 complete, 2 infeasible`."""
    return ", ".join(f"{n} {state}" for state, n in by_state.items() if n) or "none"
