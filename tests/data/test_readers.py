from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from tests.data import tiny
from tuner.data import files, json_rows
from tuner.data.examples import Row
from tuner.data.files import DataFile, LocalFile
from tuner.data.formats import RowFormat, row_format
from tuner.data.readers import has_lines, reader_of
from tuner.errors import DataError

ALPACA = row_format("alpaca", tiny.byte_level())
ROWS = [
    {"instruction": "Größe?", "input": "", "output": "line one\nline \u2028 two"},
    {"instruction": 'a, "b"', "input": "c", "output": "d"},
]
VALUES = st.recursive(
    st.integers() | st.sampled_from([None, True, 1.5, "", "é☃", 'a "b" \\ \n']),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner),
    max_leaves=4,
)
OBJECTS = st.dictionaries(st.sampled_from("abc"), VALUES)


def read(path: Path, chosen: RowFormat = ALPACA) -> list[Row]:
    file = LocalFile(path, str(path))
    return list(reader_of(file)(file, chosen))


def refusal(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        read(path)
    return str(caught.value)


def write_json(path: Path) -> None:
    path.write_text(json.dumps(ROWS, indent=1, ensure_ascii=False), encoding="utf-8")


def write_jsonl(path: Path) -> None:
    path.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS), encoding="utf-8-sig")


def write_csv(path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, ROWS[0].keys(), delimiter="\t" if "tsv" in path.name else ",")
        writer.writeheader()
        writer.writerows(ROWS)


def write_parquet(path: Path) -> None:
    parquet.write_table(pyarrow.Table.from_pylist([{**row, "unread": 1} for row in ROWS]), path)


