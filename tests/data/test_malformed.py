"""Malformed input: each is refused with file and line or row, or counted; none hangs or fills memory."""

from __future__ import annotations

import gzip
import io
import json
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from tests.data import tiny
from tuner.data import PreparedData, files, plain_text, readers
from tuner.errors import DataError

CHAT = tiny.byte_level(chat_template=tiny.CHATML)
ROW = {"instruction": "a", "output": "b"}
GOOD = json.dumps(ROW).encode() + b"\n"
CSV = b"instruction,output\n"
MANY_BYTES = 6 * 2**20
"""Of a bomb: many times what a row may have in these tests."""
DEADLINE_SECONDS = 60


def prepared(path: Path | str, format: str, **more: str) -> PreparedData:
    source = {"path": str(path), "format": format, **more}
    return tiny.prepared(CHAT, train=[source], eval_fraction=0.5, max_length=64)


def refusal(path: Path | str, format: str = "alpaca", **more: str) -> str:
    with pytest.raises(DataError) as caught:
        prepared(path, format, **more)
    return str(caught.value)


def columns(**values: list[object]) -> bytes:
    """A Parquet file of these columns."""
    return written(pyarrow.table(values))


def written(table: pyarrow.Table) -> bytes:
    stream = io.BytesIO()
    parquet.write_table(table, stream, compression="zstd")
    return stream.getvalue()


def messages(*turns: object) -> bytes:
    return json.dumps({"messages": turns}).encode() + b"\n"


PARQUET = columns(instruction=["a"] * 500, output=["b"] * 500)
NOT_TEXT = pyarrow.array([b"\xff", b"b"]).view(pyarrow.string())
TWICE = pyarrow.table([["a"], ["b"], ["c"]], names=["instruction", "output", "output"])
USER = {"role": "user", "content": "x"}

