"""The share of target tokens that are the model's top prediction."""

from tuner.methods.metrics import ExampleScores, Metric
from tuner.records import Direction


def _accuracy(examples: ExampleScores) -> float:
    return float(examples.correct.sum() / examples.tokens.sum())


TOKEN_ACCURACY = Metric(
    Direction.MAXIMIZE,
    "Share of the evaluation examples' target tokens that are the model's top prediction.",
    compute=_accuracy,
    bounds=(0.0, 1.0),
)
