"""A study from Python: the same facts as the command line shows, and running without one."""

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from jupyter_client.manager import start_new_kernel
from sqlalchemy.exc import SQLAlchemyError

import tuner
from tests.studies import ENVIRONMENT, QUICKSTART, write_round
from tuner.cli import run
from tuner.errors import InputError, Interrupted, TunerError


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> tuner.Study:
    """Two complete rounds, run and promoted from Python."""
    directory = tmp_path_factory.mktemp("study")
    write_round(directory, trials=2, learning_rate="[0.005, 0.008]", lora_r=2, sampler="grid")
    found = tuner.Study(directory)
    found.run("round1.yaml", progress=False)
    found.promote("round2", max_train_steps=12)
    found.run("round2.yaml", progress=False)
    return found


def printed(study: tuner.Study, capsys: pytest.CaptureFixture[str], *arguments: str):
    capsys.readouterr()
    assert run(["-C", str(study.directory), *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_status_and_trials_are_those_of_the_command_line(study, capsys, monkeypatch):
    monkeypatch.chdir(study.directory)
    assert study.status() == printed(study, capsys, "study", "status")
    listed = printed(study, capsys, "trial", "list")
    trials = [trial for each in study.rounds for trial in each.trials]
    assert [(t.round, t.number, t.state) for t in trials] == [
        (d["round"], d["number"], d["state"]) for d in listed
    ]
    for trial, document in zip(trials, listed, strict=True):
        for name in ("best_step", "best_eval_loss", "settled_step", "executed_steps", "continues", "reason"):
            assert getattr(trial, name) == document[name]
        assert trial.hyperparameters == document["hyperparameters"]
        assert str(trial.adapter) == document["adapter"]


def test_a_round_gives_its_advice_its_best_trial_and_its_report(study, tmp_path):
    first = study.round("round1")
    assert (first.name, first.max_train_steps, first.state) == ("round1", 8, "complete")
    assert first.best.best_eval_loss == min(trial.best_eval_loss for trial in first.trials)
    advice = first.advice
    assert advice.evidence
    assert str(advice) == "\n".join(advice.evidence)
    assert repr(advice).startswith(f"Advice({advice.diagnosis}): 8 steps, ")
    assert advice.gain(8) in (0.0, None)
    with pytest.raises(InputError, match="pass a longer horizon"):
        advice.gain(7)
    text = first.report(tmp_path / "page.html", markdown=tmp_path / "report.md")
    assert (tmp_path / "report.md").read_text() == text
    assert "<html" in (tmp_path / "page.html").read_text()
    assert study.best.name == study.trial("best").name
    assert study.round().name == study.rounds[-1].name == "round2"
    assert "2 trials of 8 steps" in repr(first)


def test_a_promotion_says_what_it_wrote(study, capsys):
    assert study.status()["rounds"][1]["max_train_steps"] == 12
    assert study.trial("round2/0").continues.startswith("round1/")
    with pytest.raises(InputError, match="round2"):
        study.promote("round2", from_round="round1", max_train_steps=16)
    third = study.promote("round3", max_train_steps=16)
    assert third.path == study.directory / "round3.yaml"
    assert third.document["max_train_steps"] == {"from": 12, "to": 16}
    third.path.unlink()


def test_tables_have_the_documented_columns(study):
    trials, evaluations = study.trials_dataframe(), study.evaluations_dataframe()
    assert list(trials.columns[:5]) == ["round", "number", "state", "reason", "best_step"]
    assert {"params_learning_rate", "params_lora_r"} <= set(trials.columns)
    assert len(trials) == sum(len(each.trials) for each in study.rounds)
    assert list(evaluations.columns) == [
        "round", "number", "step", "eval_loss", "train_loss", "learning_rate", "token_accuracy",
    ]  # fmt: skip
    best = evaluations.groupby(["round", "number"])["eval_loss"].min().tolist()
    assert best == pytest.approx(trials["best_eval_loss"].tolist())


def test_a_column_of_numbers_that_are_all_missing_is_one_of_numbers(tmp_path):
    write_round(tmp_path, trials=1)
    found = tuner.Study(tmp_path).run("round1.yaml", engine="simulated", progress=False)
    evaluations = tuner.Study(tmp_path / "dry-run").evaluations_dataframe()
    assert found.trials[0].evaluations[0].token_accuracy is None
    assert evaluations["token_accuracy"].dtype == float
    assert math.isnan(evaluations["token_accuracy"].mean())


def test_the_best_adapter_is_loaded_as_peft_has_it(study):
    model = study.best.load(device="cpu")
    assert type(model).__module__.startswith("peft.")
    assert model.peft_config["default"].r == study.best.hyperparameters["lora_r"]
    assert not model.training


def test_an_answer_is_what_the_command_line_prints(study, capsys):
    prompts = ["Say hello.", "Name three rivers and two lakes."]
    answers = study.best.generate(prompts, max_new_tokens=8)
    capsys.readouterr()
    for prompt, answer in zip(prompts, answers, strict=True):
        words = ["trial", "generate", "best", "--prompt", prompt, "--max-new-tokens", "8"]
        assert run(["-C", str(study.directory), *words]) == 0
        assert capsys.readouterr().out == answer + "\n"
    assert study.best.generate(prompts[0], max_new_tokens=8) == answers[:1]


def test_an_export_and_a_rerun_are_those_of_the_command_line(study, tmp_path):
    written = study.best.export(tmp_path / "adapter")
    assert (written / "adapter_config.json").exists()
    assert (written / "README.md").exists()
    with pytest.raises(InputError, match="not empty"):
        study.best.export(tmp_path / "adapter")
    again = study.trial("round1/0").reproduce(to_step=4, progress=False)
    assert again.agrees
    assert again.document["trial"] == "round1/0"


def test_what_can_be_freed_is_counted_before_it_is_freed(study):
    assert study.clean() >= 0


def test_a_sweep_writes_the_first_horizon(tmp_path):
    path = write_round(tmp_path, trials=2, run="run: {production_steps: 64}")
    found = tuner.Study(tmp_path).sweep("round1.yaml", engine="simulated", progress=False)
    text = (tmp_path / "dry-run" / path.name).read_text()
    assert f"max_train_steps: {found or 6}" in text


def test_a_check_is_what_the_command_line_prints(study, capsys, tmp_path):
    found = study.check("round1.yaml")
    assert found["ok"]
    assert found == printed(study, capsys, "study", "check", "round1.yaml")
    (tmp_path / "wrong.yaml").write_text((study.directory / "round1.yaml").read_text() + "nonsense: 1\n")
    wrong = study.check(tmp_path / "wrong.yaml")
    assert (wrong["ok"], wrong["plan"]) == (False, None)
    assert [error["key"] for error in wrong["errors"]] == ["nonsense"]


def test_a_new_study_is_one_that_its_check_accepts(tmp_path):
    made = tuner.Study.new(
        tmp_path / "made",
        model=str(QUICKSTART / "base"),
        data=str(QUICKSTART / "data" / "train.jsonl"),
    )
    assert made.rounds == ()
    assert made.check("round1.yaml")["ok"]
    with pytest.raises(InputError, match="exists"):
        tuner.Study.new(tmp_path / "made", model=str(QUICKSTART / "base"), data="x.jsonl")


def test_an_unknown_name_is_refused_with_those_there_are(study, tmp_path):
    with pytest.raises(InputError, match="round9: no such round has started; started: round1, round2"):
        study.round("round9")
    for number in ("99", "\N{ARABIC-INDIC DIGIT ZERO}", "-1", ""):
        with pytest.raises(InputError, match="expects ROUND/NUMBER"):
            study.trial(f"round1/{number}")
    with pytest.raises(InputError, match="/1: no such round has started"):
        study.trial("/1")
    with pytest.raises(InputError, match="no round file here"):
        tuner.Study(tmp_path)
    with pytest.raises(InputError, match="slots=0: expects auto or a whole number"):
        study.run("round1.yaml", slots=0)
    with pytest.raises(InputError, match=r"nowhere\.yaml"):
        study.run("nowhere.yaml")


@pytest.mark.parametrize(
    ("verb", "arguments", "message"),
    [
        ("run", {"slots": 1.5}, "slots=1.5: expects auto or a whole number of at least 1"),
        ("run", {"slots": True}, "slots=True: expects auto or a whole"),
        ("run", {"workers": 0}, "workers=0: expects auto or a whole"),
        ("run", {"engine": 3}, "engine=3: expects a name, one of local, ray, simulated"),
        ("run", {"seconds": "1h"}, "seconds='1h': expects a number of at least 0"),
        ("auto", {"seconds": -1}, "seconds=-1: expects a number of at least 0"),
        ("promote", {"decay": "half"}, "decay='half': expects steps or share"),
        ("promote", {"top": 0}, "top=0: expects a whole number of at least 1"),
        ("promote", {"max_train_steps": 1e3}, "max_train_steps=1000.0: expects a whole number of at least 1"),
        (
            "promote",
            {"add": "lora_r=2,4"},
            r"add='lora_r=2,4': expects a list of texts; pass \['lora_r=2,4'\]",
        ),
    ],
)
def test_an_argument_that_cannot_be_used_is_refused_before_anything(study, verb, arguments, message):
    before = sorted(study.directory.rglob("*"))
    with pytest.raises(InputError, match=f"^{message}"):
        getattr(study, verb)("round3" if verb == "promote" else "round1.yaml", **arguments)
    assert sorted(study.directory.rglob("*")) == before


def test_a_dry_run_goes_on_by_itself_and_says_why_it_ended(tmp_path, capsys):
    write_round(tmp_path, trials=3, run="run: {production_steps: 40}")
    last = tuner.Study(tmp_path).auto("round1.yaml", engine="simulated", progress=True)
    assert last.ended_because.startswith(f"enough after {last.name}: ")
    assert "trials, best loss" in capsys.readouterr().err


def test_a_round_is_a_sweep_by_what_it_does_and_not_by_its_name(tmp_path, capsys, monkeypatch):
    path = write_round(tmp_path, trials=3)
    path.write_text(path.read_text().replace("round: round1", "round: sweep-60"))
    tuner.Study(tmp_path).run("round1.yaml", engine="simulated", progress=False)
    study = tuner.Study(tmp_path / "dry-run")
    assert [(each["round"], each["state"]) for each in study.status()["rounds"]] == [("sweep-60", "complete")]
    assert study.best.round == study.round().name == "sweep-60"
    assert study.round("sweep-60").report().startswith("#")
    assert study.promote("round2", max_train_steps=24).document["from"] == "sweep-60"
    monkeypatch.chdir(tmp_path / "dry-run")
    assert run(["study", "status"]) == 0
    assert "sweep-60" in capsys.readouterr().out


def test_time_that_is_over_before_anything_began_is_said(tmp_path):
    write_round(tmp_path, trials=3)
    with pytest.raises(Interrupted, match="nothing was started"):
        tuner.Study(tmp_path).run("round1.yaml", seconds=0.0, progress=False)


def test_time_that_is_over_half_way_returns_the_round_and_the_same_call_goes_on(tmp_path):
    write_round(tmp_path, trials=2000, steps=40)
    study, before = tuner.Study(tmp_path), signal.getsignal(signal.SIGINT)
    counts = [0]
    while counts[-1] < 2 or len(counts) < 3:
        with contextlib.suppress(Interrupted):  # a busy machine had not begun yet
            found = study.run("round1.yaml", engine="simulated", seconds=1.0, progress=False)
            assert found.state == "open"
            counts.append(len(found.trials))
    assert counts == sorted(counts)
    assert counts[-1] < 2000
    assert signal.getsignal(signal.SIGINT) is before


def test_an_interrupt_saves_and_raises(tmp_path):
    """Such as a notebook's stop button: once the first trials are there."""
    write_round(tmp_path, trials=2000, steps=40)
    before = signal.getsignal(signal.SIGINT)

    def interrupt() -> None:
        directory, begun = tmp_path / "dry-run", False
        while not begun:
            time.sleep(0.1)
            with contextlib.suppress(TunerError, SQLAlchemyError):  # the database is being made
                begun = (directory / "tuner.db").exists() and bool(tuner.Study(directory).rounds)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(Interrupted, match="all progress is saved"):
        tuner.Study(tmp_path).run("round1.yaml", engine="simulated", progress=False)
    assert signal.getsignal(signal.SIGINT) is before
    assert tuner.Study(tmp_path / "dry-run").round("round1").state == "open"


IN_A_CELL = """
import signal, tuner
before = signal.getsignal(signal.SIGINT)
try:
    tuner.Study(".").run("round1.yaml", progress=False)
finally:
    assert signal.getsignal(signal.SIGINT) is before
"""


@pytest.mark.acceptance
def test_a_notebooks_stop_button_saves_and_the_same_cell_resumes(tmp_path):
    """The button interrupts the whole process group of the kernel, which workers are not in."""
    write_round(tmp_path, trials=1, steps=4000, every=10)
    study = tuner.Study(tmp_path)

    def last_step() -> int:
        with contextlib.suppress(TunerError, SQLAlchemyError):  # the database is being made
            return max((made.step for made in study.trial(0).evaluations), default=0)
        return 0

    manager, client = start_new_kernel(
        cwd=str(tmp_path), env={**os.environ, **ENVIRONMENT, "PYTHONPATH": str(Path.cwd())}
    )
    try:
        for _ in range(2):
            client.execute(IN_A_CELL)
            deadline, before = time.monotonic() + 120, last_step()
            while last_step() == before:
                assert time.monotonic() < deadline, "no evaluation"
                time.sleep(0.2)
            manager.interrupt_kernel()
            stopped = client.get_shell_msg(timeout=120)["content"]
            assert (stopped["status"], stopped.get("ename")) == ("error", "Interrupted"), stopped
            assert "all progress is saved" in stopped["evalue"]
            assert study.round().state == "open"
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    first, second = study.trial(0)._recorded.attempts
    assert 0 < first.to_step == second.from_step < second.to_step, "no step was lost"


def test_off_the_main_thread_no_signal_is_touched(tmp_path):
    write_round(tmp_path, trials=2)
    found: list[object] = []

    def work() -> None:
        found.append(tuner.Study(tmp_path).run("round1.yaml", engine="simulated", progress=False))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert isinstance(found[0], tuner.Round), found


def test_importing_it_loads_nothing_heavy():
    heavy = "{'torch', 'transformers', 'optuna', 'sqlalchemy', 'numpy', 'pandas', 'pydantic'}"
    code = f"import sys, tuner; found = {heavy} & set(sys.modules); print(found or 'nothing', dir(tuner))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("nothing ['Advice', 'Round', 'Study', 'Trial', '__version__'")
