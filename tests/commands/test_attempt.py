"""Attempts of a plain script: its curve, its checkpoints, and what each kind of end comes to."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.cli.conftest import MountTmpfs
from tests.commands.driving import PYTHON, Ran, document, spec_of, trainer, with_fault
from tuner.commands import process_tree
from tuner.commands.attempt import Round, Unusable, tokens_of
from tuner.commands.check import mistakes
from tuner.commands.outcome import Ending, judged
from tuner.engines.ray.host import WORKER_TOKEN
from tuner.errors import WorkerError
from tuner.records import CheckpointKind, Evaluated, Event, Started


def test_a_script_runs_to_the_horizon_and_its_checkpoints_are_kept(tmp_path: Path) -> None:
    ran = Ran(tmp_path, document())
    assert (ran.end.outcome, ran.end.step) == ("complete", 24)
    assert list(ran.curve) == [0, 4, 8, 12, 16, 20, 24]
    best = min(ran.curve, key=lambda step: ran.curve[step])
    assert ran.saved(CheckpointKind.BEST)[-1].step == best
    assert json.loads((ran.directory / "best" / "state.json").read_text())["step"] == best
    assert [c.step for c in ran.saved(CheckpointKind.TRUNK)] == [16]
    assert [c.step for c in ran.saved(CheckpointKind.LAST)][-1] == 24
    assert list(ran.place.joinpath("output").iterdir()) == []
    evaluation = [e.evaluation for e in ran.events if isinstance(e, Evaluated)][-1]
    assert evaluation.metrics["accuracy"] == 1 / evaluation.eval_loss
    assert evaluation.train_loss is not None
    assert evaluation.learning_rate == pytest.approx(0.05 / 8)


def test_a_checkpoint_to_resume_from_has_the_best_up_to_its_step(tmp_path: Path) -> None:
    """However many later evaluations are known when it is kept: a fast script reports all at once."""
    ran = Ran(tmp_path, document())
    kept = [json.loads(path.read_text()) for path in ran.directory.glob("last/*/curve.json")]
    assert len(kept) == 6
    for curve in kept:
        up_to_there = {step: loss for step, loss in ran.curve.items() if 0 < step <= curve["step"]}
        assert curve["best_step"] == min(up_to_there, key=lambda step: up_to_there[step])


def test_resuming_equals_a_run_from_scratch_to_the_digit(tmp_path: Path) -> None:
    short = Ran(tmp_path, document())
    longer = document(hyperparameters={"learning_rate": 0.05, "schedule": "linear", "decay_steps": 16})
    point = short.point(CheckpointKind.TRUNK)
    resumed = Ran(tmp_path, longer, trial=1, resume=point, steps=48)
    scratch = Ran(tmp_path, longer, trial=2, steps=48)
    assert [e.step for e in resumed.events if isinstance(e, Started)] == [16]
    assert resumed.curve == scratch.curve
    assert list(resumed.curve)[-1] == 48
    reported = (resumed.place / "metrics.jsonl").read_text()
    assert '"step": 12' not in reported


def test_a_killed_command_fails_the_attempt_and_the_next_resumes(tmp_path: Path) -> None:
    whole = Ran(tmp_path / "whole", document())

    def kill_at(events: list[Event]) -> bool:
        if any(isinstance(e, Evaluated) and e.evaluation.step == 8 for e in events):
            for process in process_tree.with_token(killed_tokens(tmp_path / "killed")[0]):
                process.send_signal(signal.SIGKILL)
        return False

    values = {**document()["hyperparameters"], "pause": 0.05}
    killed = Ran(tmp_path / "killed", document(hyperparameters=values), stopping=kill_at)
    assert killed.end.outcome == "failed"
    assert "signal 9" in str(killed.end.reason)
    point = killed.point(CheckpointKind.LAST)
    assert point.step >= 4
    again = Ran(tmp_path / "killed", document(hyperparameters=values), attempt=2, resume=point)
    assert again.end.outcome == "complete"
    assert again.curve == whole.curve


def killed_tokens(folder: Path) -> list[str]:
    return [path.read_text() for path in folder.rglob("token")]


def test_stopping_ends_the_tree_even_if_it_ignores_sigterm(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(process_tree.end, "__kwdefaults__", {"grace_seconds": 0.3})
    (tmp_path / "stubborn.py").write_text(
        "import os, signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "child = 'import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)'\n"
        "subprocess.Popen([sys.executable, '-c', child], start_new_session=True)\n"
        "open(os.environ['TUNER_METRICS'], 'a').write('{\"step\": 0, \"eval_loss\": 1.0}\\n')\n"
        "time.sleep(600)\n"
    )
    content = document(script="stubborn.py") | {"hyperparameters": {"learning_rate": 0.1}}
    content["command"] = {"run": content["command"]["run"]}
    ran = Ran(tmp_path, content, stopping=lambda events: any(isinstance(e, Evaluated) for e in events))
    assert ran.end.outcome == "stopped"
    assert not list(process_tree.with_token(ran.tokens[0]))


@pytest.mark.parametrize(
    ("fault", "outcome", "said"),
    [
        ("nan", "infeasible", "evaluation loss is nan at step 8"),
        ("out of memory", "infeasible", "CUDA out of memory"),
        ("port", "failed", "EADDRINUSE"),
    ],
)
def test_what_a_fault_comes_to(tmp_path: Path, fault: str, outcome: str, said: str) -> None:
    ran = Ran(tmp_path, without_resume(with_fault(fault)))
    assert ran.end.outcome == outcome
    assert said in str(ran.end.reason)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("silent", "TUNER_METRICS"),
        ("early", "TUNER_MAX_STEPS"),
        ("crash", "ImportError: no such thing"),
        ("too long", "max_train_steps is 24"),
        ("elsewhere", "not inside TUNER_OUTPUT_DIR"),
    ],
)
def test_what_no_trial_could_do_better_ends_the_round_with_what_to_do(
    tmp_path: Path, fault: str, said: str
) -> None:
    with pytest.raises(Unusable, match="trial 0: ") as caught:
        Ran(tmp_path, without_resume(with_fault(fault)))
    assert said in str(caught.value)


def test_a_script_that_starts_over_instead_of_resuming_is_found_out(tmp_path: Path) -> None:
    short = Ran(tmp_path, document())
    values = {**document()["hyperparameters"], "fault": "starts over"}
    with pytest.raises(Unusable, match="from step 16, but reported step 0"):
        Ran(
            tmp_path,
            document(hyperparameters=values),
            trial=1,
            resume=short.point(CheckpointKind.TRUNK),
            steps=48,
        )


@pytest.mark.parametrize(("began_at", "fits"), [(0, True), (8, False)])
def test_a_trainer_that_resumes_from_another_checkpoint_is_found_out(
    tmp_path: Path, began_at: int, fits: bool
) -> None:
    (tmp_path / "foreign.py").write_text(
        "import os\n"
        "with open(os.environ['TUNER_METRICS'], 'a') as file:\n"
        f'    file.write(\'{{"began_at": {began_at}, "max_steps": 24}}\\n\')\n'
        '    file.write(\'{"step": 24, "eval_loss": 1.0}\\n\')\n'
    )
    content = without_resume(document(script="foreign.py"))
    if fits:
        assert Ran(tmp_path, content).end.outcome == "complete"
        return
    with pytest.raises(Unusable, match="began at step 8, but the trial at step 0"):
        Ran(tmp_path, content)


def test_an_early_end_is_the_machines_once_a_trial_was_complete(tmp_path: Path) -> None:
    content = without_resume(with_fault("early"))
    spec = spec_of(tmp_path, content)
    work = Round(spec, tmp_path, spec.recorded_objective, {}, has_reported=True, has_completed=True)
    assert Ran(tmp_path, content, work=work).end.outcome == "failed"


def test_silence_ends_an_attempt(tmp_path: Path) -> None:
    content = without_resume(with_fault("hangs"))
    spec = spec_of(tmp_path, content)
    assert spec.command is not None
    brief = spec.command.model_copy(update={"silence_minutes": 1 / 60})
    work = Round(spec.model_copy(update={"command": brief}), tmp_path, spec.recorded_objective, {})
    began = time.monotonic()
    ran = Ran(tmp_path, content, work=work)
    assert ran.end.outcome == "failed"
    assert "no metric and no line" in str(ran.end.reason)
    assert time.monotonic() - began < 60


def test_evaluations_that_only_the_tools_log_has_are_no_silence(tmp_path: Path, monkeypatch) -> None:
    """On a clock of the test's own: each second the tool logs an evaluation; six without one are too many."""
    (tmp_path / "quiet.py").write_text(
        "import time\nfrom pathlib import Path\nwhile not Path('over').exists():\n    time.sleep(0.02)\n"
    )
    log = tmp_path / "runs" / "round1" / "trial-0000" / "attempt-1" / "output" / "trainer_log.jsonl"
    seconds = 0

    def sleep(_: float) -> None:
        nonlocal seconds
        if seconds == 24:
            (tmp_path / "over").touch()
            time.sleep(0.02)
            return
        seconds += 1
        with log.open("a") as file:
            file.write(json.dumps({"current_steps": seconds, "eval_loss": 1.0}) + "\n")

    monkeypatch.setattr(
        "tuner.commands.attempt.time", SimpleNamespace(monotonic=lambda: float(seconds), sleep=sleep)
    )
    content = without_resume(document("quiet.py"))
    spec = spec_of(tmp_path, content)
    assert spec.command is not None
    brief = spec.command.model_copy(update={"silence_minutes": 6 / 60})
    work = Round(spec.model_copy(update={"command": brief}), tmp_path, spec.recorded_objective, {})
    ran = Ran(tmp_path, content, work=work)
    assert ran.end.outcome == "complete", ran.end.reason
    assert list(ran.curve) == list(range(1, 25))


