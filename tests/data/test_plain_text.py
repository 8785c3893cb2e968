from __future__ import annotations

import gzip
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.data import tiny
from tuner.config import SourceSpec
from tuner.data import show_rows
from tuner.data.examples import Opening, Row, Segment
from tuner.data.files import LocalFile
from tuner.data.plain_text import Windows, plain_text_rows, spans
from tuner.data.tokenise import TokenisedRow, Tokeniser
from tuner.errors import DataError

PLAIN = tiny.byte_level()
WITH_BOS = tiny.byte_level(bos=True)
LLAMA_2 = tiny.sentencepiece()
LINES = st.lists(st.text(st.sampled_from("ab é\t"), max_size=12), max_size=8)


def rows(path: Path, content: bytes, split_on: str, **more: Any) -> list[Row]:
    path.write_bytes(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)
    spec = SourceSpec.model_validate({"path": str(path), "format": "text", "split_on": split_on, **more})
    return list(plain_text_rows(LocalFile(path, path.name), spec))


def found(path: Path, content: bytes, split_on: str, **more: Any) -> list[tuple[int, str]]:
    return [(row.number, row.values["text"]) for row in rows(path, content, split_on, **more)]


LOG = b"\xef\xbb\xbfone\r\n  two\n\n \nthree\nfour"


@pytest.mark.parametrize("name", ["app.log", "app.log.gz", "blob"])
def test_records_end_where_it_was_said(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    assert found(path, LOG, "line") == [(1, "one"), (2, "  two"), (5, "three"), (6, "four")]
    assert found(path, LOG, "blank") == [(1, "one\r\n  two"), (5, "three\nfour")]
    assert found(path, LOG, "line", group_records=3) == [(1, "one\n  two\nthree"), (6, "four")]
    assert found(path, LOG, "blank", group_records=9) == [(1, "one\r\n  two\n\nthree\nfour")]
    assert [row.place for row in rows(path, LOG, "line")][2] == f"{name}:5"
    assert [row.place for row in rows(path, LOG, "bytes", record_bytes=9)][1] == f"{name}: row 2"


@given(LINES, st.integers(1, 9))
def test_pieces_by_bytes_are_the_whole_file(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str], size: int
) -> None:
    text = "\n".join(lines)
    pieces = [
        t for _, t in found(tmp_path_factory.mktemp("b") / "x", text.encode(), "bytes", record_bytes=size)
    ]
    assert "".join(pieces) == text
    assert all(len(piece.encode()) <= max(size, 2) for piece in pieces)


@given(LINES)
def test_lines_and_paragraphs_lose_blank_lines_alone(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str]
) -> None:
    path = tmp_path_factory.mktemp("b") / "x"
    content = "\n".join(lines).encode()
    filled = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    assert found(path, content, "line") == filled
    paragraphs = [text.split("\n") for _, text in found(path, content, "blank")]
    assert [line for paragraph in paragraphs for line in paragraph] == [line for _, line in filled]


@pytest.mark.parametrize(
    ("split_on", "more", "place"),
    [("line", {}, "x:2: "), ("blank", {}, "x:2: "), ("bytes", {"record_bytes": 3}, "x: row 2: ")],
)
def test_bytes_that_are_no_text_are_refused_with_their_place(
    tmp_path: Path, split_on: str, more: dict[str, Any], place: str
) -> None:
    with pytest.raises(DataError) as caught:
        rows(tmp_path / "x", b"ab\n\xe9\xe9b\n", split_on, **more)
    assert str(caught.value) == f"{place}byte 0xe9 is not UTF-8; save the file as UTF-8"


@given(st.integers(0, 200), st.integers(1, 40), st.data())
def test_spans_cover_a_text_once_and_overlap_as_told(num_tokens: int, room: int, data: st.DataObject) -> None:
    overlap = data.draw(st.integers(0, room - 1))
    cut = list(spans(num_tokens, room=room, overlap=overlap))
    assert [token for _, new, end in cut for token in range(new, end)] == list(range(num_tokens))
    assert all(end - begin == room for begin, _, end in cut[:-1])
    assert all(end - begin <= room for begin, _, end in cut)
    assert [new - begin for begin, new, _ in cut] == [0, *[overlap] * (len(cut) - 1)][: len(cut)]


