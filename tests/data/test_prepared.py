from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.data import tiny
from tuner.config import SourceSpec
from tuner.data import Examples, PreparedData, batch_rows, prepare, render_prompt, show_rows
from tuner.data.formats import source_format
from tuner.data.rows import Recipe, ingredients
from tuner.data.sources import commit_of, load_rows, open_sources
from tuner.data.splits import share_to_hold_out
from tuner.data.tokenise import Tokeniser
from tuner.errors import DataError

PLAIN = tiny.byte_level(bos=True)
CHAT = tiny.byte_level(chat_template=tiny.CHATML)
ALPACA_DEMO = Path(__file__).parents[3] / "shared" / "data" / "alpaca_en_demo.json"


def outputs(examples: Examples) -> list[str]:
    return [str(PLAIN.decode(e.input_ids[e.is_target])).removesuffix("</s>") for e in examples]


def prepared(path: Path, rows: list[dict[str, Any]], **data: Any) -> PreparedData:
    """One file of Alpaca rows, a tenth of them held out unless `data` says how."""
    tiny.write_jsonl(path / "rows.jsonl", rows)
    data = data if "eval" in data else {"eval_fraction": 0.1, **data}
    return tiny.prepared(PLAIN, train=[tiny.source(path / "rows.jsonl")], **data)


def refusal(path: Path, rows: list[dict[str, Any]], **data: Any) -> str:
    with pytest.raises(DataError) as caught:
        prepared(path, rows, **data)
    return str(caught.value)


def test_every_row_is_trained_on_or_held_out(tmp_path: Path) -> None:
    rows = tiny.alpaca_rows(300)
    data = prepared(tmp_path, rows)
    both = outputs(data.train) + outputs(data.evaluation)
    assert sorted(both) == sorted(row["output"] for row in rows)
    assert 10 <= len(data.evaluation) <= 60
    assert len(data.test) == 0
    assert data.report.train.rows_read + data.report.evaluation.rows_read == 300


def test_how_far_tokenising_is_can_be_heard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tuner.data.rows._SAY_EVERY_SECONDS", 0.0)
    path = tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.alpaca_rows(1200))
    spec = tiny.round_spec(train=[tiny.source(path)], eval_fraction=0.1)
    said: list[str] = []
    prepare(spec, PLAIN, tmp_path / "cache", said.append)
    assert said == [f"tokenising: {rows} rows of {path}" for rows in ("512", "1,024", "1,200")]
    said.clear()
    prepare(spec, PLAIN, tmp_path / "cache", said.append)
    assert not said, "the table is there already"


@given(st.lists(st.integers(0, 30), min_size=40, max_size=80), st.floats(0.2, 0.8))
def test_equal_rows_fall_on_one_side(
    tmp_path_factory: pytest.TempPathFactory, numbers: list[int], share: float
) -> None:
    rows = [{"instruction": "Say.", "output": f"word {number}"} for number in [*numbers, *range(31)]]
    data = prepared(tmp_path_factory.mktemp("rows"), rows, eval_fraction=share)
    train, evaluation = outputs(data.train), outputs(data.evaluation)
    assert not set(train) & set(evaluation)
    assert len(train) + len(evaluation) == len(rows)
    assert train == [row["output"] for row in rows if row["output"] in set(train)]


def test_a_row_is_held_out_whatever_stands_around_it(tmp_path: Path) -> None:
    rows = tiny.alpaca_rows(300)
    some = set(outputs(prepared(tmp_path, rows[100:200]).evaluation))
    every = set(outputs(prepared(tmp_path, rows[::-1]).evaluation))
    assert some == every & {row["output"] for row in rows[100:200]}


def test_a_sample_of_the_evaluation_rows_is_nested_and_in_file_order(tmp_path: Path) -> None:
    rows = tiny.alpaca_rows(100)
    files = [tiny.write_jsonl(tmp_path / f"{n}.jsonl", rows[n * 50 : n * 50 + 50]) for n in range(2)]
    train = tiny.write_jsonl(tmp_path / "train.jsonl", tiny.alpaca_rows(103)[100:])
    samples = [
        outputs(
            tiny.prepared(
                PLAIN,
                max_examples=count,
                train=[tiny.source(train)],
                eval=[tiny.source(file) for file in files],
            ).evaluation
        )
        for count in (1, 7, 30, 100, 1000)
    ]
    assert [len(sample) for sample in samples] == [1, 7, 30, 100, 100]
    for small, large in pairwise(samples):
        assert set(small) <= set(large)
    everything = [row["output"] for row in rows]
    for sample in samples:
        assert sample == [output for output in everything if output in set(sample)]


