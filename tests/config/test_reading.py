import json
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args, get_origin

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from tests.config.rounds import FULL, MINIMAL, PATH, file_of, mistake_in, mistakes_in, with_hyperparameters
from tuner.config import load_round, read_round
from tuner.config.parsing import dotted
from tuner.config.round_file import RECORDED_KEYS, RoundSpec
from tuner.config.wording import EXAMPLES
from tuner.config.yaml_text import parse
from tuner.errors import InputError, RoundFileError
from tuner.records import Fixed


def test_a_round_is_read_from_disk(tmp_path):
    path = tmp_path / "round1.yaml"
    path.write_text(FULL)
    file = load_round(path)
    assert (file.path, file.text) == (path, FULL)
    assert file.directory == tmp_path
    assert file.spec.hyperparameters["learning_rate"] == {"low": 1e-5, "high": 3e-3, "log": True}
    assert file.spec.space()["lora_alpha"] == Fixed(16.0)


def test_the_directory_is_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "round1.yaml").write_text(MINIMAL)
    assert load_round(PATH.__class__("round1.yaml")).directory == tmp_path


def test_a_message_names_file_line_key_and_what_was_meant(tmp_path):
    path = tmp_path / "round1.yaml"
    path.write_text(FULL.replace("lora_r: [8", "lora_rank: [8"))
    with pytest.raises(RoundFileError) as caught:
        load_round(path)
    assert str(caught.value) == "round1.yaml:14: hyperparameters.lora_rank: unknown; did you mean lora_r?"
    assert caught.value.exit_code == 2


def test_all_mistakes_come_at_once_in_the_order_of_the_file():
    text = """\
study: ../greeting
model: {path: some/model, dtype: float16}
data:
  train: [{path: train.jsonl, format: shargpt, template: chatml}, 5]
  eval_fraction: 2
max_train_steps: 60
hyperparameters:
  lora_rank: 8
  learning_rate: "1e-5"
  warmup_steps: 50
  decay_steps: 24
search: {trials: 1, enqueue: [{lora_r: 8}, {lora_alpha: 17}]}
evaluation: {every_steps: 100}
run: {production_steps: 30, slots: 0}
storage: mysql://user:secret@host/db
"""
    found = [(mistake.line, mistake.key) for mistake in mistakes_in(text)]
    assert found == [
        (None, "round"),
        (1, "study"),
        (2, "model.dtype"),
        (4, "data.train[0].format"),
        (4, "data.train[1]"),
        (5, "data.eval_fraction"),
        (8, "hyperparameters.lora_rank"),
        (9, "hyperparameters.learning_rate"),
        (11, "hyperparameters.decay_steps"),
        (12, "search.enqueue"),
        (12, "search.enqueue[0].lora_r"),
        (12, "search.enqueue[1].lora_alpha"),
        (13, "evaluation.every_steps"),
        (14, "run.slots"),
        (14, "run.production_steps"),
        (15, "storage"),
    ]


def test_a_rule_is_silent_while_what_it_rests_on_is_wrong():
    text = FULL.replace("max_train_steps: 60", "max_train_steps: sixty").replace(
        "decay_steps: 24", "decay_steps: 90"
    )
    assert mistake_in(text).key == "max_train_steps"
    text = FULL.replace("warmup_steps: 5", "warmup_steps: five").replace("decay_steps: 24", "decay_steps: 60")
    assert mistake_in(text).key == "hyperparameters.warmup_steps"


