from __future__ import annotations

import json
from pathlib import Path

import pytest

from tuner.errors import InputError, StorageError
from tuner.inference import Answer, AnswerFile

ANSWERS = [Answer(row, f"frage {row}?", f"Antwört {row}\n", made_from=f"h{row}") for row in (3, 1, 2)]
EXPECTED = {1: "h1", 2: "h2", 3: "h3"}


def rows_in(path: Path) -> list[int]:
    return [json.loads(line)["row"] for line in path.read_text().splitlines()]


def test_a_run_that_was_killed_anywhere_goes_on(tmp_path: Path) -> None:
    """The file is cut at every second byte; in the end it is as if nothing had happened."""
    path = tmp_path / "answers.jsonl"
    with AnswerFile(path, EXPECTED) as file:
        file.append(ANSWERS[:1])
        file.append(ANSWERS[1:])
    undisturbed = path.read_bytes()
    assert rows_in(path) == [1, 2, 3]
    written = "".join(answer.line() for answer in ANSWERS).encode()
    ends = [at + 1 for at, byte in enumerate(written) if byte == ord("\n")]
    for length in range(0, len(written), 2):
        path.write_bytes(written[:length])
        file = AnswerFile(path, EXPECTED)
        assert len(file.rows) == sum(end <= length for end in ends)
        assert path.read_bytes() == written[:length]
        missing = [answer for answer in ANSWERS if answer.row not in file.rows]
        with file:
            file.append(missing[:1])
        assert set(rows_in(path)) == file.rows
        with AnswerFile(path, EXPECTED) as file:
            file.append(missing[1:])
        assert path.read_bytes() == undisturbed
    assert [each.name for each in tmp_path.iterdir()] == ["answers.jsonl"]


def test_what_is_not_whole_stays_in_the_order_it_was_made(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    with AnswerFile(path, EXPECTED) as file:
        file.append(ANSWERS[:2])
    assert rows_in(path) == [3, 1]


def test_what_is_not_asked_for_is_not_said() -> None:
    assert json.loads(ANSWERS[0].line()) == {
        "row": 3, "prompt": "frage 3?", "answer": "Antwört 3\n", "made_from": "h3"
    }  # fmt: skip
    assert list(json.loads(Answer(1, "p", base="b", made_from="h").line())) == [
        "row", "prompt", "base", "made_from"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("instruction,output\na,b\n", ":1: this line is not an answer"),
        ("my only copy", ":1: this line is not an answer"),
        (ANSWERS[0].line() + "notes", ":2: this line is not an answer"),
        (ANSWERS[0].line() + '{"row": 1}\n', ":2: this line is not an answer"),
        (
            Answer(1, "p", made_from="other").line(),
            ":1: this line was made from another prompt, trial or options",
        ),
        (
            Answer(9, "p", made_from="h1").line(),
            ":1: this line was made from another prompt, trial or options",
        ),
    ],
)
def test_a_file_with_something_else_is_left_alone(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text(text)
    with pytest.raises(InputError, match=words):
        AnswerFile(path, EXPECTED)
    assert path.read_text() == text


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        AnswerFile(tmp_path / "no" / "answers.jsonl", EXPECTED)
    with pytest.raises(InputError, match="cannot be read"):
        AnswerFile(tmp_path, EXPECTED)


def test_two_runs_do_not_write_one_file(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    with AnswerFile(path, EXPECTED), pytest.raises(StorageError, match="another process is writing to it"):
        AnswerFile(path, EXPECTED).open()


def test_what_another_run_wrote_since_the_file_was_read_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    for answers in (ANSWERS[:1], ANSWERS[1:]):  # the last replaces the file, in the order of the rows
        late = AnswerFile(path, EXPECTED)
        with AnswerFile(path, EXPECTED) as file:
            file.append(answers)
        with pytest.raises(StorageError, match="has written to it in the meantime"):
            late.open()
    assert rows_in(path) == [1, 2, 3]
    with AnswerFile(path, EXPECTED) as file:
        assert file.rows == {1, 2, 3}
