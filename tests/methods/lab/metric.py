"""The loss of the worst quarter of the evaluation examples."""

import numpy as np

from tuner.methods.metrics import Direction, Metric


def worst_quarter(examples):
    losses = np.sort(examples.nll / examples.tokens)
    return float(losses[-max(1, len(losses) // 4) :].mean())


WORST = Metric(Direction.MINIMIZE, "Mean loss of the worst quarter.", compute=worst_quarter, bounds=(0, None))
