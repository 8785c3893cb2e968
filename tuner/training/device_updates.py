"""Updates that the device decides: clipped, skipped and counted there, until the host reads the counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

MAX_BAD_UPDATES = 3
"""Consecutive updates without a usable gradient that make a trial infeasible."""

SUMMED = ("nll", "targets", "clipped")
"""Counters of the updates since the last evaluation."""
COUNTERS = (*SUMMED, "bad", "rate")
"""What a checkpoint keeps of the updates; `bad` is of those in a row."""
_TALLY = (*COUNTERS, "loss", "skipped", "rests_at")
NLL, TARGETS, CLIPPED, BAD, RATE, LOSS, SKIPPED, RESTS_AT = range(len(_TALLY))
"""Columns of a tally: the counters, the last update's train loss, whether it was skipped, and the step after
which nothing of the trial changes until the host has read of it, 0 before."""


@dataclass(frozen=True)
class HostSide:
    """What the host knows of an update that the device is to decide."""

    step: int
    """The one that the update completes."""
    rate: float
    targets: int
    max_norm: float
    """0 for no clipping."""
    tally: Sequence[float]
    """Before the update; of a trial whose tally is already on the device, anything."""
    counts_on_host: bool = False
    """Whether its optimizer counts skipped updates, too: the trial then rests after one."""


@dataclass(frozen=True)
class Decided:
    """What the device decided, a value a trial."""

    tallies: Tensor
    """[trials, columns], after the update."""
    orders: Tensor
    """By what a trial's gradients are multiplied, 1 without clipping; and 1 where its weights and moments
    stay as they are, else 0. Float32 [2, trials]"""


def is_bad_update(norm: float, nll: float) -> bool:
    """Return whether an update has no usable gradient.

    A norm layer can turn an overflow into zeros: the loss is finite, but training cannot recover.
    """
    return not np.isfinite(norm) or (norm == 0 and nll > 0)


def sent_rows(hosts: Sequence[HostSide]) -> np.ndarray:
    """Return what `decided` needs of the host: float64 [5 + columns, trials]."""
    return np.array(
        [
            [host.step for host in hosts],
            [host.rate for host in hosts],
            [host.targets for host in hosts],
            [host.max_norm for host in hosts],
            [host.counts_on_host for host in hosts],
            *zip(*(host.tally for host in hosts), strict=True),
        ],
        np.float64,
    )


def decided(norms: Tensor, nll: Tensor, sent: Tensor, tallies: Sequence[Tensor | None]) -> Decided:
    """Decide an update of each trial, from the gradients' norms and the updates' losses [trials].

    A trial without a tally on the device begins with the one in `sent`. A trial rests after the last of
    `MAX_BAD_UPDATES` in a row, and after any that is skipped if its optimizer counts on the host: nothing of
    it changes any more, and whoever reads its tally later finds what it was.
    """
    step, rate, targets, max_norm, counts_on_host = sent[:5]
    before = torch.stack([sent[5:, n] if tally is None else tally for n, tally in enumerate(tallies)])
    norm, nll = norms.double(), nll.double()
    is_finite = norm.isfinite()
    is_clipped = is_finite & (max_norm > 0) & (norm > max_norm)
    coefficients = torch.where(is_clipped, max_norm / (norm + 1e-6), 1.0)  # as torch's clip_grad_norm_
    is_bad = is_finite.logical_not() | ((norm == 0) & (nll > 0))
    bad = torch.where(is_bad, before[:, BAD] + 1, 0.0)
    rests = (bad >= MAX_BAD_UPDATES) | (is_finite.logical_not() & (counts_on_host > 0))
    after = torch.stack(
        [
            before[:, NLL] + nll,
            before[:, TARGETS] + targets,
            before[:, CLIPPED] + is_clipped,
            bad,
            rate,
            nll / targets.clamp(min=1),
            is_finite.logical_not(),
            torch.where(rests, step, 0.0),
        ],
        dim=1,
    )
    is_resting = before[:, RESTS_AT] > 0
    return Decided(
        torch.where(is_resting[:, None], before, after),
        torch.stack([coefficients, is_finite.logical_not() | is_resting]).float(),
    )
