"""Bad input ends with exit 2 and one clear message, and leaves nothing half-made."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cli.conftest import MountTmpfs, make_read_only
from tests.studies import tuner, write_round
from tuner.cli import run
from tuner.config import load_round
from tuner.installation import install_command
from tuner.report.trackers import not_installed
from tuner.study.plan import RoundPlan
from tuner.study.run import refuse_uninstalled

GOOD_ROW = '{"instruction": "Name a river.", "output": "The Ebb."}\n'
OTHER_ROW = '{"instruction": "Name a hill.", "output": "The Tor."}\n'


def files(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*")}


def refused(directory: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one message of a command that exits with 2 and leaves the folder as it was."""
    before = files(directory)
    assert run(list(arguments)) == 2
    said = capsys.readouterr()
    assert files(directory) == before
    assert said.out == ""
    assert said.err.count("error:") == 1, said.err
    assert "Traceback" not in said.err
    return said.err.partition("error:")[2]


def write_data(directory: Path, *, train: str = GOOD_ROW, evaluation: str = OTHER_ROW) -> Path:
    data = directory / "data"
    data.mkdir()
    (data / "train.jsonl").write_text(train)
    (data / "eval.jsonl").write_text(evaluation)
    return data


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"trials": 0}, ["search.trials"]),
        ({"steps": "[20, 40]"}, ["max_train_steps"]),
        ({"every": 9}, ["evaluation.every_steps"]),
        ({"steps": 10**18}, ["evaluation.every_steps", "more than 100,000 evaluations of a trial"]),
        ({"decay_steps": 8}, ["decay_steps", "warmup_steps"]),
        ({"lora_r": "[2, 4]\n  lora_rank: 4"}, ["hyperparameters.lora_rank", "did you mean lora_r"]),
        ({"lora_r": "[2, 4]\n  max_steps: 60"}, ["max_steps"]),
        ({"storage": "mysql://localhost/x"}, ["storage"]),
        ({"storage": "tuner.db"}, ["storage", "for that file, write sqlite:///tuner.db"]),
        (
            {"enqueue": "[{learning_rate: 1e-3, lora_r: 2}, {learning_rate: 0.001, lora_r: 2}]"},
            ["search.enqueue[1]: is", "the same point as search.enqueue[0]", "remove one"],
        ),
    ],
)
@pytest.mark.parametrize("verb", ["run", "check"])
def test_mistakes_in_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: str, changes: dict[str, Any], words: list[str]
) -> None:
    path = write_round(tmp_path, **changes)
    message = refused(tmp_path, capsys, "study", verb, str(path))
    assert "round1.yaml:" in message
    assert all(word in message for word in words)


@pytest.mark.parametrize(
    ("option", "given", "words"),
    [
        ("--notify", "", "expects a program and its arguments"),
        ("--notify", "  ", "expects a program and its arguments"),
        ("--notify", "'' x", "expects a program and its arguments"),
        ("--ray-address", "head:6379", "the engine local uses no cluster; add --engine ray"),
    ],
)
def test_an_option_that_would_have_no_effect(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, given: str, words: str
) -> None:
    message = refused(tmp_path, capsys, "study", "run", str(write_round(tmp_path)), option, given)
    assert words in message


@pytest.mark.parametrize("verb", ["run", "check"])
def test_a_tool_to_report_to_that_is_not_installed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    """A dry run is shown nowhere, and needs none."""
    missing = not_installed(["tensorboard", "wandb", "mlflow", "trackio"])
    if not missing:
        pytest.skip("needs an environment without one of tensorboard, wandb, mlflow and trackio")
    path = write_round(tmp_path)
    text = path.read_text()
    path.write_text(f"{text}run: {{report_to: [{missing[0]}]}}\n")
    message = refused(tmp_path, capsys, "study", verb, str(path))
    line = len(text.splitlines()) + 1
    assert f"round1.yaml:{line}: run.report_to: {missing[0]} is not installed" in message
    assert install_command(missing[0]) in message
    path.write_text(f"{text}run: {{engine: simulated, report_to: [{missing[0]}]}}\n")
    refuse_uninstalled(RoundPlan(load_round(path)))


def test_an_unknown_format(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_round(tmp_path)
    path.write_text(path.read_text().replace("format: alpaca", "format: guanaco", 1))
    message = refused(tmp_path, capsys, "study", "run", str(path))
    assert "data.train" in message
    assert "guanaco" in message
    assert "alpaca" in message


@pytest.mark.parametrize(
    "arguments",
    [
        ["study", "run"],
        ["study", "sweep", "x"],
        ["study", "status", "--foo"],
        ["-C", "nowhere", "study", "status"],
        ["study", "run", "round1.yaml", "--for", "soon"],
        ["study", "run", "round1.yaml", "--slots", "0"],
        ["study", "promote", "--to", "round2", "--decay", "most"],
    ],
)
def test_a_wrong_command_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments) == 2
    message = capsys.readouterr().err
    assert message
    assert "Traceback" not in message


