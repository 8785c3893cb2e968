"""Seeded faults over real rounds: nothing is lost, nothing counted twice, nothing left.

A few run here; `make acceptance` runs 200, and `python -m tests.faults.harness FIRST LAST FOLDER` any.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.harness import CHANGES, FAULTS, curves, disturbed, finish, refuse_leftovers, said
from tests.studies import write_round


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    directory = tmp_path_factory.mktemp("undisturbed")
    write_round(directory, **CHANGES)
    finish(directory)
    return curves(directory)


def hold(directory: Path, seed: int, undisturbed: list[str]) -> None:
    disturbed(directory, seed)
    assert curves(directory) == undisturbed, said(directory)
    refuse_leftovers(directory)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_worker_that_hangs_and_an_impatient_user(tmp_path: Path, undisturbed: list[str]) -> None:
    (seed,) = (place for place, fault in enumerate(FAULTS) if fault.__name__ == "interrupt_twice")
    hold(tmp_path, seed, undisturbed)


@pytest.mark.acceptance
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", range(200))
def test_a_seeded_fault(tmp_path: Path, undisturbed: list[str], seed: int) -> None:
    hold(tmp_path, seed, undisturbed)
