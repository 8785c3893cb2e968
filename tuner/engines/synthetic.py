"""Losses of simulated trials: from a formula, or recorded."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tuner.methods.schedules import decay_names, warmup_length
from tuner.methods.table import HYPERPARAMETERS
from tuner.playbook.schedule import multiplier, trunk_end
from tuner.records import Evaluation, Hyperparameters, Value

NUM_EXAMPLES = 32
"""Number of synthetic evaluation examples, for paired standard errors."""
EXAMPLE_TOKENS = 64
BASE_LOSS = 2.2
NOISE = 0.13
"""Excess loss of a constant rate, at the best rate of a run about as long as the pace."""
ANNEALED = 0.025
"""Mean decrease of the rate below its peak, over the run so far, that halves this noise."""
DECAYED_WORTH = 0.1
"""Progress of a decaying step, relative to one at the peak: the rate's share of the peak to this power.

Fitted, with `NOISE` and `ANNEALED`, to the published final losses at 8 and 16 paces. With a power of 1,
cosine to zero would be 2% worse than a decay of 40%.
"""

_CENTRES: Mapping[str, tuple[float, float]] = {
    "lora_alpha": (32.0, 0.010),
    "batch_size": (16.0, 0.012),
    "weight_decay": (0.01, 0.002),
    "lora_dropout": (0.05, 0.010),
    "loraplus_ratio": (4.0, 0.006),
    "max_grad_norm": (1.0, 0.003),
}
"""Optimum of each before the study's name shifts it, and the cost of being a factor of ten away."""


@dataclass(frozen=True)
class LoraFormula:
    """A `Curve` for a simulated worker: synthetic fine-tuning losses."""

    name: str
    """Seed of the surface: the same name gives the same surface."""
    pace_steps: int = 60
    """Steps to half of the total gain at the best rate."""

    def __call__(self, hyperparameters: Hyperparameters, step: int, horizon: int) -> Evaluation:
        """Return the evaluation at a step of a run; before the decay it does not depend on the horizon."""
        rate = HYPERPARAMETERS["learning_rate"].number(hyperparameters)
        if step > 0 and rate > 40 * self._best_rate:
            return Evaluation(step, math.nan, train_loss=math.nan, learning_rate=rate)
        loss, train_loss = self._losses(hyperparameters, rate / self._best_rate, step, horizon)
        nll = self._examples(hyperparameters, step, loss)
        tokens = NUM_EXAMPLES * EXAMPLE_TOKENS
        return Evaluation(
            step,
            math.fsum(nll) / tokens,
            train_loss=train_loss if step else None,
            learning_rate=rate * multiplier(step - 1, hyperparameters, horizon) if step else None,
            example_nll=nll,
            example_tokens=(EXAMPLE_TOKENS,) * NUM_EXAMPLES,
        )

    @property
    def _best_rate(self) -> float:
        """Best rate of a run about as long as the pace."""
        return 4e-4 * 10 ** (self._unit("learning_rate") - 0.5)

    def _losses(
        self, hyperparameters: Hyperparameters, rate: float, step: int, horizon: int
    ) -> tuple[float, float]:
        """Return evaluation and train loss; `rate` is in units of the best one."""
        floor = BASE_LOSS * (0.68 + self._penalty(hyperparameters))
        speed = 3.0 * rate / (1.0 + 2.0 * rate**1.3)
        worth, annealed = _decayed(hyperparameters, step, horizon)
        progress = worth * speed / self.pace_steps
        learned = (BASE_LOSS - floor) * (1.0 - (1.0 + progress) ** -0.8)
        noise = NOISE * rate / (1.0 + 0.1 * rate) * min(1.0, progress) / (1.0 + annealed / ANNEALED)
        harm = 0.003 * rate * math.log1p(progress)
        overfitted = 2e-4 * max(0.0, progress - 20.0)
        loss = BASE_LOSS - learned + noise + harm
        return loss + overfitted, loss - 0.01 * progress**0.5

    def _penalty(self, hyperparameters: Hyperparameters) -> float:
        """Return the final cost of all hyperparameters but the rate, as a share of the base model's loss."""
        rank = HYPERPARAMETERS["lora_r"].number(hyperparameters)
        total = 0.04 / rank
        for name, (centre, cost) in _CENTRES.items():
            best = centre * 10 ** (self._unit(name) - 0.5)
            known = name in hyperparameters
            value = HYPERPARAMETERS[name].number(hyperparameters) if known else centre
            total += cost * min(4.0, math.log10(max(value, centre / 100) / best) ** 2)
        for name in ("target_modules", "optimizer", "lora_init", "use_rslora"):
            total += 0.004 * self._unit(f"{name}={hyperparameters.get(name)}")
        return total

    def _examples(self, hyperparameters: Hyperparameters, step: int, loss: float) -> tuple[float, ...]:
        """Return per-example sums around a loss: some examples are hard in every run, others vary by run."""
        hard = 1.0 + 0.3 * np.random.default_rng(_seed(self.name, "examples")).standard_normal(NUM_EXAMPLES)
        # Noise must not depend on the decay: a run continued to another horizon has the same trunk.
        decay = decay_names(hyperparameters)
        run = sorted((name, repr(value)) for name, value in hyperparameters.items() if name not in decay)
        luck = np.random.default_rng(_seed(self.name, repr(run), str(step))).standard_normal(NUM_EXAMPLES)
        share = np.maximum(hard, 0.1) / float(np.maximum(hard, 0.1).mean())
        amount = 0.004 if step else 0.0
        return tuple((EXAMPLE_TOKENS * loss * share * (1.0 + amount * luck)).tolist())

    def _unit(self, what: str) -> float:
        return _seed(self.name, what) / 2**64