def test_a_missing_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for verb in ("run", "check"):
        assert "round9.yaml" in refused(tmp_path, capsys, "study", verb, str(tmp_path / "round9.yaml"))


def test_the_nearest_round_files_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_round(tmp_path)
    for name in "abcdefg":
        (tmp_path / f"{name}.yaml").touch()
    (tmp_path / "round0.yaml").mkdir()
    message = refused(tmp_path, capsys, "study", "run", str(tmp_path / "roun1.yaml"))
    assert "in this folder: round1.yaml, " in message
    assert "round0" not in message


@pytest.mark.parametrize("path", ["x" * 300, "x/" * 2100], ids=["a name", "a path"])
@pytest.mark.parametrize("verb", ["run", "import", "sweep"])
def test_a_path_that_is_too_long(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, verb: str, path: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_round(tmp_path)
    assert "too long" in refused(tmp_path, capsys, "study", verb, path)


def test_a_pipe_in_place_of_a_round_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "round1.yaml")
    for verb in ("run", "check"):
        assert "is a pipe or a device" in refused(
            tmp_path, capsys, "study", verb, str(tmp_path / "round1.yaml")
        )


def test_gigabytes_in_place_of_a_round_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_round(tmp_path)
    for name in ("rows.jsonl", "rows.yaml"):
        (tmp_path / name).touch()
        os.truncate(tmp_path / name, 2**40)
        message = refused(tmp_path, capsys, "study", "check", str(tmp_path / name))
        assert "too many for a round file" in message
    assert run(["-C", str(tmp_path), "study", "status"]) == 0  # which reads the others in the folder


def test_a_round_file_may_begin_with_a_byte_order_mark(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_round(tmp_path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert run(["-C", str(tmp_path), "study", "status"]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("verb", ["run", "check", "status"])
def test_a_pipe_in_place_of_a_database(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo(tmp_path / "tuner.db")
    arguments = [verb] if verb == "status" else [verb, str(write_round(tmp_path))]
    write_round(tmp_path)
    assert "tuner.db: is a pipe or a device" in refused(tmp_path, capsys, "study", *arguments)


def test_rows_in_place_of_a_round_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rows.jsonl").write_text(GOOD_ROW + OTHER_ROW)
    message = refused(tmp_path, capsys, "study", "check", str(tmp_path / "rows.jsonl"))
    assert "rows.jsonl:2: is not one YAML document: a round file is `key: value` lines" in message


@pytest.mark.parametrize("verb", [["run", "round1.yaml"], ["status"], ["promote", "--to", "r2"], ["clean"]])
def test_a_database_that_is_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_round(tmp_path)
    (tmp_path / "tuner.db").write_text("this is a shopping list\n" * 100)
    assert "tuner.db" in refused(tmp_path, capsys, "study", *verb)
    assert (tmp_path / "tuner.db").read_text().startswith("this is a shopping list")


@pytest.mark.parametrize(
    ("storage", "words"),
    [("sqlite:///nowhere/tuner.db", "there is no directory"), ("sqlite:///taken/tuner.db", "taken/tuner.db")],
)
def test_a_database_that_cannot_be_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], storage: str, words: str
) -> None:
    path = write_round(tmp_path, storage=storage)
    (tmp_path / "taken").write_text("a file where a folder should be")
    assert words in refused(tmp_path, capsys, "study", "run", str(path))


@pytest.mark.parametrize("directory", ["taken", "taken/runs", "taken/deeper/runs"])
def test_a_directory_that_cannot_be_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], directory: str
) -> None:
    path = write_round(tmp_path)
    path.write_text(path.read_text() + f"checkpoints: {{directory: {directory}}}\n")
    (tmp_path / "taken").write_text("a file where a folder should be")
    message = refused(tmp_path, capsys, "study", "run", str(path))
    assert "checkpoints.directory: cannot write to" in message
    assert f"{tmp_path / 'taken'} is a file" in message


def test_a_directory_that_only_reads(
    tmp_path: Path, small_disk: MountTmpfs, capsys: pytest.CaptureFixture[str]
) -> None:
    disk = small_disk(1)
    make_read_only(disk)
    path = write_round(tmp_path)
    path.write_text(path.read_text() + f"checkpoints: {{directory: {disk}/runs}}\n")
    message = refused(tmp_path, capsys, "study", "run", str(path))
    assert f"checkpoints.directory: cannot write to {disk}/runs/round1: Read-only file system" in message


