"""`study run --for` and `--slots`: what they accept, and what they do to a round."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.studies import QUICKSTART, trials_of, tuner, write_round
from tuner.cli import printing
from tuner.cli.rounds import interruptible, parse_count, parse_duration
from tuner.errors import InputError, RoundStopped


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90s", 90),
        ("30m", 1800),
        ("2h", 7200),
        ("1h30m", 5400),
        ("1h 30m", 5400),
        ("0.5h", 1800),
        ("1d", 86400),
    ],
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


def test_what_goes_on_is_named_as_it_has_to_be_typed_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(printing, "acting_in", Path("my study"))
    said = "no disk; then resume with: tuner -C 'my study' study run round1.yaml"
    with (
        pytest.raises(RoundStopped, match=re.escape(said)),
        interruptible("tuner study run round1.yaml", duration=None),
    ):
        raise RoundStopped("no disk")


@pytest.mark.parametrize("text", ["", "2", "soon", "2 hours", "-1h", "h", "1h30", "1h,30m", "0s"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(InputError, match=r"--for .*90s, 30m, 2h or 1h30m"):
        parse_duration(text)


def test_slots() -> None:
    assert parse_count("--slots", "auto") == "auto"
    assert parse_count("--slots", "3") == 3
    for text in ("0", "-1", "1.5", "many", "", "²"):
        with pytest.raises(InputError, match=r"--slots .*auto or a whole number of at least 1"):
            parse_count("--slots", text)


@pytest.mark.slow
def test_a_time_that_is_over_before_the_round_has_begun(tmp_path: Path) -> None:
    write_round(tmp_path)
    done = tuner("study", "run", "round1.yaml", "--for", "0.1s", directory=tmp_path)
    assert done.returncode == 0, done.stderr
    *_, message, following = done.stderr.splitlines()
    assert message.startswith("time limit of 0.1s reached: stopped while loading; nothing was started; ")
    assert following == "next: tuner study run round1.yaml --for 0.1s"
    assert not (tmp_path / "tuner.db").exists()


@pytest.mark.slow
def test_a_round_of_several_slots_is_paused_and_goes_on(tmp_path: Path) -> None:
    """Two trials are begun at once; when the time is over both are saved, and that is no failure.

    A machine that does other work is given more time, in a study of its own, until training has begun.
    """
    for limit in ("6s", "20s", "60s"):
        study = tmp_path / limit
        write_round(study, trials=2, steps=20_000, every=2_000, learning_rate="1e-4")
        done = tuner("study", "run", "round1.yaml", "--for", limit, "--slots", "2", directory=study)
        assert done.returncode == 0, done.stderr
        if "while loading" not in done.stderr and all(t["executed_steps"] for t in trials_of(study)):
            break
    assert "worker ready: cpu, 2 slots" in done.stderr
    said = f"time limit of {limit} reached: stopped; all progress is saved; "
    again = f"tuner study run round1.yaml --for {limit} --slots 2"
    assert f"{said}resume with: {again}\n" in done.stderr
    assert done.stderr.splitlines()[-1] == f"next: {again}"
    trials = trials_of(study)
    assert [(trial["state"], trial["attempts"]) for trial in trials] == [("waiting", 1), ("waiting", 1)]
    assert all(0 < trial["executed_steps"] < 20_000 for trial in trials)
    again = tuner("study", "run", "round1.yaml", "--for", "0.1s", directory=study)
    assert (
        again.returncode,
        "stopped while loading; the 2 started trials did not change" in again.stderr,
    ) == (0, True)
    assert trials_of(study) == trials


@pytest.mark.slow
def test_dora_trains_one_trial_at_a_time(tmp_path: Path) -> None:
    """Beside plain trials of the same round; it is said before and while the round runs.

    So are rows that are left out, and what a model may do that brings code along.
    """
    write_round(
        tmp_path,
        base=f"{QUICKSTART / 'base'}, trust_remote_code: true",
        trials=2,
        learning_rate="3e-3",
        lora_r="2\n  use_dora: [false, true]",
        sampler="grid",
    )
    checked = tuner("study", "check", "round1.yaml", directory=tmp_path)
    assert checked.returncode == 0, checked.stderr
    assert "DoRA trains one trial at a time: a worker has one slot" in checked.stdout
    done = tuner("study", "run", "round1.yaml", "--slots", "2", directory=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "DoRA trains one trial at a time: a worker has one slot" in done.stderr
    code = "model.trust_remote_code: Python code from "
    lost = "11 train rows are left out: nothing in them to learn within max_length"
    assert code in checked.stdout
    assert lost in checked.stdout
    assert lost in done.stderr
    assert f"warning: {code}" in done.stderr
    assert "worker ready: cpu, 1 slot" in done.stderr
    assert "slots: 2: DoRA trains one trial at a time" in (tmp_path / "runs/round1/worker.log").read_text()
    trials = trials_of(tmp_path)
    assert {trial["hyperparameters"]["use_dora"] for trial in trials} == {False, True}
    assert [trial["state"] for trial in trials] == ["complete", "complete"]


@pytest.mark.slow
def test_a_second_worker_changes_nothing(tmp_path: Path) -> None:
    """It has its log, and trials if it is ready in time; each is digit for digit what one worker makes."""
    for name, workers in (("one", "1"), ("two", "2")):
        write_round(tmp_path / name, trials=3, steps=10, every=5)
        done = tuner(
            *("study", "run", "round1.yaml", "--workers", workers, "--slots", "1"), directory=tmp_path / name
        )
        assert done.returncode == 0, done.stderr
        assert 1 <= done.stderr.count("worker ready") <= int(workers)
    logs = sorted(path.name for path in (tmp_path / "two" / "runs" / "round1").glob("worker*.log"))
    assert logs == ["worker-1.log", "worker.log"]
    one, two = (trials_of(tmp_path / name) for name in ("one", "two"))
    for trial in (*one, *two):
        trial.pop("adapter")
    assert one == two


@pytest.mark.slow
def test_workers_that_are_no_number(tmp_path: Path) -> None:
    write_round(tmp_path)
    done = tuner("study", "run", "round1.yaml", "--workers", "none", directory=tmp_path)
    assert done.returncode == 2
    assert "--workers 'none': expects auto or a whole number of at least 1" in done.stderr