@pytest.mark.parametrize(
    ("name", "write", "numbers", "lines"),
    [
        ("a.json", write_json, [1, 2], False),
        ("a.json", write_jsonl, [1, 3], True),
        ("a.JSONL", write_jsonl, [1, 3], True),
        ("a.csv", write_csv, [2, 4], True),
        ("a.tsv", write_csv, [2, 4], True),
        ("a.parquet", write_parquet, [1, 2], False),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_every_kind_of_file_gives_the_same_rows(
    tmp_path: Path, name: str, write: Callable[[Path], None], numbers: list[int], lines: bool, packed: bool
) -> None:
    path = tmp_path / name
    write(path)
    if packed and name != "a.parquet":
        path = path.with_name(name + ".gz")
        path.write_bytes(gzip.compress((tmp_path / name).read_bytes(), mtime=0))
    rows = read(path)
    assert [row.values for row in rows] == ROWS
    assert [row.number for row in rows] == numbers
    assert has_lines(LocalFile(path, str(path))) == lines
    between = ":" if lines else ": row "
    assert [row.place for row in rows] == [f"{path}{between}{number}" for number in numbers]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv"])
def test_an_empty_file_has_no_rows(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    assert read(tmp_path / name) == []


@given(items=st.lists(OBJECTS, max_size=5), chunk=st.integers(1, 20), indent=st.sampled_from([None, 2]))
def test_a_json_list_is_read_whatever_the_chunks(
    tmp_path_factory: pytest.TempPathFactory, items: list[Any], chunk: int, indent: int | None
) -> None:
    path = tmp_path_factory.mktemp("list") / "a.json"
    path.write_text(
        json.dumps(items, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8", errors="replace"
    )
    expected = json.loads(path.read_text(encoding="utf-8"))
    with pytest.MonkeyPatch.context() as patch, DataFile(LocalFile(path, str(path))) as file:
        patch.setattr(json_rows, "_CHUNK_BYTES", chunk)
        assert list(json_rows.json_objects(file)) == expected


@given(length=st.integers(0, 200), chunk=st.integers(1, 20))
def test_a_json_list_that_is_cut_off_is_refused(
    tmp_path_factory: pytest.TempPathFactory, length: int, chunk: int
) -> None:
    path = tmp_path_factory.mktemp("list") / "a.json"
    path.write_bytes(json.dumps(ROWS).encode()[:length])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_rows, "_CHUNK_BYTES", chunk)
        if 0 < length < len(json.dumps(ROWS)):
            assert str(path) in refusal(path)
        else:
            assert len(read(path)) == (2 if length else 0)


GOOD = b'{"instruction": "a", "output": "b"}'
DEEP = b"[" * 100_000


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", b"hello", "a.txt: unknown kind of file; allowed are .json,"),
        ("a.parquet.gz", b"", "unknown kind of file"),
        ("a.json", b"[" + GOOD + b", " + GOOD[:20], "a.json: row 2: not JSON: "),
        ("a.json", b"[" + GOOD + b" " + GOOD + b"]", "row 1: expected , or ] after it, found '{'"),
        ("a.json", b"[" + GOOD + b",]", "row 2: a row must be an object of columns and values, found ']'"),
        ("a.json", b"[" + GOOD + b"", "row 1: the file ends within the list; is it cut off?"),
        ("a.json", b"[" + GOOD + b"] more", "row 1: there is text after the list's closing ]"),
        ("a.json", b"[" + GOOD + b", 3]", "row 2: a row must be an object of columns and values, found '3'"),
        ("a.json", b'"hello"', "a.json: is neither a list of objects nor one object a line"),
        ("a.json", b"[" + GOOD + b', {"output": "\xff"}]', "row 2: byte 0xff is not UTF-8"),
        ("a.json", b"[" + GOOD + b", \xff", "row 2: byte 0xff is not UTF-8"),
        ("a.json", b"\xff\xfe[\x00]\x00", "row 1: byte 0xff is not UTF-8"),
        ("a.json", b'[{"a": ' + DEEP, "row 1: not JSON"),
        ("a.json", b"[" + GOOD + b",", "row 2: a row must be an object of columns and values, found nothing"),
        ("a.json", b"{\n" + GOOD[1:], "a.json:1: not one JSON object a line"),
        ("a.jsonl", GOOD + b"\n" + GOOD[:18], "a.jsonl:2: not one JSON object a line: Unterminated string"),
        ("a.jsonl", GOOD + b"\n" + GOOD[:18], "is the file cut off?"),
        ("a.jsonl", GOOD + b"\n[1]\n", "a.jsonl:2: a list; a row must be an object"),
        (
            "a.jsonl",
            GOOD + b'\n\n{"output": "\xe4"}\n',
            "a.jsonl:3: byte 0xe4 is not UTF-8; save the file as UTF-8",
        ),
        ("a.jsonl", DEEP, "a.jsonl:1: not JSON that can be read"),
        ("a.jsonl", b"1" * 5000, "a.jsonl:1: not JSON that can be read"),
        ("a.csv", b"a,b\n1,2\n1,2,3\n", "a.csv:3: 3 fields, but the first line names 2 columns"),
        ("a.csv", b"a,a\n", "a.csv:1: two columns have the same name: 'a', 'a'"),
        ("a.csv", b'a,b\n1,2\n"1,2\n3,4\n', "a.csv:3: not CSV: unexpected end of data"),
        ("a.csv", b"a,b\n1,\x002\n", "a.csv:2: has a NUL byte"),
        ("a.csv", b"a,b\n1,\xe42\n", "a.csv:2: byte 0xe4 is not UTF-8"),
        ("a.parquet", b"PAR1 not", "a.parquet: not a Parquet file that can be read"),
        ("a.parquet", b"", "a.parquet: not a Parquet file that can be read"),
        ("a.jsonl.gz", GOOD, "a.jsonl.gz: cannot be read: Not a gzipped file"),
        (
            "a.jsonl.gz",
            gzip.compress(GOOD * 1000, mtime=0)[:-20],
            "a.jsonl.gz: cannot be read: Compressed file ended",
        ),
        ("a.jsonl.gz", gzip.compress(GOOD, mtime=0)[:12] + b"\xff" * 30, "a.jsonl.gz: cannot be read: "),
    ],
)
def test_a_damaged_file_is_refused_with_its_place(
    tmp_path: Path, name: str, content: bytes, said: str
) -> None:
    (tmp_path / name).write_bytes(content)
    message = refusal(tmp_path / name)
    assert message.startswith(str(tmp_path / name))
    assert said in message


@pytest.mark.parametrize("name", ["no.jsonl", "no.json", "no.csv", "no.parquet", "no.json.gz"])
def test_a_missing_file_is_refused(tmp_path: Path, name: str) -> None:
    assert refusal(tmp_path / name) == f"{tmp_path / name}: there is no such file"


def test_a_line_that_would_not_fit_in_memory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "MAX_ROW_BYTES", 1000)
    monkeypatch.setattr(json_rows, "MAX_ROW_BYTES", 1000)
    monkeypatch.setattr(json_rows, "_CHUNK_BYTES", 100)
    row = json.dumps({"instruction": "a", "output": "b" * 2000})
    for name, text in (("a.jsonl", f"{GOOD.decode()}\n{row}\n"), ("a.json", f"[{GOOD.decode()}, {row}]")):
        (tmp_path / name).write_text(text)
    assert "a.jsonl:2: the line is longer than 1,000 bytes" in refusal(tmp_path / "a.jsonl")
    assert "a.json: row 2: " in refusal(tmp_path / "a.json")


