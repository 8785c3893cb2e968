"""List this machine's devices and read how busy they are."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeAlias

from tuner.errors import InputError
from tuner.report.format import GpuReading


def visible_devices(environment: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """Return the GPUs listed in CUDA_VISIBLE_DEVICES, else all that the driver knows."""
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
        return ()  # without a driver, torch cannot use a GPU
    return tuple(asked.stdout.split())


def worker_environments(
    wanted: int | Literal["auto"],
    devices: Sequence[str],
    *,
    cores: int,
    gpus_per_worker: int = 1,
    environment: Mapping[str, str] = os.environ,
) -> list[dict[str, str]]:
    """Return each worker's additional environment: its GPUs, or its share of the cores.

    `auto` is one worker per `gpus_per_worker` GPUs, or one without GPUs. Raises InputError if there are too
    few GPUs.
    """
    room = len(devices) // gpus_per_worker
    if not room and gpus_per_worker > 1:
        raise InputError(
            f"run.gpus_per_worker: {gpus_per_worker}: this machine has {len(devices)} GPU(s); "
            "lower it, or run on a machine with more"
        )
    count = max(1, room) if wanted == "auto" else wanted
    if devices and count > room:
        needs = "one" if gpus_per_worker == 1 else str(gpus_per_worker)
        raise InputError(
            f"--workers {count}: this machine has {len(devices)} GPU(s), and each worker needs {needs}; "
            f"use --slots to train more trials on a GPU"
        )
    if devices:
        groups = [devices[at * gpus_per_worker :][:gpus_per_worker] for at in range(count)]
        return [{"CUDA_VISIBLE_DEVICES": ",".join(group)} for group in groups]
    if count == 1 or "OMP_NUM_THREADS" in environment:
        return [{} for _ in range(count)]
    return [{"OMP_NUM_THREADS": str(max(1, cores // count))} for _ in range(count)]


Nvml: TypeAlias = Any
"""The initialised module `pynvml`."""


def open_nvml() -> Nvml | None:
    """Return the driver's library; None without the package (the extra `nvml`) or without a driver."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    return pynvml


def gpu_meter(nvml: Nvml | None, devices: Sequence[str]) -> Callable[[], tuple[GpuReading, ...]] | None:
    """Return a function that reads these devices of CUDA_VISIBLE_DEVICES; None if there is nothing to read.

    Numbers are in the driver's order, by PCI slot, as CUDA's with CUDA_DEVICE_ORDER=PCI_BUS_ID.
    """
    if nvml is None or not devices:
        return None
    return lambda: tuple(_readings(nvml, devices))


def driver_version(nvml: Nvml) -> str:
    """Return the driver's version, such as 570.124.06."""
    return str(nvml.nvmlSystemGetDriverVersion())


def _readings(nvml: Nvml, devices: Sequence[str]) -> Iterator[GpuReading]:
    """Read each device; leaves out devices that the driver cannot report on."""
    for index, device in enumerate(devices):
        try:
            handle = _handle(nvml, device)
            memory = nvml.nvmlDeviceGetMemoryInfo(handle)
            name = str(nvml.nvmlDeviceGetName(handle))
        except nvml.NVMLError:
            continue
        yield GpuReading(index, name, int(memory.used), int(memory.total), _utilisation(nvml, handle))


def _handle(nvml: Nvml, device: str) -> Any:
    if device.isdigit():
        return nvml.nvmlDeviceGetHandleByIndex(int(device))
    return nvml.nvmlDeviceGetHandleByUUID(device)


def _utilisation(nvml: Nvml, handle: Any) -> float | None:
    try:
        return float(nvml.nvmlDeviceGetUtilizationRates(handle).gpu) / 100
    except nvml.NVMLError:  # MIG instances have no utilisation
        return None