# name of the file, its bytes, what is said right after the file's name, what is said besides
CONTENTS: dict[str, tuple[str, bytes, str, str]] = {
    # cut off
    "truncated JSON": ("a.json", b"[" + GOOD + b"," + GOOD[:18], ": row 2: ", "not JSON"),
    "truncated line": ("a.jsonl", GOOD + GOOD[:12], ":2: ", "cut off"),
    "truncated gzip": ("a.jsonl.gz", gzip.compress(GOOD * 99, mtime=0)[:-12], ": ", "cannot be read"),
    "truncated CSV quote": ("a.csv", CSV + b'a,"' + b"b" * 1_000_000, ":2: ", "not CSV"),
    "truncated Parquet": ("a.parquet", PARQUET[: len(PARQUET) // 2], ": ", "not a Parquet file"),
    "Parquet without its index": (
        "a.parquet",
        PARQUET[:-90] + bytes(82) + PARQUET[-8:],
        ": ",
        "not a Parquet",
    ),
    "Parquet with holes": ("a.parquet", PARQUET[:10] + bytes(60) + PARQUET[70:], ": ", "not a Parquet file"),
    # encodings
    "UTF-16 lines": ("a.jsonl", GOOD.decode().encode("utf-16"), ":1: ", "not UTF-8"),
    "UTF-16 JSON": ("a.json", json.dumps([ROW]).encode("utf-16"), ": row 1: ", "not UTF-8"),
    "UTF-32 JSON": ("a.json", json.dumps([ROW]).encode("utf-32"), ": row 1: ", "not UTF-8"),
    "UTF-16 CSV": ("a.csv", CSV.decode().encode("utf-16"), ":1: ", "not UTF-8"),
    "latin-1 lines": (
        "a.jsonl",
        GOOD + '{"output": "grün"}\n'.encode("latin-1"),
        ":2: ",
        "0xfc is not UTF-8",
    ),
    "latin-1 CSV": ("a.csv", CSV + "a,b\ngrün,b\n".encode("latin-1"), ":3: ", "0xfc is not UTF-8"),
    "two BOMs": ("a.jsonl", b"\xef\xbb\xbf" * 2 + GOOD, ":1: ", "not one JSON object"),
    "Parquet text that is none": (
        "a.parquet",
        written(pyarrow.table({"instruction": NOT_TEXT, "output": ["b", "c"]})),
        ": ",
        "can't decode",
    ),
    "half a character": ("a.jsonl", GOOD + b'{"instruction": "a", "output": "\\ud800"}', ":2: ", "\\ud800"),
    "a name of half a character": ("a.jsonl", b'{"\\ud800": "a"}', ":1: ", "no column 'instruction'"),
    # nothing there
    "empty": ("a.jsonl", b"", ": ", "no rows"),
    "a BOM alone": ("a.jsonl", b"\xef\xbb\xbf", ": ", "no rows"),
    "white space alone": ("a.json", b" \n\t\n", ": ", "no rows"),
    "an empty list": ("a.json", b"[]", ": ", "no rows"),
    "an empty gzip file": ("a.json.gz", b"", ": ", "no rows"),
    "gzip of nothing": ("a.jsonl.gz", gzip.compress(b"", mtime=0), ": ", "no rows"),
    "a header alone": ("a.csv", CSV, ": ", "no rows"),
    "Parquet without rows": (
        "a.parquet",
        written(pyarrow.table({name: pyarrow.array([], pyarrow.string()) for name in ROW})),
        ": ",
        "no rows",
    ),
    "empty outputs": ("a.jsonl", b'{"instruction": "a", "output": ""}\n' * 3, ": ", "no train row is left"),
    # another kind of file
    "gzip under another name": ("a.jsonl", gzip.compress(GOOD, mtime=0), ":1: ", "not UTF-8"),
    "text under gzip's name": ("a.jsonl.gz", GOOD, ": ", "Not a gzipped file"),
    "more behind gzip": ("a.jsonl.gz", gzip.compress(GOOD, mtime=0) + b"more", ": ", "Not a gzipped file"),
    "a zip file": ("a.jsonl", b"PK\x03\x04" + bytes(30), ":1: ", "not one JSON object"),
    "pickle": ("a.pkl", b"\x80\x04N.", ": ", "unknown kind of file"),
    # shapes
    "a number": ("a.json", b"42", ": ", "neither a list of objects"),
    "null": ("a.json", b"null", ": ", "neither a list of objects"),
    "lists in a list": ("a.json", b"[[1, 2], [3]]", ": row 1: ", "must be an object"),
    "strings in a list": ("a.json", b'["a", "b"]', ": row 1: ", "must be an object"),
    "mixed kinds": ("a.jsonl", GOOD + b"[1]\n", ":2: ", "a list; a row must be an object"),
    "rows one level down": (
        "a.json",
        json.dumps({"data": [ROW]}).encode(),
        ":1: ",
        "no column 'instruction'",
    ),
    "a million brackets": ("a.jsonl", b"[" * 1_000_000, ":1: ", "not JSON that can be read"),
    "a million braces": ("a.json", b'[{"a":' + b'{"a":' * 200_000, ": row 1: ", "not JSON"),
    "a key twice": ("a.jsonl", b'{"output": "a", "output": "b"}', ":1: ", "'output' appears twice"),
    "a key twice in a list": (
        "a.json",
        b"[" + GOOD + b',{"a": 1, "a": 2}]',
        ": row 2: ",
        "'a' appears twice",
    ),
    "a column twice": ("a.csv", b"output,output\na,b\n", ":1: ", "two columns have the same name"),
    "a Parquet column twice": ("a.parquet", written(TWICE), ": ", "two columns have the same name"),
    "a missing column": ("a.jsonl", GOOD + b'{"instruction": "a"}\n', ":2: ", "no column 'output'"),
    "another delimiter": ("a.csv", b"instruction;output\na;b\n", ":2: ", "'instruction;output'"),
    "a ragged CSV": ("a.csv", CSV + b"a,b\na,b,c\n", ":3: ", "3 fields"),
    "a CSV line that is short": ("a.csv", CSV + b"a\n", ":2: ", "1 fields, but the first line names 2"),
    "a CSV with NUL": ("a.csv", CSV + b"a,b\n\0,b\n", ":3: ", "NUL byte"),
    "a CSV of old Macs": ("a.csv", b"instruction,output\ra,b\r", ":1: ", "not CSV"),
    "a line of NUL": ("a.jsonl", GOOD + bytes(20) + b"\n", ":2: ", "not one JSON object"),
    # values
    "null for text": ("a.jsonl", b'{"instruction": "a", "output": null}', ":1: ", "'output' is null"),
    "null in Parquet": (
        "a.parquet",
        columns(instruction=["a", None], output=["b", "c"]),
        ": row 2: ",
        "'instruction' is null",
    ),
    "numbers in Parquet": ("a.parquet", columns(instruction=[1], output=["b"]), ": row 1: ", "the number 1;"),
    "NaN": ("a.jsonl", b'{"instruction": NaN, "output": "b"}', ":1: ", "the number nan"),
    "beyond every number": ("a.jsonl", b'{"instruction": "a", "output": 1e999}', ":1: ", "the number inf"),
    "a huge number": ("a.jsonl", b'{"instruction": ' + b"9" * 4000 + b', "output": ""}', ":1: ", "9999..."),
    "a huger number": ("a.jsonl", b'{"instruction": ' + b"9" * 5000 + b"}", ":1: ", "not JSON that can be"),
    "an object for text": ("a.jsonl", b'{"instruction": {}, "output": ""}', ":1: ", "an object"),
}


@pytest.mark.timeout(DEADLINE_SECONDS)
@pytest.mark.parametrize("case", CONTENTS)
def test_content_is_refused_with_its_place(tmp_path: Path, case: str) -> None:
    name, content, place, words = CONTENTS[case]
    path = tmp_path / name
    path.write_bytes(content)
    message = refusal(path)
    assert message.startswith(f"{path}{place}"), message
    assert words in message


# name of the file, what its bytes are, what is said
BOMBS: dict[str, tuple[str, Callable[[], bytes], str]] = {
    "one line": ("a.jsonl.gz", lambda: packed(bytes(MANY_BYTES)), ":1: the line is longer"),
    "lines": (
        "a.jsonl.gz",
        lambda: packed((b" " * 999 + b"\n") * (MANY_BYTES // 1000)),
        "200 times its size",
    ),
    "spaces": ("a.json.gz", lambda: packed(b" " * MANY_BYTES), "200 times its size"),
    "a CSV of commas": ("a.csv.gz", lambda: packed(b"," * MANY_BYTES), ":1: the line is longer"),
    "a CSV field": (
        "a.csv.gz",
        lambda: packed(CSV + b'"' + b"x\n" * (MANY_BYTES // 2)),
        ":2: not CSV: field larger",
    ),
    "a log": ("a.log.gz", lambda: packed(b"x\n" * (MANY_BYTES // 2)), ":1: the record is longer"),
    "one value": (
        "a.parquet",
        lambda: columns(instruction=["a"], output=["b" * MANY_BYTES]),
        "200 times its size",
    ),
    "equal values": (
        "a.parquet",
        lambda: columns(instruction=["a"] * 5000, output=["b" * 10_000] * 5000),
        "200 times its size",
    ),
}


def packed(content: bytes) -> bytes:
    return gzip.compress(content, 6, mtime=0)


@pytest.mark.timeout(DEADLINE_SECONDS)
@pytest.mark.parametrize("case", BOMBS)
def test_a_bomb_does_not_fill_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    name, content, words = BOMBS[case]
    (tmp_path / name).write_bytes(content())
    for module in (files, readers, plain_text):
        monkeypatch.setattr(module, "MAX_ROW_BYTES", MANY_BYTES // 32)
    monkeypatch.setattr(files, "_EXPANSION_CHECKED_FROM_BYTES", MANY_BYTES // 8)
    before = pyarrow.total_allocated_bytes()
    tracemalloc.start()
    try:
        if name == "a.log.gz":
            message = refusal(tmp_path / name, "text", split_on="blank")
        else:
            message = refusal(tmp_path / name)
        assert tracemalloc.get_traced_memory()[1] < MANY_BYTES
    finally:
        tracemalloc.stop()
    assert message.startswith(str(tmp_path / name))
    assert words in message
    assert pyarrow.total_allocated_bytes() - before < MANY_BYTES


@pytest.mark.parametrize(
    ("format", "content", "words"),
    [
        ("messages", messages(None), "message 1 is null"),
        ("messages", messages([USER]), "message 1 is a list"),
        ("messages", messages(USER, {"role": "assistant", "content": None}), "message 2: 'content' is null"),
        ("messages", messages(USER, {"content": "y"}), "message 2: 'role' is missing"),
        ("messages", messages(), "an empty list"),
        ("messages", b'{"messages": "hello"}\n', "'messages' is text"),
        ("messages", messages({**USER, "content": "\udfff"}, {**USER, "role": "assistant"}), "\\udfff"),
        ("messages", b'{"messages": [{"role": "user", "role": "system"}]}', "'role' appears twice"),
        ("sharegpt", b'{"conversations": [{"from": null, "value": "x"}]}', "'from' is null"),
        ("sharegpt", b'{"conversations": [{"from": "ghost", "value": "x"}]}', "from 'ghost'"),
        ("sharegpt", b'{"conversations": [[]]}', "message 1 is a list"),
    ],
)
def test_a_conversation_is_refused_with_its_line(
    tmp_path: Path, format: str, content: bytes, words: str
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    message = refusal(path, format)
    assert message.startswith(f"{path}:1: "), message
    assert words in message


def pipe(path: Path) -> None:
    os.mkfifo(path)


def link_to(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


def nothing(path: Path) -> None:
    pass


@pytest.mark.timeout(DEADLINE_SECONDS)
@pytest.mark.parametrize(
    ("name", "make", "words"),
    [
        ("pipe.jsonl", pipe, "a pipe or a device"),
        ("pipe.parquet", pipe, "a pipe or a device"),
        ("zero.jsonl", link_to("/dev/zero"), "a pipe or a device"),
        ("dangling.json", link_to("nowhere"), "there is no such file"),
        ("loop.csv", link_to("loop.csv"), "cannot be read"),
        ("empty.jsonl", Path.mkdir, "is a folder without data files"),
        ("../nowhere/../up.jsonl", nothing, "there is no such file"),
        ("line\nbreak.jsonl", lambda path: path.write_bytes(b"{"), "not one JSON object"),
        ("[a-.jsonl", nothing, "no file matches"),
        ("*.jsonl", pipe, "no file matches"),
    ],
)
def test_a_name_that_leads_to_no_file(
    tmp_path: Path, name: str, make: Callable[[Path], None], words: str
) -> None:
    place = tmp_path / "inside"
    place.mkdir()
    make(place / ("some.jsonl" if name.startswith("*") else name))
    message = refusal(place / name)
    assert message.startswith(str(place / name)), message
    assert words in message


@pytest.mark.timeout(DEADLINE_SECONDS)
@pytest.mark.parametrize("make", [pipe, Path.mkdir])
def test_a_url_that_leads_to_no_file(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "a.jsonl")
    assert "is a directory, a pipe or a device" in refusal(f"file://{tmp_path}/a.jsonl")


@pytest.mark.timeout(DEADLINE_SECONDS)
@pytest.mark.parametrize("make", [pipe, Path.mkdir, link_to("/dev/zero")])
def test_plain_text_that_is_no_file(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "a.log")
    assert f"{tmp_path}/a.log: is a " in refusal(tmp_path / "a.log", "text", split_on="line")


def test_plain_text_in_another_encoding(tmp_path: Path) -> None:
    (tmp_path / "a.log").write_bytes("one\ngrün\n".encode("latin-1"))
    message = refusal(tmp_path / "a.log", "text", split_on="line")
    assert message.startswith(f"{tmp_path}/a.log:2: byte 0xfc is not UTF-8")


def test_what_can_be_read_is_read_and_counted(tmp_path: Path) -> None:
    """A row without completion, one whose prompt alone is too long, and a line of a megabyte."""
    rows = [
        *tiny.alpaca_rows(20),
        {"instruction": "a", "output": ""},
        {"instruction": "word " * 50_000, "output": "b"},
        {"instruction": "a", "output": "word " * 200_000},
    ]
    tiny.write_jsonl(tmp_path / "a.jsonl", rows)
    data = tiny.prepared(
        CHAT,
        train=[tiny.source(tmp_path / "a.jsonl")],
        eval=[tiny.source(tiny.write_jsonl(tmp_path / "b.jsonl", [ROW]))],
        max_length=96,
    )
    report = data.report.train
    assert (report.rows_read, report.rows_kept) == (23, 21)
    assert (report.empty, report.cut_off, report.truncated) == (1, 1, 1)


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", CSV + b"a,b\nc,d\n"),
        ("a.jsonl", GOOD + b'{"instruction": "c", "output": "d"}\n'),
        ("a.json", b"[" + GOOD + b', {"instruction": "c", "output": "d"}]'),
    ],
)
def test_a_byte_order_mark_is_no_content(tmp_path: Path, name: str, content: bytes, mark: bytes) -> None:
    (tmp_path / name).write_bytes(mark + content)
    data = prepared(tmp_path / name, "alpaca")
    assert data.report.train.rows_read + data.report.evaluation.rows_read == 2