def text_source(path: Path, content: str, **more: Any) -> dict[str, Any]:
    path.write_text(content, encoding="utf-8")
    return tiny.source(path, "text", **more)


@pytest.fixture
def held_out(tmp_path: Path) -> list[dict[str, Any]]:
    return [text_source(tmp_path / "held-out", "nothing like the others", split_on="line")]


@pytest.mark.parametrize("tokenizer", [PLAIN, WITH_BOS, LLAMA_2], ids=["plain", "bos", "llama"])
@pytest.mark.parametrize("overlap", [0, 5])
def test_a_long_text_becomes_several_examples(
    tmp_path: Path, held_out: list[dict[str, Any]], tokenizer: Any, overlap: int
) -> None:
    text = " ".join(f"word {n}" for n in range(60))
    source = text_source(tmp_path / "log", f"{text}\nshort", split_on="line", overlap_tokens=overlap)
    data = tiny.prepared(tokenizer, train=[source], eval=held_out, max_length=20)
    *pieces, short = data.train
    assert len(pieces) > 5
    beginning = 0 if tokenizer is PLAIN else 1
    assert all(len(piece.input_ids) == 20 for piece in pieces[:-1])
    new = [piece.input_ids[beginning + (overlap if at else 0) :] for at, piece in enumerate(pieces)]
    whole = [token for piece in new for token in piece.tolist()]
    assert tokenizer.decode(whole) == f"{text}{tokenizer.eos_token}"
    assert short.input_ids[-1] == tokenizer.eos_token_id
    for piece, learned in zip(pieces, new, strict=True):
        missing = 1 if beginning == overlap == 0 or (beginning == 0 and piece is pieces[0]) else 0
        assert piece.is_target.sum() == len(learned) - missing
    report = data.report.train
    assert (report.pieces, report.truncated, report.duplicates) == (len(pieces) - 1, 0, 0)


@pytest.mark.parametrize("text", ["Red", "Red</s>"])
def test_a_text_ends_with_one_eos(text: str) -> None:
    [(_, [row])] = Tokeniser(PLAIN).windowed([[text]], Windows(), max_length=20)
    assert row.tokens.tolist() == [*PLAIN("Red").input_ids, PLAIN.eos_token_id]


def test_without_being_told_a_long_text_of_a_table_is_cut_off(tmp_path: Path) -> None:
    table = [{"text": " ".join(f"word {n}" for n in range(60))}, {"text": "b"}]
    train = tiny.source(tiny.write_jsonl(tmp_path / "a.jsonl", table), "text")
    other = tiny.source(tiny.write_jsonl(tmp_path / "b.jsonl", [{"text": "c"}]), "text")
    cut = tiny.prepared(PLAIN, train=[train], eval=[other], max_length=20)
    assert (len(cut.train), cut.report.train.truncated, cut.report.train.pieces) == (2, 1, 0)
    whole = tiny.prepared(PLAIN, train=[{**train, "overlap_tokens": 0}], eval=[other], max_length=20)
    assert whole.report.train.truncated == 0
    assert len(whole.train) == whole.report.train.pieces + 2 > 5


@pytest.mark.parametrize("tokenizer", [WITH_BOS, LLAMA_2], ids=["bos", "llama"])
def test_records_fill_examples(tmp_path: Path, held_out: list[dict[str, Any]], tokenizer: Any) -> None:
    lines = [f"line {n}" for n in range(40)] + ["long " * 30, "end"]
    source = text_source(tmp_path / "log", "\n".join(lines), split_on="line", group_records="fill")
    data = tiny.prepared(tokenizer, train=[source], eval=held_out, max_length=40)
    texts = [
        text for row in show_rows(data.train, tokenizer, 99) for text, is_target in row.pieces if is_target
    ]
    joined = "".join(text.removesuffix(tokenizer.eos_token) for text in texts)
    assert joined.split() == " ".join(lines).split()
    assert data.train.num_tokens.max() == 40
    for example, following in zip(data.train[:5], data.train[1:6], strict=True):
        assert example.input_ids[-1] == tokenizer.eos_token_id
        first_line = tokenizer.decode(following.input_ids[1:]).split("\n")[0] + "\n"
        added = len(tokenizer.encode(first_line, add_special_tokens=False))
        assert len(example.input_ids) + added > 40 - 2, "another record would have fitted"


