"""How much each searched hyperparameter explains of the differences between a round's trials."""

from __future__ import annotations

import warnings

import optuna

from tuner.playbook import RoundResults
from tuner.playbook.selection import objective_value
from tuner.records import Hyperparameters, TrialState, searched
from tuner.study.proposals import distributions, encoded
from tuner.study.samplers.points import contains

MIN_TRIALS = 10
"""With fewer complete trials the numbers say nothing."""


def importance(results: RoundResults) -> dict[str, float]:
    """Return the share of each searched hyperparameter, the largest first, by Optuna's default evaluator.

    Made from the facts alone, so that nothing that happened to Optuna's tables changes it. Hyperparameters
    that only some trials have are left out. Empty if fewer than two are left, or too few trials.
    """
    space = searched(results.space)
    done = [
        (trial, value)
        for trial in results.trials
        if trial.state is TrialState.COMPLETE and (value := objective_value(trial)) is not None
    ]
    names = [name for name in space if len({_text(t.hyperparameters, name) for t, _ in done} - {None}) > 1]
    names = [name for name in names if all(name in trial.hyperparameters for trial, _ in done)]
    if len(done) < MIN_TRIALS or len(names) < 2:
        return {}
    by_name = distributions({name: space[name] for name in names})
    with warnings.catch_warnings():
        # Enqueued values may lie outside of the ranges, and Optuna warns of each.
        warnings.simplefilter("ignore")
        study = optuna.create_study(direction=results.objective.direction.value)
        for trial, value in done:
            chosen = {name: encoded(trial.hyperparameters[name]) for name in names}
            if all(contains(by_name[name], x) for name, x in chosen.items()):
                made = optuna.trial.create_trial(params=chosen, distributions=by_name, value=value)
                study.add_trial(made)
        if len(study.trials) < MIN_TRIALS:
            return {}
        return {name: float(share) for name, share in optuna.importance.get_param_importances(study).items()}


def _text(hyperparameters: Hyperparameters, name: str) -> str | None:
    return str(hyperparameters[name]) if name in hyperparameters else None
