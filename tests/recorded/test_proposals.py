"""What the built-in samplers propose does not change while their code is moved.

`python -m tests.recorded.test_proposals` records the proposals again, after a change that is meant.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest

from tuner.config import SearchSpec
from tuner.playbook.observations import outcomes
from tuner.records import (
    LOSS,
    AnswerScore,
    Choices,
    Direction,
    Evaluation,
    Fixed,
    Objective,
    Range,
    Space,
    Trial,
    TrialState,
    complete_hyperparameters,
    num_points,
)
from tuner.study.sampling import RoundStudy

RECORDED = Path(__file__).parent / "proposals.json"
HORIZON = 30
ANSWERS = Objective("answers", Direction.MAXIMIZE, "trial", is_relative_to_gained=True)
SAMPLERS = ("quasi-random", "random", "grid", "tpe", "gp")

MIXED: Space = {
    "learning_rate": Range(1e-5, 1e-2, log=True),
    "lora_r": Choices((8, 16, 32)),
    "warmup_steps": Range(0, 10, integer=True),
    "lora_dropout": Range(0.0, 0.3),
    "target_modules": Choices(("all-linear", ("q_proj", "v_proj"))),
    "optimizer": Fixed("adamw"),
}
SPACES: dict[str, Space] = {
    "mixed": MIXED,
    "one rate": {"learning_rate": Range(1e-5, 1e-2, log=True)},
    "ranks by their logarithm": {
        "lora_r": Range(1, 24, log=True, integer=True),
        "use_dora": Choices((False, True)),
    },
    "finite": {
        "lora_r": Choices((4, 8, 16)),
        "target_modules": Choices(("all-linear", ("q_proj", "v_proj"))),
        "training_seed": Choices((0, 1)),
        "weight_decay": Fixed(0.1),
    },
    "nothing searched": {"lora_r": Fixed(8)},
}
ENTRIES: dict[str, list[dict[str, Any]]] = {
    "mixed": [
        {"learning_rate": 2e-4, "lora_r": 16, "continues": "round0/1"},
        {"target_modules": ["q_proj", "v_proj"], "warmup_steps": 3},
        {"learning_rate": 1e-3, "lora_r": 8, "warmup_steps": 0, "lora_dropout": 0.1,
         "target_modules": "all-linear"},
    ],
    "one rate": [{"learning_rate": 3e-4}, {}],
    "ranks by their logarithm": [{"lora_r": 8}, {"use_dora": True}],
    "finite": [
        {"lora_r": 4}, {"lora_r": 4, "training_seed": 0, "target_modules": "all-linear"},
        {"training_seed": 1},
    ],
    "nothing searched": [],
}  # fmt: skip


def loss_at(number: int, values: Any) -> float:
    """Better in the middle of a space, and never the same twice."""
    units = [hash_of(f"{name}={value}") for name, value in sorted(values.items())]
    return 1.0 + 0.5 * sum(units) / max(1, len(units)) + 1e-3 * number


def hash_of(text: str) -> float:
    """From 0 to 1, the same in each process."""
    return sum(position * ord(letter) for position, letter in enumerate(text, 1)) % 997 / 997


def ended(round_name: str, number: int, values: Any, *, state: TrialState) -> Trial:
    """A trial with a curve that its state allows."""
    loss = loss_at(number, values)
    curve = [Evaluation(0, 3.0), Evaluation(10, loss + 0.4), Evaluation(20, loss + 0.1), Evaluation(30, loss)]
    num_made = {TrialState.COMPLETE: 4, TrialState.PRUNED: 3}.get(state, 2)
    score = AnswerScore(30, "exact_match", round(2 - loss, 2), 0.01, 50, is_objective=True)
    return Trial(
        round_name,
        number,
        values,
        state,
        evaluations=tuple(curve[:num_made]),
        answer_score=score if state == TrialState.COMPLETE else None,
    )


STATES = (
    "COMPLETE",
    "COMPLETE",
    "INFEASIBLE",
    "COMPLETE",
    "PRUNED",
    "FAILED",
    "COMPLETE",
    "RUNNING",
    "COMPLETE",
)


def earlier_trials(space: Space) -> list[Trial]:
    """Of a round of another seed; some lie outside of the space."""
    names = [name for name in space if name != "weight_decay"]
    wider = {name: replace(d, high=2 * d.high) if isinstance(d, Range) else d for name, d in space.items()}
    before = RoundStudy(
        optuna.storages.InMemoryStorage(),
        "before",
        wider,
        SearchSpec(trials=14, seed=9),
        max_train_steps=HORIZON,
    )
    found: list[Trial] = []
    for number in range(int(min(14, num_points(space) / 2))):
        values = complete_hyperparameters(space, before.propose(number, found).chosen)
        values = values if number % 5 or not names else {name: values[name] for name in names}
        found.append(ended("round0", number, values, state=TrialState[STATES[number % 6]]))
    return found


def proposals(
    sampler: str, name: str, *, enqueues: bool, earlier: Sequence[int], objective: Objective = LOSS
) -> list[dict[str, Any]]:
    """All that a round is proposed: trials end as they do, two run side by side, failed ones are repeated."""
    space = SPACES[name]
    total = int(min(num_points(space), 8 if sampler == "gp" else 16))
    before = earlier_trials(space)
    round_study = RoundStudy(
        optuna.storages.InMemoryStorage(),
        "study/round1",
        space,
        SearchSpec(trials=total, sampler=sampler, seed=3, enqueue=ENTRIES[name] if enqueues else []),
        max_train_steps=HORIZON,
        earlier=[outcome for horizon in earlier for outcome in outcomes(before, max_train_steps=horizon)],
        objective=objective,
    )
    trials: list[Trial] = []
    found = []
    for ordinal in range(total):
        proposal = round_study.propose(ordinal, trials)
        found.append(dict(proposal.chosen))
        values = complete_hyperparameters(space, proposal.chosen)
        state = TrialState[STATES[ordinal % len(STATES)]]
        trials.append(ended("round1", len(trials), values, state=state))
        if state == TrialState.FAILED:
            again = round_study.propose(ordinal + 1, trials, again=values)
            assert again.chosen == proposal.chosen
            trials.append(ended("round1", len(trials), values, state=TrialState.COMPLETE))
    return found


def cases() -> Iterator[tuple[str, dict[str, Any]]]:
    """A name for each round, and what it is asked with."""
    for sampler in SAMPLERS:
        for name, space in SPACES.items():
            if sampler == "grid" and any(isinstance(dimension, Range) for dimension in space.values()):
                continue
            for enqueues in (False, True) if sampler != "gp" else (True,):
                for earlier in ((), (10, HORIZON)):
                    asked = {"name": name, "enqueues": enqueues, "earlier": earlier}
                    yield (
                        f"{sampler}, {name}, enqueues {enqueues}, after {earlier}",
                        {"sampler": sampler, **asked},
                    )
    asked = {"name": "mixed", "enqueues": False, "earlier": (10,), "objective": ANSWERS}
    yield "tpe, by answers", {"sampler": "tpe", **asked}


CASES = dict(cases())


@pytest.mark.parametrize("case", CASES)
def test_what_a_round_is_proposed_is_what_it_was(case: str) -> None:
    recorded = json.loads(RECORDED.read_text())[case]
    found = json.loads(json.dumps(proposals(**CASES[case])))
    if not case.startswith("gp"):
        assert found == recorded
        return
    assert _close(recorded) == found  # torch rounds by the machine


def _close(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return points that equal others whose real numbers differ by rounding."""
    return [
        {
            name: pytest.approx(value, rel=1e-4) if isinstance(value, float) else value
            for name, value in point.items()
        }
        for point in points
    ]


def test_every_recorded_round_is_compared() -> None:
    assert set(json.loads(RECORDED.read_text())) == set(CASES)
    assert len(CASES) == 79


if __name__ == "__main__":
    recorded = {case: proposals(**asked) for case, asked in CASES.items()}
    lines = ",\n".join(f"{json.dumps(case)}: {json.dumps(points)}" for case, points in recorded.items())
    RECORDED.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")
    sys.stdout.write(f"wrote {RECORDED}\n")
