"""What a GPU is doing, in a line."""

from __future__ import annotations

from dataclasses import dataclass

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
