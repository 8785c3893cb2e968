"""`trial export` after a round of QLoRA on a CPU: what is written, what loads, what is refused."""

from __future__ import annotations

import math
import os
import re
import stat
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from tests.studies import QUICKSTART, write_round
from tests.study.simulation import Crash, simulate, trials
from tests.unsynced import on_the_disk
from tuner.api.export import appearing_whole, finished_trial
from tuner.cli import run
from tuner.data import prepare, render_prompt
from tuner.data.examples import Example
from tuner.records import CheckpointKind, Saved, TrialState
from tuner.study.folder import open_folder, opened
from tuner.whole import digest

pytestmark = pytest.mark.slow

QUANTISED = ("dtype: float32}", "dtype: bfloat16, quantization: nf4}")
CONVERTER = """\
import sys
from pathlib import Path
model, _, file, _, kind = sys.argv[1:]
if not (Path(model) / "config.json").is_file():
    sys.exit("no model there")
Path(file).write_text(kind)
"""


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A round of one trial, as in the article but for its size."""
    directory = tmp_path_factory.mktemp("study")
    path = write_round(
        directory, trials=1, steps=6, learning_rate="1e-2", lora_r="4", optimizer="adamw_8bit", decay_steps=2
    )
    path.write_text(path.read_text().replace(*QUANTISED))
    assert run(["-C", str(directory), "study", "run", "round1.yaml"]) == 0
    return directory


@pytest.fixture(autouse=True)
def _in_the_study(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(study)
    for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HF_TOKEN_PATH", str(study / "no-token"))
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(study / "no-token"))


def recorded(study: Path) -> float:
    evaluations = finished_trial(open_folder(study), "best").trial.evaluations
    return min(evaluation.eval_loss for evaluation in evaluations)


def held_out(study: Path) -> list[Example]:
    finished = finished_trial(open_folder(study), "best")
    return list(prepare(finished.spec, AutoTokenizer.from_pretrained(QUICKSTART / "base"), None).evaluation)


@torch.no_grad()
def loss(model: PreTrainedModel, examples: list[Example]) -> float:
    """By transformers alone."""
    total, count = 0.0, 0
    for example in examples:
        ids = torch.from_numpy(example.input_ids).long()
        nll = torch.nn.functional.cross_entropy(
            model(ids[None]).logits[0, :-1].float(), ids[1:], reduction="none"
        )
        total += float(nll[torch.from_numpy(example.is_target[1:])].sum())
        count += int(example.is_target.sum())
    return total / count


def test_the_merged_model_has_the_loss_of_the_trial(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["trial", "export", "best", "--to", "merged", "--merge"]) == 0
    assert "quantised to NF4 with double quantisation and de-quantised again" in capsys.readouterr().out
    merged = AutoModelForCausalLM.from_pretrained("merged", dtype=torch.float32)
    found = loss(merged, held_out(study))
    assert math.isclose(found, recorded(study), rel_tol=1e-2)
    untouched = AutoModelForCausalLM.from_pretrained(QUICKSTART / "base", dtype=torch.float32)
    assert loss(untouched, held_out(study)) > 1.1 * found
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= names(Path("merged"))
    assert not [name for name in names(study) if name.startswith(".merged")]


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def test_an_adapter_that_can_be_used_alone(study: Path) -> None:
    assert run(["trial", "export", "round1/0", "--to", "new/adapter", "--license", "apache-2.0"]) == 0
    directory = study / "new" / "adapter"
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= names(directory)
    config = PeftConfig.from_pretrained(str(directory))
    assert config.base_model_name_or_path == str(QUICKSTART / "base")
    best = study / "runs" / "round1" / "trial-0000" / "best" / "adapter_model.safetensors"
    assert (directory / "adapter_model.safetensors").read_bytes() == best.read_bytes()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    asked = [{"role": "user", "content": "Name a river."}]
    ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
    own = AutoTokenizer.from_pretrained(QUICKSTART / "base")
    assert tuple(ids) == render_prompt("alpaca", own, instruction="Name a river.").ids
    front = yaml.safe_load((directory / "README.md").read_text().split("---")[1])
    assert front["license"] == "apache-2.0"
    assert "base_model" not in front, "a directory of this machine means nothing on the Hub"
    card = (directory / "README.md").read_text()
    assert "tuner trial export round1/0 --to new/adapter --license apache-2.0" in card
    for prompt in ("{instruction}\n\n### Response:", "{instruction}\n\n### Input:\n{input}\n\n### Response:"):
        assert f"### Instruction:\n{prompt}\n" in card


def test_the_card_says_the_base_and_the_template_of_training(
    study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a base of the Hub each adapter keeps the commit; this one is told of another one's."""
    file, best = (
        study / "round1.yaml",
        study / "runs" / "round1" / "trial-0000" / "best" / "adapter_config.json",
    )
    before = {path: path.read_text() for path in (file, best)}
    commit = "c" * 40
    best.write_text(before[best].replace('"revision": null', f'"revision": "{commit}"'))
    changed = before[file].replace("quantization: nf4}", "quantization: nf4, trust_remote_code: true}")
    file.write_text(changed.replace("format: alpaca}", "format: alpaca, template: tokenizer}"))
    _record_the_adapter(study)
    try:
        assert run(["trial", "export", "best", "--to", "told"]) == 0
    finally:
        for path, text in before.items():
            path.write_text(text)
        _record_the_adapter(study)
    assert "warning: model.trust_remote_code: Python code from " in capsys.readouterr().err
    card = (study / "told" / "README.md").read_text()
    assert f'revision="{commit}", trust_remote_code=True' in card
    assert f"(revision {commit})" in card
    assert "`tokenizer.apply_chat_template(messages, add_generation_prompt=True)` renders it." in card
    assert PeftConfig.from_pretrained(str(study / "told")).revision == commit


