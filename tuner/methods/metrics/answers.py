"""The mean score of the answers of a trial's best adapter, by `evaluation.answers`."""

from tuner.methods.metrics import Metric
from tuner.records import Direction

ANSWERS = Metric(
    Direction.MAXIMIZE,
    "Mean score of generated answers, by `evaluation.answers`. Measured once per complete trial, with the "
    "adapter of its best step; best steps and horizons use the loss.",
    per="trial",
)
