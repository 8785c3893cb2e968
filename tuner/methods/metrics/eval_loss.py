"""The evaluation loss: what a round is ranked by unless its file says otherwise."""

from tuner.methods.metrics import ExampleScores, Metric
from tuner.records import Direction


def _loss(examples: ExampleScores) -> float:
    return float(examples.nll.sum() / examples.tokens.sum())


EVAL_LOSS = Metric(
    Direction.MINIMIZE,
    "Negative log-likelihood of a target token, in nats: the sum over all evaluation examples by the number "
    "of their target tokens.",
    compute=_loss,
    bounds=(0.0, None),
)
