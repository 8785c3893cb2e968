"""The loss of examples under adapters, many adapters and many examples in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tuner.adapters.pack import Pack, PackedRows
from tuner.adapters.token_grid import grid, rows_by_length
from tuner.data import Examples


@dataclass(frozen=True, slots=True)
class Scores:
    """What an adapter makes of examples."""

    nll: tuple[float, ...]
    """Sum of negative log-likelihoods of each example's target tokens."""
    correct_tokens: int
    """Target tokens, of all examples, than which no other is likelier."""


@torch.no_grad()
def scores_of(
    pack: Pack, examples: Examples, slots: Sequence[int], *, rows: int, pass_tokens: int
) -> tuple[list[Scores], int]:
    """The scores of each slot's adapter on all examples, and the tokens of a pass.

    Without slots, those of the untouched base. At most `rows` examples
    of a slot and `pass_tokens` tokens, padding included, go into a pass; out of memory halves the tokens,
    and what was left of them is returned.
    """
    width = max(1, len(slots))
    sums, correct = (torch.zeros(width, len(examples), dtype=torch.float64) for _ in range(2))
    waiting = [(range(width), part) for part in rows_by_length(examples, rows=rows)]
    while waiting:
        numbers, part = waiting.pop(0)
        tokens_in_pass = len(numbers) * len(part) * int(examples.num_tokens[part].max())
        if tokens_in_pass > pass_tokens and len(numbers) * len(part) > 1:
            waiting[:0] = _halves(numbers, part)
            continue
        packed = PackedRows(tuple(slots[number] for number in numbers)) if slots else None
        try:
            tokens = grid([[examples[row] for row in part]] * len(numbers), device=pack.base.device)
            nll, is_first = pack.token_scores(tokens.input_ids, tokens.rows, tokens.columns, packed)
        except torch.OutOfMemoryError:
            if len(part) == len(numbers) == 1:
                raise
            torch.cuda.empty_cache()
            pass_tokens = tokens_in_pass // 2
            waiting.insert(0, (numbers, part))
            continue
        for total, values in ((sums, nll), (correct, is_first)):
            by_row = tokens.sum_by_row(values).view(len(numbers), -1).cpu()
            total[numbers.start : numbers.stop, part] = by_row
    counts = correct.sum(dim=1).tolist()
    return [Scores(tuple(s), int(c)) for s, c in zip(sums.tolist(), counts, strict=True)], pass_tokens


def _halves(numbers: range, rows: list[int]) -> list[tuple[range, list[int]]]:
    """A pass as two: of half the rows, or of half the slots where there is one row."""
    if len(rows) > 1:
        middle = len(rows) // 2
        return [(numbers, rows[:middle]), (numbers, rows[middle:])]
    middle = len(numbers) // 2
    return [(numbers[:middle], rows), (numbers[middle:], rows)]
