"""What came of a command: complete, infeasible, failed, or not usable in this round at all.

Never by the exit code alone: exit 0 may come early, and a run whose loss is NaN goes to its end.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from tuner.errors import exit_words

_OUT_OF_MEMORY = (
    "OutOfMemoryError", "CUDA out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "can't allocate memory",
    "Cannot allocate memory", "HIP out of memory",
)  # fmt: skip
_OF_THE_MACHINE = (
    "EADDRINUSE", "Address already in use", "No space left on device", "Disk quota exceeded",
    "Stale file handle", "CUDA error: an illegal",
)  # fmt: skip
_OF_CONNECTIONS = (
    "NCCL error", "NCCL timeout", "ncclSystemError", "Connection refused", "Connection reset",
)  # fmt: skip
"""The machine's, unless memory ran out: the other processes of a trial then say these, and so do retries."""
_KILLED = (-9, 137)
_BELOW_A_LAUNCHER = re.compile(r"Signal (\d+) \(SIG\w+\) received by PID|died with <Signals\.SIG\w+: (\d+)>")
"""How torchrun and accelerate say that a signal ended the script; torchrun names the first cause last."""


@dataclass(frozen=True, slots=True)
class Ending:
    """How an attempt ended by itself."""

    code: int
    """Exit code, negative for a signal."""
    last_step: int | None
    """Of the last evaluation; None if there was none."""
    names: tuple[str, ...]
    """Metrics it reported."""
    log: str
    """The end of its log."""
    killed_for_memory: bool = False
    """Whether the system killed processes for want of memory meanwhile."""
    reported_before: bool = False
    """Whether this trial or another one of the round has reported an evaluation after step 0."""
    completed_before: bool = False
    """Whether a trial of this round has reached the horizon."""
    disk_is_full: bool = False
    """Whether nothing more could be written, the command's own error included."""
    unread: str | None = None
    """What it wrote that could have been read."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What an attempt's end means."""

    outcome: Literal["complete", "infeasible", "failed", "unusable"]
    """`unusable`: every trial would end so; the round stops and says what to do."""
    reason: str = ""


def judged(ending: Ending, *, max_train_steps: int, metric: str) -> Verdict:
    """Return what an attempt that ended by itself came to."""
    if ending.code == 0:
        return _ended_well(ending, max_train_steps, metric)
    text, code = ending.log, _code_of_the_script(ending)
    how = exit_words(code)
    if ending.disk_is_full:
        return Verdict("failed", f"{how}, and the disk is full{quoted(text)}")
    of_the_machine = next((sign for sign in _OF_THE_MACHINE if sign in text), None)
    memory = next((sign for sign in _OUT_OF_MEMORY if sign in text), None)
    if of_the_machine is None and memory is not None:
        return Verdict("infeasible", f"out of memory: {_line_with(memory, text)}")
    sign = of_the_machine or next((sign for sign in _OF_CONNECTIONS if sign in text), None)
    if sign is not None:
        return Verdict("failed", f"{how}, and the log says {sign!r}{quoted(text)}")
    if code in _KILLED and ending.killed_for_memory:
        return Verdict("infeasible", "out of memory: the system killed the command")
    if code > 0 and code not in (137, 143) and not ending.reported_before:
        return Verdict(
            "unusable",
            f"the command ended with {how} before it reported an evaluation, as every trial would. Fix the "
            f"command or its configuration{quoted(text)}",
        )
    return Verdict("failed", f"{how}{quoted(text)}")


def _ended_well(ending: Ending, max_train_steps: int, metric: str) -> Verdict:
    if ending.last_step == max_train_steps:
        return Verdict("complete")
    if ending.completed_before:
        where = (
            "no evaluation" if ending.last_step is None else f"its last evaluation at step {ending.last_step}"
        )
        return Verdict(
            "failed", f"the command ended with exit code 0 but {where}, not at step {max_train_steps}"
        )
    if ending.last_step is None and ending.names:
        return Verdict(
            "unusable",
            f"the command reported {', '.join(ending.names)}, but neither eval_loss nor objective.metric "
            f"{metric}: write one of these names in the round file",
        )
    if ending.last_step is None:
        return Verdict(
            "unusable",
            "the command ended with exit code 0 and reported nothing. Let it append lines such as "
            '{"step": 6, "eval_loss": 1.2} to the file named by TUNER_METRICS, call tuner.log(step, '
            "eval_loss=...), or name its tool in command.tool. `python -E` and `-I` keep tuner's hook "
            f"out{'; ' + ending.unread if ending.unread else ''}{quoted(ending.log)}",
        )
    return Verdict(
        "unusable",
        f"the command ended with exit code 0 after step {ending.last_step}, its last evaluation, and not at "
        f"max_train_steps ({max_train_steps}). Train for TUNER_MAX_STEPS steps, evaluate at the last one, "
        f"and switch early stopping off: the best step is chosen afterwards{quoted(ending.log)}",
    )


def over_the_horizon(step: int, max_train_steps: int) -> str:
    """Return what to do about a command that trains too long."""
    return (
        f"the command reported step {step}, but max_train_steps is {max_train_steps}: it must read "
        "TUNER_MAX_STEPS from its environment and end there. A step is one optimizer update"
    )


def restarted(step: int, from_step: int) -> str:
    """Return what to do about a command that did not resume."""
    return (
        f"the command was to resume from step {from_step}, but reported step {step}: it started over. Let it "
        "resume from TUNER_RESUME_FROM, or remove command.resume, so that trials start over"
    )


def began_elsewhere(step: int, from_step: int) -> str:
    """Return what to do about a command that resumed from a checkpoint that is not the trial's."""
    return (
        f"the command began at step {step}, but the trial at step {from_step}: it resumed from a checkpoint "
        "that is not the trial's. Let it resume from TUNER_RESUME_FROM, and start at step 0 without that"
    )


def _code_of_the_script(ending: Ending) -> int:
    """Return the exit code; of a launcher that says that a signal ended its script, that signal."""
    signals = _BELOW_A_LAUNCHER.findall(ending.log) if ending.code > 0 else []
    return -int(signals[-1][0] or signals[-1][1]) if signals else ending.code


def _line_with(sign: str, text: str) -> str:
    return next(line.strip() for line in reversed(text.splitlines()) if sign in line)[:300]


def quoted(text: str, *, lines: int = 12) -> str:
    """Return the last lines of a log, to follow a message; empty if there are none."""
    said = [line for line in re.sub(r".*\r(?!\n)", "", text).splitlines() if line.strip()]
    last = _without_the_launcher(said)[-lines:]
    return "; its log ends with:\n" + "\n".join(f"    {line}" for line in last) if last else ""


_TRACEBACK = "Traceback (most recent call last)"
_OF_A_LAUNCHER = ("subprocess.CalledProcessError: ", "ChildFailedError:")
"""How accelerate's (and so TRL's) and torchrun's own tracebacks end, below that of the script."""


def _without_the_launcher(lines: list[str]) -> list[str]:
    """Return the lines before the traceback of a launcher, which hides why its script failed."""
    at = max((number for number, line in enumerate(lines) if line.startswith(_TRACEBACK)), default=0)
    is_a_launchers = any(sign in line for line in lines[at:] for sign in _OF_A_LAUNCHER)
    return lines[:at] if is_a_launchers and any(_TRACEBACK in line for line in lines[:at]) else lines