def test_rows_that_are_evaluated_and_trained_on_are_refused(tmp_path: Path) -> None:
    rows = tiny.alpaca_rows(20)
    held_out = [{"instruction": "Other.", "output": "other"}, {**rows[4], "input": ""}, rows[2]]
    evaluation = tiny.write_jsonl(tmp_path / "eval.jsonl", held_out)
    message = refusal(tmp_path, rows, eval=[tiny.source(evaluation)])
    assert message.startswith("2 of 3 eval rows are train rows too, word for word; the first is ")
    assert f"{evaluation}:2, which equals {tmp_path / 'rows.jsonl'}:5." in message
    assert "give eval_fraction" in message


@pytest.mark.parametrize("other", ["train", "eval"])
def test_test_rows_must_be_new_too(tmp_path: Path, other: str) -> None:
    rows = tiny.alpaca_rows(30)
    sources = {"eval": rows[20:25], "test": [rows[3 if other == "train" else 22], rows[29]]}
    files = {
        name: [tiny.source(tiny.write_jsonl(tmp_path / f"{name}.jsonl", r))] for name, r in sources.items()
    }
    assert f"1 of 2 test rows are {other} rows too" in refusal(tmp_path, rows[:20], **files)


LIKE = [
    ("It is 4, of course.", "  it IS 4,\n of course. "),
    ("Straße", "STRASSE"),
    ("caf\u00e9 \ufb01ne", "cafe\u0301 fine"),
    ("\uff21 3\u00b2", "A 32"),
]


@pytest.mark.parametrize(("output", "other"), LIKE)
def test_rows_that_differ_in_form_alone_are_the_same(tmp_path: Path, output: str, other: str) -> None:
    evaluation = tiny.write_jsonl(tmp_path / "eval.jsonl", [{"instruction": "A", "output": other}])
    message = refusal(tmp_path, [{"instruction": "a", "output": output}], eval=[tiny.source(evaluation)])
    assert message.startswith(
        "1 of 1 eval rows are train rows too, but for format, case, white space or Unicode form"
    )
    assert "allow_overlap: true" in message


@pytest.mark.parametrize(
    "other",
    [
        {"format": "messages", "template": "chatml"},
        {"format": "sharegpt", "template": "llama3"},
        {"format": "completion"},
        {"format": "alpaca", "template": "chatml"},
    ],
)
def test_rows_that_say_the_same_in_another_format_are_the_same(tmp_path: Path, other: dict[str, str]) -> None:
    written = {
        "messages": {
            "messages": [_turn("role", "user", "content", ASKED), _turn("role", "assistant", "content", "4")]
        },
        "sharegpt": {
            "conversations": [_turn("from", "human", "value", ASKED), _turn("from", "gpt", "value", "4")]
        },
        "completion": {"prompt": ASKED, "completion": "4"},
        "alpaca": {"instruction": "Add.", "input": "2 and 2", "output": "4"},
    }
    unlike = tiny.alpaca_rows(2)
    file = tiny.write_jsonl(tmp_path / "eval.jsonl", [written[other["format"]]])
    message = refusal(tmp_path, [*unlike, written["alpaca"]], eval=[{"path": str(file), **other}])
    assert message.startswith("1 of 1 eval rows are train rows too, but for format, case")
    assert f"which equals {tmp_path / 'rows.jsonl'}:3" in message


ASKED = "Add.\n\n2 and 2"


def _turn(who: str, speaker: str, what: str, said: str) -> dict[str, str]:
    return {who: speaker, what: said}


def test_rows_that_are_equal_and_rows_that_are_alike_are_counted_apart(tmp_path: Path) -> None:
    rows = tiny.alpaca_rows(10)
    held_out = [
        {**rows[3], "output": rows[3]["output"].upper()},
        rows[5],
        {"instruction": "x", "output": "y"},
    ]
    evaluation = tiny.write_jsonl(tmp_path / "eval.jsonl", held_out)
    message = refusal(tmp_path, rows, eval=[tiny.source(evaluation)])
    assert "2 of 3 eval rows are train rows too (1 of them word for word); the first is " in message
    assert f"{evaluation}:2, which equals {tmp_path / 'rows.jsonl'}:6." in message


