"""Which devices this machine shows, and what a worker's environment says so that it sees one of them."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from typing import Literal

from tuner.errors import InputError


def visible_devices(environment: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """GPUs as CUDA_VISIBLE_DEVICES names them: those it lists, else all that the driver knows."""
    listed = environment.get("CUDA_VISIBLE_DEVICES")
    if listed is not None:
        return tuple(name.strip() for name in listed.split(",") if name.strip() not in ("", "-1"))
    try:
        asked = subprocess.run(
            ["nvidia-smi", "--query-gpu=uuid", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
    except (OSError, subprocess.SubprocessError):
        return ()  # no driver, so no GPU that torch could use
    return tuple(asked.stdout.split())


def worker_environments(
    wanted: int | Literal["auto"],
    devices: Sequence[str],
    *,
    cores: int,
    environment: Mapping[str, str] = os.environ,
) -> list[dict[str, str]]:
    """What each worker's environment has besides the parent's: its GPU, or its share of the cores.

    `auto` is one worker for each GPU, or one. Raises InputError when there are fewer GPUs than workers.
    """
    count = max(1, len(devices)) if wanted == "auto" else wanted
    if devices and count > len(devices):
        raise InputError(
            f"--workers {count}: this machine shows {len(devices)} GPU(s), and a worker takes one; "
            f"more trials on a GPU are slots: --slots"
        )
    if devices:
        return [{"CUDA_VISIBLE_DEVICES": device} for device in devices[:count]]
    if count == 1 or "OMP_NUM_THREADS" in environment:
        return [{} for _ in range(count)]
    return [{"OMP_NUM_THREADS": str(max(1, cores // count))} for _ in range(count)]
