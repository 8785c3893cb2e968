"""How to search: which sampler, after how many random trials, and how many names at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

from tuner.playbook.findings import Finding, Severity
from tuner.records import Space, searched

Sampler: TypeAlias = str
"""A name as in `search.sampler`."""
_OWN = frozenset({"quasi-random", "tpe", "gp", "random", "grid"})

MAX_STARTUP_TRIALS = 10
"""Optuna's own default; more are not needed before a model is fitted."""

_TRIALS_NEEDED = (("adam_beta1", 10), ("adam_epsilon", 25), ("adam_beta2", 100))
"""Trials from which on a name of Adam's is worth searching; far more than 25 is taken as 100."""


def default_sampler(
    *, knows_good_trials: bool, before: Sampler = "quasi-random", is_narrowed: bool = True
) -> tuple[Sampler, str]:
    """Return the sampler of a round and the reason for it; `before` is that of the round which it follows.

    A first round knows no good trials, nor does one that follows a round without a complete trial. Rule:
    Deep Learning Tuning Playbook, "Exploration vs exploitation" and "Why use quasi-random search instead of
    more sophisticated black box optimization algorithms during the exploration phase": by default the second
    round exploits.
    """
    if before not in _OWN:
        return before, "as before"
    if not knows_good_trials:
        return "quasi-random", "no good trials are known yet: it covers the space evenly"
    if not is_narrowed:
        return with_a_model(before), "learns from the trials of all rounds"
    return with_a_model(before), "the space is narrowed around good trials: now a model of them chooses"


def with_a_model(sampler: Sampler) -> Sampler:
    """The sampler that models what was tried: `gp` or a user's where the file names it already, else tpe.

    Rule: this project's decision, "Search".
    """
    return sampler if sampler == "gp" or sampler not in _OWN else "tpe"


def startup_trials(*, enqueued: int, total: int) -> int:
    """Trials before a model-based sampler begins to model; those enqueued count among them.

    At most half of the round, so that a small one is modelled at all, and no fewer than are enqueued
    anyway, up to Optuna's ten. Rule: this project's decision, "Search".
    """
    return max(1, min(MAX_STARTUP_TRIALS, max(enqueued, total // 2)))


def search_findings(space: Space, trials: int) -> Iterator[Finding]:
    """Which of Adam's hyperparameters are searched with too few trials.

    Rule: Deep Learning Tuning Playbook, "How should Adam's hyperparameters be tuned?": under 10 trials
    the learning rate alone; 10 to 25, and beta1; more, and epsilon; far more, beta2.
    """
    early = [(name, needed) for name, needed in _TRIALS_NEEDED if name in searched(space) and trials < needed]
    if early:
        names = ", ".join(f"{name} (from about {needed} trials)" for name, needed in early)
        yield Finding(
            "too_many_names",
            Severity.WARNING,
            f"{trials} trials are few for all that is searched: fix {names}.",
            {"trials": float(trials), "needed": float(max(needed for _, needed in early))},
        )
