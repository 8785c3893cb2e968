"""Ask a run to stop: after a signal on the main thread, or when its time is up."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from tuner.errors import Interrupted


@dataclass
class Stopping:
    """Check for whether to stop, called between two events of a round."""

    deadline: float | None = None
    """Deadline by `time.monotonic()`; None for no limit."""
    was_interrupted: bool = False

    def __call__(self) -> bool:
        """Return whether to stop now."""
        return self.was_interrupted or (self.deadline is not None and time.monotonic() > self.deadline)

    @contextmanager
    def returning_at_the_end(self, has_begun: Callable[[], bool]) -> Iterator[None]:
        """Leave the block without an error when time is up, if there is a round to return."""
        try:
            yield
        except Interrupted:
            if self.was_interrupted or not has_begun():
                raise


@contextmanager
def interruptible(
    seconds: float | None = None,
    *,
    signals: Sequence[signal.Signals] = (signal.SIGINT,),
    answer: Callable[[], None] = lambda: None,
    second: signal.Handlers | None = None,
) -> Iterator[Stopping]:
    """Ask to stop on the first of the signals, such as Ctrl-C or a notebook's stop button.

    `answer` is then called in a thread, because the interrupted code may hold the lock of the stream that
    `answer` writes to. `second` handles the next signal; None leaves the signal to the previous handler.
    Handlers are set on the main thread only and restored at the end; other threads only have the time limit.
    """
    stopping = Stopping(None if seconds is None else time.monotonic() + seconds)
    if threading.current_thread() is not threading.main_thread():
        yield stopping
        return
    before = {number: signal.getsignal(number) for number in signals}

    def receive(number: int, _: FrameType | None) -> None:
        stopping.was_interrupted = True
        signal.signal(number, before[signal.Signals(number)] if second is None else second)
        threading.Thread(target=answer, daemon=True).start()

    for number in signals:
        signal.signal(number, receive)
    try:
        yield stopping
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