def test_a_damaged_checkpoint_fails_the_attempt(tmp_path: Path) -> None:
    short = Ran(tmp_path, document())
    point = short.point(CheckpointKind.TRUNK)
    (point.path / "checkpoint" / "state.json").write_text("{}")
    again = Ran(tmp_path, document(), trial=1, resume=point)
    assert again.end.outcome == "failed"
    assert "changed or damaged" in str(again.end.reason)


@pytest.mark.parametrize("half", [None, b"", b"PK\x03\x04"])
def test_a_checkpoint_that_other_processes_still_write_is_kept_once_it_is_whole(
    tmp_path: Path, half: bytes | None
) -> None:
    (tmp_path / "slow.py").write_text(
        "import json, os, time\n"
        "from pathlib import Path\n"
        "def say(**line):\n"
        "    with open(os.environ['TUNER_METRICS'], 'a') as file:\n"
        "        file.write(json.dumps(line) + '\\n')\n"
        "place = Path(os.environ['TUNER_OUTPUT_DIR']) / 'checkpoint-24'\n"
        "place.mkdir(parents=True)\n"
        "say(step=24, eval_loss=1.0)\n"
        "(place / 'trainer_state.json').write_text(json.dumps({'global_step': 24}))\n"
        "(place / 'rng_state_0.pth').write_text('0')\n"
        f"if {half!r} is not None:\n"
        f"    (place / 'rng_state_1.pth').write_bytes({half!r})\n"
        "say(step=24, checkpoint=str(place), processes=2)\n"
        "time.sleep(0.6)\n"
        "import zipfile\n"
        "with zipfile.ZipFile(place / 'rng_state_1.pth', 'w') as file:\n"
        "    file.writestr('data', '1')\n"
        "time.sleep(0.4)\n"
    )
    content = trainer(hyperparameters={"learning_rate": 0.1, "decay_steps": 8})
    content["command"] = {"run": [PYTHON, "slow.py", "${args}"], "tool": "transformers"}
    ran = Ran(tmp_path, content)
    assert ran.end.outcome == "complete"
    assert zipfile.is_zipfile(ran.directory / "best" / "rng_state_1.pth")


