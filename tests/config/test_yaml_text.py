from enum import StrEnum

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tuner.config.yaml_text import YamlError, one_line, parse

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=12)
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text("ab:# ,", min_size=1), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(deadline=None)
@given(VALUES)
def test_a_value_fits_on_one_line_anywhere(value):
    line = one_line(value)
    assert "\n" not in line
    document = parse(f"plain: {line}\nlist: [{line}, 1]\nmapping: {{key: {line}, other: 1}}\n").document
    assert document == {"plain": value, "list": [value, 1], "mapping": {"key": value, "other": 1}}
    assert repr(document["plain"]) == repr(value)


@pytest.mark.parametrize(
    ("value", "line"),
    [
        (np.float64(0.1), "0.1"),
        (StrEnum("Colour", ["RED"]).RED, "red"),
        ((1, ("a",)), "[1, [a]]"),
        ([{"a": 1}], "[{a: 1}]"),
        (1e-5, "1e-05"),
        ("1e-5", "'1e-5'"),
        ("null", "'null'"),
    ],
)
def test_how_values_are_written(value, line):
    assert one_line(value) == line


def test_a_document_that_is_read_again_is_whole():
    """A text that was read lately is kept, and whoever edits what was read edits a copy."""
    first = parse("a: {b: [1]}\n").document
    first["a"]["b"].append(2)
    assert parse("a: {b: [1]}\n").document == {"a": {"b": [1]}}


def test_lines_of_nested_places():
    parsed = parse("a: 1\nb:\n  - c: 2\n    d: 3\n  - {e: 4}\n")
    assert parsed.line(("a",)) == 1
    assert parsed.line(("b", 0, "d")) == 4
    assert parsed.line(("b", 1, "e")) == 5
    assert parsed.line(("b", 1, "missing")) == 5
    assert parsed.line(("missing",)) is None


def test_unsafe_tags_are_refused():
    with pytest.raises(YamlError, match="without YAML tags"):
        parse("a: !!python/name:os.system x")
