"""The kinds of values a hyperparameter may have: what each accepts, how it says no, and its JSON Schema."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from tuner.errors import one_of, refusal, shown
from tuner.methods import registry
from tuner.records import Value


class Kind(Protocol):
    """What the values of one hyperparameter have in common."""

    @property
    def allowed(self) -> str:
        """The values it accepts, in words that follow `expects`."""

    def parse(self, raw: Any) -> Value:
        """The value as every room sees it. Raises ValueError saying what was read and what is allowed."""

    def schema(self) -> dict[str, Any]:
        """The JSON Schema of one value."""


class UnknownName(ValueError):
    """A value that is none of the names which a hyperparameter takes."""

    def __init__(self, names: tuple[str, ...], raw: Any, *, allowed: str) -> None:
        self.names, self.raw, self.allowed = names, raw, allowed
        super().__init__(refusal(allowed, raw))


@dataclass(frozen=True, slots=True)
class Number:
    """A finite number, seen as a float."""

    above: float | None = None
    """Exclusive lower bound."""
    at_least: float | None = None
    below: float | None = None
    """Exclusive upper bound."""

    @property
    def allowed(self) -> str:
        """Such as `a number of at least 0 and below 1`."""
        bounds = {"above": self.above, "of at least": self.at_least, "below": self.below}
        said = [f"{words} {bound:g}" for words, bound in bounds.items() if bound is not None]
        return f"a number {' and '.join(said)}"

    @property
    def limits(self) -> tuple[float | None, float | None]:
        """Its bounds."""
        return self.above if self.at_least is None else self.at_least, self.below

    def parse(self, raw: Any) -> float:
        """A float; whole numbers become floats, text that looks like a number does not."""
        if isinstance(raw, bool) or not isinstance(raw, (int, float)) or not math.isfinite(raw):
            raise ValueError(refusal(self.allowed, raw))
        if self.above is not None and raw <= self.above:
            raise ValueError(refusal(self.allowed, raw))
        if self.at_least is not None and raw < self.at_least:
            raise ValueError(refusal(self.allowed, raw))
        if self.below is not None and raw >= self.below:
            raise ValueError(refusal(self.allowed, raw))
        return float(raw)

    def schema(self) -> dict[str, Any]:
        """`type: number` with its bounds."""
        bounds = {"exclusiveMinimum": self.above, "minimum": self.at_least, "exclusiveMaximum": self.below}
        return {"type": "number", **{key: bound for key, bound in bounds.items() if bound is not None}}


@dataclass(frozen=True, slots=True)
class Integer:
    """A whole number."""

    at_least: int

    @property
    def allowed(self) -> str:
        """Such as `a whole number of at least 1`."""
        return f"a whole number of at least {self.at_least}"

    @property
    def limits(self) -> tuple[float | None, float | None]:
        """Its lower bound."""
        return self.at_least, None

    def parse(self, raw: Any) -> int:
        """An int; 8.0 is refused, since whoever types it may mean something that is not whole."""
        if isinstance(raw, bool) or not isinstance(raw, int) or raw < self.at_least:
            raise ValueError(refusal(self.allowed, raw))
        return raw

    def schema(self) -> dict[str, Any]:
        """`type: integer` with its bound."""
        return {"type": "integer", "minimum": self.at_least}


@dataclass(frozen=True, slots=True)
class Flag:
    """True or false."""

    @property
    def allowed(self) -> str:
        """The two words YAML 1.2 knows; `yes` and `on` are text to it."""
        return "true or false"

    def parse(self, raw: Any) -> bool:
        """The bool as it is."""
        if isinstance(raw, bool):
            return raw
        raise ValueError(refusal(self.allowed, raw))

    def schema(self) -> dict[str, Any]:
        """`type: boolean`."""
        return {"type": "boolean"}


@dataclass(frozen=True, slots=True)
class OneOf:
    """A name out of a few."""

    names: tuple[str, ...]
    refused: tuple[tuple[str, str], ...] = ()
    """Other names, alone or with a suffix after `_`, and why each is none of these."""

    @property
    def allowed(self) -> str:
        """The names, with `or` before the last."""
        return one_of(self.names)

    def parse(self, raw: Any) -> str:
        """One of the names, as it is."""
        for name, reason in self.refused:
            if isinstance(raw, str) and (raw == name or raw.startswith(f"{name}_")):
                raise ValueError(refusal(self.allowed, raw, reason))
        if not isinstance(raw, str) or raw not in self.names:
            raise UnknownName(self.names, raw, allowed=self.allowed)
        return raw

    def schema(self) -> dict[str, Any]:
        """An `enum`."""
        return {"enum": list(self.names)}


@dataclass(frozen=True, slots=True)
class Method:
    """A way to train by name: built in, registered by an installed package, or `package.module:Name`."""

    kind: Literal["optimizer", "schedule"]

    @property
    def allowed(self) -> str:
        """The names, and that there may be others."""
        return one_of((*registry.names(self.kind), "package.module:Name"))

    def parse(self, raw: Any) -> str:
        """The name as it is. What it leads to is not imported."""
        if not isinstance(raw, str) or not registry.is_known(self.kind, raw):
            raise UnknownName(registry.names(self.kind), raw, allowed=self.allowed)
        return raw

    def schema(self) -> dict[str, Any]:
        """An `enum` of those built in, for editors to complete, or a path."""
        path = {"type": "string", "pattern": f"^{registry.PATH}$"}
        return {"anyOf": [{"enum": list(registry.BUILT_IN[self.kind])}, path]}


@dataclass(frozen=True, slots=True)
class Anything:
    """A value of a hyperparameter that a method brings which is not loaded yet."""

    allowed: str = "a number, true or false, or text"

    def parse(self, raw: Any) -> Value:
        """The value as it is, text and layers included."""
        if isinstance(raw, (list, tuple)):
            return tuple(str(item) for item in raw)
        if not isinstance(raw, (bool, int, float, str)):
            raise ValueError(refusal(self.allowed, raw))  # noqa: TRY004  a user's mistake, as for all kinds
        return raw

    def schema(self) -> dict[str, Any]:
        """Whatever it is."""
        return {}


ALL_LINEAR = "all-linear"
"""PEFT's word for every linear layer but the output head."""