def test_an_overlap_that_is_allowed_is_counted(tmp_path: Path) -> None:
    rows = tiny.alpaca_rows(20)
    files = {
        name: [tiny.source(tiny.write_jsonl(tmp_path / f"{name}.jsonl", held_out))]
        for name, held_out in (("eval", rows[18:]), ("test", [rows[1], rows[19], rows[18], rows[2]]))
    }
    data = prepared(tmp_path, rows[:19], allow_overlap=True, **files)
    assert (data.report.evaluation.overlap, data.report.test.overlap) == (1, 3)
    assert [found.split(" rows too")[0] for found in data.report.overlaps] == [
        "1 of 2 eval rows are train",
        "3 of 4 test rows are train",
        "2 of 4 test rows are eval",
    ]
    assert (len(data.train), len(data.evaluation), len(data.test)) == (19, 2, 4)


@given(st.lists(st.tuples(st.integers(0, 30), st.booleans()), min_size=40, max_size=80), st.floats(0.2, 0.8))
def test_rows_that_are_alike_fall_on_one_side(
    tmp_path_factory: pytest.TempPathFactory, numbers: list[tuple[int, bool]], share: float
) -> None:
    texts = [f"word {number}".upper() if shouts else f"word {number}" for number, shouts in numbers]
    rows = [{"instruction": "Say.", "output": text} for text in [*texts, *(f"word {n}" for n in range(31))]]
    data = prepared(tmp_path_factory.mktemp("rows"), rows, eval_fraction=share)
    train, evaluation = ({text.lower() for text in outputs(part)} for part in (data.train, data.evaluation))
    assert not train & evaluation
    assert len(data.train) + len(data.evaluation) == len(rows)


def test_a_difference_that_the_template_hides_is_none(tmp_path: Path) -> None:
    twins = [{"instruction": "a", "input": None, "output": "b"}, {"instruction": "a", "output": "b"}]
    data = prepared(tmp_path, [*twins, *tiny.alpaca_rows(30)])
    assert data.report.train.duplicates + data.report.evaluation.duplicates == 1


def test_weights_repeat_rows_and_fractions_take_a_fixed_share(tmp_path: Path) -> None:
    rows = tiny.alpaca_rows(400)
    files = [tiny.write_jsonl(tmp_path / f"{n}.jsonl", rows[n * 100 : n * 100 + 100]) for n in range(4)]
    weights = (1.0, 2.0, 0.25, 1.5)
    data = tiny.prepared(
        PLAIN,
        train=[tiny.source(file, weight=weight) for file, weight in zip(files[:4], weights, strict=True)],
        eval=[tiny.source(tiny.write_jsonl(tmp_path / "eval.jsonl", tiny.alpaca_rows(401)[400:]))],
    )
    train = outputs(data.train)
    per_file = [
        [o for o in train if o in {r["output"] for r in rows[n : n + 100]}] for n in (0, 100, 200, 300)
    ]
    assert per_file[0] == [row["output"] for row in rows[:100]]
    assert per_file[1] == [row["output"] for row in rows[100:200] for _ in range(2)]
    assert 10 <= len(per_file[2]) == len(set(per_file[2])) <= 40
    assert len(set(per_file[3])) == 100
    assert 130 <= len(per_file[3]) <= 170
    assert data.report.train.rows_kept == 400
    assert data.report.train.num_examples == len(train)


def test_a_weight_does_not_ask_the_hash_that_held_rows_out(tmp_path: Path) -> None:
    file = tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.alpaca_rows(400))
    data = tiny.prepared(PLAIN, train=[tiny.source(file, weight=0.5)], eval_fraction=0.5)
    assert 160 <= data.report.train.rows_kept <= 240
    assert 0.35 < len(data.train) / data.report.train.rows_kept < 0.65


def test_a_weight_on_evaluation_rows_is_refused(tmp_path: Path) -> None:
    rows = tiny.alpaca_rows(20)
    evaluation = tiny.source(tiny.write_jsonl(tmp_path / "eval.jsonl", rows[10:]), weight=2.0)
    assert "weight applies only to training rows" in refusal(tmp_path, rows[:10], eval=[evaluation])


