"""Speed and devices in words."""

from __future__ import annotations

from dataclasses import dataclass

from tuner.records import Throughput
from tuner.report import format
from tuner.report.format import percent, size


@dataclass(frozen=True, slots=True)
class GpuReading:
    """One GPU at one moment, whoever uses it."""

    index: int
    """Among those that workers see."""
    name: str
    used_bytes: int
    total_bytes: int
    utilisation: float | None
    """Part of the last moments in which it computed, 0 to 1; None where the driver does not say."""


def gpu_line(reading: GpuReading) -> str:
    """`GPU 0  61.3 GB of 150 GB (41%), 97% busy  NVIDIA H200`."""
    share = percent(reading.used_bytes / reading.total_bytes) if reading.total_bytes else "?"
    busy = "" if reading.utilisation is None else f", {percent(reading.utilisation)} busy"
    used = f"{size(reading.used_bytes)} of {size(reading.total_bytes)} ({share})"
    return f"GPU {reading.index}  {used}{busy}  {reading.name}"


HEADERS = ("measure", "value", "what it is")
_MEANINGS = {
    "tokens/s": "trained on, in a second of a worker's training",
    "trial-steps/s": "updates of all trials, in the same second",
    "packing factor": "trials that share a training pass, on average",
    "padding": "of the tokens computed in training",
    "evaluation": "of the time of training, evaluation and saving",
    "peak memory": "of the worker that used most",
}


def rows(throughput: Throughput | None) -> list[tuple[str, str, str]]:
    """Each number with its name and what it is of, under `HEADERS`."""
    values = {} if throughput is None else _values(throughput)
    return [(name, value, _MEANINGS[name]) for name, value in values.items()]


def line(throughput: Throughput) -> str:
    """The same on one line."""
    units = ("tokens/s", "trial-steps/s")
    values = _values(throughput).items()
    return ", ".join(f"{value} {name}" if name in units else f"{name} {value}" for name, value in values)


def _values(throughput: Throughput) -> dict[str, str]:
    values = {
        "tokens/s": _rate(throughput.tokens_per_second),
        "trial-steps/s": _rate(throughput.trial_steps_per_second),
        "packing factor": _rate(throughput.packing_factor),
        "padding": _share(throughput.padding_share),
        "evaluation": _share(throughput.evaluation_share),
        "peak memory": format.size(throughput.peak_memory_bytes),
    }
    return {name: value for name, value in values.items() if value is not None}


def _rate(number: float | None) -> str | None:
    if number is None:
        return None
    return f"{number:,.0f}" if number >= 100 else format.number(number)


def _share(share: float | None) -> str | None:
    return None if share is None else format.percent(share)
