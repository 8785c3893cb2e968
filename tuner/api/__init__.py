"""What a script types: studies, rounds, trials. The command line is arguments and printing over it."""

from __future__ import annotations


def log(step: int, **metrics: float) -> None:
    """Report metrics of a step from inside a training command; anywhere else, do nothing.

    So a script that calls it runs the same without tuner.

    Args:
        step: Optimizer updates done so far.
        metrics: Values by name, such as `eval_loss=2.31`.
    """