@pytest.mark.parametrize(
    ("old", "new", "line", "key", "message"),
    [
        ("study: greeting\n", "", None, "study", "missing: Name of the study that"),
        ("max_train_steps: 60\n", "", None, "max_train_steps", "missing: Number of optimizer steps"),
        ("path: some/model", "dtype: float32", 3, "model.path", "missing: A model"),
        (
            "{path: some/model}",
            "some/model",
            3,
            "model",
            "`key: value` lines such as {path: some/model}, got 'some/model'",
        ),
        ("{path: some/model}", "", 3, "model", "but it has no value"),
        ("some/model", '""', 3, "model.path", "expects text that is not empty, got ''"),
        ("some/model", "7", 3, "model.path", "expects text (in quotes where it looks like a number), got 7"),
        ("some/model}", "m, quantization: 4bit}", 3, "model.quantization", "did you mean nf4?"),
        ("some/model}", "m, dtype: bf16}", 3, "model.dtype", "did you mean bfloat16?"),
        ("some/model}", "m, dtype: fp16}", 3, "model.dtype", "overflow"),
        ("some/model}", "m, tf32: true}", 3, "model.tf32", "or set dtype: float32"),
        ("some/model}", "m, trust_remote_code: yes}", 3, "model.trust_remote_code", "expects true or false"),
        ("[{path: train.jsonl, format: alpaca}]", "[]", 4, "data.train", "at least 1 entry, got []"),
        (
            "[{path: train.jsonl, format: alpaca}]",
            "train.jsonl",
            4,
            "data.train",
            "expects a list such as [{path: train.jsonl, format: alpaca}], got 'train.jsonl'",
        ),
        ("format: alpaca", "format: alpacca", 4, "data.train[0].format", "did you mean alpaca?"),
        ("format: alpaca", "format: vicuna", 4, "data.train[0].format", "did you mean sharegpt?"),
        ("format: alpaca", "format: alpaca, weight: 0", 4, "data.train[0].weight", "a number above 0, got 0"),
        ("format: alpaca", "format: alpaca, weight: .nan", 4, "data.train[0].weight", "a finite number"),
        ("eval_fraction: 0.1", "eval_fraction: 1", 4, "data.eval_fraction", "a number below 1, got 1"),
        ("eval_fraction: 0.1", "eval_fraction: 5%", 4, "data.eval_fraction", "above 0 and below 1, got '5%'"),
        ("eval_fraction: 0.1", 'eval_fraction: "0.1"', 4, "data.eval_fraction", "write 0.1 without quotes"),
        ("max_train_steps: 60", "max_train_steps: 0", 5, "max_train_steps", "expects at least 1, got 0"),
        (
            "max_train_steps: 60",
            "max_train_steps: 60.0",
            5,
            "max_train_steps",
            "whole number of at least 1, got 60.0; write 60",
        ),
        (
            "max_train_steps: 60",
            "max_train_steps: true",
            5,
            "max_train_steps",
            "whole number of at least 1, got true",
        ),
        ("round: round1", "round: 1", 2, "round", "in quotes"),
        ("round: round1", "round: .hidden", 2, "round", "letters, digits"),
        ("round: round1", "round: a/b", 2, "round", "letters, digits"),
        ("round: round1", "round: -rf", 2, "round", "letters, digits"),
        ("round: round1", "round: straße", 2, "round", "letters, digits"),
        ("round: round1", f"round: {'r' * 101}", 2, "round", "at most 100 characters"),
        ("model}", "model, loader: sloth}", 3, "model.loader", "did you mean unsloth?"),
        (
            "model}",
            "model, loader: unsloth, kernels: liger}",
            3,
            "model.kernels",
            "unsloth has kernels of its own",
        ),
        (
            "model}",
            "model, loader: unsloth, attention: varlen}",
            3,
            "model.attention",
            "unsloth has kernels of its own",
        ),
        (
            "model}",
            "model, dtype: float32, attention: varlen}",
            3,
            "model.attention",
            "varlen is for dtype: bfloat16; set attention: torch, or dtype: bfloat16",
        ),
        (
            "model}",
            "model, loader: unsloth, quantization: int8}",
            3,
            "model.quantization",
            "not supported by loader: unsloth",
        ),
        (
            "model}",
            "model, loader: unsloth, gguf_file: a.gguf}",
            3,
            "model.gguf_file",
            "not supported by loader: unsloth",
        ),
        ("study: greeting", "study: ..", 1, "study", "letters, digits"),
        ("study: greeting", 'study: "a\\n"', 1, "study", "letters, digits"),
    ],
)
def test_single_mistakes(old, new, line, key, message):
    assert MINIMAL.count(old) == 1
    mistake = mistake_in(MINIMAL.replace(old, new))
    assert (mistake.line, mistake.key) == (line, key)
    assert message in mistake.message