def test_a_disk_that_fails_is_the_machines_fault(tmp_path: Path) -> None:
    content = document()
    spec = spec_of(tmp_path, content)
    trial = tmp_path / "runs" / spec.round / "trial-0000"
    trial.mkdir(parents=True)
    (trial / "best-steps").write_text("a file where a folder belongs")
    ran = Ran(tmp_path, content)
    assert ran.end.outcome == "failed"
    assert "best-steps" in str(ran.end.reason)
    assert not list(process_tree.with_token(ran.tokens[0]))


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_checkpoint_that_the_command_deletes_while_it_is_read_costs_no_attempt(
    tmp_path: Path, monkeypatch, at: int
) -> None:
    (tmp_path / "rotates.py").write_text(
        "import json, os\n"
        "from pathlib import Path\n"
        "place = Path(os.environ['TUNER_OUTPUT_DIR'], 'kept', 'shards')\n"
        "place.mkdir(parents=True)\n"
        "(place / 'weights').write_text('1')\n"
        "with open(os.environ['TUNER_METRICS'], 'a') as file:\n"
        "    line = {'step': 24, 'eval_loss': 1.0, 'checkpoint': str(place.parent)}\n"
        "    file.write(json.dumps(line) + '\\n')\n"
    )
    listed, times = os.scandir, 0

    def deletes(place: str | Path | int = ".") -> object:
        nonlocal times
        if not isinstance(place, int) and Path(place).parts[-2:] == ("kept", "shards"):
            times += 1
            if times == at:
                shutil.rmtree(place)
        return listed(place)

    monkeypatch.setattr(os, "scandir", deletes)
    assert Ran(tmp_path, without_resume(document("rotates.py"))).end.outcome == "complete"
    assert times >= at


