"""Send a round to experiment trackers: TensorBoard, Weights & Biases, MLflow, Trackio."""

from tuner.report.trackers.tracker import FollowedRound, Tool, followed, not_installed, refuse_unusable

__all__ = ["FollowedRound", "Tool", "followed", "not_installed", "refuse_unusable"]