@given(
    st.lists(st.text(st.sampled_from("ab c"), max_size=25), max_size=12),
    st.integers(8, 30),
    st.integers(1, 5),
)
def test_records_are_put_together_as_long_as_they_fit(texts: list[str], max_length: int, batch: int) -> None:
    for tokenizer in (WITH_BOS, LLAMA_2):
        tokeniser = Tokeniser(tokenizer)
        windows = Windows(fills=True, separator="\n")
        batches = [texts[at : at + batch] for at in range(0, len(texts), batch)]
        groups = windowed(tokeniser, batches, windows, max_length)
        assert [at for together, _ in groups for at in together] == list(range(len(texts)))
        assert all(len(together) == 1 for together, examples in groups if len(examples) > 1)
        for (together, _), (following, _) in pairwise(groups):
            more = [texts[at] for at in [*together, following[0]]]
            [[_, examples]] = windowed(tokeniser, [["\n".join(more)]], Windows(), max_length)
            assert len(examples) > 1 or examples[0].full_length > max_length - 2, "it would have fitted"


def windowed(
    tokeniser: Tokeniser, batches: list[list[str]], windows: Windows, max_length: int
) -> list[tuple[range, list[TokenisedRow]]]:
    found = tokeniser.windowed(batches, windows, max_length=max_length)
    return [(together, list(examples)) for together, examples in found]


@pytest.mark.parametrize("tokenizer", [WITH_BOS, LLAMA_2], ids=["bos", "llama"])
def test_a_long_text_is_tokenised_in_parts(monkeypatch: pytest.MonkeyPatch, tokenizer: Any) -> None:
    tokeniser = Tokeniser(tokenizer)
    lines = [f"line {n} has more words than one\n" for n in range(9)]

    def tokens(text: str, most_characters: int) -> list[list[int]]:
        monkeypatch.setattr("tuner.data.tokenise._MOST_CHARACTERS", most_characters)
        [[_, examples]] = windowed(tokeniser, [[text]], Windows(), 20)
        segments = (Segment(text, is_target=True),)
        [row] = tokeniser.rows([segments], Opening.TEXT, loss_on="all", max_length=999)
        return [row.tokens.tolist(), *(example.tokens.tolist() for example in examples)]

    for whole_lines in (lines, ["instructionRed\n" * 9]):
        assert tokens("".join(whole_lines), 40) == tokens("".join(whole_lines), 10_000)
    for text in (" ".join(lines).replace("\n", ""), "x" * 99):
        [whole, *_] = tokens(text, 10)
        assert tokenizer.decode(whole, skip_special_tokens=True) == text


def test_pieces_of_one_text_are_held_out_together(tmp_path: Path) -> None:
    lines = "\n".join(" ".join(f"{n}.{m}" for m in range(20)) for n in range(30))
    source = text_source(tmp_path / "log", lines, split_on="line", overlap_tokens=4)
    data = tiny.prepared(PLAIN, train=[source], eval_fraction=0.4, max_length=20, max_examples=10_000)
    sides = [
        {
            PLAIN.decode(example.input_ids).strip().removesuffix("</s>").split()[-2].split(".")[0]
            for example in part
        }
        for part in (data.train, data.evaluation)
    ]
    assert len(sides[0]) > 5
    assert len(sides[1]) > 5
    assert not sides[0] & sides[1]


def test_no_room_for_anything_new_is_refused(tmp_path: Path, held_out: list[dict[str, Any]]) -> None:
    source = text_source(tmp_path / "log", "hello", split_on="line", overlap_tokens=1)
    with pytest.raises(DataError, match="max_length 2 leaves no room for new tokens after overlap_tokens"):
        tiny.prepared(WITH_BOS, train=[source], eval=held_out, max_length=2)


def test_empty_texts_are_counted(tmp_path: Path) -> None:
    table = tiny.write_jsonl(
        tmp_path / "a.jsonl", [{"text": ""}, {"text": "a"}, {"text": " "}, {"text": "b"}]
    )
    other = tiny.source(tiny.write_jsonl(tmp_path / "b.jsonl", [{"text": "c"}]), "text")
    data = tiny.prepared(PLAIN, train=[tiny.source(table, "text", overlap_tokens=0)], eval=[other])
    report = data.report.train
    assert (report.rows_read, report.empty, report.num_examples) == (4, 2, 2)
