"""YAML that is costly or no plain data: one message with the line, at once."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.faults.mutations import bomb
from tests.studies import QUICKSTART
from tuner.config.parsing import read_round
from tuner.config.yaml_text import YamlError, parse
from tuner.errors import RoundFileError

ROUND = (QUICKSTART / "round1.yaml").read_text()

# what is appended to a good file, in which line of it the mistake stands, what is said
REFUSED = {
    "aliases of aliases": (bomb(9), 5, "more than 50,000 values"),
    "brackets": ("a: " + "[" * 300 + "]" * 300, 1, "more than 32 levels"),
    "brackets that stay open": ("a: " + "[" * 100_000, 1, "more than 32 levels"),
    "indentation": ("".join(f"{' ' * level}k:\n" for level in range(300)), 33, "more than 32 levels"),
    "dashes": ("a:\n" + "- " * 300 + "b", 2, "more than 32 levels"),
    "a tag that does not fit": ("a: 1\nb: !!bool maybe", 2, "without YAML tags"),
    "a tag that fits": ("a: !!int 1", 1, "without YAML tags"),
    "a tag of Python's": ("a: !!python/object/apply:os.system [x]", 1, "without YAML tags"),
    "a list as a key": ("[a]: b", 1, "a key is a list or a mapping"),
    "a mapping as a key": ("? {a: b}\n: c", 1, "a key is a list or a mapping"),
    "a key inside": ("x:\n  y: {[a]: b}", 2, "a key is a list or a mapping"),
    "an alias as a key": ("x: &a [b]\n*a : c", 2, "a key is an alias"),
    "an alias of what is around": ("x: &a [*a]", 1, "alias"),
    "an alias of nothing": ("x: *a", 1, "alias"),
    "a number beyond every float": ("x:\n  - " + "9" * 400, 2, "308 digits"),
    "half of a surrogate pair": ('x:\n  - "\\ud800"', 2, r"contains \ud800, half of a surrogate pair"),
    "a key with half of a pair": ('"x\\udfff": 1', 1, r"contains \udfff"),
    "a merge of what is no mapping": ("x: {<<: 1}", 1, "merg"),
}


@pytest.mark.timeout(120)
@pytest.mark.parametrize("case", REFUSED)
def test_it_is_refused_at_its_line_at_once(case: str) -> None:
    more, line, words = REFUSED[case]
    before, begun = ROUND.count("\n"), time.process_time()
    with pytest.raises(RoundFileError) as caught:
        read_round(ROUND + more, Path("round1.yaml"))
    assert time.process_time() - begun < 10
    (mistake,) = caught.value.mistakes
    assert mistake.line == before + line, str(caught.value)
    assert words in mistake.message


def test_a_file_that_is_too_long_is_not_read() -> None:
    begun = time.process_time()
    with pytest.raises(RoundFileError, match="at most 120,000"):
        read_round(ROUND + "# x\n" * 100_000, Path("round1.yaml"))
    assert time.process_time() - begun < 10


@pytest.mark.parametrize(
    "value", ["2026-99-99", "2026-11-28T25:61:61", "1:99", "0o9", "0x", "9" * 5000, "1e999999"]
)
def test_a_scalar_that_looks_like_something_is_read_or_refused(value: str) -> None:
    with suppress(YamlError):
        assert "a" in parse(f"a: {value}\n").document


def test_ordinary_yaml_passes() -> None:
    text = "a: &x [1, 2]\nb: *x\nc: &m {d: 1}\ne: {<<: *m, f: 2}\ng: 'x'\nh: |\n  text\n"
    found = parse(text).document
    assert found["b"] == [1, 2]
    assert found["e"] == {"d": 1, "f": 2}


def test_a_long_list_of_entries_is_read_in_good_time() -> None:
    entries = "".join(f"    - {{learning_rate: {number}e-6, lora_r: 8}}\n" for number in range(1, 2000))
    begun = time.process_time()
    assert len(parse(f"search:\n  enqueue:\n{entries}").document["search"]["enqueue"]) == 1999
    assert time.process_time() - begun < 20
