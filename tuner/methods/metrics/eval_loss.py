"""The evaluation loss, the default objective of a round."""

from tuner.methods.metrics import ExampleScores, Metric
from tuner.records import Direction


def _loss(examples: ExampleScores) -> float:
    return float(examples.nll.sum() / examples.tokens.sum())


EVAL_LOSS = Metric(
    Direction.MINIMIZE,
    "Mean negative log-likelihood per target token, in nats: the sum over all evaluation examples divided by "
    "the number of target tokens.",
    compute=_loss,
    bounds=(0.0, None),
)