def test_the_report_counts_what_became_of_every_row(tmp_path: Path) -> None:
    rows = [
        {"instruction": "a", "output": "kept"},
        {"instruction": "a", "output": "kept"},
        {"instruction": "a", "output": "cut " * 200},
        {"instruction": "a" * 400, "output": "out of reach"},
        {"instruction": "a", "output": " "},
    ]
    evaluation = tiny.write_jsonl(tmp_path / "eval.jsonl", [{"instruction": "b", "output": "c"}])
    data = prepared(tmp_path, rows, eval=[tiny.source(evaluation)], max_length=150)
    report = data.report.train
    assert (report.rows_read, report.rows_kept, report.num_examples) == (5, 3, 3)
    assert (report.truncated, report.cut_off, report.empty, report.duplicates) == (1, 1, 1, 1)
    assert report.tokens == data.train.num_tokens.sum() == sum(len(e.input_ids) for e in data.train)
    assert report.targets == data.train.num_targets.sum() == sum(e.is_target.sum() for e in data.train)
    assert data.train.num_tokens.max() == 150
    assert data.report.left_out(150) == [
        "1 of 3 train rows are cut at max_length 150",
        "1 train rows are left out: no answer to learn (none, empty, or weight 0)",
        "1 train rows are left out: nothing in them to learn within max_length",
    ]
    lengths = report.token_lengths
    assert lengths["max"] > 150
    assert sorted(lengths.values()) == list(lengths.values())
    assert list(lengths) == ["p50", "p90", "p99", "max"]


@pytest.mark.parametrize(
    ("rows", "data", "said"),
    [
        ([], {}, "rows.jsonl: has no rows"),
        ([{"instruction": "a"}], {}, "rows.jsonl:1: no column 'output'; columns found: 'instruction'"),
        (
            [{"instruction": "a", "output": "b\ud800"}],
            {},
            r"rows.jsonl:1: contains a lone surrogate (\ud800)",
        ),
        (
            [{"instruction": "a", "output": ""}] * 9,
            {"eval_fraction": 0.5},
            "no train row is left with anything",
        ),
        (tiny.alpaca_rows(9), {"max_length": 5, "eval_fraction": 0.5}, "max_length (5 tokens)"),
        (tiny.alpaca_rows(9), {"eval_fraction": 1e-9}, "eval_fraction 1e-09 holds out none of its rows"),
    ],
)
def test_data_that_cannot_be_trained_on_is_refused(
    tmp_path: Path, rows: list[dict[str, Any]], data: dict[str, Any], said: str
) -> None:
    message = refusal(tmp_path, rows, **data)
    assert message.startswith(str(tmp_path))
    assert said in message


def test_the_cache_changes_nothing(tmp_path: Path) -> None:
    rows = tiny.alpaca_rows(60)
    fresh = prepared(tmp_path, rows)
    tiny.write_jsonl(tmp_path / "rows.jsonl", rows)
    for _ in range(2):
        cached = tiny.prepared(
            PLAIN, cache=tmp_path / "cache", train=[tiny.source(tmp_path / "rows.jsonl")], eval_fraction=0.1
        )
        assert cached.fingerprint == fresh.fingerprint
        assert cached.report == fresh.report
        for ours, theirs in ((cached.train, fresh.train), (cached.evaluation, fresh.evaluation)):
            assert [e.input_ids.tolist() for e in ours] == [e.input_ids.tolist() for e in theirs]
            assert [e.is_target.tolist() for e in ours] == [e.is_target.tolist() for e in theirs]
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_whatever_decides_about_tokens_is_in_the_caches_key(tmp_path: Path) -> None:
    rows = [{**row, "text": row["output"]} for row in tiny.alpaca_rows(60)]
    file = tiny.write_jsonl(tmp_path / "rows.jsonl", rows)
    changes: list[dict[str, Any]] = [
        {},
        {"max_length": 11},
        {"loss_on": "all"},
        {"train": [tiny.source(file, "text")]},
        {"tokenizer": CHAT},
        {"train": [tiny.source(tiny.write_jsonl(tmp_path / "b.jsonl", rows[:-1]))]},
        {"train": [tiny.source(tmp_path / "b.jsonl")]},
        {"train": [tiny.source(file, columns={"output": "instruction", "instruction": "output"})]},
        {"train": [tiny.source(file, template="chatml")]},
    ]
    fingerprints = []
    for change in changes:
        data = {"train": [tiny.source(file)], "eval_fraction": 0.2, "tokenizer": PLAIN, **change}
        kwargs = {**data, "loss_on": data.get("loss_on", "all" if "max_length" in change else "completion")}
        tokenizer = kwargs.pop("tokenizer")
        cached = tiny.prepared(tokenizer, cache=tmp_path / "cache", **kwargs)
        assert cached.fingerprint == tiny.prepared(tokenizer, **kwargs).fingerprint
        fingerprints.append(cached.fingerprint)
    assert len(set(fingerprints)) == len(changes) - 1
    assert len(list((tmp_path / "cache").iterdir())) == len(changes) - 1