def test_results_on_a_disk_that_only_reads_are_read(small_disk: MountTmpfs) -> None:
    """Such as somebody else's study, or an archive: nothing there changes, and nothing can be recorded."""
    disk = small_disk(32)
    write_round(disk, trials=2)
    assert tuner("study", "run", "round1.yaml", "--engine", "simulated", directory=disk).returncode == 0
    make_read_only(disk)
    before = files(disk)
    for command in (("study", "status"), ("trial", "list"), ("trial", "show", "best")):
        assert tuner("-C", "dry-run", *command, directory=disk).returncode == 0, command
    advice = "make it writable, or copy the study's folder to where you may write"
    message = tuner("-C", "dry-run", "study", "promote", "--to", "round2", directory=disk).stderr
    assert f"{disk}/dry-run/tuner.db: Read-only file system; {advice}" in message
    message = tuner("-C", "dry-run", "study", "report", directory=disk).stderr
    assert "set --html to a file" in message
    assert files(disk) == before


@pytest.mark.parametrize("target", ["nowhere", "runs"])
def test_a_link_that_leads_nowhere(tmp_path: Path, capsys: pytest.CaptureFixture[str], target: str) -> None:
    """A disk that is not mounted, and a link to itself."""
    path = write_round(tmp_path)
    link = tmp_path / "runs"
    link.symlink_to(target)
    for verb in ("run", "check"):
        message = refused(tmp_path, capsys, "study", verb, str(path))
        assert f"{link} is a link to {target}, which does not exist" in message


