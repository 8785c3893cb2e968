from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.config.rounds import FULL, MINIMAL, spec_of
from tuner.config import DELETE, edit_round, new_round
from tuner.config.yaml_text import one_line, parse
from tuner.errors import InputError


def changed_lines(before: str, after: str) -> tuple[list[str], list[str]]:
    """Lines that went and lines that came."""
    old, new = before.splitlines(), after.splitlines()
    return [line for line in old if line not in new], [line for line in new if line not in old]


def test_no_change_changes_nothing():
    assert edit_round(FULL, {}, {}) == FULL


def test_only_the_changed_line_changes():
    after = edit_round(
        FULL, {"hyperparameters.lora_r": 16}, {"hyperparameters.lora_r": "the leading trials agree"}
    )
    assert changed_lines(FULL, after) == (
        ["  lora_r: [8, 16, 32]"],
        ["  lora_r: 16  # the leading trials agree"],
    )


def test_a_value_keeps_its_comment_when_no_reason_is_given():
    after = edit_round(FULL, {"hyperparameters.batch_size": 4}, {})
    assert changed_lines(FULL, after)[1] == ["  batch_size: 4            # sequences per optimizer step"]


def test_a_reason_takes_the_place_of_the_comment_before():
    once = edit_round(FULL, {"hyperparameters.batch_size": 4}, {"hyperparameters.batch_size": "one"})
    twice = edit_round(
        once, {"hyperparameters.batch_size": 4}, {"hyperparameters.batch_size": "second\n  reason"}
    )
    assert "  batch_size: 4  # second reason\n" in twice
    assert "# one" not in twice
    assert "optimizer step" not in twice


def test_a_list_of_points_is_written_one_a_line_under_its_reason():
    points = [{"learning_rate": 3e-4, "continues": "r0/3"}, {"target_modules": ["q", "v"]}]
    after = edit_round(FULL, {"search.enqueue": points}, {"search.enqueue": "the best two of r0"})
    assert (
        "  enqueue:  # the best two of r0\n"
        "    - {learning_rate: 0.0003, continues: r0/3}\n"
        "    - {target_modules: [q, v]}\n"
        "evaluation:"
    ) in after
    again = edit_round(after, {"search.enqueue": points[:1]}, {"search.enqueue": "the best of r0"})
    assert (
        "  enqueue:  # the best of r0\n    - {learning_rate: 0.0003, continues: r0/3}\nevaluation:" in again
    )
    kept = edit_round(again, {"search.enqueue": points}, {})
    assert "  enqueue:  # the best of r0\n    - {l" in kept
    emptied = edit_round(kept, {"search.enqueue": []}, {})
    assert "  enqueue: []  # the best of r0\nevaluation:" in emptied


def test_keys_that_share_a_line_are_named_in_its_comment():
    changes = {"evaluation.every_steps": 10, "evaluation.max_examples": 400}
    comments = {"evaluation.every_steps": "a twelfth", "evaluation.max_examples": "less noise"}
    after = edit_round(FULL, changes, comments)
    assert (
        "evaluation: {every_steps: 10, batch_size: 16, max_examples: 400}"
        "  # every_steps: a twelfth; max_examples: less noise\n"
    ) in after
    assert edit_round(after, changes, comments) == after


def test_new_keys_go_to_the_end_of_their_section():
    changes = {
        "hyperparameters.weight_decay": 0.1,
        "checkpoints.extra": "x",
        "data.eval_fraction": 0.2,
        "notes.first.second": [1, 2],
    }
    after = edit_round(FULL, changes, {"hyperparameters.weight_decay": "regularise"})
    assert "  decay_steps: 24\n  weight_decay: 0.1  # regularise\nsearch:" in after
    assert "{directory: runs, keep_best: 1, extra: x}" in after
    assert after.endswith("storage: sqlite:///tuner.db\nnotes: {first: {second: [1, 2]}}\n")


def test_new_sections_in_a_short_file():
    points = [{"lora_r": 16}]
    after = edit_round(
        MINIMAL, {"hyperparameters.lora_r": [8, 16], "search.enqueue": points, "search.trials": 3}, {}
    )
    assert spec_of(after).hyperparameters == {"lora_r": [8, 16]}
    assert spec_of(after).search.enqueue == points
    assert after.startswith(MINIMAL)