def _record_the_adapter(study: Path) -> None:
    """Record the files that now lie in the place of the first trial's adapter."""
    with opened(open_folder(study)) as store:
        (trial,) = store.trials("round1")
        best = trial.checkpoint(CheckpointKind.BEST)
        assert best is not None
        found = replace(best, sha256=digest(study / "runs" / "round1" / best.path))
        store.record(Saved(trial.round, trial.number, trial.attempts[-1].number, found))


def refusal(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    capsys.readouterr()
    before = {path: path.stat().st_mtime_ns for path in Path().rglob("*")}
    assert run(["trial", "export", *options]) == 2
    assert {path: path.stat().st_mtime_ns for path in Path().rglob("*")} == before
    return capsys.readouterr().err


def test_what_is_in_the_way_stays(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (study / "mine").mkdir()
    (study / "mine" / "thesis.txt").write_text("years of work")
    (study / "file").write_text("")
    (study / "link").symlink_to("mine")
    assert "--to mine: not empty" in refusal(capsys, "best", "--to", "mine")
    assert "--to mine: is not an export" in refusal(capsys, "best", "--to", "mine", "--force")
    assert "--to file: is a file" in refusal(capsys, "best", "--to", "file")
    assert "--to link: is a link" in refusal(capsys, "best", "--to", "link", "--force")
    for above in (".", "..", "/"):
        assert "contains the study" in refusal(capsys, "best", "--to", above, "--force")
    (study / "empty").mkdir()
    for extra in ((), ("--force",)):
        assert run(["trial", "export", "best", "--to", "empty", *extra]) == 0
        assert "adapter_config.json" in names(study / "empty")
        (study / "empty" / "left.txt").write_text("")
    assert "--to empty: not empty" in refusal(capsys, "best", "--to", "empty")


def test_what_a_killed_export_left_goes_with_the_next(tmp_path: Path) -> None:
    numbers = (2**22 + 1, os.getppid())  # above any process's number on Linux; one that runs
    left, running = (tmp_path / f".model[1].{number}.tmp" for number in numbers)
    for folder in (left, running):
        folder.mkdir()
    with appearing_whole(tmp_path / "model[1]") as made:
        assert {path.name for path in tmp_path.iterdir()} == {running.name, made.name}


def test_an_export_is_on_the_disk_before_it_replaces_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "model"
    for content in ("first", "second"):
        synced = on_the_disk(monkeypatch)
        with appearing_whole(target) as made:
            (made / "weights").write_text(content)
        assert {path.stat().st_ino for path in (target / "weights", target, tmp_path)} <= synced
        assert (target / "weights").read_text() == content
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--push", "me/model", "--merge"), "--push me/model: no token; set HF_TOKEN"),
        (("--push", "me/mo del", "--merge"), "--push me/mo del: expects OWNER/NAME"),
        (("--push", "me/model"), "others could not load the adapter; add --merge to push the merged model"),
        (("--gguf", "m.gguf"), "--gguf: llama.cpp's converter is not installed"),
        (("--gguf", "m.gguf", "--gguf-converter", "no.py"), "--gguf-converter no.py: no such file"),
        (("--gguf", "round1.yaml"), "--gguf round1.yaml: exists"),
        (("--gguf", "runs"), "--gguf runs: is a directory"),
        (("--gguf-converter", "no.py"), "--gguf-converter requires --gguf"),
        (("--dtype", "float16"), "--dtype requires --merge"),
        (("--public",), "--public requires --push"),
        (("--as", "trl", "--merge"), "--as writes a configuration, not weights; remove --merge"),
        (("--as", "trl", "--license", "mit", "--push", "me/x"), "remove --push and --license"),
    ],
)
def test_options_that_cannot_be_had(
    options: tuple[str, ...],
    words: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PATH", "")
    assert words in refusal(capsys, "best", "--to", "out", *options)


def test_a_gguf_file_is_made_of_the_merged_model(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By a program that takes the arguments of llama.cpp's converter."""
    converter = study / "convert_hf_to_gguf.py"
    converter.write_text(CONVERTER)
    options = ("--gguf", "out/model.gguf", "--gguf-converter", converter.name, "--dtype", "float16")
    assert run(["trial", "export", "best", "--to", "for-gguf", *options]) == 0
    assert (study / "out" / "model.gguf").read_text() == "f16"
    assert names(study / "out") == {"model.gguf"}


def test_a_converter_that_fails_leaves_the_model(
    study: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found on the PATH, and a program of its own there."""
    tools = study / "tools"
    tools.mkdir()
    converter = tools / "llama-convert-hf-to-gguf"
    converter.write_text(f"#!{sys.executable}\nimport sys\nsys.exit('no such architecture')\n")
    converter.chmod(converter.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tools))
    assert run(["trial", "export", "best", "--to", "kept", "--gguf", "failed.gguf"]) == 1
    said = capsys.readouterr().err
    assert "ended with 1 and wrote no failed.gguf; the merged model is in kept" in said
    assert said.rstrip().endswith("no such architecture")
    assert "config.json" in names(study / "kept")
    assert not [name for name in names(study) if "failed" in name]


def test_trials_without_a_result(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    simulate(tmp_path, trials=4, learning_rate="[1e-3, 8e-2]", sampler="grid")
    states = {trial.state: trial.number for trial in trials(tmp_path)}
    lost, done = states[TrialState.INFEASIBLE], states[TrialState.COMPLETE]
    assert re.search(
        rf"error: {lost}: round1/{lost} is infeasible \(.+\): it has no result to share",
        refusal(capsys, str(lost), "--to", "out"),
    )
    link = tmp_path / "runs" / "round1" / f"trial-{done:04d}" / "best"
    link.unlink(missing_ok=True)
    assert f"the adapter of round1/{done} is missing from" in refusal(capsys, str(done), "--to", "out")
    assert "round9/0: no such round has started; started: round1" in refusal(
        capsys, "round9/0", "--to", "out", "--as", "trl"
    )


def test_a_trial_that_has_not_ended(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Crash):
        simulate(tmp_path, fuse=12)
    assert "0: round1/0 is waiting and not yet trained to the end" in refusal(capsys, "0", "--to", "out")


@pytest.mark.parametrize("tool", ["axolotl", "llamafactory", "trl"])
def test_rows_for_other_tools_are_those_of_the_trial(
    study: Path, tool: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from datasets import Dataset, load_from_disk

    assert run(["trial", "export", "best", "--to", tool, "--as", tool]) == 0
    assert re.search(rf"^next: cd \S+/{tool} && .* {tool}\.yaml$", capsys.readouterr().err, re.MULTILINE)
    document = yaml.safe_load((study / tool / f"{tool}.yaml").read_text())
    assert document["max_steps"] == 6
    rows = study / tool / "rows"
    if tool == "llamafactory":
        written = load_from_disk(str(rows))["validation"]
    else:
        written = Dataset.from_parquet(str(rows / "test.parquet"), cache_dir=str(study / "cache"))
    examples = held_out(study)
    assert len(written) == len(examples) == 8
    for row, example in zip(written, examples, strict=True):
        assert row["input_ids"] == example.input_ids.tolist()
        assert row["attention_mask"] == [1] * len(example.input_ids)
        wanted = [
            i if target else -100 for i, target in zip(row["input_ids"], example.is_target, strict=True)
        ]
        assert row["labels"] == wanted