def test_a_study_on_a_disk_that_only_reads(
    small_disk: MountTmpfs, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The database cannot be written although the checkpoints could be."""
    disk = small_disk(32)
    path = write_round(disk)
    path.write_text(path.read_text() + f"checkpoints: {{directory: {tmp_path}/runs}}\n")
    make_read_only(disk)
    before = files(tmp_path)
    message = refused(disk, capsys, "study", "run", str(path))
    assert f"{disk}/tuner.db" in message
    assert files(tmp_path) == before


BAD_DATA = [
    ({"train": ""}, ["train.jsonl"]),
    ({"train": '{"question": "?"}\n'}, ["train.jsonl", "instruction", "question"]),
    ({"train": "{not json\n"}, ["train.jsonl"]),
    ({"evaluation": ""}, ["eval.jsonl"]),
    ({"train": GOOD_ROW + OTHER_ROW}, ["eval.jsonl", "train.jsonl"]),
]


@pytest.mark.parametrize(("rows", "words"), BAD_DATA)
def test_data_that_cannot_be_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], rows: dict[str, str], words: list[str]
) -> None:
    path = write_round(tmp_path, data=write_data(tmp_path, **rows))
    message = refused(tmp_path, capsys, "study", "check", str(path))
    assert all(word in message for word in words)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: path.write_text('{"output": "a", "output": "b"}'), "train.jsonl:1: the key 'output'"),
        (lambda path: path.write_text(GOOD_ROW[:20]), "train.jsonl:1: not one JSON object a line"),
        (os.mkfifo, "train.jsonl: is a pipe or a device"),
    ],
)
def test_data_files_that_cannot_be_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], make: Callable[[Path], None], words: str
) -> None:
    path = write_round(tmp_path, data=write_data(tmp_path))
    (tmp_path / "data" / "train.jsonl").unlink()
    make(tmp_path / "data" / "train.jsonl")
    assert words in refused(tmp_path, capsys, "study", "check", str(path))


def test_the_same_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_round(tmp_path, data=write_data(tmp_path, train=""))
    assert run(["study", "check", str(path), "--json"]) == 2
    document = json.loads(capsys.readouterr().out)
    assert (document["ok"], document["plan"]) == (False, None)
    assert "train.jsonl" in document["errors"][0]["message"]


def test_a_loader_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.studies import QUICKSTART

    if find_spec("unsloth") is not None:
        pytest.skip("needs an environment without unsloth")
    path = write_round(tmp_path, base=f"{QUICKSTART / 'base'}, loader: unsloth")
    message = refused(tmp_path, capsys, "study", "check", str(path))
    assert "model.loader: unsloth cannot be used here: the package unsloth is not installed" in message
    assert install_command("unsloth") in message


def test_kernels_that_are_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.studies import QUICKSTART

    if find_spec("liger_kernel") is not None:
        pytest.skip("needs an environment without liger-kernel")
    path = write_round(tmp_path, base=f"{QUICKSTART / 'base'}, kernels: liger")
    message = refused(tmp_path, capsys, "study", "check", str(path))
    assert "model.kernels: liger cannot be used here: the package liger-kernel is not installed" in message
    assert install_command("liger") in message


def test_attention_that_needs_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.studies import QUICKSTART

    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    path = write_round(tmp_path, base=f"{QUICKSTART / 'base'}, attention: varlen")
    path.write_text(path.read_text().replace("dtype: float32", "dtype: bfloat16"))
    message = refused(tmp_path, capsys, "study", "check", str(path))
    assert "model.attention: varlen cannot be used here: it needs a CUDA GPU" in message
    assert message.rstrip().endswith("Set model.attention: torch")


def test_a_missing_model_and_missing_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_round(tmp_path, base=tmp_path / "no-model")
    assert "no-model" in refused(tmp_path, capsys, "study", "check", str(path))
    path = write_round(tmp_path, data=tmp_path / "no-data")
    assert "no-data/train.jsonl" in refused(tmp_path, capsys, "study", "check", str(path))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "rows", "words"),
    [
        ({}, {"train": ""}, ["train.jsonl"]),
        ({"base": "no-model"}, {}, ["no-model"]),
    ],
)
def test_what_only_the_worker_sees(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    rows: dict[str, str],
    words: list[str],
) -> None:
    """A run has made the checkpoints' directory and the cache by then, and takes them back."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # a name that is no folder is looked for on the Hub
    path = write_round(tmp_path, data=write_data(tmp_path, **rows), **changes)
    message = refused(tmp_path, capsys, "study", "run", str(path))
    assert all(word in message for word in words)


def test_check_accepts_a_good_round_and_records_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_round(tmp_path, schedule="cosine")
    assert run(["study", "check", str(path), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    plan = document["plan"]
    assert any("decay_steps has no effect" in remark for remark in document["remarks"])
    assert (plan["trials"], plan["max_train_steps"]) == (3, 8)
    assert plan["eval_rows"] == 8
    assert plan["checkpoint_bytes"] > 0
    assert files(tmp_path).isdisjoint({"tuner.db", "runs"})


def test_check_names_a_trial_to_continue_that_is_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_round(tmp_path, enqueue="[{learning_rate: 1e-3, lora_r: 2, continues: round0/1}]")
    assert run(["study", "check", str(path), "--json"]) == 0
    remarks = json.loads(capsys.readouterr().out)["remarks"]
    assert any("there is no trial round0/1 to continue, so" in said for said in remarks)


def test_new_writes_a_round_that_checks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.studies import QUICKSTART
    from tuner.config import load_round

    arguments = ["--model", str(QUICKSTART / "base"), "--data", str(QUICKSTART / "data" / "train.jsonl")]
    assert run(["study", "new", str(tmp_path / "mine"), *arguments]) == 0
    spec = load_round(tmp_path / "mine" / "round1.yaml").spec
    assert (spec.study, spec.data.train[0].format) == ("mine", "alpaca")
    assert run(["study", "new", str(tmp_path / "mine"), *arguments]) == 2
    assert "exists" in capsys.readouterr().err


def test_a_path_in_the_home_folder_is_found_and_written_so_that_it_is_found_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shell leaves `--data=~/rows.jsonl` as it is; a folder with a blank is quoted where it is named."""
    from tests.studies import QUICKSTART

    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "base").symlink_to(QUICKSTART / "base")
    (tmp_path / "rows.jsonl").write_text(GOOD_ROW * 3)
    (tmp_path / "held.jsonl").write_text(OTHER_ROW)
    study = tmp_path / "my study"
    options = ("--model=~/base", "--data=~/rows.jsonl", "--eval=~/held.jsonl")
    done = tuner("study", "new", str(study), *options, directory=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"next: tuner study check '{study}/round1.yaml'" in done.stderr
    spec = load_round(study / "round1.yaml").spec.absolute(study)
    found = (spec.model.path, spec.data.train[0].path, spec.data.eval[0].path)
    assert found == tuple(str(tmp_path / name) for name in ("base", "rows.jsonl", "held.jsonl"))


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--data", "", "--data: is empty; pass a file"),
        ("--model", "", "--model: is empty"),
        ("--eval", "", "--eval: is empty"),
        ("--data", f"{'x' * 256}.jsonl", "--data: contains a file name longer than 255 bytes"),
    ],
)
def test_new_refuses_what_is_no_path(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, value: str, words: str
) -> None:
    """Such as a variable of the shell that is not set."""
    (tmp_path / "rows.jsonl").write_text(GOOD_ROW)
    given = {"--model": "m", "--data": str(tmp_path / "rows.jsonl"), option: value}
    options = [word for pair in given.items() for word in pair]
    assert words in refused(tmp_path, capsys, "study", "new", str(tmp_path / "mine"), *options)
