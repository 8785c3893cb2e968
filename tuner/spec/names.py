"""Which name was meant by one that does not exist, or not in that place."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from tuner.spec.aliases import KEYS, NOT_KEYS, VALUES, Alias
from tuner.spec.wording import one_of

ONE_HORIZON = (
    "Within a round all trials train equally long: a search over lengths would mostly find that longer is "
    "better, and hide which hyperparameters are (a rule of Google's Deep Learning Tuning Playbook: never "
    "tune max_train_steps within a round). Choose one value; each trial's best step is read from its "
    "evaluations afterwards, and `tuner study promote` suggests the next round's value from them"
)
"""Why a range or a list of horizons is refused."""

_SIMILAR = 0.7
"""difflib's ratio from which a typing error is assumed."""


def _by_typed(aliases: Iterable[Alias]) -> dict[str, Alias]:
    return {typed: alias for alias in aliases for typed in alias.typed.split()}


_KEYS, _NOT_KEYS, _VALUES = _by_typed(KEYS), _by_typed(NOT_KEYS), _by_typed(VALUES)


def unknown_key(path: Sequence[str | int], known: Collection[str]) -> str:
    """The message for a key that does not exist, or not there.

    `path` leads to it from the top of the file; `known` are the dotted names of all keys.
    """
    section, typed = _section(path), str(path[-1]).lower().replace("-", "_")
    if tuple(path[:2]) == ("search", "enqueue"):
        known = [*known, f"{section}.continues"]
    alias = _in_the_same_list(_KEYS.get(typed, Alias("", "")), section)
    here = {_leaf(name): name for name in known if _parent(name) == section}
    elsewhere = [name for name in known if _leaf(name) == typed and _parent(name) != section]
    if alias.meant and _parent(alias.meant) == section:
        return _did_you_mean(alias, section)
    if elsewhere:
        return _misplaced(typed, elsewhere, alias, section)
    if alias.meant:
        return _did_you_mean(alias, section)
    if typed in _NOT_KEYS:
        return f"unknown, and not needed: {_NOT_KEYS[typed].meant}"
    anywhere = {_leaf(name): name for name in known}
    if similar := _similar(typed, here, section) or _similar(typed, anywhere, None):
        return _did_you_mean(similar, section)
    return f"unknown; allowed here: {', '.join(here)}"


def meant_value(raw: Any, allowed: Collection[str]) -> str:
    """`did you mean ...?` for a value that is none of those allowed; empty when nothing is like it."""
    if not isinstance(raw, str):
        return ""
    typed = raw.lower()
    meant = _VALUES[typed].meant if typed in _VALUES else None
    if meant not in allowed:
        meant = next(iter(difflib.get_close_matches(typed, allowed, n=1, cutoff=_SIMILAR)), None)
    return f"did you mean {meant}?" if meant else ""


def _in_the_same_list(alias: Alias, section: str) -> Alias:
    """The sources of train, eval and test have the same keys, and the aliases are those of train's."""
    if section in ("data.eval", "data.test") and _parent(alias.meant) == "data.train":
        return alias._replace(meant=f"{section}.{_leaf(alias.meant)}")
    return alias


def _did_you_mean(alias: Alias, section: str) -> str:
    meant = _leaf(alias.meant) if _parent(alias.meant) == section else _place(alias.meant)
    if alias.meant == "max_train_steps" and section == "hyperparameters":
        return f"unknown; did you mean {meant}? {ONE_HORIZON}"
    reason = f" {alias.reason[0].upper()}{alias.reason[1:]}." if alias.reason else ""
    return f"unknown; did you mean {meant}?{reason}"


def _misplaced(typed: str, names: Sequence[str], alias: Alias, section: str) -> str:
    if typed == "max_train_steps" and section == "hyperparameters":
        return f"not a hyperparameter but one whole number at the top level of the file. {ONE_HORIZON}"
    message = f"unknown here; {typed} belongs {one_of([_home(name) for name in names])}"
    return f"{message}. Or did you mean {_place(alias.meant)}?" if alias.meant else message


def _similar(typed: str, names: dict[str, str], section: str | None) -> Alias | None:
    """The key, or the alias of a key, that looks like what was typed; `section` restricts the aliases."""
    aliases = {word: alias for word, alias in _KEYS.items() if section in (None, _parent(alias.meant))}
    candidates = {**aliases, **{leaf: Alias(name, leaf) for leaf, name in names.items()}}
    found = difflib.get_close_matches(typed, candidates, n=1, cutoff=_SIMILAR)
    return candidates[found[0]] if found else None


def _section(path: Sequence[str | int]) -> str:
    if tuple(path[:2]) == ("search", "enqueue") and len(path) > 2:
        return "hyperparameters"
    return ".".join(part for part in path[:-1] if isinstance(part, str))


def _place(name: str) -> str:
    return name if _parent(name) else f"{name}, at the top level of the file"


def _home(name: str) -> str:
    return f"under {_parent(name)}" if _parent(name) else "at the top level of the file"


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]
