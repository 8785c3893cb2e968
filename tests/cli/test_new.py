"""`study new` writes a round that `study check` accepts, or nothing, and says what is wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.data import tiny
from tests.data.test_pretrained import write_gguf
from tests.studies import QUICKSTART, Done, tuner
from tuner.api.check import FEW_EXAMPLES, noise_remarks
from tuner.api.new import write_first_command
from tuner.config import RoundSpec, load_round
from tuner.errors import InputError
from tuner.records import Evaluation

BASE = QUICKSTART / "base"
RIVERS = [{"instruction": f"Name river {n}.", "output": f"River {n} is the Ebb."} for n in range(400)]


def new(directory: Path, rows: list[Any], *options: str, model: Path | str = BASE) -> Done:
    data = directory / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tuner(
        "study", "new", "mine", "--model", str(model), "--data", str(data), *options, directory=directory
    )


def accepted(directory: Path, done: Done) -> tuple[RoundSpec, dict[str, Any]]:
    """What was written, and the plan of `study check`."""
    assert done.returncode == 0, done.stderr
    checked = tuner("study", "check", "mine/round1.yaml", "--json", directory=directory)
    assert checked.returncode == 0, checked.stdout
    return load_round(directory / "mine" / "round1.yaml").spec, json.loads(checked.stdout)["plan"]


def refused(directory: Path, done: Done, *words: str) -> str:
    """The error, which has these words, of a command that left nothing."""
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert all(word in done.stderr for word in words), done.stderr
    assert not (directory / "mine").exists(), "nothing is left"
    return done.stderr


@pytest.mark.parametrize(("num_rows", "least"), [(400, 50), (200, 50), (100, 30), (20, 6), (3, 1), (2, 1)])
def test_about_fifty_rows_are_held_out_where_there_are_so_many(
    tmp_path: Path, num_rows: int, least: int
) -> None:
    _, plan = accepted(tmp_path, new(tmp_path, RIVERS[:num_rows]))
    assert least <= plan["eval_rows"] <= max(least + 6, 1)
    assert plan["train_rows"] + plan["eval_rows"] == num_rows


@pytest.mark.parametrize("rows", [RIVERS[:1], RIVERS[:1] * 5])
def test_rows_that_cannot_be_parted(tmp_path: Path, rows: list[Any]) -> None:
    said = refused(tmp_path, new(tmp_path, rows), "rows.jsonl", "separate evaluation rows")
    assert "none of its rows can be held out" in said


@pytest.mark.parametrize(
    ("names", "format"),
    [
        (("question", "answer"), "completion"),
        (("input", "output"), "completion"),
        (("question", "response"), "alpaca"),
        (("prompt", "completion"), "alpaca"),
    ],
)
def test_columns_of_other_names_are_found(tmp_path: Path, names: tuple[str, str], format: str) -> None:
    rows = [dict(zip(names, row.values(), strict=True)) for row in RIVERS[:100]]
    spec, plan = accepted(tmp_path, new(tmp_path, rows, "--format", format))
    assert tuple(spec.data.train[0].columns.values()) == names
    assert plan["train_rows"] + plan["eval_rows"] == 100


def test_conversations_get_a_template_where_the_tokenizer_has_none(tmp_path: Path) -> None:
    base = tmp_path / "plain"
    shutil.copytree(BASE, base)
    (base / "chat_template.jinja").unlink(missing_ok=True)
    config = base / "tokenizer_config.json"
    settings = json.loads(config.read_text())
    settings.pop("chat_template", None)
    config.write_text(json.dumps(settings))
    rows = [
        {
            "messages": [
                {"role": "user", "content": row["instruction"]},
                {"role": "assistant", "content": row["output"]},
            ]
        }
        for row in RIVERS[:60]
    ]
    spec, _ = accepted(tmp_path, new(tmp_path, rows, model=base))
    assert spec.data.train[0].template == "chatml"


def test_a_split_is_named_where_there_are_several(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    DatasetDict({"a": Dataset.from_list(RIVERS[:60]), "b": Dataset.from_list(RIVERS[:80])}).save_to_disk(
        str(tmp_path / "saved")
    )
    words = ("study", "new", "mine", "--model", str(BASE), "--data", str(tmp_path / "saved"))
    refused(tmp_path, tuner(*words, directory=tmp_path), "split")
    _, plan = accepted(tmp_path, tuner(*words, "--split", "b", directory=tmp_path))
    assert plan["train_rows"] + plan["eval_rows"] == 80


def test_target_modules_are_written_that_can_be_adapted(tmp_path: Path) -> None:
    """A mixture of experts has linear layers that are none of torch's."""
    from transformers import AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(BASE)
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, moe_intermediate_size=8,
        num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=8, num_experts=2,
        num_experts_per_tok=1, max_position_embeddings=256,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).save_pretrained(tmp_path / "moe")
    tokenizer.save_pretrained(tmp_path / "moe")
    spec, _ = accepted(tmp_path, new(tmp_path, RIVERS[:60], model=tmp_path / "moe"))
    assert set(spec.hyperparameters["target_modules"]) == {"q_proj", "k_proj", "v_proj", "o_proj"}


