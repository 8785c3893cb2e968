"""Trials and rounds written down number by number, for tests of single rules."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from tuner.playbook import RoundResults
from tuner.records import Evaluation, Fixed, Space, Trial, TrialState, Value

CONSTANT: dict[str, Value] = {"schedule": "constant", "warmup_steps": 0, "decay_steps": 0}


def exact(step: int, loss: float, *, spread: float = 0.0, train_loss: float | None = None) -> Evaluation:
    """An evaluation of four examples; two of them with equal `spread` differ by no standard error."""
    nll = tuple(16 * (loss + sign * spread) for sign in (1, -1, 1, -1))
    return Evaluation(step, loss, train_loss, example_nll=nll, example_tokens=(16,) * 4)


def trial_of(
    number: int,
    losses: Sequence[float] | Callable[[int], float],
    *,
    steps: Sequence[int] = tuple(range(0, 101, 10)),
    state: TrialState = TrialState.COMPLETE,
    trains: bool = True,
    **hyperparameters: Value,
) -> Trial:
    values = [losses(step) for step in steps] if callable(losses) else losses
    evaluations = tuple(
        exact(step, loss, train_loss=3.0 - step / 1000 if trains and step else None)
        for step, loss in zip(steps, values, strict=True)
    )
    chosen = {"learning_rate": 1e-4 * (number + 1), **CONSTANT, **hyperparameters}
    return Trial("round1", number, chosen, state, evaluations=evaluations)


def round_of(
    *trials: Trial,
    max_train_steps: int = 100,
    evaluate_every: int = 10,
    space: Space | None = None,
    name: str = "round1",
    **fields: object,
) -> RoundResults:
    if space is None:
        names: Mapping[str, Value] = trials[0].hyperparameters if trials else {}
        space = {name: Fixed(value) for name, value in names.items()}
    fields = {"train_rows": 800, "workload": "w", **fields}
    return RoundResults(name, max_train_steps, evaluate_every, space, trials, **fields)  # type: ignore[arg-type]
