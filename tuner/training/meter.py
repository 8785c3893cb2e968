"""Where a worker's time goes, and how full its passes are."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

from tuner.records import Throughput

Kind = Literal["training", "evaluating", "saving"]


class Meter:
    """Sums over everything a worker has done since it was made. The parts of the time do not overlap."""

    def __init__(self) -> None:
        self.session = f"{time.time_ns()}-{os.getpid()}"
        self.seconds: dict[Kind, float] = {"training": 0.0, "evaluating": 0.0, "saving": 0.0}
        self.passes = self.micro_steps = self.trial_steps = self.tokens = self.padded_tokens = 0

    @contextmanager
    def timing(self, kind: Kind) -> Iterator[None]:
        """Count the time of a block. On a GPU the block must end with a result that was waited for."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[kind] += time.perf_counter() - begun

    def count_pass(self, *, micro_steps: int, tokens: int, padded_tokens: int) -> None:
        """A training pass that held so many trials' micro-batches."""
        self.passes += 1
        self.micro_steps += micro_steps
        self.tokens += tokens
        self.padded_tokens += padded_tokens

    def read(self, device: torch.device) -> Throughput:
        """The sums so far."""
        return Throughput(
            session=self.session,
            training_seconds=self.seconds["training"],
            evaluating_seconds=self.seconds["evaluating"],
            saving_seconds=self.seconds["saving"],
            passes=self.passes,
            micro_steps=self.micro_steps,
            trial_steps=self.trial_steps,
            tokens=self.tokens,
            padded_tokens=self.padded_tokens,
            peak_memory_bytes=peak_memory_bytes(device),
        )


def peak_memory_bytes(device: torch.device) -> int:
    """The most that was held at once: of the GPU's memory by torch, or of the machine's by the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
