"""What a file holds before anyone has said how to read it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from tuner.config import SourceSpec
from tuner.data.preview import recognise, survey
from tuner.errors import DataError

ROWS: dict[str, dict[str, Any]] = {
    "alpaca": {"instruction": "Name a river.", "input": "", "output": "The Ebb."},
    "messages": {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
    "completion": {"prompt": "One, two,", "completion": " three."},
    "sharegpt": {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
    "text": {"text": "All happy families are alike."},
}


def source(path: Path, format: str = "alpaca") -> SourceSpec:
    return SourceSpec.model_validate({"path": str(path), "format": format})


def jsonl(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("format", list(ROWS))
def test_each_format_is_recognised_by_its_columns(tmp_path: Path, format: str) -> None:
    path = jsonl(tmp_path / "rows.jsonl", *[ROWS[format]] * 3)
    assert survey(source(path), recognised=True) == (format, 3)


@pytest.mark.parametrize("format", ["alpaca", "completion", "text"])
def test_tables_of_other_kinds(tmp_path: Path, format: str) -> None:
    row = ROWS[format]
    (tmp_path / "rows.json").write_text(json.dumps([row, row]))
    pyarrow.parquet.write_table(pa.Table.from_pylist([row] * 4), tmp_path / "rows.parquet")
    lines = [",".join(row), *[",".join(f'"{value}"' for value in row.values())] * 5]
    (tmp_path / "rows.csv").write_text("\n".join(lines) + "\n")
    for name, count in (("rows.json", 2), ("rows.parquet", 4), ("rows.csv", 5)):
        assert survey(source(tmp_path / name), recognised=True) == (format, count)


def test_the_most_telling_columns_decide() -> None:
    """Whoever exports a chat often leaves the prompt and the rendered text beside it."""
    assert recognise(("text", "prompt", "completion", "messages")) == "messages"
    assert recognise(("text", "completion", "prompt")) == "completion"
    assert recognise(("instruction", "output", "text")) == "alpaca"
    assert recognise(("id", "text")) == "text"
    assert recognise(("instruction", "prompt")) is None
    assert recognise(()) is None


def test_what_the_user_says_is_not_doubted(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", *[ROWS["alpaca"] | {"text": "the whole"}] * 2)
    assert survey(source(path, "text"), recognised=False) == ("text", 2)
    assert survey(source(path, "text"), recognised=True) == ("alpaca", 2)


def test_columns_of_no_format(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", {"instruction": "Name a river.", "answer": "The Ebb."})
    with pytest.raises(DataError) as refused:
        survey(source(path), recognised=True)
    message = str(refused.value)
    assert f"{path}:1" in message
    assert "'instruction'" in message
    assert all(word in message for word in ("alpaca", "messages", "completion", "text", "output"))


@pytest.mark.parametrize("recognised", [True, False])
def test_a_file_without_rows(tmp_path: Path, recognised: bool) -> None:
    path = jsonl(tmp_path / "rows.jsonl")
    with pytest.raises(DataError, match=r"rows\.jsonl.* no rows"):
        survey(source(path), recognised=recognised)


def test_a_file_that_is_not_there_or_not_readable(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.jsonl"):
        survey(source(tmp_path / "nowhere.jsonl"), recognised=True)
    (tmp_path / "rows.jsonl").write_text('{"instruction": "a", "output": "b"}\n{"instruction": \n')
    with pytest.raises(DataError, match=r"rows\.jsonl:2"):
        survey(source(tmp_path / "rows.jsonl"), recognised=True)
