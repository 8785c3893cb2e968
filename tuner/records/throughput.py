"""What worker processes have done, and how fast; what a few steps predict."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Throughput:
    """What a worker process has done since it was ready, in sums."""

    session: str = ""
    """Names the life of one worker process, on a cluster as `NODE/SESSION`; empty for a sum over several."""
    training_seconds: float = 0.0
    """Spent in training passes and updates. Those of workers side by side are added up."""
    evaluating_seconds: float = 0.0
    saving_seconds: float = 0.0
    passes: int = 0
    """Forward and backward passes of training."""
    micro_steps: int = 0
    """Trials' micro-batches in them."""
    trial_steps: int = 0
    """Optimizer updates, of all trials."""
    tokens: int = 0
    """Tokens trained on."""
    padded_tokens: int = 0
    """The same with the padding that was computed along."""
    peak_memory_bytes: int = 0
    """The most at once; of several workers, the largest."""

    @property
    def node(self) -> str | None:
        """Return the node of a cluster that the process ran on; None on the parent's own machine."""
        return self.session.rpartition("/")[0] or None

    @property
    def tokens_per_second(self) -> float | None:
        """Return the training tokens per second of training; None before any."""
        return _ratio(self.tokens, self.training_seconds)

    @property
    def trial_steps_per_second(self) -> float | None:
        """Return the updates of all trials per second of training; None before any."""
        return _ratio(self.trial_steps, self.training_seconds)

    @property
    def packing_factor(self) -> float | None:
        """Return the average number of trials in a training pass; None before any."""
        return _ratio(self.micro_steps, self.passes)

    @property
    def padding_share(self) -> float | None:
        """Return the share of padding among computed tokens, in [0, 1]; None before any pass."""
        real = _ratio(self.tokens, self.padded_tokens)
        return None if real is None else 1.0 - real

    @property
    def evaluation_share(self) -> float | None:
        """Return evaluation's share of the measured seconds, in [0, 1]; None before any."""
        measured = self.training_seconds + self.evaluating_seconds + self.saving_seconds
        return _ratio(self.evaluating_seconds, measured)


@dataclass(frozen=True, slots=True)
class Prediction:
    """The predicted cost of a round, from a few steps of all slots of a worker."""

    slots: int
    seconds_per_step: float
    """Per trial: slots that train together divide the time of a pass."""
    seconds_per_evaluation: float
    """The same for an evaluation."""
    peak_memory_bytes: int
    packed_slots: int | None = None
    """With so many slots instead, where the choice of slots leaves packing to the user."""
    packed_seconds_per_step: float | None = None

    @property
    def packing_gain(self) -> float | None:
        """Return how many times as fast trials train with `packed_slots`."""
        packed = self.packed_seconds_per_step
        return None if not packed else self.seconds_per_step / packed


def by_node(parts: Iterable[Throughput]) -> dict[str, Throughput]:
    """Return the sums over the worker processes of each node of a cluster, by its name."""
    found: dict[str, list[Throughput]] = {}
    for part in parts:
        if part.node is not None:
            found.setdefault(part.node, []).append(part)
    sums = {node: added_up(each) for node, each in sorted(found.items())}
    return {node: each for node, each in sums.items() if each is not None}


def added_up(parts: Iterable[Throughput]) -> Throughput | None:
    """Return the sums over several worker processes; None if there were none."""
    sessions = tuple(parts)
    if not sessions:
        return None
    return Throughput(
        training_seconds=sum(part.training_seconds for part in sessions),
        evaluating_seconds=sum(part.evaluating_seconds for part in sessions),
        saving_seconds=sum(part.saving_seconds for part in sessions),
        passes=sum(part.passes for part in sessions),
        micro_steps=sum(part.micro_steps for part in sessions),
        trial_steps=sum(part.trial_steps for part in sessions),
        tokens=sum(part.tokens for part in sessions),
        padded_tokens=sum(part.padded_tokens for part in sessions),
        peak_memory_bytes=max(part.peak_memory_bytes for part in sessions),
    )


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole > 0 else None