_REGEX_SIGN = r"[\\^$*+?{}\[\]|()]"
"""No layer's name has one of these; a regular expression that names several layers has."""


@dataclass(frozen=True, slots=True)
class Modules:
    """The linear layers that get an adapter: all of them, a list of names, or a regular expression."""

    @property
    def allowed(self) -> str:
        """The three forms, with examples."""
        return (
            f"{ALL_LINEAR}, a list of layer names such as [q_proj, v_proj], or a regular expression such as "
            r"'.*\.[qv]_proj'"
        )

    def parse(self, raw: Any) -> str | tuple[str, ...]:
        """`all-linear`, the regular expression, or the names as a tuple in the file's order."""
        if raw == ALL_LINEAR:
            return ALL_LINEAR
        if isinstance(raw, str) and re.search(_REGEX_SIGN, raw):
            return self._regex(raw)
        if not isinstance(raw, (list, tuple)) or not raw:
            hint = f"a single layer is written [{raw}]" if isinstance(raw, str) else ""
            raise ValueError(refusal(self.allowed, raw, hint))
        for name in raw:
            if not isinstance(name, str) or not name or name == ALL_LINEAR:
                raise ValueError(f"expects layer names in a list, got {shown(name)} in {shown(raw)}")
            if re.search(_REGEX_SIGN, name):
                raise ValueError(
                    f"expects layer names in a list, got {shown(name)}; a regular expression stands alone, "
                    "without a list of names"
                )
        if len(set(raw)) < len(raw):
            raise ValueError(f"names a layer twice: {shown(raw)}")
        return tuple(raw)

    def _regex(self, raw: str) -> str:
        try:
            re.compile(raw)
        except re.error as error:
            raise ValueError(
                f"expects {self.allowed}, got {shown(raw)}, which is no regular expression: {error}"
            ) from None
        return raw

    def lists_choices(self, raw: list[Any]) -> bool:
        """Whether a list in the file is one of values to search, not one of layer names."""
        return any(
            isinstance(item, list)
            or (isinstance(item, str) and (item == ALL_LINEAR or re.search(_REGEX_SIGN, item) is not None))
            for item in raw
        )

    def schema(self) -> dict[str, Any]:
        """`all-linear`, a string that no layer could be called, or an array of names."""
        name = {"type": "string", "minLength": 1, "not": {"anyOf": [{"const": ALL_LINEAR}, _REGEX]}}
        names = {"type": "array", "items": name, "minItems": 1, "uniqueItems": True}
        return {"anyOf": [{"const": ALL_LINEAR}, _REGEX, names]}


_REGEX = {"type": "string", "pattern": _REGEX_SIGN}
ALL_LAYERS = "all"


@dataclass(frozen=True, slots=True)
class Layers:
    """The transformer layers that get an adapter: all of them, or a list of their numbers."""

    allowed: str = f"{ALL_LAYERS} or a list of layer numbers such as [0, 1, 2]"

    def parse(self, raw: Any) -> str | tuple[int, ...]:
        """`all`, or the numbers as a tuple, lowest first."""
        if raw == ALL_LAYERS:
            return ALL_LAYERS
        if not isinstance(raw, (list, tuple)) or not raw:
            is_number = isinstance(raw, int) and not isinstance(raw, bool)
            raise ValueError(
                refusal(self.allowed, raw, f"a single layer is written [{raw}]" if is_number else "")
            )
        for layer in raw:
            if isinstance(layer, bool) or not isinstance(layer, int) or layer < 0:
                raise ValueError(
                    f"expects layer numbers from 0 in a list, got {shown(layer)} in {shown(raw)}"
                )
        if len(set(raw)) < len(raw):
            raise ValueError(f"names a layer twice: {shown(raw)}")
        return tuple(sorted(raw))

    def lists_choices(self, raw: list[Any]) -> bool:
        """Whether a list in the file is one of values to search, not one of layer numbers."""
        return any(isinstance(item, list) or item == ALL_LAYERS for item in raw)

    def schema(self) -> dict[str, Any]:
        """`all` or an array of numbers."""
        layer = {"type": "integer", "minimum": 0}
        layers = {"type": "array", "items": layer, "minItems": 1, "uniqueItems": True}
        return {"anyOf": [{"const": ALL_LAYERS}, layers]}
