"""Seeded faults over real rounds: nothing is lost, nothing counted twice, nothing left.

Nine run here; tests/cli has a full disk, a second Ctrl-C and a damaged adapter. `make acceptance-faults`
runs 200: each fault in each setting that it applies to, with other dice each time.
"""

from __future__ import annotations

import random
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.engines.clusters import local_cluster
from tests.faults.faults import SCHEDULE, disturb, mounted
from tests.faults.harness import COMMAND, LOCAL, Case, Setting, on_a_server, on_ray, undisturbed
from tests.faults.warm import WarmRuns

Expected = tuple[list[str], Counter[str]]
NINE = (
    "local-kill-parent",
    "local-parent-commit",
    "local-worker-rename",
    "local-start-together",
    "local-delete-optuna",
    "local-flip-last",
    "local-clock",
    "command-kill-worker",
    "postgres-drop-connections",
)
PLACES = {f"{setting}-{fault.name}": (setting, fault) for setting, fault in SCHEDULE}


@pytest.fixture(scope="module")
def runs() -> Iterator[WarmRuns]:
    warm = WarmRuns()
    yield warm
    warm.close()


@pytest.fixture(scope="module")
def expected(runs: WarmRuns, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Setting], Expected]:
    """Curves and seams of an undisturbed round; where its facts and workers are makes no difference."""
    known: dict[str, Expected] = {}

    def found(setting: Setting) -> Expected:
        alone = COMMAND if setting is COMMAND else LOCAL
        if alone.name not in known:
            known[alone.name] = undisturbed(runs, alone, tmp_path_factory.mktemp("alone") / alone.name)
        return known[alone.name]

    return found


@pytest.fixture(scope="module")
def cluster() -> Iterator[Setting]:
    with local_cluster(nodes=1) as made:
        yield on_ray(made.address)


@pytest.fixture
def server(request: pytest.FixtureRequest) -> Callable[[str], Setting]:
    """The setting of a name, with what it needs."""

    def found(name: str) -> Setting:
        match name:
            case "postgres":
                return on_a_server(request.getfixturevalue("postgres_url"))
            case "ray":
                setting: Setting = request.getfixturevalue("cluster")
                return setting
            case _:
                return LOCAL if name == "local" else COMMAND

    return found


def after(
    place: str,
    seed: int,
    directory: Path,
    runs: WarmRuns,
    expected: Callable[[Setting], Expected],
    setting_of: Callable[[str], Setting],
) -> tuple[list[str], list[str]]:
    """The curves after a fault and what undisturbed ones are; raises if anything else was left."""
    name, fault = PLACES[place]
    setting = setting_of(name)
    curves, seams = expected(setting)
    if fault.is_small:
        mounted(directory)
    try:
        case = Case(runs, setting, directory, random.Random(seed), seams)
        disturb(case, fault)
        return case.curves, curves
    finally:
        if fault.is_small:
            subprocess.run(["umount", "--lazy", str(directory)], check=True)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("place", NINE)
def test_a_fault(
    place: str,
    tmp_path: Path,
    runs: WarmRuns,
    expected: Callable[[Setting], Expected],
    server: Callable[[str], Setting],
) -> None:
    curves, expected_curves = after(place, 0, tmp_path / place, runs, expected, server)
    assert curves == expected_curves


@pytest.mark.acceptance
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("place", "seed"), [(list(PLACES)[seed % len(PLACES)], seed) for seed in range(1, 201)]
)
def test_one_of_200(
    place: str,
    seed: int,
    tmp_path: Path,
    runs: WarmRuns,
    expected: Callable[[Setting], Expected],
    server: Callable[[str], Setting],
) -> None:
    curves, expected_curves = after(place, seed, tmp_path / place, runs, expected, server)
    assert curves == expected_curves
