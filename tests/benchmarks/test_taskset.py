"""The replays charge every step and play fair, and the script writes what they say; on a tiny table."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
FULL = 50
"""Evaluation intervals of a full-length run."""
BRACKET_INTERVALS = 27 * 2 + 9 * 4 + 3 * 12 + 1 * 32
"""Of a bracket of successive halving whose trials go on where they stopped."""


@pytest.fixture(scope="module", autouse=True)
def _importable() -> Iterator[None]:
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tables")
    write_table(directory / "one.npz", seed=1)
    write_table(directory / "two.npz", seed=2)
    return directory


def write_table(path: Path, *, seed: int, num: int = 120, evaluations: int = FULL) -> None:
    """Curves that fall to a floor made of the learning rate and l2; the highest rates diverge."""
    random = np.random.default_rng(seed)
    rate = 10 ** random.uniform(-5, 0, num)
    beta = 1 - 10 ** random.uniform(-3, 0, num)
    l2 = 10 ** random.uniform(-8, 0, num)
    floor = 0.3 + 0.1 * (np.log10(rate) + 2.5) ** 2 + 0.02 * (np.log10(l2) + 5) ** 2
    steps = np.arange(evaluations + 1)
    losses = floor[:, None] + (3.0 - floor[:, None]) * np.exp(-steps / 8)[None]
    losses[rate > 0.5, 3:] = np.nan
    np.savez(
        path,
        hyperparameters=np.stack([rate, beta, l2], axis=1),
        names=np.array(["learning_rate", "beta1", "l2"]),
        valid_loss=losses.astype(np.float32),
        train_loss=losses.astype(np.float32),
    )


def ledger_of(directory: Path, *, seed: int = 0, budget: int = 600, name: str = "one") -> Any:
    from replay.task import Ledger, read_task

    return Ledger(read_task(directory / f"{name}.npz"), seed, budget=budget)


def play(method: Callable[[Any], None], ledger: Any) -> Any:
    from replay.task import ReplayOver

    with pytest.raises(ReplayOver):
        method(ledger)
    return ledger


def endless(ledger: Any) -> Any:
    """A ledger whose target is out of reach, so that a method goes on until its budget is spent."""
    ledger.task.__dict__["best"] = 0.0
    return ledger


# --- the ledger -----------------------------------------------------------------------------------


def test_a_table_is_read_with_its_space(directory: Path) -> None:
    task = ledger_of(directory).task
    assert list(task.space) == ["learning_rate", "one_minus_beta1", "l2"]
    assert (task.full, task.steps[:3]) == (FULL, (0, 200, 400))
    assert task.unit.min() == 0.0
    assert task.unit.max() == pytest.approx(1.0)
    assert task.best == pytest.approx(float(np.nanmin(task.curves)))
    assert np.allclose(task.to_unit(task.point(7)), task.unit[7])


def test_proposals_are_snapped_to_the_nearest_that_is_left(directory: Path) -> None:
    from replay.task import ReplayOver

    ledger = ledger_of(directory)
    unit = np.array([0.5, 0.5, 0.5])
    order = np.argsort(((ledger.task.unit - unit) ** 2).sum(axis=1))
    taken = [ledger.snap_unit(unit) for _ in range(len(order))]
    assert taken == order.tolist()
    with pytest.raises(ReplayOver):
        ledger.snap_unit(unit)


def test_every_step_is_charged_and_a_diverged_run_stops(directory: Path) -> None:
    ledger = ledger_of(directory)
    rows = np.argsort(-np.nan_to_num(ledger.task.curves[:, -1], nan=-1))
    ledger.run(int(rows[0]), 0, 2)
    ledger.run(int(rows[0]), 2, 6)
    ledger.run(int(rows[0]), 0, 6)
    assert ledger.spent == 12
    diverged = int(np.flatnonzero(np.isnan(ledger.task.curves[:, -1]))[0])
    assert ledger.run(diverged, 0, FULL) == float("inf")
    assert ledger.spent == 12 + 3
    assert ledger.best == pytest.approx(float(ledger.task.curves[rows[0], 6]))


def test_a_replay_ends_near_the_best_or_at_its_budget(directory: Path) -> None:
    from replay.task import ReplayOver

    ledger = ledger_of(directory)
    best = int(np.nanargmin(ledger.task.curves.min(axis=1)))
    with pytest.raises(ReplayOver):
        ledger.run(best, 0, FULL)
    reached = ledger.cost(0.01)
    assert ledger.cost(0.05) <= reached <= 1.0
    poor = ledger_of(directory, budget=1)
    with pytest.raises(ReplayOver):
        poor.run(int(np.nanargmax(poor.task.curves[:, -1])), 0, FULL)
    assert (poor.spent, poor.cost(0.01)) == (FULL, 1.0)


# --- the methods ----------------------------------------------------------------------------------


def methods() -> dict[str, Callable[[Any], None]]:
    sys.path.insert(0, str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("taskset", BENCHMARKS / "taskset.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["taskset"] = module
    spec.loader.exec_module(module)
    return dict(module.METHODS)


METHODS = methods()


@pytest.mark.parametrize("name", METHODS)
def test_every_method_finds_the_best_and_repeats_itself(directory: Path, name: str) -> None:
    if name in ("asha", "bohb"):
        pytest.importorskip("syne_tune", reason="syne-tune is not installed: pip install '.[bench]'")
    first = play(METHODS[name], ledger_of(directory, seed=3))
    assert first.best <= first.task.best * 1.01 or not first._free.any()
    assert 0 < first.cost(0.05) <= first.cost(0.01) <= len(first.task.values)
    if name != "bohb":  # slow, and its model is of no further interest here
        assert play(METHODS[name], ledger_of(directory, seed=3)).trace == first.trace
        assert play(METHODS[name], ledger_of(directory, seed=4)).trace != first.trace


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("asha", "bohb")])
def test_curves_of_few_evaluations_are_replayed_too(tmp_path: Path, name: str) -> None:
    write_table(tmp_path / "short.npz", seed=1, evaluations=4)
    replay = play(METHODS[name], ledger_of(tmp_path, name="short", budget=40))
    assert replay.spent >= 40 * 4 or replay.best <= replay.task.best * 1.01 or not replay._free.any()


@pytest.mark.parametrize("name", ["halving", "tuner"])
def test_what_goes_on_is_charged_for_the_rest_alone(directory: Path, name: str) -> None:
    """Both run 27, 9, 3 and 1 trials to 4%, 12%, 36% and all of a run, and no step of them twice."""
    ledger = ledger_of(directory)
    object.__setattr__(ledger.task, "curves", np.nan_to_num(ledger.task.curves, nan=9.0) + 1000.0)
    object.__setattr__(ledger.task, "train_curves", ledger.task.curves)
    ledger.see = lambda loss: None
    taken = []
    snap = ledger.snap_unit

    def counting(unit: np.ndarray) -> int:
        taken.append(ledger.spent)
        return int(snap(unit))

    ledger.snap_unit = counting
    play(METHODS[name], ledger)
    assert taken[27] == BRACKET_INTERVALS


def test_restarts_are_charged(directory: Path) -> None:
    ledger = ledger_of(directory)
    object.__setattr__(ledger.task, "curves", np.nan_to_num(ledger.task.curves, nan=9.0))
    ledger.see = lambda loss: None
    taken = []
    snap = ledger.snap_unit
    ledger.snap_unit = lambda unit: taken.append(ledger.spent) or snap(unit)
    play(METHODS["two-rounds-from-scratch"], ledger)
    assert taken[27] == 27 * 6 + 3 * FULL


# --- the script -----------------------------------------------------------------------------------


def run_script(*arguments: str | Path, directory: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(BENCHMARKS / "taskset.py"), *map(str, arguments)],
        cwd=directory,
        text=True,
        capture_output=True,
        timeout=200,
        check=False,
    )


def test_the_script_writes_page_and_plot_and_goes_on_with_what_is_there(
    directory: Path, tmp_path: Path
) -> None:
    arguments = (
        "--methods",
        "tuner,halving,random",
        "--jobs",
        "1",
        "--raw",
        "raw.jsonl",
        "--out",
        "out/page.md",
    )
    done = run_script(directory, "--seeds", "2", *arguments, directory=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "raw.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    assert {(r["task"], r["method"], r["seed"]) for r in found} == {
        (task, method, seed)
        for task in ("one", "two")
        for method in ("tuner", "halving", "random")
        for seed in (0, 1)
    }
    page = (tmp_path / "out" / "page.md").read_text()
    assert page.strip() == done.stdout.strip()
    assert "| halving | 2 |" in page
    assert "within 1%" in page
    assert (tmp_path / "out" / "page.svg").read_text().count("<polyline") == 3

    again = run_script(directory, "--seeds", "2", *arguments, directory=tmp_path)
    assert (tmp_path / "raw.jsonl").read_text().splitlines() == lines
    assert again.stdout.split("## The methods")[0] == done.stdout.split("## The methods")[0]
    summary = run_script(directory, "--summarise", *arguments, directory=tmp_path)
    assert summary.stdout.split("## The methods")[0] == done.stdout.split("## The methods")[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(("nothing",), "no .npz file"), (("broken",), "bad.npz"), (("tables", "--methods", "magic"), "magic")],
)
def test_what_cannot_be_replayed_is_said(tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    for name in ("nothing", "broken", "tables"):
        (tmp_path / name).mkdir()
    np.savez(tmp_path / "broken" / "bad.npz", names=np.array(["a"]))
    done = run_script(*arguments, directory=tmp_path)
    assert done.returncode == 2
    assert words in done.stderr


def test_costs_and_regret_are_read_off_the_trace(directory: Path) -> None:
    from replay.summary import Replay, costs, interval, typical

    task = ledger_of(directory).task
    near, far = task.best * 1.005, task.best * 1.04
    replays = [
        Replay("one", "m", 0, 600, [(10, task.start), (100, far), (250, near)]),
        Replay("one", "m", 1, 600, [(10, task.start)]),
    ]
    assert costs(replays, [task], "m", 0.01).tolist() == [[5.0, 600.0]]
    assert costs(replays, [task], "m", 0.05).tolist() == [[2.0, 600.0]]
    assert replays[0].regret(task, 0.1) == 1.0
    assert replays[0].regret(task, 3) == pytest.approx((far - task.best) / (task.start - task.best))
    table = np.array([[1.0, 4.0, 2.0], [9.0, 16.0, 8.0]])
    assert typical(table) == pytest.approx((2.0 * 9.0) ** 0.5)
    low, high = interval([table], typical)
    assert low <= typical(table) <= high
