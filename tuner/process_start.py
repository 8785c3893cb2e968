"""When a process started, by which it is told from a later one with the same number."""

from __future__ import annotations

from pathlib import Path

_FIELD = 19
"""Of /proc/PID/stat after the name in parentheses: field 22 of proc(5)."""


def start_ticks(pid: int) -> int | None:
    """Return when a process started; None if it has ended, or this system does not tell.

    In clock ticks since the boot: a change of the system's clock does not move it.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    fields = stat[stat.rindex(")") + 2 :].split()
    return None if fields[0] in ("Z", "X") else int(fields[_FIELD])  # dead, not yet waited for
