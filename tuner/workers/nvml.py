"""What NVIDIA's driver says of the GPUs, through nvidia-ml-py where that is installed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

from tuner.report.devices import GpuReading

Nvml: TypeAlias = Any
"""The module `pynvml`, after nvmlInit."""


def open_nvml() -> Nvml | None:
    """The driver's library; None without the package (the extra `nvml`) or without a driver."""
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
    """What reads the devices, named as in CUDA_VISIBLE_DEVICES; None where there is nothing to read.

    A number counts as the driver does, by PCI slots, as CUDA does with CUDA_DEVICE_ORDER=PCI_BUS_ID.
    """
    if nvml is None or not devices:
        return None
    return lambda: tuple(_readings(nvml, devices))


def driver_version(nvml: Nvml) -> str:
    """Such as 570.124.06."""
    return str(nvml.nvmlSystemGetDriverVersion())


def _readings(nvml: Nvml, devices: Sequence[str]) -> Iterator[GpuReading]:
    """One a device; a device that the driver cannot be asked about is left out."""
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
    except nvml.NVMLError:  # parts of a GPU (MIG) have no utilisation
        return None
