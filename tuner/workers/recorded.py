"""Learning curves that were recorded once, as what a simulated worker replays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tuner.records import Evaluation, Hyperparameters, Value


@dataclass(frozen=True)
class RecordedCurves:
    """A table: a configuration's values, and its losses at the recorded steps; a `Curve`.

    The recorded runs must not depend on a horizon: what was recorded up to a step is the whole run
    to that horizon, and the trunk of a longer one.
    """

    names: tuple[str, ...]
    """Hyperparameters that tell one configuration from another; a trial may have more."""
    steps: tuple[int, ...]
    """Where losses were recorded, rising."""
    eval_losses: Mapping[tuple[Value, ...], Sequence[float]]
    """By configuration, in the order of `names`: one loss a step; not finite where it diverged."""
    train_losses: Mapping[tuple[Value, ...], Sequence[float]]
    """The same of the training batches; may be empty."""

    def __post_init__(self) -> None:
        if list(self.steps) != sorted(set(self.steps)):
            raise ValueError(f"recorded steps must rise; got {self.steps}")
        for losses in (self.eval_losses, self.train_losses):
            short = next((key for key, curve in losses.items() if len(curve) != len(self.steps)), None)
            if short is not None:
                raise ValueError(f"{short}: {len(losses[short])} losses for {len(self.steps)} steps")

    def __call__(self, hyperparameters: Hyperparameters, step: int, horizon: int) -> Evaluation:
        """The recorded evaluation. Raises KeyError for what was not recorded: no curve is made up."""
        key = tuple(hyperparameters[name] for name in self.names)
        if key not in self.eval_losses:
            raise KeyError(f"no curve was recorded for {dict(zip(self.names, key, strict=True))}")
        if step not in self.steps:
            raise KeyError(f"nothing was recorded at step {step}; recorded are {self.steps}")
        at = self.steps.index(step)
        trained = self.train_losses.get(key)
        train_loss = float(trained[at]) if trained is not None and step > 0 else None
        return Evaluation(step, float(self.eval_losses[key][at]), train_loss=train_loss)
