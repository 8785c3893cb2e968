"""What may still change in the file of a round that has begun."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tuner.errors import Mistake
from tuner.spec.dimensions import dimension_to_yaml
from tuner.spec.reading import RoundFile
from tuner.spec.round import RoundSpec
from tuner.spec.yaml_text import one_line, parse

_MAY_CHANGE = ("goal", "search.trials", "evaluation.batch_size", "checkpoints.keep_best_trials", "run")
"""Keys, or whole sections, that change no trial's result."""
_FOLLOWS_HORIZON = ("evaluation.every_steps", "hyperparameters.warmup_steps", "hyperparameters.decay_steps")
"""Keys whose defaults are parts of max_train_steps."""


def refused_changes(begun: Mapping[str, Any], now: RoundFile) -> list[Mistake]:
    """Every difference that would make the round's trials incomparable; empty when the round may go on.

    `begun` is the JSON of the RoundSpec that the round began with, its paths relative or absolute. Values are
    compared by their meaning: a default that is now written out is no change, nor is another order of keys.
    """
    before = RoundSpec.model_validate(dict(begun))
    then, today = (_by_key(spec.absolute(now.directory)) for spec in (before, now.spec))
    written_then, written_today = _by_key(before), _by_key(now.spec)
    lines = parse(now.text)
    horizon_changed = then["max_train_steps"] != today["max_train_steps"]
    mistakes = []
    for key in today:
        place = tuple(key.split("."))
        follows = horizon_changed and key in _FOLLOWS_HORIZON and place not in lines.lines
        may_change = key in _MAY_CHANGE or place[0] in _MAY_CHANGE
        if then[key] != today[key] and not follows and not may_change:
            message = _message(written_then[key], written_today[key])
            mistakes.append(Mistake(lines.line(place), key, message))
    return sorted(mistakes, key=lambda mistake: mistake.line or 0)


def _by_key(spec: RoundSpec) -> dict[str, Any]:
    """The round's values by dotted name, every hyperparameter included."""
    values: dict[str, Any] = {}
    for name, value in spec.model_dump(mode="json", exclude={"hyperparameters"}).items():
        if isinstance(value, dict):
            values.update({f"{name}.{key}": item for key, item in value.items()})
        else:
            values[name] = value
    for name, dimension in spec.space().items():
        values[f"hyperparameters.{name}"] = dimension_to_yaml(dimension)
    return values


def _message(before: Any, now: Any) -> str:
    return (
        f"the round began with {one_line(before)} and the file now says {one_line(now)}, but the trials of "
        "one round must be comparable; put it back, or start a new round by another name after `round:`"
    )