def test_a_checkpoint_that_does_not_fit_is_the_machines_fault(
    tmp_path: Path,
    small_disk: MountTmpfs,
) -> None:
    disk = small_disk(8)
    (disk / "large.py").write_text(
        "import json, os\n"
        "from pathlib import Path\n"
        "place = Path(os.environ['TUNER_OUTPUT_DIR']) / 'large'\n"
        "place.mkdir()\n"
        "(place / 'weights').write_bytes(bytes(6 * 2**20))\n"
        "with open(os.environ['TUNER_METRICS'], 'a') as file:\n"
        "    file.write(json.dumps({'step': 24, 'eval_loss': 1.0, 'checkpoint': str(place)}) + '\\n')\n"
    )
    ran = Ran(disk, without_resume(document("large.py")))
    assert ran.end.outcome == "failed"
    assert "No space left on device" in str(ran.end.reason)


def test_a_disk_that_fails_before_the_command_starts_is_the_machines_fault(tmp_path: Path) -> None:
    content = document()
    trial = tmp_path / "runs" / spec_of(tmp_path, content).round / "trial-0000"
    trial.parent.mkdir(parents=True)
    trial.write_text("a file where a folder belongs")
    ran = Ran(tmp_path, content)
    assert ran.end.outcome == "failed"
    assert "trial-0000" in str(ran.end.reason)


@pytest.mark.parametrize("text", ["", "17", "17-1", "17-1-abc", "\0" * 30])
def test_a_token_that_a_full_disk_cut_short_is_none(tmp_path: Path, text: str) -> None:
    whole = process_tree.new_token()
    for number, token in enumerate((whole, text), start=1):
        place = tmp_path / "trial-0000" / f"attempt-{number}" / "token"
        place.parent.mkdir(parents=True)
        place.write_text(token)
    assert tokens_of(tmp_path) == [whole]
    assert process_tree.end_orphans(tokens_of(tmp_path)) == 0


def test_a_worker_that_lives_is_no_orphan_whatever_the_clock_does(monkeypatch) -> None:
    token = process_tree.new_token()
    monkeypatch.setattr("psutil._pslinux.boot_time", lambda: 1e9)  # moves with the system's clock
    assert process_tree.is_token(token)
    assert not process_tree.is_orphaned(token)
    pid, started, name = token.split("-")
    assert process_tree.is_orphaned(f"{pid}-{int(started) + 1}-{name}")  # its number is used again
    with subprocess.Popen(["true"]) as ended:
        ended.wait()
    assert process_tree.is_orphaned(f"{ended.pid}-{started}-{name}")


