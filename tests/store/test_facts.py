from __future__ import annotations

import pytest

from tuner.records import (
    Attempt,
    TrialEnded,
    TrialState,
)
from tuner.records.state import state_of

OPEN, OVER = Attempt(1, 0, 5, 0.0), Attempt(2, 5, 9, 1.0, ended_at=2.0)


@pytest.mark.parametrize("state", [TrialState.WAITING, TrialState.RUNNING])
def test_a_trial_ends_in_a_final_state(state: TrialState) -> None:
    with pytest.raises(ValueError, match=f"final state; got {state}"):
        TrialEnded("round1", 0, state, None, 0.0)


def test_the_latest_attempt_says_whether_a_trial_runs() -> None:
    assert state_of(None, []) is TrialState.WAITING
    assert state_of(None, [OPEN]) is TrialState.RUNNING
    assert state_of(None, [OVER, OPEN]) is TrialState.WAITING
    assert state_of(TrialState.PRUNED, [OPEN]) is TrialState.PRUNED
