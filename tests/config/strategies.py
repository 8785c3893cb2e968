"""Hypothesis strategies for hyperparameters in every form a round file may give them."""

import math

from hypothesis import strategies as st

from tuner.methods.kinds import (
    ALL_LAYERS,
    ALL_LINEAR,
    Flag,
    Integer,
    Kind,
    Layers,
    Method,
    Modules,
    Number,
    OneOf,
)
from tuner.methods.registry import BUILT_IN
from tuner.methods.table import HYPERPARAMETERS
from tuner.records import Choices, Dimension, Fixed, Range, TimesSqrtRank, Value

LAYER_NAMES = st.text("abcdefgh_.0123456789", min_size=1, max_size=8)
REGEXES = (r".*\.(q|v)_proj", "model.layers.[0-9].*", "(a|b): #", r"^x\d+$")


def values(kind: Kind) -> st.SearchStrategy[Value]:
    """Values that the kind accepts, as `parse` returns them."""
    match kind:
        case Number(above=above, at_least=at_least, below=below):
            low = above if at_least is None else at_least
            return st.floats(low, 1e6 if below is None else below).filter(_accepted(kind))
        case Integer(at_least=at_least):
            return st.integers(at_least, 10**6)
        case Flag():
            return st.booleans()
        case OneOf(names=names):
            return st.sampled_from(names)
        case Method(kind=method, refused=refused):
            names = [name for name in BUILT_IN[method] if name not in dict(refused)]
            return st.sampled_from((*names, "package.module:Name"))
        case Modules():
            names = st.lists(LAYER_NAMES, min_size=1, max_size=4, unique=True).map(tuple)
            return st.just(ALL_LINEAR) | names | st.sampled_from(REGEXES)
        case Layers():
            numbers = st.lists(st.integers(0, 99), min_size=1, max_size=4, unique=True)
            return st.just(ALL_LAYERS) | numbers.map(sorted).map(tuple)
    raise AssertionError(kind)


def dimensions(name: str) -> st.SearchStrategy[Dimension]:
    """Dimensions that the file may give a hyperparameter."""
    kind = HYPERPARAMETERS[name].kind
    forms: list[st.SearchStrategy[Dimension]] = [
        values(kind).map(Fixed),
        st.lists(values(kind), min_size=1, max_size=4, unique=True).map(tuple).map(Choices),
    ]
    if isinstance(kind, (Number, Integer)):
        forms.append(_ranges(kind))
    if HYPERPARAMETERS[name].may_follow_rank:
        forms.append(st.floats(1e-3, 1e3).map(TimesSqrtRank))
    return st.one_of(forms)


def _ranges(kind: Number | Integer) -> st.SearchStrategy[Dimension]:
    bounds = st.lists(values(kind), min_size=2, max_size=2, unique=True).map(sorted)
    integer = isinstance(kind, Integer)
    return st.builds(
        lambda ends, log: Range(*ends, log=log and ends[0] > 0, integer=integer), bounds, st.booleans()
    )


def _accepted(kind: Number):  # type: ignore[no-untyped-def]
    def accepts(value: float) -> bool:
        try:
            kind.parse(value)
        except ValueError:
            return False
        return math.isfinite(value)

    return accepts