def test_processes_that_sigkill_does_not_end_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as those of a GPU that has fallen off the bus: the round would wait for them without a word."""
    monkeypatch.setattr(process_tree, "_ENDS_WITHIN_SECONDS", 0.2)
    monkeypatch.setattr(process_tree, "_is_alive", lambda *_: True)
    with pytest.raises(WorkerError, match=r"have not ended .*state D in `ps`"):
        process_tree.end(process_tree.new_token(), grace_seconds=0.0)


def test_where_the_system_does_not_tell_when_processes_started_a_living_worker_is_no_orphan(
    monkeypatch,
) -> None:
    monkeypatch.setattr(process_tree, "start_ticks", lambda pid: None)
    token = process_tree.new_token()
    assert process_tree.is_token(token)
    assert not process_tree.is_orphaned(token)
    with subprocess.Popen(["true"]) as ended:
        ended.wait()
    assert process_tree.is_orphaned(f"{ended.pid}-0-{token.rpartition('-')[2]}")


def test_a_token_file_of_any_bytes_is_none(tmp_path: Path) -> None:
    place = tmp_path / "trial-0000" / "attempt-1" / "token"
    place.parent.mkdir(parents=True)
    place.write_bytes(b"17-\xff\xfe")
    assert tokens_of(tmp_path) == []


def test_a_worker_on_a_node_is_known_by_the_token_in_its_commands(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv(WORKER_TOKEN, "round.old.1")
    (tmp_path / "show.py").write_text(
        "import os\nfrom pathlib import Path\n"
        f"Path('seen').write_text(os.environ.get({WORKER_TOKEN!r}, ''))\n"
        "import json\n"
        "with open(os.environ['TUNER_METRICS'], 'a') as file:\n"
        "    file.write(json.dumps({'step': 24, 'eval_loss': 1.0}) + '\\n')\n"
    )
    Ran(tmp_path, without_resume(document(script="show.py")))
    assert (tmp_path / "seen").read_text() == "round.old.1"


def test_a_trainer_without_evaluation_rows_says_so(tmp_path: Path) -> None:
    content = trainer()
    content["command"]["run"].append("--no_rows")
    with pytest.raises(Unusable, match="before it reported an evaluation") as caught:
        Ran(tmp_path, content)
    assert "eval" in str(caught.value).partition("its log ends with")[2]


def test_an_objective_that_is_not_reported_names_what_is(tmp_path: Path) -> None:
    content = document(objective={"metric": "f1", "direction": "maximize"})
    with pytest.raises(Unusable, match=r"accuracy, eval_loss, but not objective\.metric f1"):
        Ran(tmp_path, content)


def test_the_environment_is_clean_and_documented(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep)
    monkeypatch.setenv("TUNER_RESUME_FROM", "/elsewhere")
    monkeypatch.setenv("RANK", "3")
    (tmp_path / "show.py").write_text(
        "import json, os, tuner\n"
        "from pathlib import Path\n"
        "Path('seen.json').write_text(json.dumps(dict(os.environ)))\n"
        "tuner.log(0, eval_loss=2.0)\n"
        "tuner.log(int(os.environ['TUNER_MAX_STEPS']), eval_loss=1.0)\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep + str(Path(__file__).parents[2]))
    content = without_resume(document(script="show.py"))
    ran = Ran(tmp_path, content)
    assert ran.curve == {0: 2.0, 24: 1.0}
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert "" not in seen["PYTHONPATH"].split(os.pathsep)
    assert "RANK" not in seen
    assert "TUNER_RESUME_FROM" not in seen
    assert seen["TUNER_STABLE_STEP"] == "16"
    assert json.loads(Path(seen["TUNER_HYPERPARAMETERS"]).read_text())["learning_rate"] == 0.05
    for name in ("TRIAL_DIR", "OUTPUT_DIR", "METRICS"):
        assert seen[f"TUNER_{name}"].startswith(str(tmp_path))
    assert (seen["TUNER_EVALUATE_EVERY"], seen["TUNER_SEED"]) == ("4", "0")


@pytest.mark.parametrize(
    ("key", "word", "said"),
    [
        ("run", "${learning_rate}", "${learning_rate} is unknown; expects one of ${args},"),
        ("run", "${resume_from}", "${resume_from} is unknown"),
        ("resume", "--from=${resumed}", "${resumed} is unknown; expects one of"),
        ("resume", "${output_dir}", None),
    ],
)
def test_a_placeholder_that_nothing_fills_is_refused_before_a_trial_starts(
    tmp_path: Path, key: str, word: str, said: str | None
) -> None:
    content = document()
    content["command"] = {**content["command"], key: [*content["command"][key], word]}
    found = [f"{name}: {message}" for name, message in mistakes(spec_of(tmp_path, content), tmp_path)]
    assert len(found) == (said is not None)
    assert all(f"command.{key}: {said}" in message for message in found)


OUT_OF_MEMORY = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB"


@pytest.mark.parametrize(
    ("log", "came_to"),
    [
        (f"{OUT_OF_MEMORY}\n[rank1]: torch.distributed.DistBackendError: NCCL error in: x.cpp", "infeasible"),
        (f"wandb: Connection reset by peer, retrying\n{OUT_OF_MEMORY}", "infeasible"),
        (f"OSError: [Errno 28] No space left on device\n{OUT_OF_MEMORY}", "failed"),
        ("[rank1]: torch.distributed.DistBackendError: NCCL error in: x.cpp", "failed"),
        ("Connection reset by peer", "failed"),
    ],
)
def test_what_a_log_with_several_signs_comes_to(log: str, came_to: str) -> None:
    """Where one process runs out of memory, the others lose their connection to it."""
    ending = Ending(1, 4, ("eval_loss",), log, reported_before=True)
    assert judged(ending, max_train_steps=24, metric="eval_loss").outcome == came_to


TORCHRUNS = """x.ChildFailedError:
Failures:
[1]:
  rank      : 0 (local_rank: 0)
  traceback : Signal 15 (SIGTERM) received by PID 27169
