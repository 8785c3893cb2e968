"""The decisions, as functions of a round's facts: best step, horizon, next round, findings."""

from tuner.playbook.horizon import Diagnosis
from tuner.playbook.promotion import NextRound, plan_next_round
from tuner.playbook.pruning import is_diverged
from tuner.playbook.reading import Reading, read_round
from tuner.playbook.results import Finding, RoundResults, Severity
from tuner.playbook.schedule import can_continue
from tuner.playbook.selection import best_evaluation, settled_step

__all__ = [
    "Diagnosis",
    "Finding",
    "NextRound",
    "Reading",
    "RoundResults",
    "Severity",
    "best_evaluation",
    "can_continue",
    "is_diverged",
    "plan_next_round",
    "read_round",
    "settled_step",
]
