"""The Python API: studies, rounds and trials. The command line parses and prints, and calls it."""

from __future__ import annotations


def log(step: int, **metrics: float) -> None:
    """Report metrics of a step from inside a training command; do nothing anywhere else.

    A script that calls this function also runs without tuner.

    Args:
        step: Number of optimizer updates so far.
        metrics: Values by name, such as `eval_loss=2.31`.
    """