Root Cause (first observed failure):
[0]:
  rank      : 1 (local_rank: 1)
  traceback : Signal {} received by PID 27170
"""
ACCELERATES = "subprocess.CalledProcessError: Command '['python']' died with <Signals.{}>."


@pytest.mark.parametrize("reported", [False, True])
@pytest.mark.parametrize(
    ("log", "for_memory", "came_to", "said"),
    [
        (TORCHRUNS.format("9 (SIGKILL)"), False, "failed", "signal 9"),
        (TORCHRUNS.format("9 (SIGKILL)"), True, "infeasible", "out of memory"),
        (TORCHRUNS.format("6 (SIGABRT)"), True, "failed", "signal 6"),
        (ACCELERATES.format("SIGKILL: 9"), False, "failed", "signal 9"),
        (ACCELERATES.format("SIGKILL: 9"), True, "infeasible", "out of memory"),
    ],
)
def test_a_signal_below_a_launcher_is_no_mistake_of_the_command(
    log: str, for_memory: bool, came_to: str, said: str, reported: bool
) -> None:
    """Launchers end with exit code 1 then, as they do for a script that cannot work."""
    ending = Ending(1, None, (), log, reported_before=reported, killed_for_memory=for_memory)
    verdict = judged(ending, max_train_steps=24, metric="eval_loss")
    assert (verdict.outcome, said in verdict.reason) == (came_to, True)


CAUSE = "Traceback (most recent call last):\n  File 'dpo.py', line 9\nKeyError: 'chosen'"
LAUNCHER = "Traceback (most recent call last):\n" + "  File 'launch.py', line 1\n" * 20


@pytest.mark.parametrize(
    ("log", "ends_with"),
    [
        (f"{CAUSE}\n{LAUNCHER}subprocess.CalledProcessError: Command 'x' returned 1.", "KeyError: 'chosen'"),
        (f"{CAUSE}\n{LAUNCHER}x.ChildFailedError:\n=====\ndpo.py FAILED\n=====", "KeyError: 'chosen'"),
        (f"loading\n{LAUNCHER}subprocess.CalledProcessError: Command 'git'", "Command 'git'"),
        (f"{LAUNCHER}OSError: first\n{CAUSE}", "KeyError: 'chosen'"),
    ],
)
def test_a_launchers_traceback_does_not_hide_that_of_its_script(log: str, ends_with: str) -> None:
    verdict = judged(Ending(1, None, (), log, reported_before=False), max_train_steps=24, metric="eval_loss")
    assert verdict.reason.rstrip().endswith(ends_with)


@pytest.mark.parametrize("name", ["dataset_name", "model_name_or_path", "train_file"])
def test_what_lies_beside_the_configuration_alone_is_refused(tmp_path: Path, name: str) -> None:
    """The command runs in the round file's folder, and would take a data set of the cache of that name."""
    (tmp_path / "config" / "rows").mkdir(parents=True)
    path = tmp_path / "config" / "tool.json"
    content = trainer()
    content["command"] = {"run": ["python", "${config}"], "tool": "trl", "config": str(path)}

    def found(**values: Any) -> list[str]:
        path.write_text(json.dumps(values))
        said = (f"{name}: {message}" for name, message in mistakes(spec_of(tmp_path, content), tmp_path))
        return [each for each in said if "beside" in each]

    assert f"command.config: {name}: rows lies beside the configuration" in found(**{name: "rows"})[0]
    assert found(**{name: "trl-lib/rows"}) == found(**{name: str(path.parent / "rows")}) == []
    assert found(output_dir="rows", report_to="rows") == [], "neither is read"
    assert found(datasets=[{"path": "rows"}])[0].startswith("command.config: path: rows")
    (tmp_path / "rows").mkdir()
    assert found(**{name: "rows"}) == []


def without_resume(content: dict) -> dict:
    return content | {"command": {"run": content["command"]["run"]}}
