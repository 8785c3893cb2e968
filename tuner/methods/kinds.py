"""The kinds of values that a hyperparameter can have: parsing, error messages and JSON Schema."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from tuner.errors import one_of, refusal, shown
from tuner.methods import registry
from tuner.records import Value


class Kind(Protocol):
    """The type of a hyperparameter's values."""

    @property
    def allowed(self) -> str:
        """Return the allowed values in words, to follow `expects`."""

    def parse(self, raw: Any) -> Value:
        """Parse a value of the file. Raises ValueError with what was read and what is allowed."""

    def schema(self) -> dict[str, Any]:
        """Return the JSON Schema of one value."""


class UnknownName(ValueError):
    """A value that is not one of a hyperparameter's allowed names."""

    def __init__(self, names: tuple[str, ...], raw: Any, *, allowed: str) -> None:
        self.names, self.raw, self.allowed = names, raw, allowed
        super().__init__(refusal(allowed, raw))


@dataclass(frozen=True, slots=True)
class Number:
    """A finite number, parsed as a float."""

    above: float | None = None
    """Exclusive lower bound."""
    at_least: float | None = None
    below: float | None = None
    """Exclusive upper bound."""

    @property
    def allowed(self) -> str:
        """Return, for example, `a number of at least 0 and below 1`."""
        bounds = {"above": self.above, "of at least": self.at_least, "below": self.below}
        said = [f"{words} {bound:g}" for words, bound in bounds.items() if bound is not None]
        return f"a number {' and '.join(said)}".rstrip()

    @property
    def limits(self) -> tuple[float | None, float | None]:
        """Return its bounds."""
        return self.above if self.at_least is None else self.at_least, self.below

    def parse(self, raw: Any) -> float:
        """Parse a float. Whole numbers become floats; text that looks like a number is refused."""
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
        """Return `type: number` with its bounds."""
        bounds = {"exclusiveMinimum": self.above, "minimum": self.at_least, "exclusiveMaximum": self.below}
        return {"type": "number", **{key: bound for key, bound in bounds.items() if bound is not None}}


@dataclass(frozen=True, slots=True)
class Integer:
    """A whole number."""

    at_least: int

    @property
    def allowed(self) -> str:
        """Return, for example, `a whole number of at least 1`."""
        return f"a whole number of at least {self.at_least}"

    @property
    def limits(self) -> tuple[float | None, float | None]:
        """Return its lower bound."""
        return self.at_least, None

    def parse(self, raw: Any) -> int:
        """Parse an int. 8.0 is refused, since it may be a typing error for a fraction."""
        if isinstance(raw, bool) or not isinstance(raw, int) or raw < self.at_least:
            raise ValueError(refusal(self.allowed, raw))
        return raw

    def schema(self) -> dict[str, Any]:
        """Return `type: integer` with its bound."""
        return {"type": "integer", "minimum": self.at_least}


@dataclass(frozen=True, slots=True)
class Flag:
    """True or false."""

    @property
    def allowed(self) -> str:
        """Return the two booleans of YAML 1.2, where `yes` and `on` are text."""
        return "true or false"

    def parse(self, raw: Any) -> bool:
        """Parse a bool."""
        if isinstance(raw, bool):
            return raw
        raise ValueError(refusal(self.allowed, raw))

    def schema(self) -> dict[str, Any]:
        """Return `type: boolean`."""
        return {"type": "boolean"}


@dataclass(frozen=True, slots=True)
class OneOf:
    """One of a fixed set of names."""

    names: tuple[str, ...]
    refused: tuple[tuple[str, str], ...] = ()
    """Known names that are not supported, also with a suffix after `_`, and the reason for each."""

    @property
    def allowed(self) -> str:
        """Return the names, with `or` before the last."""
        return one_of(self.names)

    def parse(self, raw: Any) -> str:
        """Parse one of the names."""
        for name, reason in self.refused:
            if isinstance(raw, str) and (raw == name or raw.startswith(f"{name}_")):
                raise ValueError(refusal(self.allowed, raw, reason))
        if not isinstance(raw, str) or raw not in self.names:
            raise UnknownName(self.names, raw, allowed=self.allowed)
        return raw

    def schema(self) -> dict[str, Any]:
        """Return an `enum`."""
        return {"enum": list(self.names)}


