"""A round shown in other tools: TensorBoard, Weights & Biases, MLflow, Trackio."""

from tuner.report.elsewhere.sending import followed
from tuner.report.elsewhere.tools import FollowedRound, Tool, not_installed

__all__ = ["FollowedRound", "Tool", "followed", "not_installed"]
