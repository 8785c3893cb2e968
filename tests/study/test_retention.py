"""What a round gives up: never the best nor what a longer round needs, and all of it after a crash."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.studies import write_round
from tests.study.simulation import Crash, simulate, trials
from tuner.cli import run
from tuner.playbook.promotion import incumbents
from tuner.records import (
    Checkpoint,
    CheckpointKind,
    Evaluation,
    Promotion,
    RoundKind,
    RoundRecord,
    Trial,
    TrialState,
)
from tuner.study.disk import not_retained, num_carried_over, num_kept, promised_trials, unneeded
from tuner.study.plan import CheckpointFolder

KINDS = (CheckpointKind.BEST, CheckpointKind.LAST, CheckpointKind.TRUNK)
SHORT: dict[str, Any] = {
    "trials": 5,
    "steps": 4,
    "every": 4,
    "decay_steps": 1,
    "learning_rate": "[1e-4, 1e-3, 2e-3]",
}
LIMITED = SHORT | {"storage": "sqlite:///tuner.db\ncheckpoints: {keep_best_trials: 1}"}


def ended(number: int, loss: float, state: TrialState = TrialState.COMPLETE) -> Trial:
    return Trial(
        "round1",
        number,
        {"learning_rate": 1e-3 * (1 + number)},
        state=state,
        evaluations=(Evaluation(8, loss, loss, 1e-3),),
        checkpoints=tuple(Checkpoint(kind, 8, f"{number}/{kind}", 10, "0") for kind in KINDS),
    )


def test_the_latest_attempts_adapter_is_kept_though_one_before_had_come_further(tmp_path: Path) -> None:
    """It resumed before that step, and runs it anew: its own adapter is what it can still come back to."""
    further = Checkpoint(CheckpointKind.BEST, 8, "trial-0000/best-steps/step-000008.a1", 10, "0")
    resumed = Checkpoint(CheckpointKind.BEST, 3, "trial-0000/best-steps/step-000003.a2", 10, "1")
    again = Checkpoint(CheckpointKind.BEST, 9, "trial-0000/best-steps/step-000009.a10", 10, "2")
    for found, best, surplus in (
        ((resumed, further), resumed, [further]),
        ((resumed, further, again), again, [resumed, further]),
    ):
        trial = Trial("round1", 0, {"learning_rate": 1e-3}, checkpoints=found)
        assert trial.checkpoint(CheckpointKind.BEST) == best
        assert CheckpointFolder(tmp_path).surplus(trial, keep_best=1) == surplus


def given_up(found: list[Trial], limit: int | None, *promised: int) -> dict[int, str]:
    """The first letters of what each trial loses."""
    every = not_retained(found, keep_best_trials=limit, promised=promised)
    return {u.trial.number: "".join(c.kind[0] for c in u.checkpoints) for u in every}


FIVE = [ended(number, loss) for number, loss in enumerate([3.0, 1.0, 5.0, 2.0, 4.0])]


def test_only_the_best_keep_their_adapters_and_the_carried_what_they_go_on_from() -> None:
    assert given_up(FIVE, None) == {}
    assert given_up(FIVE, 5) == {}
    assert given_up(FIVE, 4) == {2: "blt"}
    assert given_up(FIVE, 1) == {0: "b", 2: "blt", 3: "b", 4: "blt"}
    assert given_up(FIVE, 1, 2) == {0: "b", 2: "b", 3: "b", 4: "blt"}


@pytest.mark.parametrize("state", [TrialState.INFEASIBLE, TrialState.FAILED, TrialState.PRUNED])
def test_what_has_no_rank_keeps_nothing_and_what_still_runs_everything(state: TrialState) -> None:
    assert given_up([ended(0, 9.0), ended(1, 1.0, state)], 2) == {1: "blt"}
    assert given_up([ended(0, 9.0), ended(1, 1.0, TrialState.RUNNING)], 1) == {}


def test_nothing_is_given_up_that_the_whole_round_would_keep() -> None:
    for length in range(1, len(FIVE) + 1):
        early, late = given_up(FIVE[:length], 2), given_up(FIVE, 2)
        assert all(set(kinds) <= set(late[number]) for number, kinds in early.items())


def test_what_promote_carries_can_be_gone_on_from() -> None:
    lost = given_up(FIVE, 1)
    assert [trial.number for trial in incumbents(FIVE, 3)] == [1, 3, 0]
    assert all("t" not in lost.get(trial.number, "") for trial in incumbents(FIVE, 3))


def test_trials_that_plans_name() -> None:
    plan = {"continues": [{"trial": "round1/4", "from_step": 5}, {"trial": "round0/2", "from_step": 5}]}
    assert promised_trials([Promotion("round1", "round2", plan, "", 0.0)], "round1") == {4}


def test_what_any_pass_may_take_up_is_kept() -> None:
    def carried(passes: int, *planned: int) -> int:
        plans = [Promotion("round1", "round2", {"passes": number}, "", 0.0) for number in planned]
        old = Promotion("round1", "round2", {}, "", 0.0)
        return num_carried_over(12, passes=passes, promotions=[old, *plans])

    assert [carried(1), carried(2), carried(3)] == [3, 8, 12]
    assert carried(1, 2) == carried(2, 1) == 8
    every = not_retained(FIVE, keep_best_trials=1, carried=4)
    assert [u.trial.number for u in every if len(u.checkpoints) == len(KINDS)] == [2]


def test_how_many_trials_need_room() -> None:
    assert [num_kept(100, None), num_kept(100, 10), num_kept(100, 1), num_kept(2, 10)] == [100, 10, 3, 2]


def cleaned(name: str = "round1", *, later: tuple[str, ...] = (), **more: Any) -> dict[int, tuple[str, str]]:
    kinds = {n: RoundKind.SWEEP if n.startswith("sweep") else RoundKind.SEARCH for n in (name, *later)}
    record, *after = [RoundRecord(n, 8, {}, begun_at=0.0, kind=kind) for n, kind in kinds.items()]
    options = {"promotions": (), "keep_best_trials": None, "is_dry_run": False} | more
    running = ended(9, 1.0, TrialState.RUNNING)
    found = unneeded(record, [*FIVE[:2], running], later=after, **options)
    return {u.trial.number: ("".join(c.kind[0] for c in u.checkpoints), u.reason) for u in found}


def test_clean_frees_by_what_came_after() -> None:
    assert cleaned() == {0: ("l", "ended"), 1: ("l", "ended")}
    assert cleaned(keep_best_trials=1) == {0: ("bl", "not among the best 1"), 1: ("l", "ended")}
    assert cleaned("sweep-8", later=("sweep-16",)) == cleaned()
    answered = cleaned("sweep-8", later=("sweep-16", "round1"))
    assert answered == dict.fromkeys((0, 1), ("blt", "a sweep whose result is in use"))
    assert {kinds for kinds, _ in cleaned(is_dry_run=True).values()} == {"blt"}


def kept(directory: Path) -> tuple[set[int], set[int]]:
    """Numbers of the trials that have an adapter, and a resumable checkpoint, on disk."""
    runs = directory / "runs" / "round1"
    links = {int(link.parent.name[-4:]) for link in runs.glob("trial-*/best")}
    adapters = {int(path.parent.parent.name[-4:]) for path in runs.glob("trial-*/best-steps/*")}
    assert links == adapters
    return adapters, {int(path.parent.parent.name[-4:]) for path in runs.glob("trial-*/trunk/*")}


def expected(directory: Path) -> tuple[set[int], set[int]]:
    best = [trial.number for trial in incumbents(trials(directory, **LIMITED), 3)]
    return set(best[:1]), set(best)


def test_a_round_keeps_its_best_trials_files_whatever_crashes(tmp_path: Path) -> None:
    passed = simulate(tmp_path / "whole", **LIMITED).passed
    removals = [at for at, seam in enumerate(passed, start=1) if seam == "after record CheckpointsRemoved"]
    with pytest.raises(Crash):
        simulate(tmp_path / "died", fuse=removals[-1], **LIMITED)
    simulate(tmp_path / "died", **LIMITED)
    for directory in (tmp_path / "whole", tmp_path / "died"):
        assert kept(directory) == expected(directory)
        runs = directory / "runs" / "round1"
        on_disk = {str(file.parent.relative_to(runs)) for file in runs.rglob("simulated.json")}
        assert on_disk == {c.path for trial in trials(directory, **LIMITED) for c in trial.checkpoints}


def test_clean_takes_a_limit_that_came_later_and_frees_a_dry_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    simulate(tmp_path, **SHORT)
    simulate(tmp_path / "dry-run", **SHORT)
    (tmp_path / "dry-run" / "round1.yaml").open("a").write("run: {engine: simulated}\n")
    assert len(kept(tmp_path)[0]) == SHORT["trials"]
    write_round(tmp_path, **LIMITED)
    for arguments, said in (([], "can be freed"), (["--yes"], "freed:")):
        assert run(["study", "clean", *arguments]) == 0
        shown = capsys.readouterr().out
        assert "(not among the best 1)" in shown
        assert "its stable checkpoints are kept" in shown
        assert "dry-run/round1/0: " in shown
        assert said in shown
    assert kept(tmp_path) == expected(tmp_path)
    assert not list((tmp_path / "dry-run").rglob("simulated.json"))
