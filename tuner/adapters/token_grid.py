"""Rows of many slots side by side in one tensor, and which rows go into a pass of an evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tuner.data import Example, Examples


@dataclass(frozen=True)
class TokenGrid:
    """Rows of many trials as tensors: an equal number of rows for each, padded on the right."""

    input_ids: Tensor
    """[rows, length]"""
    rows: Tensor
    """[targets] row of each target token."""
    columns: Tensor
    """[targets] column of each target token."""

    def sum_by_row(self, nll: Tensor) -> Tensor:
        """Add up per-token values [targets] row by row, in float64: [rows]."""
        total = torch.zeros(self.input_ids.shape[0], dtype=torch.float64, device=nll.device)
        return total.index_add_(0, self.rows, nll.detach().double())


def grid(examples: Sequence[Sequence[Example]], *, device: torch.device, pad: int = 0) -> TokenGrid:
    """Lay the examples of each slot side by side.

    Slots with fewer rows than the largest are filled with rows of one token and no target, so that
    the number of rows is the same for each.
    """
    height = max(len(part) for part in examples)
    length = max(len(example.input_ids) for part in examples for example in part)
    ids = np.full((len(examples) * height, length), pad, dtype=np.int64)
    target = np.zeros((len(examples) * height, length), dtype=bool)
    for slot, part in enumerate(examples):
        for place, example in enumerate(part):
            row = slot * height + place
            ids[row, : len(example.input_ids)] = example.input_ids
            target[row, : len(example.input_ids)] = example.is_target
    rows, columns = np.nonzero(target)
    return TokenGrid(
        input_ids=torch.from_numpy(ids).to(device),
        rows=torch.from_numpy(rows).to(device),
        columns=torch.from_numpy(columns).to(device),
    )


def rows_by_length(examples: Examples, *, rows: int) -> list[list[int]]:
    """All examples, longest first, in groups of at most `rows`: the batches of an evaluation."""
    order = np.argsort(-np.asarray(examples.num_tokens), kind="stable").tolist()
    return [order[start : start + rows] for start in range(0, len(order), rows)]
