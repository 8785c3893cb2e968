"""When a process started, in clock ticks since the boot: with its number it names the process.

Times of day cannot: a step of the clock changes when all processes seem to have started.
"""

from __future__ import annotations

from pathlib import Path

_STARTED_FIELD = 19
"""Of /proc/PID/stat, after the name in parentheses."""


def started_ticks(pid: int) -> int | None:
    """Return when a process started; None if it has ended, or this system does not tell."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    state, *fields = stat[stat.rindex(")") + 2 :].split()
    return None if state in ("Z", "X") else int(fields[_STARTED_FIELD - 1])  # dead, not yet waited for