@dataclass(frozen=True, slots=True)
class Method:
    """The name of a method: built in, registered by an installed package, or `package.module:Name`."""

    kind: Literal["optimizer", "schedule", "variant"]
    refused: tuple[tuple[str, str], ...] = ()
    """Names that are chosen in another way, and which."""

    @property
    def allowed(self) -> str:
        """Return the known names and the form of a path."""
        return one_of((*self._names(registry.names(self.kind)), "package.module:Name"))

    def parse(self, raw: Any) -> str:
        """Parse a name without importing anything."""
        if isinstance(raw, str) and raw in dict(self.refused):
            raise ValueError(refusal(self.allowed, raw, dict(self.refused)[raw]))
        if not isinstance(raw, str) or not registry.is_known(self.kind, raw):
            raise UnknownName(self._names(registry.names(self.kind)), raw, allowed=self.allowed)
        return raw

    def schema(self) -> dict[str, Any]:
        """Return an `enum` of the built-in names (for completion in editors), or a path."""
        path = {"type": "string", "pattern": f"^{registry.PATH}$"}
        return {"anyOf": [{"enum": list(self._names(registry.BUILT_IN[self.kind]))}, path]}

    def _names(self, names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(name for name in names if name not in dict(self.refused))


@dataclass(frozen=True, slots=True)
class Anything:
    """A value of a plug-in's hyperparameter while the plug-in is not loaded."""

    allowed: str = "a number, true or false, or text"

    def parse(self, raw: Any) -> Value:
        """Parse a number, a bool, text or a list."""
        if isinstance(raw, (list, tuple)):
            return tuple(str(item) for item in raw)
        if not isinstance(raw, (bool, int, float, str)):
            raise ValueError(refusal(self.allowed, raw))  # noqa: TRY004  a user's mistake, as for all kinds
        return raw

    def schema(self) -> dict[str, Any]:
        """Return a schema that allows every value."""
        return {}


ALL_LINEAR = "all-linear"
"""PEFT's name for all linear layers except the output head."""


_REGEX_SIGN = r"[\\^$*+?{}\[\]|()]"
"""Characters that occur in regular expressions but not in names of layers."""


@dataclass(frozen=True, slots=True)
class Modules:
    """The linear layers that get an adapter: all of them, a list of names, or a regular expression."""

    @property
    def allowed(self) -> str:
        """Return the three forms, with examples."""
        return (
            f"{ALL_LINEAR}, a list of layer names such as [q_proj, v_proj], or a regular expression such as "
            r"'.*\.[qv]_proj'"
        )

    def parse(self, raw: Any) -> str | tuple[str, ...]:
        """Parse `all-linear`, a regular expression, or names, which become a tuple in the file's order."""
        if raw == ALL_LINEAR:
            return ALL_LINEAR
        if isinstance(raw, str) and re.search(_REGEX_SIGN, raw):
            return self._regex(raw)
        if not isinstance(raw, (list, tuple)) or not raw:
            hint = _as_list(raw) if isinstance(raw, str) else ""
            raise ValueError(refusal(self.allowed, raw, hint))
        for name in raw:
            if not isinstance(name, str) or not name or name == ALL_LINEAR:
                raise ValueError(f"expects layer names in a list, got {shown(name)} in {shown(raw)}")
            if re.search(_REGEX_SIGN, name):
                raise ValueError(
                    f"expects layer names in a list, got {shown(name)}; write a regular expression as text, "
                    "not in a list"
                )
        if len(set(raw)) < len(raw):
            raise ValueError(f"lists a layer twice: {shown(raw)}")
        return tuple(raw)

    def _regex(self, raw: str) -> str:
        try:
            re.compile(raw)
        except re.error as error:
            raise ValueError(
                f"expects {self.allowed}, got {shown(raw)}, which is not a valid regular expression: {error}"
            ) from None
        return raw

    def lists_choices(self, raw: list[Any]) -> bool:
        """Return whether a list in the file is a list of choices, not one of layer names."""
        return any(
            isinstance(item, list)
            or (isinstance(item, str) and (item == ALL_LINEAR or re.search(_REGEX_SIGN, item) is not None))
            for item in raw
        )

    def schema(self) -> dict[str, Any]:
        """Return a schema for `all-linear`, a regular expression, or an array of names."""
        name = {"type": "string", "minLength": 1, "not": {"anyOf": [{"const": ALL_LINEAR}, _REGEX]}}
        names = {"type": "array", "items": name, "minItems": 1, "uniqueItems": True}
        return {"anyOf": [{"const": ALL_LINEAR}, _REGEX, names]}


def _as_list(raw: str) -> str:
    if raw.lower().replace("_", "-") in ("all", "linear", "all-linear"):
        return f"did you mean {ALL_LINEAR}?"
    return f"write {'the layers' if ',' in raw else 'a single layer'} as [{raw}]"


_REGEX = {"type": "string", "pattern": _REGEX_SIGN}
ALL_LAYERS = "all"


@dataclass(frozen=True, slots=True)
class Layers:
    """The transformer layers that get an adapter: all of them, or a list of their numbers."""

    allowed: str = f"{ALL_LAYERS} or a list of layer numbers such as [0, 1, 2]"

    def parse(self, raw: Any) -> str | tuple[int, ...]:
        """Parse `all`, or numbers, which become a sorted tuple."""
        if raw == ALL_LAYERS:
            return ALL_LAYERS
        if not isinstance(raw, (list, tuple)) or not raw:
            is_number = isinstance(raw, int) and not isinstance(raw, bool)
            raise ValueError(
                refusal(self.allowed, raw, f"write a single layer as [{raw}]" if is_number else "")
            )
        for layer in raw:
            if isinstance(layer, bool) or not isinstance(layer, int) or layer < 0:
                raise ValueError(
                    f"expects layer numbers from 0 in a list, got {shown(layer)} in {shown(raw)}"
                )
        if len(set(raw)) < len(raw):
            raise ValueError(f"lists a layer twice: {shown(raw)}")
        return tuple(sorted(raw))

    def lists_choices(self, raw: list[Any]) -> bool:
        """Return whether a list in the file is a list of choices, not one of layer numbers."""
        return any(isinstance(item, list) or item == ALL_LAYERS for item in raw)

    def schema(self) -> dict[str, Any]:
        """Return a schema for `all` or an array of numbers."""
        layer = {"type": "integer", "minimum": 0}
        layers = {"type": "array", "items": layer, "minItems": 1, "uniqueItems": True}
        return {"anyOf": [{"const": ALL_LAYERS}, layers]}
