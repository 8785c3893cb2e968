from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.data import tiny
from tuner.data import Example, Examples, printable, show_rows


@pytest.mark.parametrize("tokenizer", [tiny.byte_level(), tiny.sentencepiece()], ids=["bytes", "llama"])
@pytest.mark.parametrize("text", ["a red car", "so 世界 is", "naïve"])
def test_pieces_are_the_text_wherever_it_is_cut(tokenizer: tiny.PreTrainedTokenizerBase, text: str) -> None:
    ids = np.array(tokenizer.encode(text, add_special_tokens=False), np.int32)
    for cut in range(1, len(ids)):
        examples = Examples.of([Example(ids, np.arange(len(ids)) >= cut)])
        [shown] = show_rows(examples, tokenizer, 1)
        assert "".join(piece for piece, _ in shown.pieces) == text
        assert [is_target for _, is_target in shown.pieces] == [False, True]
        assert (shown.num_tokens, shown.num_targets) == (len(ids), len(ids) - cut)


def test_rows_of_every_file_are_shown_and_where_they_stand(tmp_path: Path) -> None:
    rows = tiny.alpaca_rows(9)
    first = tiny.write_jsonl(tmp_path / "a.jsonl", rows[:6])
    second = tiny.write_jsonl(tmp_path / "b.jsonl", rows[6:8])
    third = tiny.write_jsonl(tmp_path / "c.jsonl", rows[8:])
    train = [tiny.source(first), tiny.source(second)]
    data = tiny.prepared(tiny.byte_level(), train=train, eval=[tiny.source(third)])

    def places(count: int) -> list[str]:
        return [Path(row.place).name for row in show_rows(data.train, tiny.byte_level(), count)]

    assert places(1) == ["a.jsonl:1"]
    assert places(3) == ["a.jsonl:1", "a.jsonl:2", "b.jsonl:1"]
    assert places(6) == ["a.jsonl:1", "a.jsonl:2", "a.jsonl:3", "a.jsonl:4", "b.jsonl:1", "b.jsonl:2"]
    assert len(places(99)) == 8


def test_control_characters_are_written_out() -> None:
    assert printable("a\n\tb\x1b[31mred\r\x07\x9b é 世") == "a\n\tb\\x1b[31mred\\r\\x07\\x9b é 世"
