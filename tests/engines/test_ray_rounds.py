"""Whole rounds on a Ray cluster, against the same rounds on this machine.

Run with: pytest -m acceptance tests/engines/test_ray_rounds.py
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

import tuner
from tests.engines.clusters import LocalCluster, local_cluster
from tests.studies import QUICKSTART
from tuner.records import Attempt
from tuner.store import open_store

pytestmark = [pytest.mark.acceptance, pytest.mark.xdist_group("ray"), pytest.mark.timeout(600)]
BLIND = "tests.engines.clusters:BlindEngine"


def copied(directory: Path) -> Path:
    """Quickstart's first round, one slot a worker, in a folder of its own."""
    for name in ("base", "data"):
        shutil.copytree(QUICKSTART / name, directory / name)
    text = (QUICKSTART / "round1.yaml").read_text()
    (directory / "round1.yaml").write_text(text)
    return directory


def curves(directory: Path) -> list[Any]:
    """All that a round's trials came to, every digit."""
    trials = tuner.Study(directory).round("round1").trials
    return [
        (
            trial.number,
            str(trial.state),
            dict(trial.hyperparameters),
            trial.best_step,
            [
                (e.step, e.eval_loss, e.train_loss, e.learning_rate, tuple(e.example_nll))
                for e in trial.evaluations
            ],
        )
        for trial in trials
    ]


def attempts(directory: Path) -> list[Attempt]:
    with closing(open_store(f"sqlite:///{directory / 'tuner.db'}", study="quickstart")) as store:
        return [attempt for trial in store.trials("round1") for attempt in trial.attempts]


def in_the_middle(directory: Path) -> set[str]:
    """Nodes on which a trial is under way."""
    if not (directory / "tuner.db").exists():
        return set()
    return {
        attempt.environment["node"]
        for attempt in attempts(directory)
        if attempt.ended_at is None and attempt.to_step >= 10
    }


@pytest.fixture(scope="module")
def locally(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    study = copied(tmp_path_factory.mktemp("local"))
    tuner.Study(study).run("round1.yaml", slots=1, workers=2, progress=False)
    return curves(study)


@pytest.fixture
def cluster() -> Iterator[LocalCluster]:
    with local_cluster() as cluster:
        yield cluster


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.mark.parametrize("engine", ["ray", BLIND])
def test_quickstarts_first_round_is_the_same_on_a_cluster(
    cluster: LocalCluster, locally: list[Any], tmp_path: Path, engine: str
) -> None:
    study = copied(tmp_path)
    tuner.Study(study).run("round1.yaml", slots=1, engine=engine, ray_address=cluster.address, progress=False)
    assert curves(study) == locally
    assert len({attempt.environment["node"] for attempt in attempts(study)}) == 2


def test_and_with_a_node_killed_in_the_middle(
    cluster: LocalCluster, locally: list[Any], tmp_path: Path
) -> None:
    study = copied(tmp_path)
    lost = threading.Event()

    def lose_a_node() -> None:
        while len(in_the_middle(study)) < 2:
            time.sleep(0.1)
        cluster.lose(cluster.nodes[0])
        lost.set()

    threading.Thread(target=lose_a_node, daemon=True).start()
    tuner.Study(study).run("round1.yaml", slots=1, engine=BLIND, ray_address=cluster.address, progress=False)
    assert lost.is_set()
    assert curves(study) == locally
    assert [attempt.outcome for attempt in attempts(study)].count("died") == 1
    (status,) = tuner.Study(study).status()["rounds"]
    (gone,) = {attempt.environment["node"] for attempt in attempts(study) if attempt.outcome == "died"}
    assert [(each["node"], each["change"]) for each in status["node_changes"]] == [(gone, "lost")]


def test_a_probe_and_a_reproduction_run_on_the_cluster(cluster: LocalCluster, tmp_path: Path) -> None:
    study = tuner.Study(copied(tmp_path))
    said = study.check("round1.yaml", probe=True, engine=BLIND, ray_address=cluster.address)
    assert said["ok"], said
    assert said["plan"]["peak_memory_bytes"] > 1e6
    assert any(remark.startswith(f"Ray cluster {cluster.address}") for remark in said["remarks"])
    text = (tmp_path / "round1.yaml").read_text().replace("trials: 8", "trials: 1")
    (tmp_path / "round1.yaml").write_text(text)
    study.run("round1.yaml", slots=1, engine=BLIND, ray_address=cluster.address, progress=False)
    again = study.trial("round1/0").reproduce(engine=BLIND, ray_address=cluster.address, progress=False)
    assert again.agrees