def _decayed(hyperparameters: Hyperparameters, step: int, horizon: int) -> tuple[float, float]:
    """Return the progress in steps at the peak, and how far the mean rate is below the peak.

    The warmup counts towards the first by its shares of the peak, but not towards the second.
    """
    warmup = min(step, warmup_length(hyperparameters))
    end = trunk_end(hyperparameters, horizon)
    trunk = min(step, max(warmup, end or 0))
    if trunk > warmup and multiplier(trunk - 1, hyperparameters, horizon) < 1.0:
        trunk = warmup  # a stable phase need not be at the peak
    warming = [multiplier(s, hyperparameters, horizon) for s in range(warmup)]
    decaying = [multiplier(s, hyperparameters, horizon) for s in range(trunk, step)]
    worth = math.fsum(warming) + (trunk - warmup) + math.fsum(m**DECAYED_WORTH for m in decaying)
    annealed = math.fsum(1.0 - m for m in decaying)
    return worth, annealed / max(1, step - warmup)


def _seed(*parts: str) -> int:
    return int.from_bytes(hashlib.sha256("\0".join(parts).encode()).digest()[:8], "big")


@dataclass(frozen=True)
class RecordedCurves:
    """A `Curve` from a table of recorded losses by configuration.

    The recorded runs must not depend on a horizon: the losses up to a step are the whole run to that horizon,
    and the trunk of a longer one.
    """

    names: tuple[str, ...]
    """Hyperparameters that identify a configuration; a trial may have more."""
    steps: tuple[int, ...]
    """Steps with recorded losses, rising."""
    eval_losses: Mapping[tuple[Value, ...], Sequence[float]]
    """Losses by configuration, in the order of `names`: one per step; not finite after divergence."""
    train_losses: Mapping[tuple[Value, ...], Sequence[float]]
    """Training losses in the same form; may be empty."""

    def __post_init__(self) -> None:
        if list(self.steps) != sorted(set(self.steps)):
            raise ValueError(f"recorded steps must rise; got {self.steps}")
        for losses in (self.eval_losses, self.train_losses):
            short = next((key for key, curve in losses.items() if len(curve) != len(self.steps)), None)
            if short is not None:
                raise ValueError(f"{short}: {len(losses[short])} losses for {len(self.steps)} steps")

    def __call__(self, hyperparameters: Hyperparameters, step: int, horizon: int) -> Evaluation:
        """Return the recorded evaluation. Raises KeyError if there is none."""
        key = tuple(hyperparameters[name] for name in self.names)
        if key not in self.eval_losses:
            raise KeyError(f"no curve was recorded for {dict(zip(self.names, key, strict=True))}")
        if step not in self.steps:
            raise KeyError(f"nothing was recorded at step {step}; recorded steps: {self.steps}")
        at = self.steps.index(step)
        trained = self.train_losses.get(key)
        train_loss = float(trained[at]) if trained is not None and step > 0 else None
        return Evaluation(step, float(self.eval_losses[key][at]), train_loss=train_loss)