def test_columns_that_nothing_is_known_of(tmp_path: Path) -> None:
    rows = [{"a": row["instruction"], "b": row["output"]} for row in RIVERS[:50]]
    done = new(tmp_path, rows, "--format", "completion")
    refused(
        tmp_path, done, "rows.jsonl:1: no column 'prompt'; columns found: 'a', 'b'", "--columns prompt=NAME"
    )
    more = ("--columns", "prompt=a", "--columns", "completion=b")
    refused(tmp_path, new(tmp_path, rows, *more), "--columns requires --format")
    refused(tmp_path, new(tmp_path, rows, "--format", "text", "--columns", "text"), "expects COLUMN=NAME")
    refused(tmp_path, new(tmp_path, rows, "--format", "completion", "--columns", "prompt=c"), "no column")
    spec, _ = accepted(tmp_path, new(tmp_path, rows, "--format", "completion", *more))
    assert spec.data.train[0].columns == {"prompt": "a", "completion": "b"}


@pytest.mark.parametrize("named", ["file", "directory"])
def test_a_gguf_file_is_named_as_such(tmp_path: Path, named: str) -> None:
    place = tmp_path / "gguf"
    place.mkdir()
    write_gguf(place / "model.gguf", tiny.byte_level(chat_template=tiny.CHATML))
    done = new(tmp_path, RIVERS[:100], model=place if named == "directory" else place / "model.gguf")
    spec, _ = accepted(tmp_path, done)
    assert (spec.model.path, spec.model.gguf_file) == ("../gguf", "model.gguf")
    assert spec.data.max_length == 128, "its positions"


def test_directories_that_are_no_model(tmp_path: Path) -> None:
    place = tmp_path / "base"
    place.mkdir()
    assert "no config.json and no GGUF file" in refused(tmp_path, new(tmp_path, RIVERS[:9], model=place))
    for name in ("b.gguf", "a.gguf"):
        (place / name).write_bytes(b"")
    refused(tmp_path, new(tmp_path, RIVERS[:9], model=place), "2 GGUF files: a.gguf, b.gguf", "as --model")
    shutil.rmtree(place)
    shutil.copytree(BASE, place)
    (place / "tokenizer.json").unlink()
    refused(tmp_path, new(tmp_path, RIVERS[:9], model=place), "tokenizer")
    refused(tmp_path, new(tmp_path, RIVERS[:9], model=BASE / "config.json"), "is a file")


def test_a_name_that_the_hub_does_not_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    said = refused(tmp_path, new(tmp_path, RIVERS[:9], model="nobody/no-such-model"))
    assert "nobody/no-such-model" in said


def test_what_was_in_the_folder_stays(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "notes.txt").write_text("mine")
    assert new(tmp_path, RIVERS[:1]).returncode == 2
    assert [path.name for path in mine.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("is_there", [True, False])
def test_a_command_that_cannot_be_written_leaves_nothing(tmp_path: Path, is_there: bool) -> None:
    (tmp_path / "dpo.yaml").write_text("beta: 0.1\n")
    if is_there:
        (tmp_path / "mine").mkdir()
    for tool, settings in (("bogus", ()), ("trl", ("nosuch=3",))):
        with pytest.raises(InputError, match=r"expects none|nosuch: unknown"):
            write_first_command(tmp_path / "mine", tool=tool, config=tmp_path / "dpo.yaml", settings=settings)
    assert not any((tmp_path / "mine").glob("*"))
    assert (tmp_path / "mine").exists() == is_there
    with pytest.raises(InputError, match="cannot be written"):
        write_first_command(tmp_path / "dpo.yaml" / "mine", tool="trl", config=tmp_path / "dpo.yaml")


def evaluation(num_examples: int, *, spread: float) -> Evaluation:
    """Losses of 2 -+ spread, a token each: their standard error is spread / sqrt(n - 1)."""
    nll = tuple(2.0 + spread * (-1) ** n for n in range(num_examples))
    return Evaluation(0, sum(nll) / num_examples, example_nll=nll, example_tokens=(1,) * num_examples)


def test_a_noisy_base_is_warned_of() -> None:
    [said] = noise_remarks(evaluation(50, spread=0.56), num_examples=50)
    assert said.startswith("the standard error of the base model's loss is 4% with 50 evaluation rows")
    assert "hold out more rows; about 200 rows would bring it to 2%" in said
    [said] = noise_remarks(evaluation(50, spread=0.56), num_examples=50, max_examples=50)
    assert "raise evaluation.max_examples" in said
    assert list(noise_remarks(evaluation(50, spread=0.27), num_examples=50)) == []
    assert list(noise_remarks(None, num_examples=FEW_EXAMPLES)) == []
    [said] = noise_remarks(None, num_examples=FEW_EXAMPLES - 1)
    assert "probably above 2%" in said


def test_check_warns_of_few_evaluation_rows(tmp_path: Path) -> None:
    """Of a base that was measured by its number, before that by the number of rows."""
    accepted(tmp_path, new(tmp_path, RIVERS[:20]))
    words = "standard error of the base model's loss is"
    for more, said in (((), f"{words} probably above 2%"), (("--probe",), words)):
        done = tuner("study", "check", "mine/round1.yaml", *more, directory=tmp_path)
        assert said in " ".join(done.stdout.split())
    assert "probably" not in done.stdout
