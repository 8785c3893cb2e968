"""Which tests of engines have workers that are forks."""

from __future__ import annotations

import pytest

from tests import forked_workers

FORKING = ("test_engines.py", "test_kept_workers.py", "test_workers.py")
"""What they check of a worker begins when it runs; in the other files it is started as users do."""
STARTED = ("test_prepares_and_is_ready_before_anything_else", "test_a_worker_of_another_version_is_ended")
"""But for these."""


def pytest_runtest_setup(item: pytest.Item) -> None:
    """After the hook of all tests, before the fixtures."""
    if item.path.name in FORKING:
        forked_workers.is_on = item.name not in STARTED