@pytest.mark.parametrize(
    ("text", "key", "message"),
    [
        ("search: {trials: 0}", "search.trials", "at least 1"),
        (
            "search: {trials: many}",
            "search.trials",
            "expects a whole number of at least 1, got 'many'. Meaning: Number of trials in the round",
        ),
        ("search: {trials: }", "search.trials", "has no value; write one, or remove this line"),
        ("search: {sampler: qmc}", "search.sampler", "did you mean quasi-random?"),
        ("search: {enqueue: {lora_r: 8}}", "search.enqueue", "expects a list"),
        ("search: {enqueue: [8]}", "search.enqueue[0]", "`key: value` lines"),
        ("search: {enqueue: [{lr: 1e-4}]}", "search.enqueue[0].lr", "did you mean learning_rate?"),
        ("search: {enqueue: [{lora_r: big}]}", "search.enqueue[0].lora_r", "expects a whole number"),
        ("search: {enqueue: [{continues: 3}]}", "search.enqueue[0].continues", "such as round1/3, got 3"),
        ("search: {enqueue: [{continues: round0}]}", "search.enqueue[0].continues", "ROUND/TRIAL"),
        ("search: {enqueue: [{continues: ../r/3}]}", "search.enqueue[0].continues", "ROUND/TRIAL"),
        ("search: {enqueue: [{continue: r/3}]}", "search.enqueue[0].continue", "did you mean continues?"),
        ("evaluation: {every_steps: 0}", "evaluation.every_steps", "at least 1"),
        ("evaluation: 5", "evaluation", "`key: value` lines"),
        ("checkpoints: {keep_best: 0}", "checkpoints.keep_best", "at least 1"),
        ("checkpoints: {keep_best_trials: 0}", "checkpoints.keep_best_trials", "all or a whole number"),
        ("checkpoints: {keep_best_trials: every}", "checkpoints.keep_best_trials", "got 'every'"),
        ("run: {slots: many}", "run.slots", "auto or a whole number of at least 1, got 'many'"),
        (
            "run: {engine: rey}",
            "run.engine",
            "expects one of local, ray, simulated, or package.module:Name, got 'rey'",
        ),
        ("run: {ray_address: head}", "run.ray_address", "expects HOST:PORT, such as 10.0.0.1:6379, or local"),
        ("run: {ray_address: 'ray://head:1'}", "run.ray_address", "got 'ray://head:1'"),
        ("run: {ray_address: 6379}", "run.ray_address", "HOST:PORT"),
        ("run: {pruner: hyperband}", "run.pruner", "expects none, median or halving"),
        ("run: {report_to: [tensorbord]}", "run.report_to[0]", "did you mean tensorboard?"),
        ("run: {report_to: wandb}", "run.report_to", "expects a list such as [tensorboard], got 'wandb'"),
        (
            "run: {resources_patience: 10m}",
            "run.resources_patience",
            "Meaning: Minutes to wait for a free GPU",
        ),
        ("run: {loading_timeout: 90}", "run.loading_timeout", "a time such as 90s, 30m or 2h, got 90"),
        (
            "run: {engine: 1}",
            "run.engine",
            "expects one of local, ray, simulated, or package.module:Name, got 1",
        ),
        ("run: {notify: tell.py}", "run.notify", "such as [python, tell.py], got 'tell.py'"),
        ("run: {notify: [tell, 3]}", "run.notify", "such as [python, tell.py], got [tell, 3]"),
        ("run: {decay_branches: often}", "run.decay_branches", "'often'"),
        ("storage: mysql://user:secret@host/db", "storage", "begins with 'mysql'"),
        ("storage: tuner.db", "storage", "sqlite:///FILE"),
        ("storage: 'sqlite:///:memory:'", "storage", "names no file"),
        ("storage: /data/tuner.db", "storage", "for that file, write sqlite:////data/tuner.db"),
        ("storage: sqlite://tuner.db", "storage", "for that file, write sqlite:///tuner.db"),
        ("objective: {metric: m:f, direction: max}", "objective.direction", "did you mean maximize?"),
        ("storage: 'sqlite://'", "storage", "names no file"),
        ("hyperparameters: [lora_r]", "hyperparameters", "`key: value` lines"),
        ("hyperparameters:", "hyperparameters", "but it has no value"),
        ("learning_rate: 3e-4", "learning_rate", "belongs under hyperparameters"),
    ],
)
def test_single_mistakes_of_optional_keys(text, key, message):
    mistake = mistake_in(f"{MINIMAL}{text}\n")
    assert (mistake.line, mistake.key) == (6, key)
    assert message in mistake.message
    assert "secret" not in mistake.message


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("", None, "is empty"),
        ("# nothing but a comment\n", None, "is empty"),
        ("- study\n- round\n", 1, "got a list"),
        ("study", 1, "got 'study'"),
        ("study: a\nround: b\nstudy: c\n", 3, "the key study appears a second time"),
        ("study: a\nmodel:\n  path: x\n  path: y\n", 4, "the key path appears a second time"),
        ("study: a\nmodel:\n\tpath: x\n", 3, "a tab"),
        ("study: a\nmodel: {path: x\n", 3, "is not YAML"),
        ("study: a\nmax_train_steps 20\nround: b\n", 2, "is not YAML: expects `key: value`, with a colon"),
        ("study: a\n  round: b\n", 2, "is not YAML"),
        ("model:\n  path: x\n   dtype: y\n", 3, "is not YAML"),
        ("model:\n  - x\n  path: y\n", 3, "the line begins in another column"),
        ("study: a: b\n", 1, "is not YAML: mapping values are not allowed here"),
        ("study: a\n---\nround: b\n", 2, "is not YAML"),
        ("study: a\nround: *nowhere\n", 2, "undefined alias"),
        ("study: a\nround: @x\n", 2, "is not YAML"),
        ("study: a\nround: \x01\n", 2, "'\\x01'"),
        ("study: a\nround: !name b\n", 2, "without YAML tags"),
        ("&loop\nstudy: *loop\n", 2, "contains itself"),
    ],
)
def test_text_that_is_no_round_gives_one_message(text, line, message):
    mistake = mistake_in(text)
    assert (mistake.line, mistake.key) == (line, "")
    assert message in mistake.message


