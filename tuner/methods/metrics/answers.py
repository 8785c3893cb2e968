"""The mean score of what a trial's best adapter answers, by `evaluation.answers`."""

from tuner.methods.metrics import Metric
from tuner.records import Direction

ANSWERS = Metric(
    Direction.MAXIMIZE,
    "Mean score of generated answers, by `evaluation.answers`. Each complete trial has one, with the adapter "
    "of its best step; steps and horizons go by the loss.",
    per="trial",
)