def test_every_key_of_a_source_is_in_the_caches_key(tmp_path: Path) -> None:
    file = tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.alpaca_rows(3))
    lines = {"split_on": "line"}
    text: list[dict[str, Any]] = [
        *({}, {"columns": {"text": "output"}}, {"overlap_tokens": 0}, {"overlap_tokens": 2}, lines),
        *({**lines, "overlap_tokens": 1}, {**lines, "group_records": 2}, {**lines, "group_records": "fill"}),
        *({"split_on": "blank"}, *({"split_on": "bytes", "record_bytes": n} for n in (98, 99))),
    ]
    templates = (None, "alpaca", "chatml", "llama3", "tokenizer")
    others = [{"format": f, "template": t} for f in ("alpaca", "messages", "sharegpt") for t in templates]
    recipe = Recipe(Tokeniser(CHAT), "completion", 512, None)
    keys = []
    for more in [*({"format": "text", **each} for each in text), *others]:
        spec = SourceSpec.model_validate({"path": str(file), **more})
        [source] = open_sources(spec, None, tmp_path)
        keys.append(json.dumps(ingredients(source, source_format(spec, CHAT), recipe), sort_keys=True))
    assert len(set(keys)) == len(keys) == 26


def test_tables_of_finished_rounds_are_found(tmp_path: Path) -> None:
    file = tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.alpaca_rows(3))
    spec = SourceSpec(path=str(file), format="alpaca")
    [source] = open_sources(spec, None, tmp_path)
    recipe = Recipe(Tokeniser(PLAIN), "completion", 512, None)
    assert ingredients(source, source_format(spec, PLAIN), recipe) == {
        "version": 5,
        "libraries": {name: version(name) for name in ("tokenizers", "transformers")},
        "source": f"_json_lines {hashlib.sha256(file.read_bytes()).hexdigest()}",
        "format": "alpaca",
        "tokenizer": recipe.tokeniser.fingerprint,
        "loss_on": "completion",
        "max_length": 512,
    }


def test_a_folder_is_read_as_a_data_set_is(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    tiny.write_jsonl(folder / "train.jsonl", tiny.alpaca_rows(40))
    tiny.write_jsonl(folder / "test.jsonl", tiny.alpaca_rows(45)[40:])
    data = tiny.prepared(
        PLAIN,
        cache=tmp_path / "cache",
        train=[tiny.source(folder)],
        eval_fraction=0.2,
        test=[tiny.source(folder, split="test")],
    )
    assert len(data.train) + len(data.evaluation) == 40
    assert outputs(data.test) == [f"It is {n}, of course." for n in range(40, 45)]
    with pytest.raises(DataError, match='Unknown split "valid"'):
        tiny.prepared(PLAIN, train=[tiny.source(folder, split="valid")], eval_fraction=0.2)


def test_a_folder_of_anything_is_refused_with_a_pattern_to_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.write_jsonl(tmp_path / "a.jsonl", tiny.alpaca_rows(9))
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "b.csv.gz").touch()
    (tmp_path / ".hidden.parquet").touch()
    with pytest.raises(DataError, match=r"kinds, such as a.jsonl and more/b.csv.gz; .* as .*/\*\.jsonl$"):
        tiny.prepared(PLAIN, train=[tiny.source(tmp_path)], eval_fraction=0.2)
    (tmp_path / "README.md").write_text("---\nconfigs:\n- config_name: one\n  data_files: a.jsonl\n---\n")
    found = tiny.prepared(PLAIN, cache=tmp_path / ".c", train=[tiny.source(tmp_path)], eval_fraction=0.2)
    assert found.report.train.rows_read + found.report.evaluation.rows_read == 9
    monkeypatch.setattr("tuner.data.sources._MOST_ENTRIES", 3)
    with pytest.raises(DataError, match=r"is a folder with more than 3 files; name the files by a pattern"):
        tiny.prepared(PLAIN, train=[tiny.source(tmp_path)], eval_fraction=0.2)


@pytest.mark.parametrize("kind", ["plain", "numpy", "chosen rows"])
def test_what_save_to_disk_wrote_is_read_where_it_lies(tmp_path: Path, kind: str) -> None:
    rows = [{**row, "n": n} for n, row in enumerate(tiny.alpaca_rows(20))]
    saved = datasets.Dataset.from_list(rows)
    if kind == "numpy":
        saved = saved.with_format("numpy")
    if kind == "chosen rows":
        saved = datasets.Dataset.from_list([*rows, *rows]).select(range(20))
    saved.save_to_disk(str(tmp_path / "set"))
    data = tiny.prepared(PLAIN, train=[tiny.source(tmp_path / "set")], eval_fraction=0.3)
    both = outputs(data.train) + outputs(data.evaluation)
    assert sorted(both) == sorted(row["output"] for row in rows)
    assert data.train.place(0).startswith(f"{tmp_path / 'set'}: row ")
    for wrong, said in (({"split": "test"}, "remove `split`"), ({"config": "a"}, "remove `config`")):
        with pytest.raises(DataError, match=said):
            tiny.prepared(PLAIN, train=[tiny.source(tmp_path / "set", **wrong)], eval_fraction=0.3)