def test_deleting():
    after = edit_round(
        FULL,
        {
            "hyperparameters.lora_alpha": DELETE,
            "evaluation.every_steps": DELETE,
            "run": DELETE,
            "search.none": DELETE,
        },
        {"run": "not needed"},
    )
    gone, came = changed_lines(FULL, after)
    assert came == ["evaluation: {batch_size: 16, max_examples: 200}"]
    assert [line.split(":")[0] for line in gone] == ["  lora_alpha", "evaluation", "run"]
    assert (
        edit_round(after, {"run": DELETE, "evaluation.max_examples": DELETE}, {}).count("{batch_size: 16}")
        == 1
    )


def test_deleting_all_of_a_section_leaves_it_empty():
    text = "a:  # first\n  b: 1  # inner\n# between\nc: {d: 2}\n"
    after = edit_round(text, {"a.b": DELETE, "c.d": DELETE}, {})
    assert after == "a: {}  # first\n# between\nc: {}\n"


@pytest.mark.parametrize(
    ("text", "changes", "comments", "after"),
    [
        ("a: 1", {"a": 2}, {"a": "why"}, "a: 2  # why"),
        ("a:\nb: 1\n", {"a": 2}, {}, "a: 2\nb: 1\n"),
        ("a:  # empty\nb: 1\n", {"a": 2}, {}, "a: 2  # empty\nb: 1\n"),
        ("a:\n", {"a.b": 2}, {}, "a: {b: 2}\n"),
        ("a: 1\r\nb: 2\r\n", {"c": [{"d": 1}]}, {"b": "x"}, "a: 1\r\nb: 2  # x\r\nc:\r\n  - {d: 1}\r\n"),
        ("a: 'x # y'  # z\n", {}, {"a": "w"}, "a: 'x # y'  # w\n"),
        ("a: |\n  x\n\n  y\n\n# c\nb: 1\n", {"a": 3}, {}, "a: 3\n\n# c\nb: 1\n"),
        ("a: | # old\n  x # y\nb: 1\n", {}, {"a": "new"}, "a: |  # new\n  x # y\nb: 1\n"),
        ("a: {b: 1,\n    c: 2}  # z\n", {"a.b": 5}, {"a.b": "w"}, "a: {b: 5,  # b: w\n    c: 2}  # z\n"),
        ("a:\n- b: 1\n- c\n# d\ne: 1\n", {"a": 2}, {}, "a: 2\n# d\ne: 1\n"),
        ("a:\n- b: 1\n- c  # d\n", {"a": [{"x": 1}]}, {}, "a:\n  - {x: 1}\n"),
        (
            "a:\n  b: 1\n\n  # about c\n  c: 2\nd: 3\n",
            {"a.b": DELETE},
            {},
            "a:\n\n  # about c\n  c: 2\nd: 3\n",
        ),
        ("a:\n  b: 1\n\n# about d\nd: 3\n", {"a.c": 2}, {}, "a:\n  b: 1\n  c: 2\n\n# about d\nd: 3\n"),
        ('{"a": 1, "b": {}}\n', {"b.c": 2, "a": DELETE}, {}, '{"b": {c: 2}}\n'),
        ("---\na: 1\n...\n", {"b": 2}, {}, "---\na: 1\nb: 2\n...\n"),
        ("a: >-\n  x\n  y", {"b": "c: d"}, {}, "a: >-\n  x\n  y\nb: 'c: d'"),
        ("a: &x 1\nb: *x\n", {"c": 2}, {"b": "y"}, "a: &x 1\nb: *x  # y\nc: 2\n"),
        ("a: &x 1\nb: *x\n", {"b": 2}, {}, "a: &x 1\nb: 2\n"),
        ("été: 1  # é\na: 2\n", {"a": "ü"}, {"été": "ö"}, "été: 1  # ö\na: ü\n"),
    ],
)
def test_odd_but_legal_texts(text, changes, comments, after):
    assert edit_round(text, changes, comments) == after


@pytest.mark.parametrize(
    ("text", "changes"),
    [
        ("a: &x {b: 1}\nc: *x\n", {"a.b": 2}),
        ("a: &x {b: 1, d: 3}\nc: *x\n", {"c.b": 2}),
        ("a: &x 1\nb: *x\n", {"a": 2}),
        ("a: &x {b: 1}\nc: {<<: *x}\n", {"c.b": DELETE}),
        ("- a\n", {"a": 1}),
        ("a: [\n", {"a": 1}),
        ("", {"a": 1}),
    ],
)
def test_edits_that_would_reach_further_are_refused(text, changes):
    with pytest.raises(InputError, match="cannot be"):
        edit_round(text, changes, {})


