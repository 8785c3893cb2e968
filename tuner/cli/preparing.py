"""A round's data for a command, and how far it is on standard error."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from tuner.cli.printing import error_output
from tuner.data import PreparedData, load_tokenizer, prepare
from tuner.report.live import PREPARING_EVERY_SECONDS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tuner.spec import RoundSpec


def prepared(
    spec: RoundSpec, cache: Path | None, tokenizer: PreTrainedTokenizerBase | None = None
) -> PreparedData:
    """As `prepare`, with the model's own tokenizer unless it is at hand already."""
    with progress_shown(error_output()) as say:
        return prepare(spec, tokenizer or load_tokenizer(spec.model), cache, say)


@contextmanager
def progress_shown(
    console: Console, *, clock: Callable[[], float] = time.monotonic
) -> Iterator[Callable[[str], None]]:
    """Gives a function that says how far a long work is.

    On a terminal in one line, which is gone at the end; elsewhere in a line every half a minute.
    """
    if console.is_interactive:
        with console.status("") as status:
            yield lambda doing: status.update(Text(doing))
        return
    said_at = clock()

    def say(doing: str) -> None:
        nonlocal said_at
        if (now := clock()) - said_at >= PREPARING_EVERY_SECONDS:
            said_at = now
            console.print(doing, markup=False, emoji=False, highlight=False, soft_wrap=True)

    yield say