def test_a_file_that_unpacks_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_EXPANSION_CHECKED_FROM_BYTES", 1000)
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress((GOOD + b"\n") * 100_000, mtime=0))
    assert "unpacks to more than 200 times its size" in refusal(path)


LIST = "is a JSON list; call it .json"
OBJECT = "an object goes over several lines; write each on one line"
LISTED = "with a list under 'data'; if these are the rows"


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.jsonl", json.dumps(ROWS), LIST),
        ("a.jsonl", json.dumps(ROWS) + "\n\n", LIST),
        ("a.jsonl", "\n" + json.dumps(ROWS, indent=1), LIST),
        ("a.jsonl", "[\n" + ",\n".join(map(json.dumps, ROWS)) + "\n]\n", LIST),
        ("a.ndjson", "[" + ",\n".join(map(json.dumps, ROWS)) + "]", LIST),
        ("a.jsonl", json.dumps(ROWS * 20_000, indent=1), LIST),
        ("a.jsonl", json.dumps(ROWS, indent=1)[:-20], LIST),
        ("a.jsonl", "".join(json.dumps(row, indent=2) + "\n" for row in ROWS), OBJECT),
        ("a.json", "".join(json.dumps(row, indent=2) + "\n" for row in ROWS), OBJECT),
        ("a.jsonl", json.dumps({"messages": [{"role": "user", "content": "a"}]}, indent=2), OBJECT),
        ("a.json", json.dumps({"version": 1, "data": ROWS}, indent=2), LISTED),
        ("a.jsonl", '[{"role": "user", "content": "a"}]\n', 'such as {"messages": [...]}'),
        ("a.jsonl", (json.dumps(ROWS) + "\n") * 2, "a list; a row must be an object"),
        ("a.jsonl", '{"output": "a",\n{"output": "b"}\n', "line: Expecting property name"),
        ("a.jsonl", '{"output": "a\n{"output": "b"}\n{"output": "c"}\n', "Invalid control character"),
    ],
)
def test_json_of_another_shape_says_what_it_is(tmp_path: Path, name: str, text: str, said: str) -> None:
    (tmp_path / name).write_text(text)
    message = refusal(tmp_path / name)
    assert said in message
    assert [hint for hint in (LIST, OBJECT, LISTED) if hint in message] == (
        [said] if said in (LIST, OBJECT, LISTED) else []
    )


@given(item=st.dictionaries(st.sampled_from("abc"), VALUES, min_size=1), good=st.integers(0, 2))
def test_a_pretty_printed_object_is_told_from_damage(
    tmp_path_factory: pytest.TempPathFactory, item: Any, good: int
) -> None:
    path = tmp_path_factory.mktemp("rows") / "a.jsonl"
    path.write_bytes((GOOD + b"\n") * good + json.dumps(item, indent=1).encode())
    message = refusal(path)
    assert f"a.jsonl:{good + 1}: not one JSON object a line: " in message
    assert "over several lines" in message


def test_packed_files_are_told_alike(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(json.dumps(ROWS, indent=1).encode()))
    assert LIST in refusal(tmp_path / "a.jsonl.gz")