def test_of_several_splits_that_save_to_disk_wrote_one_is_named(tmp_path: Path) -> None:
    rows = tiny.alpaca_rows(24)
    parts = {"train": rows[:16], "valid": rows[16:20], "test": rows[20:]}
    splits = {name: datasets.Dataset.from_list(part) for name, part in parts.items()}
    several, one = str(tmp_path / "several"), str(tmp_path / "one")
    datasets.DatasetDict(splits).save_to_disk(several)
    datasets.DatasetDict({"valid": splits["valid"]}).save_to_disk(one)
    train = [tiny.source(Path(several), split="train")]
    data = tiny.prepared(PLAIN, train=train, eval=[tiny.source(Path(one))])
    assert outputs(data.train) == [row["output"] for row in parts["train"]]
    assert outputs(data.evaluation) == [row["output"] for row in parts["valid"]]
    said = "contains the splits train, valid, test, .* name one of them, as `split: train`"
    for split in ({}, {"split": "dev"}, {"split": "train[:9]"}):
        with pytest.raises(DataError, match=said):
            tiny.prepared(PLAIN, train=[tiny.source(Path(several), **split)], eval_fraction=0.3)


def test_a_saved_data_set_that_is_damaged_is_refused(tmp_path: Path) -> None:
    datasets.Dataset.from_list(tiny.alpaca_rows(9)).save_to_disk(str(tmp_path / "set"))
    next((tmp_path / "set").glob("*.arrow")).write_bytes(b"ARROW1")
    with pytest.raises(DataError, match="set: was written by save_to_disk and cannot be read"):
        tiny.prepared(PLAIN, train=[tiny.source(tmp_path / "set")], eval_fraction=0.3)