def test_a_comment_needs_its_key():
    with pytest.raises(KeyError):
        edit_round(FULL, {}, {"hyperparameters.lora_dropout": "why"})


def test_a_promotion_of_the_generated_file():
    before = new_round(study="s", model="m", data="d.jsonl", train_rows=520)
    changes: dict[str, Any] = {
        "round": "round2",
        "max_train_steps": 120,
        "hyperparameters.learning_rate": {"low": 1e-4, "high": 9e-4, "log": True},
        "hyperparameters.decay_steps": 48,
        "search.enqueue": [{"learning_rate": 3e-4, "lora_r": 16, "continues": "round1/3"}],
        "search.trials": 5,
        "evaluation.every_steps": 10,
    }
    after = edit_round(before, changes, {key: f"why {key}" for key in changes})
    spec = spec_of(after)
    assert (spec.round, spec.max_train_steps, spec.search.trials) == ("round2", 120, 5)
    gone, came = changed_lines(before, after)
    assert (len(gone), len(came)) == (7, 8)
    assert len([line for line in came if "# " in line]) == 7


# --- any file, any change --------------------------------------------------------------------------

NAMES = st.sampled_from(["alpha", "beta", "gamma", "delta"])
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-9, 9)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=6)
)
POINTS = st.lists(st.dictionaries(NAMES, SCALARS, min_size=1, max_size=2), min_size=1, max_size=3)
VALUES = SCALARS | st.lists(SCALARS, max_size=3) | POINTS | st.dictionaries(NAMES, SCALARS, max_size=2)
COMMENTS = st.sampled_from(["", "  # short", " # with: a {brace} and 'quote'"])


@st.composite
def texts(draw: st.DrawFn) -> str:
    """Scalars and sections in flow and block style, with comments and blank lines in between."""
    lines = ["kept: 0"]
    for name in draw(st.lists(NAMES, min_size=1, max_size=4, unique=True)):
        inner = draw(st.dictionaries(NAMES, VALUES, min_size=1, max_size=3))
        lines += draw(st.sampled_from([[], [""], [f"# above {name}"]]))
        if draw(st.booleans()):
            lines.append(f"{name}:{draw(COMMENTS)}")
            indent = draw(st.sampled_from(["  ", "    "]))
            for key, value in inner.items():
                lines += draw(st.sampled_from([[], [f"{indent}# above {name}.{key}"]]))
                if isinstance(value, list) and value and draw(st.booleans()):
                    lines.append(f"{indent}{key}:{draw(COMMENTS)}")
                    lines += [
                        f"{indent}{draw(st.just('- '))}{one_line(item)}{draw(COMMENTS)}" for item in value
                    ]
                else:
                    lines.append(f"{indent}{key}: {one_line(value)}{draw(COMMENTS)}")
        else:
            lines.append(f"{name}: {one_line(draw(VALUES))}{draw(COMMENTS)}")
    return "\n".join([*lines, "# end", ""])


PATHS = st.lists(NAMES, min_size=1, max_size=2).map(".".join)


@settings(deadline=None)
@given(texts(), st.dictionaries(PATHS, VALUES | st.just(DELETE), max_size=4), st.booleans())
def test_any_edit_reads_as_it_should_and_keeps_the_other_lines(text, changes, with_reasons):
    # a section and a key inside it in one edit would undo each other
    changes = {
        key: value
        for key, value in changes.items()
        if "." in key or not any(other.startswith(f"{key}.") for other in changes)
    }
    expected = parse(text).document
    for key, value in changes.items():
        apply(expected, key.split("."), value)
    comments = {key: f"why {key}" for key, value in changes.items() if value is not DELETE and with_reasons}
    after = edit_round(text, changes, comments)
    assert parse(after).document == expected
    assert edit_round(after, changes, comments) == after
    touched = {key.split(".")[0] for key in changes}
    for line in text.splitlines():
        if line.startswith("#") or (line and not line.startswith(" ") and line.split(":")[0] not in touched):
            assert line in after.splitlines()
    for comment in comments.values():
        assert comment in after


def apply(document: dict[str, Any], path: list[str], value: Any) -> None:
    name, *rest = path
    if not rest:
        if value is DELETE:
            document.pop(name, None)
        else:
            document[name] = value
        return
    if not isinstance(document.get(name), dict):
        if value is DELETE:
            return
        document[name] = {}
    apply(document[name], rest, value)