def test_bytes_that_are_no_text_name_their_line(tmp_path):
    path = tmp_path / "round1.yaml"
    path.write_bytes(b"study: a\ngoal: caf\xe9\n")
    with pytest.raises(RoundFileError, match=r"round1\.yaml:2: is not UTF-8 text: byte 0xe9"):
        load_round(path)


def test_a_byte_order_mark_and_windows_line_ends_are_read(tmp_path):
    path = tmp_path / "round1.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + MINIMAL.replace("\n", "\r\n").encode())
    assert load_round(path).spec == file_of(MINIMAL).spec


def test_no_file_and_no_regular_file(tmp_path):
    with pytest.raises(InputError, match="there is no round file"):
        load_round(tmp_path / "round1.yaml")
    with pytest.raises(InputError, match="is a directory"):
        load_round(tmp_path)


def test_aliases_and_merges_are_read_and_mistakes_inside_have_a_line():
    text = MINIMAL + "search:\n  <<: {trials: 4}\n  seed: 1\n"
    assert file_of(text).spec.search.trials == 4
    text = MINIMAL + "search:\n  <<: {trials: 0}\n  seed: 1\n"
    mistake = mistake_in(text)
    assert mistake.key == "search.trials"
    assert mistake.line in (6, 7)


def test_a_date_is_text():
    assert file_of(MINIMAL.replace("round1", "2026-11-23")).spec.round == "2026-11-23"


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="ab:-[]{}&*!|>'\"%@`#,? \t\n\r0123.e~\x00é", max_size=40))
def test_any_text_has_mistakes(text):
    last_line = text.count("\n") + text.count("\r") + 1
    for mistake in mistakes_in(text):
        assert mistake.line is None or 1 <= mistake.line <= last_line


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([line for line in FULL.splitlines() if ": " in line]),
            st.sampled_from(
                ["", "null", "x", "-1", "[1, 2]", "{low: 1, high: 2}", "true", "1e-5", "[[]]", "{}"]
            ),
        ),
        min_size=1,
        max_size=5,
    )
)
def test_any_damage_to_a_round_is_named_once_a_place(damages):
    text = FULL
    for line, value in damages:
        text = text.replace(line, f"{line.split(':')[0]}: {value}")
    try:
        read_round(text, PATH)
    except RoundFileError as error:
        places = [mistake.key for mistake in error.mistakes]
        assert len(places) == len(set(places))