def test_a_configuration_of_a_data_set_is_chosen(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    configs = [
        {"config_name": name, "data_files": [{"split": "train", "path": f"{name}.jsonl"}]} for name in "ab"
    ]
    for n, name in enumerate("ab"):
        tiny.write_jsonl(folder / f"{name}.jsonl", tiny.alpaca_rows(20 * n + 20)[20 * n :])
    (folder / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")
    data = tiny.prepared(
        PLAIN,
        cache=tmp_path / "cache",
        train=[tiny.source(folder, config="b")],
        eval=[tiny.source(folder, config="a")],
    )
    assert outputs(data.train) == [f"It is {n}, of course." for n in range(20, 40)]
    assert outputs(data.evaluation) == [f"It is {n}, of course." for n in range(20)]


def test_columns_of_a_data_set_are_mapped_too(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    tiny.write_jsonl(folder / "train.jsonl", [{"q": f"a{n}", "a": f"b{n}", "more": n} for n in range(30)])
    columns = {"prompt": "q", "completion": "a"}
    data = tiny.prepared(
        PLAIN,
        cache=tmp_path / "cache",
        train=[tiny.source(folder, "completion", columns=columns)],
        eval_fraction=0.2,
    )
    assert sorted(outputs(data.train) + outputs(data.evaluation)) == sorted(f"b{n}" for n in range(30))


@pytest.mark.usefixtures("no_hub")
def test_a_data_set_that_cannot_be_had_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty: is a folder without data files"):
        tiny.prepared(PLAIN, train=[tiny.source(tmp_path / "empty")], eval_fraction=0.2)
    pauses: list[float] = []
    monkeypatch.setattr("time.sleep", pauses.append)
    with pytest.raises(DataError, match=r"nobody/no-such-set: no local file .* the Hub cannot be reached"):
        load_rows("nobody/no-such-set", config=None, split="train", cache=None)
    assert sum(pauses) == 0, "its client would try for 23 seconds"
    assert not datasets.config.HF_HUB_OFFLINE, "for this dataset alone"


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("Dataset 'a/b' is a gated dataset on the Hub.", "a/b: is gated: request access on its page on the"),
        ("Dataset 'a/b' doesn't exist on the Hub.", "a/b: neither a local file nor .* log in with `hf auth"),
    ],
)
def test_a_data_set_that_the_hub_keeps_says_what_to_do(
    said: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the words that `datasets` has for it."""

    def refuse(*_: object, **__: object) -> None:
        raise datasets.exceptions.DatasetNotFoundError(said)

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(DataError, match=words):
        load_rows("a/b", config=None, split="train", cache=None)


def test_a_file_has_no_splits(tmp_path: Path) -> None:
    file = tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.alpaca_rows(9))
    with pytest.raises(DataError, match="split and config apply only to datasets"):
        tiny.prepared(PLAIN, train=[tiny.source(file, split="train")], eval_fraction=0.5)


def test_the_data_of_finished_rounds_is_what_it_was(tmp_path: Path) -> None:
    rows = tiny.alpaca_rows(60)
    train = [
        tiny.source(tiny.write_jsonl(tmp_path / "a.jsonl", rows[:40])),
        tiny.source(tiny.write_jsonl(tmp_path / "b.jsonl", rows[40:]), weight=1.5),
    ]
    data = tiny.prepared(PLAIN, train=train, eval_fraction=0.2)
    held_out = (2, 14, 16, 17, 18, 22, 25, 26, 32, 33, 35, 39, 45)
    twice = (42, 49, 51, 58, 59)
    assert outputs(data.evaluation) == [rows[n]["output"] for n in held_out]
    kept = [n for n in range(60) if n not in held_out]
    assert outputs(data.train) == [rows[n]["output"] for n in kept for _ in range(1 + (n in twice))]
    assert batch_rows(len(data.train), batch_size=8, seed=0, step=1) == (0, 31, 8, 51, 19, 26, 9, 3)


def test_the_mix_says_which_share_of_an_epoch_each_source_has(tmp_path: Path) -> None:
    rows = tiny.alpaca_rows(70)
    for n in range(3):
        tiny.write_jsonl(tmp_path / f"part-{n}.jsonl", rows[n * 10 : n * 10 + 10])
    whole = str(tmp_path / "part-*.jsonl")
    other = str(tiny.write_jsonl(tmp_path / "other.jsonl", rows[30:40]))
    data = tiny.prepared(
        PLAIN,
        train=[{"path": whole, "format": "alpaca"}, {"path": other, "format": "alpaca", "weight": 3.0}],
        eval=[tiny.source(tiny.write_jsonl(tmp_path / "eval.jsonl", rows[40:]))],
    )
    assert data.report.mix == pytest.approx({whole: 0.5, other: 0.5})
    assert outputs(data.train)[:30] == [row["output"] for row in rows[:30]]


def test_rows_are_shown_as_the_model_sees_them(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    chats = [{"messages": [{"role": "system", "content": str(n)}, *turns, *turns]} for n in range(20)]
    file = tiny.write_jsonl(tmp_path / "rows.jsonl", chats)
    data = tiny.prepared(CHAT, train=[tiny.source(file, "messages")], eval_fraction=0.2)
    [shown] = show_rows(data.train, CHAT, 1)
    asked = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert shown.pieces[1:] == [("hello<|im_end|>", True), ("\n" + asked, False), ("hello<|im_end|>", True)]
    assert shown.pieces[0][0].endswith("<|im_end|>\n" + asked)
    assert len(show_rows(data.train, CHAT, 1000)) == len(data.train)
    assert (shown.place, shown.num_tokens, shown.num_targets) == (
        data.train.place(0),
        len(data.train[0].input_ids),
        data.train[0].is_target.sum(),
    )


def test_the_prompt_for_inference_begins_the_training_example(tmp_path: Path) -> None:
    for tokenizer in (PLAIN, tiny.sentencepiece()):
        rows = [{"instruction": f"Add {n}.", "input": "1", "output": "so"} for n in range(9)]
        file = tiny.write_jsonl(tmp_path / "rows.jsonl", rows)
        other = tiny.write_jsonl(tmp_path / "eval.jsonl", tiny.alpaca_rows(1))
        data = tiny.prepared(tokenizer, train=[tiny.source(file)], eval=[tiny.source(other)])
        for row, example in zip(rows, data.train, strict=True):
            prompt = render_prompt("alpaca", tokenizer, instruction=row["instruction"], input=row["input"])
            assert example.input_ids[~example.is_target].tolist() == list(prompt.ids)


def test_importing_the_room_is_light() -> None:
    heavy = ["torch", "transformers", "datasets", "tokenizers", "pyarrow", "tuner.config"]
    code = f"import sys, tuner.data; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.skipif(not ALPACA_DEMO.exists(), reason=f"{ALPACA_DEMO} is not here")
def test_real_alpaca_rows() -> None:
    data = tiny.prepared(PLAIN, train=[tiny.source(ALPACA_DEMO)], eval_fraction=0.1, max_length=2048)
    train, evaluation = data.report.train, data.report.evaluation
    assert train.rows_read + evaluation.rows_read == 999
    assert 60 < evaluation.rows_read < 140
    assert train.cut_off == train.empty == 0
    assert train.num_examples == train.rows_kept == train.rows_read
    assert all(example.input_ids[-1] == PLAIN.eos_token_id for example in data.train) == (
        train.truncated == 0
    )
    assert "### Response:\n" in show_rows(data.train, PLAIN, 1)[0].pieces[0][0]
    assert np.all(data.train.num_targets > 1)


@given(
    # Hashes as shares of all there are; real ones have twice the bits.
    st.lists(st.integers(0, 2**32 - 1).map(lambda hashed: hashed / 2**32), min_size=1, max_size=300),
    st.integers(1, 100),
    st.floats(0.01, 0.3),
)
def test_the_share_that_holds_out_so_many_rows(found: list[float], wanted: int, least: float) -> None:
    """At least as many as are wanted, or three tenths, where the rows can be parted so; some are left."""
    places = np.array(found)
    share = share_to_hold_out(places, least=least, wanted_rows=wanted)
    if len(set(found)) == 1:
        assert share is None
        return
    assert share is not None
    held_out = int((places < share).sum())
    assert 0 < held_out < len(found)
    most = max(1, min(wanted, int(0.3 * len(found))))
    nearest = np.sort(places)[most - 1]
    if max(nearest, least) < places.max():
        assert held_out >= most
        assert share >= least


def test_a_smaller_share_would_hold_out_too_few() -> None:
    places = np.random.default_rng(0).random(200)
    share = share_to_hold_out(places, least=0.05, wanted_rows=50)
    assert share == round(share or 0, 2)
    assert (places < share).sum() >= 50 > (places < share - 0.01).sum()
    assert share_to_hold_out(np.arange(4000) / 4000, least=0.05, wanted_rows=50) == 0.05


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """The file behind `file://` URLs, which others may change."""
    path = tmp_path / "rows.jsonl"
    tiny.write_jsonl(path, tiny.alpaca_rows(30))
    return path


def test_a_worker_has_the_rows_that_the_first_one_had_although_they_have_changed(elsewhere: Path) -> None:
    spec = tiny.round_spec(train=[{"path": f"file://{elsewhere}", "format": "alpaca"}], eval_fraction=0.2)
    cache = elsewhere.parent / "cache"
    first = prepare(spec, PLAIN, cache)
    assert prepare(spec, PLAIN, cache, known=first.fingerprint).fingerprint == first.fingerprint
    tiny.write_jsonl(elsewhere, tiny.alpaca_rows(31))
    assert prepare(spec, PLAIN, cache, known=first.fingerprint).fingerprint == first.fingerprint
    elsewhere.unlink()
    assert prepare(spec, PLAIN, cache, known=first.fingerprint).fingerprint == first.fingerprint
    tiny.write_jsonl(elsewhere, tiny.alpaca_rows(31))
    anew = prepare(spec, PLAIN, cache)
    assert anew.fingerprint != first.fingerprint
    assert len(anew.train) + len(anew.evaluation) == 31


def test_rows_that_are_nowhere_any_more_are_read_as_they_are_now(elsewhere: Path) -> None:
    """Whoever compares workloads refuses them then."""
    spec = tiny.round_spec(train=[{"path": f"file://{elsewhere}", "format": "alpaca"}], eval_fraction=0.2)
    cache = elsewhere.parent / "cache"
    first = prepare(spec, PLAIN, cache)
    for table in cache.glob("[0-9a-f]*"):
        shutil.rmtree(table)
    assert prepare(spec, PLAIN, cache, known=first.fingerprint).fingerprint == first.fingerprint
    for table in cache.glob("[0-9a-f]*"):
        shutil.rmtree(table)
    tiny.write_jsonl(elsewhere, tiny.alpaca_rows(31))
    assert prepare(spec, PLAIN, cache, known=first.fingerprint).fingerprint != first.fingerprint


def test_the_commit_of_a_data_set_of_the_hub_is_that_of_its_folder(tmp_path: Path) -> None:
    """`datasets` keeps what it has loaded in NAME/CONFIG/VERSION/COMMIT."""
    commit = "0123456789abcdef" * 2 + "01234567"
    for name, expected in ((commit, commit), ("5f4d", None)):
        datasets.Dataset.from_list(tiny.alpaca_rows(3)).save_to_disk(str(tmp_path / "set" / name))
        rows = datasets.load_from_disk(str(tmp_path / "set" / name))
        assert commit_of(rows) == expected
