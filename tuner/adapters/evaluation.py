"""Losses of adapters on evaluation rows, arranged in a grid of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tuner.adapters.device_io import one_out_of_memory, read
from tuner.adapters.device_pack import PackedRows
from tuner.adapters.joined import Joined, joined_rows, predicting_places
from tuner.adapters.pack import Pack
from tuner.adapters.placement import on, send_to_each
from tuner.data import Example, Examples

GRIDS = {"max_grids": 4, "multiple": 16}
"""Of attention on a CPU, whose kernel takes up to half as long again for another length. A GPU gets one grid,
for fewer launches."""


@dataclass(frozen=True)
class TokenGrid:
    """Rows of many trials as tensors: an equal number of rows for each, padded on the right."""

    input_ids: Tensor
    """[rows, length]"""
    rows: Tensor
    """[targets] row of each target token."""
    columns: Tensor
    """[targets] column of each target token."""
    more: tuple[Tensor, ...] = ()
    """What was sent with them."""
    joined: Joined | None = None
    """Where tokens belong if a row has several examples."""

    def sum_by_row(self, nll: Tensor) -> Tensor:
        """Add up per-token values [targets] row by row, in float64: [rows]."""
        total = torch.zeros(self.input_ids.shape[0], dtype=torch.float64, device=nll.device)
        return total.index_add_(0, on(self.rows, nll.device), nll.detach().double())


def grid(
    examples: Sequence[Sequence[Example]],
    *,
    device: torch.device,
    others: Sequence[torch.device] = (),
    pad: int = 0,
    more: Sequence[NDArray[np.generic]] = (),
) -> TokenGrid:
    """Lay the examples of each slot side by side, and send them to the device in one copy with `more`.

    Of other devices, to which they are sent too, `placement.on` has the copies.

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
    input_ids, at_rows, at_columns, *extra = send_to_each([ids, rows, columns, *more], (device, *others))
    return TokenGrid(input_ids, at_rows, at_columns, tuple(extra))


def join(
    examples: Sequence[Sequence[Example]],
    *,
    device: torch.device,
    others: Sequence[torch.device] = (),
    more: Sequence[NDArray[np.generic]] = (),
) -> TokenGrid:
    """Join the examples of each slot to one row, padded to that of the longest slot. Sends as `grid` does."""
    arrays, shapes = joined_rows(examples, **(GRIDS if device.type == "cpu" else {}))
    ids, at_rows, at_columns, *_ = arrays
    predicting = predicting_places(at_rows, at_columns, ids.shape)
    last = [] if predicting is None else [predicting]
    sent = send_to_each([*arrays, *more, *last], (device, *others))
    input_ids, rows, columns, positions, numbers, places, starts, *extra = sent
    joined = Joined(positions, numbers, places, starts, shapes, *extra[len(more) :])
    return TokenGrid(input_ids, rows, columns, tuple(extra[: len(more)]), joined)


def rows_by_length(examples: Examples, *, rows: int) -> list[list[int]]:
    """Group all examples, longest first, into batches of at most `rows`."""
    order = np.argsort(-np.asarray(examples.num_tokens), kind="stable").tolist()
    return [order[start : start + rows] for start in range(0, len(order), rows)]


@dataclass(frozen=True, slots=True)
class Scores:
    """The scores of an adapter on examples."""

    nll: tuple[float, ...]
    """Sum of negative log-likelihoods of each example's target tokens."""
    correct: tuple[int, ...]
    """Number of target tokens of each example that are the likeliest."""


@torch.no_grad()
def scores_of(
    pack: Pack, examples: Examples, slots: Sequence[int], *, rows: int, pass_tokens: int
) -> tuple[list[Scores], int]:
    """Return the scores of each slot's adapter on all examples, and the tokens of a pass.

    Without slots, those of the base model. A pass has at most `rows` examples of a slot and `pass_tokens`
    tokens, including padding; running out of memory halves the tokens, and the reduced number is returned.
    """
    width = max(1, len(slots))
    parts: list[tuple[range, list[int], Tensor]] = []  # on the device until the last pass has begun
    waiting = [(range(width), part) for part in rows_by_length(examples, rows=rows)]
    while waiting:
        numbers, part = waiting.pop(0)
        tokens_in_pass = len(numbers) * len(part) * int(examples.num_tokens[part].max())
        if tokens_in_pass > pass_tokens and len(numbers) * len(part) > 1:
            waiting[:0] = _halves(numbers, part)
            continue
        packed = PackedRows(tuple(slots[number] for number in numbers)) if slots else None
        try:
            with one_out_of_memory():
                device, *others = pack.devices
                tokens = grid([[examples[row] for row in part]] * len(numbers), device=device, others=others)
                nll, is_first = pack.token_scores(tokens.input_ids, tokens.rows, tokens.columns, packed)
        except torch.OutOfMemoryError:
            if len(part) == len(numbers) == 1:
                raise
            torch.cuda.empty_cache()
            pass_tokens = tokens_in_pass // 2
            waiting.insert(0, (numbers, part))
            continue
        of_rows = torch.stack([tokens.sum_by_row(values) for values in (nll, is_first)])
        parts.append((numbers, part, of_rows))
    sums = np.zeros((2, width, len(examples)))
    for (numbers, part, _), values in zip(parts, read([of_rows for *_, of_rows in parts]), strict=True):
        sums[:, numbers.start : numbers.stop, part] = np.reshape(values, (2, len(numbers), len(part)))
    found = zip(sums[0].tolist(), sums[1].astype(int).tolist(), strict=True)
    return [Scores(tuple(nll), tuple(correct)) for nll, correct in found], pass_tokens


def _halves(numbers: range, rows: list[int]) -> list[tuple[range, list[int]]]:
    """Split a pass in two: half the rows each, or half the slots if there is one row."""
    if len(rows) > 1:
        middle = len(rows) // 2
        return [(numbers, rows[:middle]), (numbers, rows[middle:])]
    middle = len(numbers) // 2
    return [(numbers[:middle], rows), (numbers[middle:], rows)]