def test_every_section_and_list_has_an_example():
    names = {re.sub(r"\[\d\]", "[]", dotted(place)) for place in _refused_kinds()}
    assert names - {"run.notify", "search.sampler_arguments"} == EXAMPLES.keys() - _ITEMS
    assert len(names) > 15


_ITEMS = {f"data.{part}[]{more}" for part in ("train", "eval", "test") for more in ("", ".columns")} | {
    "search.enqueue[]"
}


def _refused_kinds(model=RoundSpec, place=()):
    """Yield where a section or a list is expected."""
    for name, field in model.model_fields.items():
        kinds = [field.annotation, *get_args(field.annotation)]
        inner = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
        is_one = inner in kinds[:1] or type(None) in kinds
        if name in RECORDED_KEYS:
            continue
        if inner is not None and is_one:
            yield from _refused_kinds(inner, (*place, name))
        if inner is not None or any(get_origin(kind) in (list, dict) for kind in kinds):
            yield (*place, name)


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_right(name):
    document = parse(FULL).document
    if name.startswith("command"):
        del document["model"], document["data"]
        document |= {"command": {"run": ["x"]}, "hyperparameters": {"schedule": "constant"}}
    *above, last = (0 if part == "[]" else part for part in re.findall(r"\w+|\[\]", name))
    at = document
    for part in above:
        if at[part] == []:
            at[part] = [{"path": "rows.jsonl", "format": "alpaca"}]
        at = at[part]
    value = parse(f"value: {EXAMPLES[name]}").document["value"]
    if last == 0:
        at[:] = [value]
    else:
        at[last] = value
    assert RoundSpec.model_validate(document)


@pytest.mark.parametrize(
    "text",
    [
        "command: {run: [x, 3], resume: [a, 2, {b: 1}]}",
        "run: {report_to: [1, [2]], notify: [3]}",
        "search: {enqueue: [1, [2], text]}",
        "data: {train: [1, [2]], eval: [text], test: [{}]}",
    ],
)
def test_wrong_items_of_lists_are_all_named(text):
    document = {**parse(MINIMAL).document, **parse(text).document}
    with pytest.raises(RoundFileError) as refused:
        read_round(json.dumps(document, indent=1), Path("round1.yaml"))
    assert len([m for m in refused.value.mistakes if "expects" in m.message]) >= 2


def test_reading_needs_no_heavy_library():
    heavy = ["torch", "transformers", "datasets", "optuna", "sqlalchemy", "numpy", "scipy", "rich", "typer"]
    code = f"import sys, tuner.config; print([name for name in {heavy} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_the_line_of_a_mistake_inside_blocks():
    text = with_hyperparameters(lora_r="8", learning_rate="\n    low: 1e-5\n    hgih: 1e-3")
    mistake = mistake_in(text)
    assert (mistake.line, mistake.key) == (8, "hyperparameters.learning_rate")


@pytest.mark.parametrize(
    ("written", "words"),
    [(r"a\0b", "NUL"), (f"a/{'l' * 256}/b", "longer than 255 bytes")],
)
def test_paths_that_no_file_can_have(written, words):
    text = MINIMAL.replace("some/model", f'"{written}"').replace("train.jsonl", f'"{written}"')
    text += f'checkpoints: {{directory: "{written}"}}\nstorage: "sqlite:///{written}"\n'
    found = mistakes_in(text)
    assert [mistake.key for mistake in found] == [
        "model.path", "data.train[0].path", "checkpoints.directory", "storage"
    ]  # fmt: skip
    assert all(words in mistake.message for mistake in found)


def test_a_url_may_be_longer_than_a_name():
    text = MINIMAL.replace("train.jsonl", f"https://host/a.jsonl?signature={'s' * 300}")
    assert read_round(text, PATH).spec.data.train[0].path.startswith("https://")
