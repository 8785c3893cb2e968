"""Which prompts are answered together."""

from __future__ import annotations

from collections.abc import Sequence


def batches(
    prompt_tokens: Sequence[int], new_tokens: Sequence[int], *, budget_tokens: int, most_rows: int | None
) -> list[list[int]]:
    """Positions of prompts in batches, the longest first, so that what does not fit is known at once.

    Prompts of like length go together, since the shorter ones are padded, and only those that may have the
    same number of new tokens. A batch takes at most `budget_tokens`, padding and answers included, but one
    prompt always; `most_rows`, where given, counts instead.
    """
    order = sorted(range(len(prompt_tokens)), key=lambda at: (-prompt_tokens[at], at))
    found: list[list[int]] = []
    for at in order:
        batch = found[-1] if found else []
        rows = most_rows
        if batch and rows is None:
            rows = budget_tokens // (prompt_tokens[batch[0]] + new_tokens[batch[0]])
        if batch and rows is not None and len(batch) < rows and new_tokens[at] == new_tokens[batch[0]]:
            batch.append(at)
        else:
            found.append([at])
    return found
